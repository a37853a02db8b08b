"""How long a text a model takes, by its config.json and the names in its files: no torch is needed,
so a recipe that asks for more is refused before anything is tokenized or loaded.

A table of positions ends: one token more is an IndexError, or on a GPU an assertion of the device.
Rotary positions and those of a formula go on, but nobody knows what a model makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import Mistake, Say, UserError
from llmpipe.files.json import read_json
from llmpipe.recipe.sections import Training
from llmpipe.run.folders import tensors_of

NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Of the number of positions, in the configurations of transformers."""

TABLES = (
    "wpe.weight",
    "embed_positions.weight",
    "position_embeddings.weight",
    "positions_embed.weight",
)
"""How the names of tensors end that hold a position a row."""

TABLE_IN_CODE = {"codegen", "ctrl", "gptj", "mpt"}
"""Kinds of models that compute such a table, and so have no tensor of it in a file."""

BEHIND_PADDING = {
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Kinds whose first position comes behind the row of the pad token."""

SCALED_ALREADY = ("llama3", "longrope", "su", "default", "mrope", "proportional")
"""Kinds of scaled rotary positions whose configuration counts them after the scaling, as vLLM has
it."""


@dataclass(frozen=True)
class Context:
    """How many tokens a model takes."""

    tokens: int
    ends: bool
    """Whether its positions are a table, which has no row for one token more."""
    window: int | None = None
    """Tokens that a token attends to in every layer, where all of them slide."""


def of_folder(folder: Path) -> Context | None:
    """The context of a model in a folder; None where nothing limits it, or nothing says so."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return None
    tokens = tokens_of(config)
    if tokens is None:
        return None
    kind = config.get("model_type")
    ends = kind in TABLE_IN_CODE or any(name.endswith(TABLES) for name in tensors_of(folder))
    return Context(tokens, ends, _window(config))


def tokens_of(config: dict[str, Any]) -> int | None:
    """How many tokens a model was made for, by its configuration, the scaling of rotary positions
    included; None where nothing limits it.
    """
    text = _of_text(config)
    most = next((text[name] for name in NAMES if isinstance(text.get(name), int)), None)
    if most is None or text.get("alibi"):
        return None
    if text.get("model_type") in BEHIND_PADDING:
        pad = text.get("pad_token_id")
        return int(most) - (pad if isinstance(pad, int) else 0) - 1
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    whole = rope.get("full_attention")  # one a kind of layer, where kinds differ
    rope = whole if isinstance(whole, dict) else rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in SCALED_ALREADY:
        return int(most)
    before = rope.get("original_max_position_embeddings") if kind == "yarn" else most
    return max(int(most), int((before or most) * (rope.get("factor") or 1.0)))


def _of_text(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the language model, where it reads images as well."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def _window(config: dict[str, Any]) -> int | None:
    """The sliding window, where every layer has it."""
    text = _of_text(config)
    window = text.get("sliding_window")
    layers = set(text.get("layer_types") or ["sliding_attention"])
    slides = text.get("use_sliding_window", True) and layers == {"sliding_attention"}
    return window if slides and isinstance(window, int) else None


# --- what a recipe asks for ---


def check_lengths(recipe: Training, model: Path, say: Say) -> None:
    """Hold the lengths in a recipe against what the model in a folder takes.

    Raises UserError (2) with both numbers where it has a table of positions, and a sequence may be
    longer; what it was not made for, and what it sees the end of alone, is said.
    """
    context = of_folder(model)
    if context is None:
        return
    for mistake in mistakes_in_lengths(recipe, context):
        raise mistake.error
    for field, length in _lengths(recipe).items():
        if length > context.tokens:
            say(
                f"{field}: {length:,} tokens, and {recipe.model} was made for "
                f"{context.tokens:,}: what it makes of later positions, it has to learn here"
            )
        elif context.window and length > context.window:
            say(
                f"{field}: {length:,} tokens, of which each attends to the last "
                f"{context.window:,} in every layer of {recipe.model}"
            )


def mistakes_in_lengths(recipe: Training, context: Context) -> Iterator[Mistake]:
    """The lengths in a recipe for which a model with this context has no positions."""
    for field, length in _lengths(recipe).items():
        if length > context.tokens and context.ends:
            problem = f"{length:,} tokens, and {recipe.model} has {context.tokens:,} positions"
            hint = f"set {field}: {context.tokens}; what is longer is cut, split or rejected"
            yield Mistake(field, UserError(f"{field}: {problem}", hint))
    for field, tokens in _answers(recipe).items():
        if tokens >= context.tokens:
            yield Mistake(field, _no_room(field, tokens, str(recipe.model), context))


def check_answers(answers: dict[str, int], models: dict[str, Path]) -> None:
    """Raise UserError (2) where answers of so many tokens, by the field that limits them, leave no
    room for a prompt in one of the models, by the field that names it.
    """
    for named, folder in models.items():
        if context := of_folder(folder):
            for field, tokens in answers.items():
                if tokens >= context.tokens:
                    raise _no_room(field, tokens, named, context)


def _lengths(recipe: Training) -> dict[str, int]:
    """Tokens of the longest sequence that is trained on, by the field that limits it."""
    lengths = {"data.max_length": recipe.data.preparation.max_length}
    mixture = getattr(recipe, "mixture", None)  # of ppo, whose sections need not be imported here
    if mixture:
        lengths["mixture.max_length"] = mixture.max_length
    return lengths


def _answers(recipe: Training) -> dict[str, int]:
    """Tokens of the longest answer that is drawn, by the field that limits it."""
    rollout, samples = getattr(recipe, "rollout", None), getattr(recipe, "samples", None)
    answers = {"rollout.max_new_tokens": rollout.max_new_tokens} if rollout else {}
    if samples and samples.prompts:
        answers["samples.max_new_tokens"] = samples.max_new_tokens
    return answers


def refuse_rollouts(context: int | None, prompt: int, response: int) -> None:
    """Raise UserError where the longest prompt and the longest response exceed the context."""
    if context is not None and prompt + response > context:
        raise UserError(
            f"a prompt of {prompt:,} tokens and an answer of {response:,} "
            f"exceed the model's {context:,}",
            "lower data.max_length or rollout.max_new_tokens",
        )


def _no_room(field: str, tokens: int, model: str, context: Context) -> UserError:
    """Of answers so long that no prompt fits before them."""
    problem = f"{tokens:,} tokens, and {model} takes {context.tokens:,} with the prompt"
    return UserError(f"{field}: {problem}", f"lower {field}")
