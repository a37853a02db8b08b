"""What a training takes of a device's memory, by the shape of its model and before anything is
loaded; without torch.

Weights that learn, their gradients and moments are in fp32, frozen ones in the precision of the
arithmetic or in few bits. A process holds all of them, or a part, and beside it what is whole while
it is computed with. What a pass keeps for its backward pass is counted as Korthikanti 2022 does
(https://arxiv.org/abs/2205.05198, section 4), with a gated MLP, attention whose scores are in no
memory, and a head whose logits are in none either. On an H100 (SmolLM2-1.7B's shape) it was 5 to
15 % above what was seen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmpipe.files.json import parse_json, read_text
from llmpipe.recipe.optimizers import OPTIMIZERS
from llmpipe.recipe.ppo import PPORecipe
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.recipe.sections import Training
from llmpipe.run.folders import CONFIG, tensors_of

FP32, BF16 = 4, 2  # bytes of a number

USED = 0.9
"""Of a device, at most; what PyTorch cannot use for want of order is a part of the rest."""

COMPILED = 0.6
"""Of what a layer keeps where it is compiled: norms and activations are computed again there."""

BUCKET = 500_000_000
"""Numbers that DeepSpeed sends at once, as it is set where nobody asks for another number."""

HEAD = 1 << 30
"""Bytes of the logits that exist at once."""

LAYER = re.compile(r".*?\.\d+\.")
"""What the names of a layer's tensors begin with."""

LLAMAS = ("llama", "mistral", "qwen2", "qwen3")

WIDTHS = ("hidden_size", "intermediate_size", "vocab_size")


@dataclass(frozen=True)
class Layer:
    """Numbers that a layer makes of a token."""

    layers: int
    """How many there are."""
    width: int
    queries: int
    keys: int
    inner: int
    """Width of the MLP, or of all experts of a token."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Layer:
        """Of a configuration of a text model. Raises ValueError where it does not say."""
        width = _number(config, "hidden_size", "n_embd", "d_model")
        layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
        if not width or not layers:
            raise ValueError("it does not say how wide and how deep the model is")
        heads = _number(config, "num_attention_heads", "n_head") or 1
        dim = _number(config, "head_dim") or width // heads
        keys = (_number(config, "num_key_value_heads") or heads) * dim
        inner = _number(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * width
        if experts := _number(config, "num_experts_per_tok"):
            inner = experts * (_number(config, "moe_intermediate_size") or inner)
        return cls(layers, width, heads * dim, keys, inner)

    def kept(
        self, *, bf16: bool, stream: int = FP32, compiles: bool = False, adapted: float = 0
    ) -> dict[str, float]:
        """Bytes that a layer keeps of a token, by what is computed again. `stream`: bytes of a
        number between layers; `adapted`: numbers of a token that go into adapters.
        """
        number = BF16 if bf16 else FP32
        rounded = BF16 if bf16 else 0  # beside the fp32 that it was
        norms = 2 * self.width * (stream + FP32 + rounded)
        attention = number * 2 * (self.queries + self.keys)
        none = float(norms + attention + 4 * number * self.inner + (number + 1) * adapted)
        selective = float(stream * self.width + attention + number * 2 * (self.width + self.inner))
        if compiles:
            none = COMPILED * none
            selective = min(selective, none)
        return {"none": none, "selective": selective, "full": float(stream * self.width)}

    def of_a_pass(self, kept: Mapping[str, float], kind: str, tokens: int) -> float:
        """Bytes that a pass of so many tokens takes; `kind`: of what is computed again."""
        # the gradients of a layer, or what is computed again of it, exist beside what is kept
        return HEAD + tokens * (self.layers * kept[kind] + kept["none"])


def _number(config: Mapping[str, Any], *names: str) -> int:
    """The first of these that is a number, 0 where none is."""
    return next((value for name in names if isinstance(value := config.get(name), int)), 0)


@dataclass(frozen=True)
class Shape:
    """What decides the memory of a training of a model."""

    weights: int
    """Numbers in all."""
    layer: int
    """Of them in the largest layer."""
    outside: int
    """Of them in no layer: embeddings and a head."""
    sides: int
    """Inputs and outputs of all matrices in layers, which an adapter has a row or column for."""
    inputs: int
    """Inputs alone."""
    passed: Layer

    @classmethod
    def of_folder(cls, folder: Path) -> Shape | None:
        """Of the model in a folder that may be opened, by its headers and its configuration; None
        where they do not say.
        """
        tensors = {name: tensor.shape for name, tensor in tensors_of(folder).items()}
        return cls.of(parse_json(read_text(folder / CONFIG), twice=False), tensors)

    @classmethod
    def of(cls, config: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> Shape | None:
        """Of a model with this config.json and tensors of these shapes."""
        sizes: Counter[str] = Counter()
        outputs = inputs = 0
        for name, shape in tensors.items():
            inside = LAYER.match(name)
            sizes[inside[0] if inside else ""] += math.prod(shape)
            if inside and len(shape) == 2:
                outputs, inputs = outputs + shape[0], inputs + shape[1]
        outside = sizes.pop("", 0)
        try:
            passed = Layer.of(config.get("text_config") or config)
        except ValueError:
            return None
        if not sizes:
            return None
        weights = sum(sizes.values()) + outside
        return cls(weights, max(sizes.values()), outside, outputs + inputs, inputs, passed)


def of_llama(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model of Llama's kind with this config.json, Qwen's among them.
    Raises ValueError for a model of another kind.
    """
    kind = str(config.get("model_type"))
    if kind not in LLAMAS:
        raise ValueError(f"the tensors of {kind} are not known; of {', '.join(LLAMAS)} they are")
    width, inner, rows = (int(config[name]) for name in WIDTHS)
    passed = Layer.of(config)
    queries, keys = passed.queries, passed.keys
    attention = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
    }
    matrices = attention | {
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    vectors = {"input_layernorm": width, "post_attention_layernorm": width}
    if kind == "qwen3":
        vectors |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config["head_dim"])
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, width)}
    for number in range(passed.layers):
        place = f"model.layers.{number}."
        tensors |= {f"{place}{name}.weight": shape for name, shape in matrices.items()}
        tensors |= {f"{place}{name}.weight": (size,) for name, size in vectors.items()}
        if kind == "qwen2":
            biased = list(attention.items())[:3]
            tensors |= {f"{place}{name}.bias": shape[:1] for name, shape in biased}
    tensors["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        tensors["lm_head.weight"] = (rows, width)
    return tensors


@dataclass(frozen=True)
class Pass:
    """The longest batch of a process."""

    tokens: int
    bf16: bool
    kind: str
    """Of what is computed again."""


@dataclass(frozen=True)
class Held:
    """What a process holds of its device, in bytes."""

    weights: float
    gradients: float
    moments: float
    copies: float
    """Buckets that gradients are sent in, weights in the precision of the arithmetic, and of a
    model in parts what is whole."""
    activations: float
    host: float = 0.0
    """Of the host's memory, with `launch.offload`: weights, gradients and moments, which no device
    holds then."""
    checkpoint: float = 0.0
    """Of the host's memory, the copy of a checkpoint that is written while steps run; of a model
    that is whole in each process the first one's alone."""

    @property
    def total(self) -> float:
        """Of the device."""
        return self.weights + self.gradients + self.moments + self.copies + self.activations

    @classmethod
    def of(
        cls, shape: Shape, recipe: Training, longest: Pass, processes: int, parts: int = 1
    ) -> Held:
        """`parts`: in how many the model is cut; 1 where each process holds all of it."""
        number = BF16 if longest.bf16 else FP32
        adapter = recipe.adapter
        learned = _learned(shape, recipe)
        frozen = _frozen(shape, recipe, number, parts)
        cut = 1 if adapter else parts  # an adapter is whole in each process
        if parts > 1:
            # a layer that is computed with, one on its way, and gradients before they are cut
            whole = 2 * shape.layer + shape.outside
            copies = number * whole + (0 if adapter else FP32 * (shape.layer + shape.outside))
            if isinstance(recipe, RLRecipe):  # a policy that draws is whole, then each reward model
                copies = max(copies, number * shape.weights)
        else:
            buckets = FP32 if processes > 1 else 0
            copies = learned * (buckets + (BF16 if longest.bf16 else 0))
        adapted = shape.inputs / shape.passed.layers if adapter else 0
        stream = number if adapter else FP32
        kept = shape.passed.kept(bf16=longest.bf16, stream=stream, adapted=adapted)
        passed = shape.passed.of_a_pass(kept, longest.kind, longest.tokens)
        held = cls(
            weights=frozen / parts + FP32 * learned / cut,
            gradients=FP32 * learned / cut,
            moments=OPTIMIZERS[recipe.optim.optimizer].moments * learned / cut,
            copies=float(copies),
            activations=max(passed, _cached(shape.passed, recipe, number)),
            checkpoint=_copied(recipe) * learned / cut,
        )
        return held.offloaded() if recipe.launch.offload and parts > 1 else held

    @classmethod
    def under_zero(cls, shape: Shape, recipe: Training, longest: Pass, processes: int) -> Held:
        """Under DeepSpeed's ZeRO, whose gathers and buckets are in fp32, while it trains. Before
        and after, with stage 3 too, all weights are in each process.
        """
        stage, learned = recipe.launch.zero, _learned(shape, recipe)
        plain = cls.of(shape, recipe, longest, processes)
        share = FP32 * learned / processes
        bucket = FP32 * min(learned, BUCKET)
        rounded = BF16 * learned if longest.bf16 else 0
        weights, copies = plain.weights + share, 2.0 * bucket + rounded  # a part of them apart
        if stage == 3:
            whole = 2 * shape.layer + shape.outside
            weights = plain.weights / processes
            copies = 2.0 * bucket + FP32 * whole + (BF16 * whole if longest.bf16 else 0)
        return replace(
            plain,
            weights=weights,
            gradients=share,
            moments=plain.moments / processes,
            copies=copies,
            checkpoint=plain.checkpoint / processes,
        )

    def offloaded(self) -> Held:
        """The same with what is not computed with in the host's memory."""
        host = self.weights + self.gradients + self.moments
        return replace(self, weights=0.0, gradients=0.0, moments=0.0, host=host)


def _learned(shape: Shape, recipe: Training) -> int:
    """Numbers that learn: all weights, or an adapter's; those of a critic, too."""
    adapter = recipe.adapter
    learned = adapter.rank * shape.sides if adapter else shape.weights
    if not isinstance(recipe, PPORecipe) or recipe.critic.start == "trunk":
        return learned
    return learned + (recipe.critic.rank * shape.sides if adapter else shape.weights)


def _copied(recipe: Training) -> int:
    """Bytes that a copy of a checkpoint takes of a number that learns, with its moments; 0 where it
    is written at once. `auto` is taken for that of a GPU.
    """
    if recipe.checkpoint.asynchronous is False:
        return 0
    unpaged = recipe.optim.optimizer.removeprefix("paged_")  # whose moments are somewhere, too
    moments = next(each.moments for name, each in OPTIMIZERS.items() if name == unpaged)
    return FP32 + moments


def _frozen(shape: Shape, recipe: Training, number: int, parts: int) -> float:
    """Bytes of weights that do not learn: those under an adapter, a reference's and, each as large
    as the policy, reward models'.
    """
    ranked = 0.0
    if isinstance(recipe, RLRecipe):
        ranked += number * shape.weights * sum(bool(each.model) for each in recipe.reward)
    layers = shape.weights - shape.outside
    if recipe.quantization:  # what is not in few bits is made fp32, see `adapters.load_frozen`
        constants = 0.13 if recipe.quantization.double else 0.5
        bits = 4 + constants if recipe.quantization.bits == 4 else 8
        return ranked + layers * bits / 8 + FP32 * shape.outside
    if recipe.adapter:
        return ranked + (FP32 if recipe.adapter.rewrites else number) * shape.weights
    if isinstance(recipe, RLRecipe):  # whose reference is rounded where it is whole
        if not recipe.has_reference:
            return ranked
        return ranked + (FP32 if parts > 1 else number) * layers + FP32 * shape.outside
    is_compared = recipe.stage in ("dpo", "kto") and getattr(recipe, "has_reference", True)
    is_kept = is_compared and not getattr(recipe, "precompute", False)
    return float(FP32 * shape.weights if is_kept else 0)


def _cached(passed: Layer, recipe: Training, number: int) -> float:
    """Bytes of the keys and values of the answers that are drawn at a time, at most."""
    if not isinstance(recipe, RLRecipe):
        return 0
    tokens = recipe.launch.rollout_batch_size * recipe.longest
    return number * 2.0 * passed.keys * passed.layers * tokens
