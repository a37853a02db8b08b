"""Policy, reference and critic, each weight in memory once.

    all weights   policy, a frozen copy of the parent, and a critic: a model with a value head, or a head on the policy
    adapter       one frozen base: the policy is its adapter `default`, the reference the base alone or the parent's
                  adapter, kept as `reference`, and the critic an adapter `critic` of its own with a value head; a
                  reward model that is an adapter on the same base is one more, `reward`

Training passes lay answers end to end in one row, each after its prompt and with positions of its own: no padding is
computed, and logits exist for a tile of answer tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe import upstream
from llmpipe.data.pack import IGNORED
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import read_json
from llmpipe.kernels.cpu import LogProbs
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import Setup, load_copy, load_policy
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.models.verify import PROBE
from llmpipe.rl.rollout import Episode
from llmpipe.run.artifact import is_reward_model

TILE = 256  # tokens whose logits exist at once
COLUMNS = ("input_ids", "labels", "seq_lengths")


class Packed(NamedTuple):
    """Episodes end to end: `ids` and `positions` int64 [1, tokens]; `at` [answer tokens], where each is predicted from;
    `targets` [answer tokens]; `allowed`: which ids could be drawn at each, or None."""

    ids: Tensor
    positions: Tensor
    at: Tensor
    targets: Tensor
    allowed: list[Tensor] | None


def pack(episodes: list[Episode], device: torch.device) -> Packed:
    wholes = [episode.prompt + episode.answer for episode in episodes]
    at, start = [], 0
    for episode, whole in zip(episodes, wholes, strict=True):
        first = start + len(episode.prompt) - 1
        at += range(first, first + len(episode.answer))
        start += len(whole)
    allowed = (
        None
        if episodes[0].allowed is None
        else [ids for episode in episodes for ids in episode.allowed]
    )
    return Packed(
        torch.tensor([[token for whole in wholes for token in whole]], device=device),
        torch.tensor([[i for whole in wholes for i in range(len(whole))]], device=device),
        torch.tensor(at, device=device),
        torch.tensor([token for episode in episodes for token in episode.answer], device=device),
        allowed,
    )


def pack_rows(rows: list[dict], device: torch.device) -> Packed:
    """Rows of sft data end to end: their documents, whose learned tokens are the targets. None at all: nothing."""
    ids, labels, lengths = ([value for row in rows for value in row[name]] for name in COLUMNS)
    positions = [i for length in lengths for i in range(length)]
    learned = [i for i, label in enumerate(labels) if label != IGNORED and positions[i]]
    return Packed(
        torch.tensor([ids], device=device),
        torch.tensor([positions], device=device),
        torch.tensor(learned, device=device, dtype=torch.long) - 1,
        torch.tensor([labels[i] for i in learned], device=device, dtype=torch.long),
        None,
    )


class Head(NamedTuple):
    """What makes logits of hidden states: a linear layer, a factor, and a bound c: c tanh(logit / c) (Gemma 2)."""

    linear: nn.Linear
    scale: float
    cap: float | None


def head_of(model: Any) -> Head:
    """The head of a model; what its architecture does beyond this, `_probe` refuses."""
    config = model.config.get_text_config()
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")  # Cohere; Muse; Falcon-H1
    scale = next(
        (value for name in names if (value := getattr(config, name, None)) is not None), 1.0
    )
    divisor = (
        getattr(config, "logits_scaling", None) or 1.0
    )  # Granite; HyperCLOVA X multiplies by it
    scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(
        model.get_output_embeddings(), scale, getattr(config, "final_logit_softcapping", None)
    )


def log_probs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    allowed: list[Tensor] | None,
    bonus: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets` under the distribution that tokens are drawn from, and its entropy in nats,
    float32 [tokens] each. hidden [tokens, width]; `bonus`: the entropy is learned from."""
    layer, plain = head.linear, head.linear.bias is None and head.cap is None
    if hidden.device.type == "cpu" and allowed is None and not bonus and plain:
        found = LogProbs.apply(
            hidden * (head.scale / temperature),
            layer.weight,
            None,
            targets,
            1.0,
            TILE,
            None,
            1.0,
            ("entropy",),
        )
        return found[0], found[1]
    parts = []
    for start in range(0, len(targets), TILE):
        part = slice(start, start + TILE)
        how = head.scale, head.cap, temperature, allowed and allowed[part]
        arguments = hidden[part], layer.weight, layer.bias, targets[part], *how
        parts.append(
            checkpoint(_tile, *arguments, use_reentrant=False)
            if torch.is_grad_enabled()
            else _tile(*arguments)
        )
    log_p, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return log_p, entropy


def _tile(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, cap: float | None,
    temperature: float, allowed: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    logits = linear(hidden, weight, bias).float() * scale
    logits = (logits if cap is None else cap * (logits / cap).tanh()) / temperature
    if allowed is not None:
        mask = torch.zeros(logits.shape, dtype=torch.bool)
        for row, ids in zip(mask, allowed, strict=True):
            row[ids.long()] = True
        logits = logits.masked_fill(~mask.to(logits.device), -torch.inf)
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


class Actors(nn.Module):
    """What learns, and what it is held to. Shapes as in `Packed`."""

    def __init__(
        self, policy: Any, critic: Any, reference: Any, value: nn.Linear, how: Any, trunk: bool
    ):
        """`critic` and `reference`: models of their own, or None where they are adapters of the policy's."""
        super().__init__()
        self.policy, self.critic, self.reference, self.value = policy, critic, reference, value
        self.temperature, self.bonus, self.trunk = (
            how.rollout.temperature,
            how.algorithm.entropy > 0,
            trunk,
        )
        self.adapted, self.recomputes = how.adapter is not None, how.launch.activation_checkpointing

    @property
    def causal(self) -> Any:
        """The policy as transformers knows it; its layers hold the adapters."""
        return self.policy.get_base_model() if self.adapted else self.policy

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Compute with one of the adapters, or with none. PEFT's own switch also decides what learns; this does not."""
        if not self.adapted:
            yield
            return
        from peft.tuners.tuners_utils import BaseTunerLayer

        layers = [module for module in self.policy.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer._disable_adapters, layer._active_adapter = name is None, [name or "default"]
        try:
            yield
        finally:
            for layer in layers:
                layer._disable_adapters, layer._active_adapter = False, ["default"]

    def _hidden(self, model: Any, batch: Packed) -> Tensor:
        out = model.base_model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False)
        return out.last_hidden_state[0, batch.at]

    def _predicted(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value(hidden.float()).squeeze(-1)

    def spoken(self, batch: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
        """The policy's log-probabilities and entropies; its values, where they come from the same pass."""
        hidden = self._hidden(self.causal, batch)
        found = log_probs(
            hidden, head_of(self.causal), batch.targets, self.temperature, batch.allowed, self.bonus
        )
        return *found, self._predicted(hidden) if self.trunk else None

    def recited(self, batch: Packed) -> Tensor:
        """The policy's log-probabilities of text that it did not draw: temperature 1, and the whole vocabulary."""
        return log_probs(
            self._hidden(self.causal, batch), head_of(self.causal), batch.targets, 1.0, None, False
        )[0]

    def valued(self, batch: Packed) -> Tensor:
        """The critic's values V(s_t), float32 [answer tokens]."""
        return self._predicted(
            self._hidden(self.causal if self.critic is None else self.critic, batch)
        )

    def as_critic(self) -> Any:
        """What `valued`, and the backward pass of what it returns, have to run in."""
        return self.using("critic" if self.adapted and not self.trunk else "default")

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Compute padded batches, with a cache or without: answers are drawn so, and shared reward models read so."""
        self.recompute(False)
        try:
            with upstream.generating(self.causal):
                yield
        finally:
            self.recompute(self.recomputes)

    def recompute(self, wanted: bool) -> None:
        """Whether layers recompute their activations in the backward pass; transformers asks their training mode."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = wanted

    @torch.no_grad()
    def referred(self, batch: Packed) -> Tensor:
        """The reference's log-probabilities, over the whole vocabulary: what no token was drawn from counts as well."""
        model = self.causal if self.reference is None else self.reference
        continued = self.adapted and "reference" in self.policy.peft_config
        with self.using("reference" if continued else None):
            hidden = self._hidden(model, batch)
        return log_probs(hidden, head_of(model), batch.targets, self.temperature, None, False)[0]

    def learned(self) -> dict[str, nn.Parameter]:
        """What learns: names as in the module."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def alone(self) -> None:
        """Leave the policy as it is published."""
        for name in (
            [name for name in self.policy.peft_config if name != "default"] if self.adapted else ()
        ):
            self.policy.delete_adapter(name)
        self.critic = self.reference = None


def build(job: Any, prepared: PreparedRows, hardware: Hardware, tokenizer: Any) -> Actors:
    """The actors of a recipe, on their device, in evaluation mode: PPO compares probabilities, and dropout is noise."""
    recipe, say, base = job.recipe, job.say, job.bases.get("model")
    for at, folder in job.models.items():
        if at != "model" and not is_reward_model(folder):
            problem = f"{at}: {recipe.references()[at]} is not a reward model"
            raise UserError(problem, "train one with `llmpipe reward`", INTEGRITY)
    setup = Setup(job, prepared, hardware, tokenizer)
    policy = load_policy(setup)
    causal = policy.get_base_model() if recipe.adapter else policy
    _refuse(causal, job, prepared)
    if recipe.adapter and recipe.adapter.dropout:
        say("adapter.dropout: 0 here: PPO compares probabilities, and dropout is noise in them")
    wanted = recipe.critic.start
    torch.manual_seed(recipe.seed)
    value = nn.Linear(causal.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(
        value.weight
    )  # a random head on features of any size begins far from every reward
    nn.init.zeros_(value.bias)
    critic = reference = None
    if recipe.adapter:
        from peft import LoraConfig

        own = policy.peft_config["default"]
        if wanted != "trunk" and base:
            policy.load_adapter(str(job.model), "critic", is_trainable=True)
        elif wanted != "trunk":
            config = LoraConfig(
                r=recipe.critic.rank,
                lora_alpha=2 * recipe.critic.rank,
                target_modules=own.target_modules,
            )
            policy.add_adapter("critic", config)
        if base:
            policy.load_adapter(str(job.model), "reference", is_trainable=False)
        for name, p in policy.named_parameters():
            p.requires_grad = any(f".{learns}." in name for learns in ("default", "critic"))
            p.data = p.data.float() if p.requires_grad else p.data
        held = "the parent's adapter" if base else "the parent, the adapter off"
    else:
        reference = load_copy(setup)
        reference.requires_grad_(False)
        if hardware.bf16:  # autocast does so for every product, and keeps nothing of what is frozen
            for layer in (
                layer for layer in reference.base_model.modules() if isinstance(layer, nn.Linear)
            ):
                layer.to(torch.bfloat16)
        held = "a frozen copy of the parent"
        if wanted != "trunk":
            critic, value, wanted = _critic(setup, causal, value, wanted)
    if recipe.launch.activation_checkpointing:
        for model in filter(None, (causal, critic)):
            model.activation_checkpointing_enable({"use_reentrant": False})
    predicts = (
        "a head on the policy"
        if wanted == "trunk"
        else f"{'an adapter' if recipe.adapter else 'a model'} of its own"
    )
    say(
        f"reference: {held}; critic: {predicts}{', from the reward model' if wanted == 'reward' else ''}"
    )
    actors = Actors(policy, critic, reference, value, recipe, wanted == "trunk").to(hardware.device)
    actors.eval()
    _probe(actors, tokenizer, 0.3 if hardware.bf16 or recipe.quantization else 1e-3)
    actors.recompute(recipe.launch.activation_checkpointing)
    return actors


class Ranker:
    """A reward model that is an adapter on the policy's own base; called as AutoModelForSequenceClassification is."""

    def __init__(self, actors: Actors, name: str, score: Tensor, pad: int):
        self.actors, self.name, self.score, self.pad = actors, name, score, pad
        self.config, self.device = actors.causal.config, score.device

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        """Scores [texts, 1] of texts that are padded on the right, as `logits`."""
        with self.actors.padded(), self.actors.using(self.name):
            out = self.actors.causal.base_model(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
        place = torch.arange(input_ids.shape[1], device=out.device)
        last = ((input_ids != self.pad) * place).argmax(
            1
        )  # as transformers reads it, where pad ends turns as well
        last = out[torch.arange(len(out), device=out.device), last]
        return SimpleNamespace(logits=linear(last.to(self.score.dtype), self.score))


def ranker(actors: Actors, job: Any, at: str, tokenizer: Any) -> Ranker | None:
    """The reward model that the recipe has `at`, on the policy's base; None where it needs a model of its own."""
    from peft import PeftConfig, set_peft_model_state_dict

    folder, base = job.models[at], job.bases.get(at)
    if base is None or not actors.adapted or job.recipe.quantization:
        return None
    config = PeftConfig.from_pretrained(str(folder))
    plain = {*config.modules_to_save} <= {
        "classifier",
        "score",
    } and not config.trainable_token_indices
    if base.resolve() != job.weights.resolve() or not plain:
        return None
    if len(tokenizer) > actors.causal.get_input_embeddings().weight.shape[0]:
        return None
    name = at.replace(".", "-")
    config.modules_to_save, config.task_type, config.lora_dropout = None, "CAUSAL_LM", 0.0
    actors.policy.add_adapter(name, config)
    tensors = load_file(folder / "adapter_model.safetensors")
    score = next(tensors.pop(key) for key in list(tensors) if key.endswith("score.weight"))
    left = set_peft_model_state_dict(actors.policy, tensors, adapter_name=name).unexpected_keys
    if left:
        raise UserError(f"{folder}: {left[0]} is left over", code=INTEGRITY)
    for parameter, p in actors.policy.named_parameters():
        if f".{name}." in parameter:
            p.requires_grad = False
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Ranker(actors, name, score.to(actors.value.weight.device), pad)


@torch.no_grad()
def _probe(actors: Actors, tokenizer: Any, tolerance: float) -> None:
    """Refuse a model that, episodes end to end, does not say what it says of each alone, by its own head."""
    ids = tokenizer(PROBE)["input_ids"]
    episodes = [
        Episode(ids[:cut], ids[cut:], False, Tensor(), None)
        for cut in (len(ids) // 2, len(ids) // 3)
    ]
    with torch.autocast(actors.value.weight.device.type, torch.bfloat16, enabled=tolerance > 0.1):
        packed = actors.spoken(pack(episodes, actors.value.weight.device))[0].cpu()
        logits = actors.causal(
            torch.tensor([ids], device=actors.value.weight.device), use_cache=False
        ).logits[0, :-1]
    alone = (
        (logits.float() / actors.temperature)
        .log_softmax(-1)
        .cpu()
        .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    )
    expected = torch.cat([alone[len(episode.prompt) - 1 :] for episode in episodes])
    apart = float((packed - expected).abs().max())
    if not apart <= tolerance:
        kind = type(actors.causal).__name__
        raise UserError(
            f"model: ppo does not know how {kind} keeps answers apart, or its head: {apart:.2g} nats"
        )


def _critic(
    setup: Setup[Any], causal: Any, value: nn.Linear, wanted: str
) -> tuple[Any, nn.Linear, str]:
    """A critic with weights of its own, its head, and what it begins with."""
    job, tokenizer, hardware = setup.job, setup.tokenizer, setup.hardware
    found = next(((at, path) for at, path in job.models.items() if at.startswith("reward.")), None)
    if found and found[0] not in job.bases and wanted in ("auto", "reward"):
        ranker = load_model(found[1], hardware.attention)
        shapes = [
            {n: p.shape for n, p in model.base_model.named_parameters()}
            for model in (ranker, causal)
        ]
        vocabularies = load_tokenizer(found[1]).get_vocab(), tokenizer.get_vocab()
        if shapes[0] == shapes[1] and vocabularies[0] == vocabularies[1]:
            upstream.speed_up(ranker, device_type=hardware.device)
            value.weight.data.copy_(ranker.score.weight.data)
            return _body(ranker), value, "reward"
    if wanted == "reward":
        raise UserError(
            "critic.start: reward: the reward model has not the policy's shape and vocabulary, or is an adapter",
            "set critic.start: policy, or adapter.merge: true for the reward model and take NAME-merged",
        )
    return _body(load_copy(setup)), value, "policy"


def _body(model: Any) -> Any:
    """`model` with only its body to learn: the head is `value`."""
    model.requires_grad_(False)
    model.base_model.requires_grad_(True)
    return model


def _refuse(causal: Any, job: Any, prepared: PreparedRows) -> None:
    recipe = job.recipe
    parent = read_json(job.model / "adapter_config.json") if job.bases.get("model") else {}
    if parent.get("modules_to_save") or parent.get("trainable_token_indices"):
        raise UserError(
            "model: the adapter has embeddings of its own",
            "set adapter.continue: false to merge it first",
        )
    ends = (causal.get_input_embeddings(), causal.get_output_embeddings())
    if recipe.adapter and (
        prepared.added_tokens or any(hasattr(end, "base_layer") for end in ends)
    ):
        raise UserError(
            "adapter: ppo trains neither embeddings nor head",
            "add tokens in sft; mend adapter.targets",
        )
