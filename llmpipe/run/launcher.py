"""What an outside launcher was configured to do with the model, which becomes the recipe's to say.

`accelerate launch` hands its configuration on in the environment, for a library that would put the
model in parts a second time and in another way. Here it is read, and taken out of there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from llmpipe.errors import UserError
from llmpipe.recipe.sections import Launch, Recipe, Training

FSDP = "ACCELERATE_USE_FSDP"

SHARDING = {
    "FULL_SHARD": "fsdp",
    "1": "fsdp",
    "TRUE": "fsdp",
    "HYBRID_SHARD": "hsdp",
    "4": "hsdp",
}
"""Forms of FSDP in Accelerate's words, and what they are here."""

REFUSED = {
    "FSDP_ACTIVATION_CHECKPOINTING": "set launch.activation_checkpointing: full",
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "set launch.activation_checkpointing: full",
    "FSDP_IGNORED_MODULES": "all of a model is put in parts",
}
"""What would change how a model is trained, and what to do instead."""

UNITS = ("SIZE_BASED_WRAP", "NO_WRAP")
"""Ways to cut a model that are not by its layers."""


def shards() -> bool:
    """Whether a launcher has been told to put models in parts."""
    return _is_set(FSDP)


def obeyed(recipe: Recipe) -> Recipe:
    """The recipe with a launcher's FSDP as its `launch.strategy` and `launch.offload`, and its own
    where that is `hsdp`, which the launcher's default is a form of; as it is without one.

    Raises UserError (2) with everything that is asked for and not there.
    """
    if not shards() or not isinstance(recipe, Training):
        return recipe
    if problems := list(_problems(recipe.launch)):
        lines = [f"accelerate: {problem}" for problem in problems]
        raise UserError("\n".join(lines), "`accelerate config` asks for these again")
    asked = {recipe.launch.strategy, *(SHARDING[form] for _, form in _forms())}
    strategy = "hsdp" if "hsdp" in asked else "fsdp"
    offload = recipe.launch.offload or _is_set("FSDP_OFFLOAD_PARAMS")
    launch = recipe.launch.model_copy(update={"strategy": strategy, "offload": offload})
    return recipe.model_copy(update={"launch": launch})


def take_out() -> None:
    """Let Accelerate, once it is imported, know nothing of it."""
    for name in [FSDP, *(name for name in os.environ if name.startswith("FSDP_"))]:
        os.environ.pop(name, None)


def _problems(launch: Launch) -> Iterator[str]:
    if launch.strategy not in ("auto", "fsdp", "hsdp"):
        yield f"FSDP, and the recipe has launch.strategy: {launch.strategy}: take one of them"
    for name, form in _forms():
        if form not in SHARDING:
            yield f"{name}={os.environ[name]}: parts are of weights, gradients and moments"
        elif launch.strategy == "fsdp" and SHARDING[form] != "fsdp":
            yield f"{name}={os.environ[name]}, and the recipe has launch.strategy: fsdp: take one"
    for name, remedy in REFUSED.items():
        if _is_set(name):
            yield f"{name}: {remedy}"
    cut = os.environ.get("FSDP_AUTO_WRAP_POLICY", "")
    if cut in UNITS:
        yield f"FSDP_AUTO_WRAP_POLICY={cut}: a model is cut by its layers"


def _forms() -> Iterator[tuple[str, str]]:
    """What names a form of FSDP, and the form, in large letters."""
    for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD"):
        yield name, os.environ.get(name, "FULL_SHARD").upper()


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "false", "0")
