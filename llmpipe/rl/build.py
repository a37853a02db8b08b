"""Load policy, reference and critic: as models of their own, or as adapters on one base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import read_json
from llmpipe.models.apart import Road, keeps_apart
from llmpipe.models.drawing.draw import Episode
from llmpipe.models.load import Setup, load_copy, load_policy, speed_up
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.parallel.parts import looking
from llmpipe.parallel.tensors import whole
from llmpipe.recipe.ppo import Critic, PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe, Scored
from llmpipe.rl.actors import CRITIC, POLICY, REFERENCE, Actors, Cast, Distribution, Role
from llmpipe.rl.packing import pack_episodes
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.job import Job
from llmpipe.run.machine import full_pass


@dataclass(frozen=True)
class _Beginning:
    """What both ways to build start from."""

    setup: Setup[RLRecipe]
    policy: Any
    """As it is published: a model, or PEFT's wrapper of one."""
    causal: Any
    """The policy as transformers knows it."""
    critic: Critic | None
    """As the recipe has it, where the method has any."""
    value: nn.Linear | None
    """A value head that says 0, of a critic."""


def build(setup: Setup[RLRecipe]) -> Actors:
    """The actors of a recipe, on their device, in evaluation mode: probabilities are compared, and
    dropout is noise in them."""
    recipe, hardware = setup.recipe, setup.hardware
    refuse_no_reward_models(setup.job)
    policy = load_policy(setup)
    causal = policy.get_base_model() if recipe.adapter else policy
    _refuse_embeddings(setup, causal)
    if recipe.adapter and recipe.adapter.dropout:
        setup.say(
            f"adapter.dropout: 0 here: {recipe.stage} compares probabilities, "
            "and dropout is noise in them"
        )
    critic = recipe.critic if isinstance(recipe, PPORecipe) else None
    width = causal.config.get_text_config().hidden_size
    value = _value_head(width, recipe.seed) if critic else None
    beginning = _Beginning(setup, policy, causal, critic, value)
    cast = _with_adapters(beginning) if recipe.adapter else _with_all_weights(beginning)
    drawn = Distribution(recipe.rollout.temperature, recipe.algorithm.entropy > 0)
    actors = Actors(cast, drawn)
    if not hardware.spread:
        actors.modules.to(hardware.device)
    elif value:  # parts lie where they were loaded to
        value.to(hardware.place)
    actors.modules.eval()
    with looking(actors.modules):
        _refuse_mixing(actors, setup)
    if hardware.activation_checkpointing != "none":
        actors.compute_again(hardware.activation_checkpointing)
    return actors


def _value_head(width: int, seed: int) -> nn.Linear:
    """A head that says 0: a random one on features of any size begins far from every reward."""
    torch.manual_seed(seed)
    value = nn.Linear(width, 1)
    nn.init.zeros_(value.weight)
    nn.init.zeros_(value.bias)
    return value


# --- one base with adapters ---


def _with_adapters(beginning: _Beginning) -> Cast:
    """The reference is the base without the adapter, or with the parent's."""
    setup, policy, causal = beginning.setup, beginning.policy, beginning.causal
    parent = str(setup.job.model) if setup.base else None
    critic = _adapted_critic(beginning, parent)
    reference, words = None, "none"
    if setup.recipe.has_reference:
        reference = Role(causal, REFERENCE if parent else None)
        words = "the parent's adapter" if parent else "the parent, the adapter off"
    if reference and parent:
        policy.load_adapter(parent, REFERENCE, is_trainable=False)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad = f".{POLICY}." in name or f".{CRITIC}." in name
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    says = {None: "none", POLICY: "a head on the policy", CRITIC: "an adapter of its own"}
    setup.say(f"reference: {words}; critic: {says[critic.adapter if critic else None]}")
    return Cast(beginning.policy, Role(causal, POLICY), critic, reference, beginning.value)


def _adapted_critic(beginning: _Beginning, parent: str | None) -> Role | None:
    """A head on the policy, or an adapter that begins as the parent's where there is one."""
    policy, causal, recipe = beginning.policy, beginning.causal, beginning.critic
    if recipe is None:
        return None
    if recipe.start == "trunk":
        return Role(causal, POLICY)
    if parent:
        policy.load_adapter(parent, CRITIC, is_trainable=True)
    else:
        policy.add_adapter(CRITIC, _critic_config(policy, recipe.rank))
    return Role(causal, CRITIC)


def _critic_config(policy: Any, rank: int) -> Any:
    """A new adapter on the layers that the policy's has."""
    from peft import LoraConfig

    targets = policy.peft_config[POLICY].target_modules
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)


# --- models of their own ---


def _with_all_weights(beginning: _Beginning) -> Cast:
    """The reference is a frozen copy of the parent."""
    setup = beginning.setup
    policy = Role(beginning.causal)
    reference, words = None, "none"
    if setup.recipe.has_reference:
        reference, words = Role(_frozen_copy(setup)), "a frozen copy of the parent"
    critic, said = _whole_critic(beginning, policy)
    if critic and critic is not policy:
        _learn_body_only(critic.model)
    setup.say(f"reference: {words}; critic: {said}")
    return Cast(beginning.policy, policy, critic, reference, beginning.value)


def _whole_critic(beginning: _Beginning, policy: Role) -> tuple[Role | None, str]:
    """A critic, and in words what it is."""
    setup, recipe = beginning.setup, beginning.critic
    if recipe is None:
        return None, "none"
    if recipe.start == "trunk":
        return policy, "a head on the policy"
    if ranker := _ranker_of_policys_shape(setup, beginning.causal, recipe.start):
        assert beginning.value
        beginning.value.weight.data.copy_(whole(ranker.score.weight.data))
        return Role(ranker), "a model of its own, from the reward model"
    return Role(load_copy(setup)), "a model of its own"


def _frozen_copy(setup: Setup[RLRecipe]) -> Any:
    """The parent once more. In bf16 its products' weights are kept so: autocast would round them
    for every product, and keeps nothing of what is frozen. Those in parts are sent so."""
    model = load_copy(setup)
    model.requires_grad_(False)
    if setup.hardware.bf16 and not setup.hardware.spread:
        for layer in model.base_model.modules():
            if isinstance(layer, nn.Linear):
                layer.to(torch.bfloat16)
    return model


def _ranker_of_policys_shape(setup: Setup[RLRecipe], causal: Any, start: str) -> Any:
    """The first reward model, where the critic may begin with it: not an adapter, of the policy's
    shape and vocabulary. None where it may not; refused where the recipe asks for it (2)."""
    job, hardware = setup.job, setup.hardware
    at = next((at for at in job.models if at.startswith("reward.")), None)
    if at and at not in job.bases and start in ("auto", "reward"):
        ranker = load_model(
            job.models[at], hardware.attention, device=hardware.place, spread=hardware.spread
        )
        same_shape = _shapes(ranker) == _shapes(causal)
        if same_shape and _vocabulary(job.models[at]) == setup.tokenizer.get_vocab():
            speed_up(ranker, setup)
            return ranker
    if start == "reward":
        raise UserError(
            "critic.start: reward: the reward model has not the policy's shape and vocabulary, "
            "or is an adapter",
            "set critic.start: policy, "
            "or adapter.merge: true for the reward model and take NAME-merged",
        )
    return None


def _shapes(model: Any) -> dict[str, torch.Size]:
    """Of the body's weights."""
    return {name: weight.shape for name, weight in model.base_model.named_parameters()}


def _vocabulary(folder: Path) -> dict[str, int]:
    vocabulary: dict[str, int] = load_tokenizer(folder).get_vocab()
    return vocabulary


def _learn_body_only(model: Any) -> None:
    """The head of a critic is the value head."""
    model.requires_grad_(False)
    model.base_model.requires_grad_(True)


# --- what is refused ---


def refuse_no_reward_models(job: Job[Scored]) -> None:
    """Raises UserError (3) where what should score is no reward model."""
    for at, folder in job.models.items():
        if at != "model" and not is_reward_model(folder):
            problem = f"{at}: {job.recipe.references()[at]} is not a reward model"
            raise UserError(problem, "train one with `llmpipe reward`", INTEGRITY)


def _refuse_embeddings(setup: Setup[RLRecipe], causal: Any) -> None:
    """Refuse adapters that train embeddings or the head."""
    parent = read_json(setup.job.model / "adapter_config.json") if setup.base else {}
    if parent.get("modules_to_save") or parent.get("trainable_token_indices"):
        raise UserError(
            "model: the adapter has embeddings of its own",
            "set adapter.continue: false to merge it first",
        )
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    adapted = any(hasattr(end, "base_layer") for end in ends)
    if setup.recipe.adapter and (setup.prepared.added_tokens or adapted):
        raise UserError(
            f"adapter: {setup.recipe.stage} trains neither embeddings nor head",
            "add tokens in sft; mend adapter.targets",
        )


def _refuse_mixing(actors: Actors, setup: Setup[RLRecipe]) -> None:
    """Refuse a model that, texts end to end, does not say what it says of each alone, by its own
    head.
    """
    drawn = actors.distribution

    def packed(model: Any, texts: Sequence[list[int]]) -> list[Tensor]:
        episodes = [Episode(ids[:1], ids[1:], False, Tensor(), None) for ids in texts]
        alike = actors if model is actors.causal else _alone_on_stage(model, drawn)
        log_probs = alike.policy(pack_episodes(episodes, model.device))[0]
        return list(log_probs.split([len(ids) - 1 for ids in texts]))

    def alone(model: Any, text: list[int]) -> Tensor:
        ids = torch.tensor([text], device=model.device)
        logits = model(ids, use_cache=False).logits[0, :-1].float() / drawn.temperature
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    road = Road(packed, alone, full_pass(setup.hardware.device == "cuda"))
    if not keeps_apart(actors.causal, road, setup.hardware, setup.say):
        kind = type(actors.causal).__name__
        raise UserError(
            f"model: {setup.recipe.stage} does not know how {kind} keeps answers apart, or its head"
        )


def _alone_on_stage(model: Any, drawn: Distribution) -> Actors:
    """A model that is the policy."""
    return Actors(Cast(model, Role(model), None, None, None), drawn)
