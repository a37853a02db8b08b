"""Low-rank adapters (LoRA, Hu 2021): begin one, put one on its base, and what its files hold.

An adapter is published without its base; the manifest names the base with its hash, and `plan`
refuses any other. What follows the adapter everywhere: tokenizer, chat template, and the generation
configuration with its stop tokens.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D

from llmpipe import upstream
from llmpipe.errors import INTEGRITY, UserError, first_line
from llmpipe.faults import reading
from llmpipe.models.pretrained import load_model, resize_embeddings, take_generation
from llmpipe.parallel.parts import Spread, beside_parts, hold_whole
from llmpipe.recipe.sections import Adapter, Quantization
from llmpipe.run.weights import tensors_in
from llmpipe.upstream import few_bits

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Base:
    """The model under an adapter, as it was held while the adapter was trained."""

    folder: Path
    reference: str
    """What the recipe calls it."""
    revision: str | None
    """Its commit, of a model on the Hub."""
    quantization: Quantization | None
    dtype: torch.dtype
    """Of the weights that are not quantized."""

    @property
    def computes_in(self) -> torch.dtype:
        """The precision of its products."""
        return torch.bfloat16 if self.quantization else self.dtype

    @property
    def is_exact(self) -> bool:
        """Whether it was held as its files have it."""
        return self.quantization is None and self.dtype == torch.float32


# --- the base, and an adapter on it ---


def load_frozen(
    folder: Path,
    quantization: Quantization | None,
    dtype: torch.dtype,
    attention: str = "sdpa",
    scores: bool = False,
    device: str = "cpu",
    spread: Spread | None = None,
) -> PreTrainedModel:
    """A base to train an adapter on, as a reward model where it `scores`, whose head is then whole
    in every process.

    It is in `dtype` and may be `spread` over processes, or as bitsandbytes holds it: NF4 with
    double quantization (Dettmers 2023) or 8 bits, with norms and embeddings in fp32. Raises
    UserError as `load_model` does.
    """
    if quantization is None:
        model = load_model(folder, attention, dtype, scores=scores, device=device, spread=spread)
        if spread and scores:
            hold_whole(model, "score")
        return model
    from peft import prepare_model_for_kbit_training

    if quantization.bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=quantization.double,
            bnb_4bit_compute_dtype=dtype,
        )
    model = load_model(folder, attention, dtype, config, scores, device)
    few_bits.keep_unpacked(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def begin(model: PreTrainedModel, adapter: Adapter, new_tokens: list[int], seed: int) -> Any:
    """PEFT's model: a fresh adapter, drawn from `seed`, on `model`, which is frozen.

    `new_tokens`: ids whose rows are new, or are new tokens'. Raises UserError (2) when no layer has
    the names in `targets`.
    """
    from peft import LoraConfig, get_peft_model

    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    adapter.check_targets(linear)
    inits: dict[str, bool | str] = {"default": True, "pissa": "pissa_niter_16"}
    config = LoraConfig(
        task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=inits.get(adapter.init, adapter.init),
        **_trained_embeddings(model, adapter, new_tokens),
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        problem = f"adapter: {first_line(error)}"
        raise UserError(problem, "see adapter.targets and adapter.init") from None
    upstream.with_bias(adapted)
    upcast_trained(adapted)
    freeze_rows(adapted, adapter)
    if adapter.rewrites:
        start = {name: tensor.clone() for name, tensor in tensors_of(adapted).items()}
        adapted.began_with = start  # see `as_published`
    return adapted


def _trained_embeddings(
    model: PreTrainedModel, adapter: Adapter, new_tokens: list[int]
) -> dict[str, Any]:
    """What of embeddings and head is saved beside the matrices, in the words of LoraConfig.

    New rows are, whether they learn or not: nobody else could draw the same ones.
    """
    if adapter.embeddings == "all":
        return {"modules_to_save": _ends(model)}
    if not new_tokens:
        return {}
    if model.get_output_embeddings() is None or is_tied(model):
        return {"trainable_token_indices": new_tokens}
    # the head has rows of its own
    return {"trainable_token_indices": dict.fromkeys(_ends(model), new_tokens)}


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weights are the embeddings'."""
    head = model.get_output_embeddings()
    return head is not None and model.get_input_embeddings().weight is head.weight


def _ends(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings and the head, without those of the modules around them."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    ]


def on_base(base: PreTrainedModel, folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Any:
    """PEFT's model: the adapter in `folder` on `base`, with the vocabulary and the generation that
    the adapter was trained with. Raises UserError as `attach` does.

    `seed`: of rows that the base lacks, before the adapter's take their place.
    """
    make_fit(base, folder, tokenizer, seed)
    return attach(base, folder)


def merged(model: Any) -> PreTrainedModel:
    """PEFT's model with the update in its weights, and nothing of PEFT's around them; as it is
    where its base is quantized, whose weights take no sum.
    """
    if hasattr(model.get_base_model().config, "quantization_config"):
        return model
    whole: PreTrainedModel = model.merge_and_unload()
    return whole


def updates_of(model: Any) -> dict[str, Tensor]:
    """What PEFT's model adds to each weight of its base that it changes, by its name: bfloat16.

    Matrices add to it, rows of tokens take the place of its own, and so do whole modules.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    updates = {}
    for name, layer in model.get_base_model().named_modules():
        path = [part for part in name.split(".") if part not in ("base_layer", "token_adapter")]
        last = getattr(layer, "parameter_name", "weight")  # of experts, which are no layers
        weight: Any = getattr(plain_layer(layer), last, None)
        if weight is None or not weight.is_floating_point():
            continue
        if isinstance(layer, BaseTunerLayer):
            updates[".".join([*path, last])] = _added(layer, weight)
        elif isinstance(whole := getattr(layer, "modules_to_save", None), nn.ModuleDict):
            learned = whole["default"].get_parameter(last).detach() - weight.detach()
            updates[".".join([*path, last])] = learned.to(torch.bfloat16)
    return updates


def _added(layer: Any, weight: Any) -> Tensor:
    """What a layer of PEFT's adds to a weight of its base."""
    before = weight.detach().clone()
    layer.merge()
    update: Tensor = (weight.detach() - before).to(torch.bfloat16)
    layer.unmerge()
    weight.data.copy_(before)  # a sum taken back is the number within rounding alone
    return update


def make_fit(base: PreTrainedModel, folder: Path, tokenizer: Tokenizer, seed: int = 0) -> None:
    """Give a base the vocabulary and the generation of the adapter in `folder`."""
    resize_embeddings(base, tokenizer, seed)
    take_generation(base, folder)


def plain_layer(module: Any) -> nn.Module:
    """A module of the base, without what PEFT has put around it."""
    while (inside := getattr(module, "base_layer", None)) is not None:
        module = inside
    plain: nn.Module = getattr(module, "original_module", module)
    return plain


@dataclass(frozen=True)
class Frozen:
    """A weight of the base under an adapter."""

    layer: Any
    """The module that has it."""
    weight: Any
    """A parameter."""
    is_files: bool
    """Whether the base's files hold it: not where a part was taken out of it, nor where a whole
    module learns in its place."""


def frozen_weight(model: Any, name: str) -> Frozen:
    """The weight that has this name in the base of PEFT's `model`."""
    *path, last = name.split(".")
    rewrites = hasattr(model, "began_with")
    module, is_files = model.get_base_model(), True
    for part in path:
        module = getattr(plain_layer(module), part)
        is_files &= not hasattr(module, "modules_to_save")
        is_files &= not (rewrites and hasattr(module, "lora_A"))
    layer = plain_layer(module)
    return Frozen(layer, getattr(layer, last), is_files)


@dataclass(frozen=True)
class Update:
    """How a layer is adapted."""

    kind: str
    """Which of PEFT's classes it has become."""
    scale: float


def adapted_layers(model: Any) -> dict[str, Update]:
    """Layers of PEFT's model that have low-rank matrices, by name."""
    return {
        name: Update(
            type(module).__name__ + (" with DoRA" if module.use_dora.get("default") else ""),
            module.scaling["default"],
        )
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.scaling
    }


def attach(model: PreTrainedModel, folder: Path, trainable: bool = False) -> Any:
    """PEFT's model: the adapter in `folder` on `model`.

    Raises UserError (3) when their tensors do not fit one another.
    """
    from peft import PeftModel, set_peft_model_state_dict

    with reading(folder, "an adapter of its base", Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of missing tensors, which are refused below
        adapted = PeftModel.from_pretrained(
            model, str(folder), is_trainable=trainable, local_files_only=True
        )
        if upcast_trained(adapted):  # which was loaded rounded
            set_peft_model_state_dict(adapted, load_file(folder / WEIGHTS))
    saved = set(tensors_in(folder / WEIGHTS))
    differing = sorted(saved ^ set(tensors_of(adapted)))
    if differing:
        fate = "is left over" if differing[0] in saved else "is missing"
        raise UserError(f"{folder / WEIGHTS}: {differing[0]} {fate}", code=INTEGRITY)
    return upstream.with_bias(adapted)


def freeze_rows(model: Any, adapter: Adapter) -> None:
    """Let the rows that an adapter brings along stay as they are, where no embeddings learn."""
    if adapter.embeddings != "none":
        return
    for module in model.modules():
        if isinstance(rows := getattr(module, "trainable_tokens_delta", None), nn.Module):
            rows.requires_grad_(False)


def refuse_rows_without_a_home(model: Any, made: range) -> None:
    """Raise UserError (2) for rows made for an adapter that was begun without them: it has no place
    to save them in.
    """
    config = model.peft_config["default"]
    kept = config.trainable_token_indices or []
    ids = kept if isinstance(kept, list) else [id for ids in kept.values() for id in ids]
    if config.modules_to_save or set(made) <= set(ids):
        return
    problem = f"{len(made)} tokens are new, and the adapter was begun without them"
    hint = "take the template it was trained with, or set adapter.continue: false"
    raise UserError(f"adapter: {problem}", hint)


def refuse_beside_parts(folder: Path) -> None:
    """Raise UserError (2) where the adapter in `folder` has more than low-rank matrices and a head
    of scores: embeddings and lengths of weights do not fit a base in parts.
    """
    from peft import PeftConfig

    with reading(folder, "an adapter", Exception):
        config: Any = PeftConfig.from_pretrained(str(folder), local_files_only=True)
    modules = {*(config.modules_to_save or ())} - {"score", "classifier"}
    if modules or config.trainable_token_indices or config.use_dora:
        what = "dora" if config.use_dora else "rows of embeddings"
        problem = f"launch.strategy: fsdp: {folder}: the adapter has {what} beside its matrices"
        raise UserError(problem, "set launch.strategy: ddp")


def forget_base(model: Any) -> None:
    """Forget where the base was loaded from: PEFT looks it up, on the Hub too, at each save, and
    writes it into a card.
    """
    model.get_base_model().name_or_path = ""
    model.get_base_model().config._name_or_path = ""
    model.peft_config["default"].base_model_name_or_path = ""


# --- what learns beside the matrices ---


def upcast_trained(model: Any) -> bool:
    """Bring what learns beside low-rank matrices, a head or embeddings, to fp32, as PEFT does with
    the matrices only; returns whether there is any.

    Such a layer casts what goes in, or what comes out of embeddings, so that the frozen layers
    around it see their own precision.
    """
    any_trained = False
    for module in list(model.modules()):
        layers = getattr(module, "modules_to_save", None)
        rows = getattr(module, "trainable_tokens_delta", None)
        for trained in (layers, rows):
            if isinstance(trained, nn.Module):
                trained.float()
                any_trained = True
        if isinstance(layers, nn.ModuleDict):
            _cast_around(layers.values(), module.original_module)
    return any_trained


def _cast_around(layers: Iterable[nn.Module], original: Any) -> None:
    """Let fp32 layers compute between others of the precision that the `original` one has."""
    for layer in layers:
        if layer._forward_hooks or layer._forward_pre_hooks:
            continue  # an earlier call was here
        if isinstance(layer, nn.Embedding):
            layer.register_forward_hook(lambda _, args, output: output.to(original.weight.dtype))
        else:
            layer.register_forward_pre_hook(_cast_to_weight)


def _cast_to_weight(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(layer.weight.dtype), *args[1:])


# --- what the files hold ---


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors as its file has them, on the CPU."""
    from peft import get_peft_model_state_dict

    # PEFT would gather all of a base in parts first
    state = beside_parts(model)
    tensors = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def as_published(model: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The adapter as tensors and PEFT's configuration, for the base's own weights.

    One that began with a part B0 A0 of the weights, taken out of them, has changed them by
    B A - B0 A0 = [B, -B0] [A; A0]: that is an adapter of twice the rank.
    """
    tensors = tensors_of(model)
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # whose order is another one in every process
        config.target_modules = sorted(config.target_modules)
    start = getattr(model, "began_with", None)
    if start is None:
        return tensors, config
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensors[name] = torch.cat([tensor, start[name]])
        elif "lora_B" in name:
            tensors[name] = torch.cat([tensor, -start[name]], dim=1)
    config.init_lora_weights = True
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # the scale stays what it was
    return tensors, config


# --- whether it is the one that was asked for ---


def refuse_another(model: Any, adapter: Adapter) -> None:
    """Raise UserError (3) when a recipe asks for another adapter than the one that is trained
    on.
    """
    config = model.peft_config["default"]
    shape = {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "dropout": config.lora_dropout,
        "rslora": config.use_rslora,
        "dora": config.use_dora,
    }
    embeddings = "all" if config.modules_to_save else "new"
    if "all" in (embeddings, adapter.embeddings):  # `new` and `none` may be the same
        shape["embeddings"] = embeddings
    differing = {name: value for name, value in shape.items() if getattr(adapter, name) != value}
    adapted = _adapted_layers(model)
    if any(is_adapted != adapter.is_on(name) for name, is_adapted in adapted.items()):
        last_names = {name.rpartition(".")[2] for name, is_adapted in adapted.items() if is_adapted}
        differing["targets"] = sorted(last_names)
    if differing:
        words = [
            f"{name} {value} there, {getattr(adapter, name)} in the recipe"
            for name, value in differing.items()
        ]
        raise UserError(
            f"adapter: the one that is trained on is another: {', '.join(words)}",
            "write the adapter's own numbers, or set adapter.continue: false to merge it and start "
            "a new one",
            INTEGRITY,
        )


def _adapted_layers(model: Any) -> dict[str, bool]:
    """Linear layers of the model under an adapter, less the head, and whether they are adapted."""
    inside = ("lora_", "base_layer", "modules_to_save", "original_module")  # parts of a layer
    head = model.get_output_embeddings()
    layers = {}
    for name, module in model.get_base_model().named_modules():
        is_adapted = hasattr(module, "lora_A")
        is_linear = is_adapted or isinstance(module, nn.Linear | Conv1D)
        if is_linear and module is not head and not any(part in name for part in inside):
            layers[name] = is_adapted
    return layers
