"""Overrides of TRL, transformers, PEFT and bitsandbytes internals that are not a trainer's methods
(`training`). `tests/test_upstream.py` fails when one of any of them moves.

Three things make a step fast without changing its result, and `speed_up` sets two of them:

- attention (`attention`): a packed row [d1 d2 d3] costs (d1+d2+d3)^2 under one dense block mask,
  and d1^2+d2^2+d3^2 document by document, as `kernels` do it on a CPU and on a GPU;
- the head (`head`): on a CPU, TRL folds the logits in a dozen fp32 passes and multiplies the
  gradients in fp32. `kernels.cpu.log_probs` leaves the gradients behind in its forward pass;
- compiled layers (`layers`), on a GPU, where the third of a step goes into norms and activations.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, core_model_loading, modeling_utils
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.modeling_layers import GradientCheckpointingLayer

from llmpipe.parallel.parts import plain_class
from llmpipe.upstream.attention import attend_by_document, fits
from llmpipe.upstream.checkpointing import as_asked, checkpoint_layers
from llmpipe.upstream.head import score_labels
from llmpipe.upstream.later import instead, reading_later, with_later_logits
from llmpipe.upstream.layers import compile_layers, forget_compiled, interpreted

if TYPE_CHECKING:  # it imports bitsandbytes, which `noise.silence` has to precede
    from transformers import Trainer

__all__ = ["as_asked", "checkpoint_layers", "compile_layers", "fits"]  # beside what is defined here

# --- speed ---


def speed_up(model: PreTrainedModel, *, device_type: str) -> None:
    """`model` document by document, where its attention allows that, and TRL's head fast on a CPU.

    Call before training. The saved configuration names no attention, so nothing of this is left in
    an artifact.
    """
    attend_by_document(model, device_type)
    score_labels(device_type)


# --- attention and routing: in training, and as a model is read ---


def supported_attention(model: type[PreTrainedModel] | PreTrainedModel, preferred: str) -> str:
    """The attention that a model or its class can compute with: the preferred one, else sdpa, else
    eager.
    """
    # where an architecture names kernels, transformers takes another one, of the Hub
    kernels = getattr(model, "_compatible_flash_implementations", None)
    flash = getattr(model, "_supports_flash_attn", True)
    supports = {
        "flash_attention_2": flash and (not kernels or "flash_attention_2" in kernels),
        "flex_attention": getattr(model, "_supports_flex_attn", False),
        "sdpa": getattr(model, "_supports_sdpa", True),
    }
    return next(name for name in (preferred, "sdpa", "eager") if supports.get(name, True))


def as_loaded(model: PreTrainedModel) -> None:
    """Leave what only training computes with.

    That is an attention that may run in half precision alone, layers that are compiled for the
    shapes of training, and the routing that a mixture of experts returns, by TRL's order in the
    configuration: with it a cached step of generation breaks.
    """
    forget_compiled(model)
    model.set_attn_implementation(supported_attention(model, "sdpa"))
    forget_routing(model.config)


def forget_routing(config: PretrainedConfig) -> None:
    """Let a mixture of experts not return its routing."""
    text = config.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


def forget_debugging(model: nn.Module) -> None:
    """Take away what `debug: underflow_overflow` hangs on every module.

    It fails at a module that is made later, as the merged layers are with which an adapter is
    compared.
    """
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), DebugUnderflowOverflow):
                del module._forward_hooks[key]


@contextmanager
def generating(model: PreTrainedModel) -> Iterator[None]:
    """Compute padded batches with a cache: as a model is loaded, and with whole rows for the
    head.
    """
    text = model.config.get_text_config()
    attention = model.config._attn_implementation
    returns_routing = getattr(text, "output_router_logits", False)
    with interpreted(model), contiguous_head(model), _without_sorting():
        as_loaded(model)
        try:
            yield
        finally:
            model.set_attn_implementation(attention)
            if returns_routing:
                text.output_router_logits = True


@contextmanager
def _without_sorting() -> Iterator[None]:
    """Write to places of a tensor as they come: no two are the same, so that sorting them first, as
    PyTorch does where it is asked to be deterministic, changes nothing but the time.
    """
    asked = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(asked, warn_only=warns)


@contextmanager
def contiguous_head(model: PreTrainedModel) -> Iterator[None]:
    """Hand the head whole rows.

    transformers hands it a slice, the last positions; where the weight is frozen, a matmul of
    PyTorch on CPU then copies all of it once per row, 3.6 GB and 10 s for 64 rows of a vocabulary
    of 49,152.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


# --- heads and layers ---


@contextmanager
def as_reward_model(model: type[PreTrainedModel]) -> Iterator[None]:
    """Make reward models of causal ones, of this class, without a word of the head that is new and
    of the one that is left out. TRL has the same for heads called `lm_head` only; Pythia's is
    `embed_out`.
    """
    missing = model._keys_to_ignore_on_load_missing
    unexpected = model._keys_to_ignore_on_load_unexpected
    model._keys_to_ignore_on_load_missing = [*(missing or []), r"^score\."]
    model._keys_to_ignore_on_load_unexpected = [*(unexpected or []), r"^(lm_head|embed_out)\."]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "DTensor random operators")  # drawn again, see `load`
            yield
    finally:
        model._keys_to_ignore_on_load_missing = missing
        model._keys_to_ignore_on_load_unexpected = unexpected


@contextmanager
def to_host() -> Iterator[None]:
    """Load parts of weights to the host's memory, where FSDP2 has to find those that are offloaded.

    transformers leaves them on the device. FSDP2 would take there only what is inside of a DTensor,
    to which no gradient on the host can be assigned then. One after the other: threads would read
    ahead, and a device may not hold them all.
    """
    places: tuple[Any, ...] = (core_model_loading, modeling_utils)
    kept = core_model_loading._dtensor_from_local_like
    ahead = os.environ.get(NOT_AHEAD)

    def on_host(part: Tensor, like: Any) -> Any:
        return kept(part, like).cpu()

    os.environ[NOT_AHEAD] = "1"
    for place in places:
        place._dtensor_from_local_like = on_host
    try:
        yield
    finally:
        for place in places:
            place._dtensor_from_local_like = kept
        del os.environ[NOT_AHEAD]
        if ahead is not None:
            os.environ[NOT_AHEAD] = ahead


NOT_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"


@contextmanager
def of_size(model: type[PreTrainedModel], most: int) -> Iterator[None]:
    """Load weights into models of this class of at most `most` bytes; else raise ValueError.

    transformers builds the model that a configuration describes, without memory, and then makes
    room for what the weights lack, however much that is.
    """
    kept = vars(model).get("_load_pretrained_model")
    load = model._load_pretrained_model

    def load_small(built: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        size = sum(tensor.nbytes for tensor in (*built.parameters(), *built.buffers()))
        if size > most:
            problem = f"the configuration describes a model of {size / 1e9:,.1f} GB"
            raise ValueError(f"{problem}, of which the weights hold a fraction")
        return load(built, *arguments, **options)

    model._load_pretrained_model = staticmethod(load_small)
    try:
        yield
    finally:
        del model._load_pretrained_model  # the library's is seen again
        if kept is not None:
            model._load_pretrained_model = kept


@contextmanager
def writing_by(write: Callable[[dict[str, Tensor], Path, dict[str, str]], None]) -> Iterator[None]:
    """Let `write` have the tensors that transformers and PEFT would write to a file of safetensors,
    with its path and its words. All else of what they save they write.
    """
    from peft import peft_model

    def save_file(tensors: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
        write(tensors, Path(path), metadata)

    places: tuple[Any, ...] = (modeling_utils, peft_model)
    kept = [place.safe_save_file for place in places]
    for place in places:
        place.safe_save_file = save_file
    try:
        yield
    finally:
        for place, function in zip(places, kept, strict=True):
            place.safe_save_file = function


def with_bias(model: Any) -> Any:
    """`model`, whose head TRL's fused head can read: PEFT's wrapper of a tied head that
    learns new tokens lacks a `bias`.
    """
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None
    return model


def merged_part(adapted: Any, part: nn.Module) -> nn.Module:
    """A part of PEFT's model with the update in its weights and nothing of PEFT's around them: what
    `merge_and_unload` makes of a whole model.
    """
    tuner = adapted.base_model
    whole, holder = tuner.model, nn.Module()
    holder.part = part
    tuner.model = holder
    try:
        tuner._unload_and_optionally_merge(merge=True, safe_merge=True)
    finally:
        tuner.model = whole
    merged: nn.Module = holder.part
    return merged


def as_saved(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names, and in the parts, that `save_pretrained` writes them in; of a layer
    at least, since some are made of several.
    """
    from transformers.core_model_loading import revert_weight_conversion

    saved: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return saved


@contextmanager
def using_adapter(model: nn.Module, adapter: str | None, otherwise: str) -> Iterator[None]:
    """Compute with one of the adapters of `model`, PEFT's, or with none, and `otherwise` after it.
    PEFT's own switch also decides what learns; this does not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    _switch(layers, adapter)
    try:
        yield
    finally:
        _switch(layers, otherwise)


def _switch(layers: list[Any], adapter: str | None) -> None:
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter:
            layer._active_adapter = [adapter]


def recompute(model: nn.Module, on: bool) -> None:
    """Whether the layers of a model that has activation checkpointing compute their activations
    again in the backward pass; transformers asks their training mode, and a model may have to be in
    evaluation mode. Some layers (OPT's, Falcon's) ask it for their dropout, too, which stays off.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = on
            code = plain_class(layer)
            if on and _drops(code):
                _hold_still(layer)


@cache
def _drops(layer: type[nn.Module]) -> bool:
    """Whether the code of a layer itself asks its training mode."""
    classes = layer.__mro__[: layer.__mro__.index(GradientCheckpointingLayer)]
    return any("self.training" in inspect.getsource(each) for each in classes)


def _hold_still(layer: Any) -> None:
    """Let a layer be in evaluation mode in its own code, each time that this is run."""
    if not hasattr(layer, "asked_to_train"):
        layer.register_forward_pre_hook(_without_dropout)
        layer.register_forward_hook(_as_asked, always_call=True)
        layer.asked_to_train = layer.training
    checkpointing = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpointing and not isinstance(checkpointing, _Still):
        layer._gradient_checkpointing_func = _Still(layer, checkpointing)


def _without_dropout(layer: Any, _: Any) -> None:
    layer.asked_to_train = layer.training
    layer.training = layer.training and layer.gradient_checkpointing  # see `_Still`


def _as_asked(layer: Any, *_: Any) -> None:
    layer.training = layer.asked_to_train


@dataclass
class _Still:
    """The checkpointing of a layer, which it is asked for in training mode, with its code in
    evaluation mode.
    """

    layer: Any
    checkpointing: Callable[..., Any]

    def __call__(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        return self.checkpointing(partial(self._still, forward), *arguments)

    def _still(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        training = self.layer.training
        self.layer.training = False
        try:
            return forward(*arguments)
        finally:
            self.layer.training = training


def without_dropout(model: nn.Module, but: str, recomputes: bool) -> None:
    """Let nothing in a model that trains be dropped but in the modules whose names end in `but`.

    TRL's `disable_dropout` reaches modules alone, not what a layer's own code drops. The model
    itself still says that it trains, by which TRL tells training from evaluation.
    """
    training = model.training
    model.eval()
    recompute(model, recomputes and training)
    for name, module in model.named_modules():
        if name.endswith(but):
            module.train(training)
    model.training = training


def show_no_bars() -> None:
    """Let compressed-tensors show no bars, when it reads a model and when that computes first: it
    asks nobody whether to."""
    from compressed_tensors.offload import dispatch
    from compressed_tensors.quantization.lifecycle import apply

    modules: tuple[Any, ...] = (apply, dispatch)
    for module in modules:
        module.tqdm = lambda steps, **_: steps


@contextmanager
def alone(accelerator: Accelerator) -> Iterator[None]:
    """Let a trainer compute as if there was no other process, and so wait for none."""

    def same(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return tensor

    with instead(accelerator, gather=same, reduce=same):
        yield


@contextmanager
def hashing_models(by: Callable[[nn.Module], str]) -> Iterator[None]:
    """Let TRL's DPOTrainer hash a model by this function: its own takes no model in parts."""
    from trl.trainer import dpo_trainer

    before = dpo_trainer.hash_module
    dpo_trainer.hash_module = by
    try:
        yield
    finally:
        dpo_trainer.hash_module = before


def preference_loss(
    library: type[Trainer], trainer: Any, forward: Callable[..., Any], batch: dict[str, Any]
) -> Tensor:
    """TRL's objective on held-out examples, the mean over those of a batch, by its own formulas.

    `library`: TRL's class of the `trainer`, whose weighing of a step is not asked; `forward`: what
    stands for the policy, so that outputs that are computed already need no second pass; `batch`:
    with the reference's log-probabilities. TRL's averages of the training stay.
    """
    precomputed = trainer.precompute_ref_logps
    trainer.precompute_ref_logps = True  # so that the batch's are read
    try:
        with reading_later(trainer.accelerator, even=False):
            return library.compute_loss(trainer, with_later_logits(forward), batch)
    finally:
        trainer.precompute_ref_logps = precomputed
        trainer._metrics["eval"].clear()
