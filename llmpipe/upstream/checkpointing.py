"""Which activations layers keep for their backward pass, and which they compute again.

`full` keeps what goes into a layer, by transformers' own checkpointing. `selective` keeps what came
of matrix products and attention as well (Korthikanti 2022, https://arxiv.org/abs/2205.05198): what
lies between them costs much memory and little time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachingTorchDispatchMode,
    _is_compiling,
    _VersionWrapper,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

KEPT = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    *("aten::_int_mm", "aten::_scaled_mm", "aten::_grouped_mm"),
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    *("aten::_flash_attention_forward", "aten::_efficient_attention_forward"),
    *("torch_attn::_varlen_attn", "llmpipe::attend_rows", "flex_attention"),
    *("bitsandbytes::int8_linear_matmul", "bitsandbytes::int8_scaled_mm"),
    *("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit"),
}
"""Operations whose results are kept. Packages of attention have namespaces of any name."""


def checkpoint_layers(model: PreTrainedModel, kind: str, **options: Any) -> None:
    """Let the layers of `model` compute activations again, `selective` or `full`, in training mode.

    `options`: of torch's `checkpoint`. Raises ValueError where the architecture cannot.
    """
    as_asked(model, kind)
    model.activation_checkpointing_enable({"use_reentrant": False} | options)


def as_asked(model: PreTrainedModel, kind: str) -> None:
    """Let whoever turns checkpointing on in `model` get this kind of it: its options are kept in
    files, which hold no functions.
    """
    vars(model).pop("_set_gradient_checkpointing", None)  # the class's is seen again
    if kind != "selective":
        return
    by_class = model._set_gradient_checkpointing

    def set_selective(
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        selective = partial(gradient_checkpointing_func, context_fn=contexts)
        by_class(enable, selective, every_n_layers)

    vars(model)["_set_gradient_checkpointing"] = set_selective


def contexts() -> Any:
    """What a layer's passes, forward and once more, are computed in."""
    _, again = create_selective_checkpoint_contexts(policy)
    return Keeping(policy, again.storage), again


class Keeping(_CachingTorchDispatchMode):
    """torch's, in which a layer may also write to what is kept of it (`scores /= scale`): that gets
    a memory apart first. torch itself stops at the backward pass, or, where it was a view that was
    written to, computes other gradients without a word.
    """

    supports_higher_order_operators = True  # flex_attention asks for torch's very class, or this

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if _writes(func) and not _is_compiling(func, args, options):
            for place, argument in enumerate(func._schema.arguments):
                if argument.is_write:
                    given = args[place] if place < len(args) else options.get(argument.name)
                    self._set_apart({_memory(each) for each in tree_iter(given)} - {None})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _set_apart(self, memories: set[int | None]) -> None:
        """Copy what is kept in memories that are about to be written to."""
        for kept in tree_iter([*self.storage.values()]):
            if isinstance(kept, _VersionWrapper) and _memory(kept.val) in memories:
                vars(kept).update(vars(_VersionWrapper(kept.val.clone())))


def _memory(value: Any) -> int | None:
    """Where the numbers of a tensor lie; None of anything else."""
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else None


def policy(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    """Whether the result of an operation is kept."""
    name = operation.name().partition(".")[0]
    kept = name in KEPT or "flash_attn" in name
    if kept and not _writes(operation) and not _drops(operation, arguments, options):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _writes(operation: Any) -> bool:
    """Whether its result is a tensor that it was given."""
    schema = getattr(operation, "_schema", None)
    return bool(schema and schema.is_mutable)


def _drops(operation: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether it draws what it drops. Such an operation has to be computed again: who draws next
    would else draw other numbers than before.
    """
    schema = getattr(operation, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else []
    given = dict(zip(names, arguments, strict=False)) | options
    shares = [given.get(name) for name in ("dropout_p", "dropout")]
    return any(isinstance(share, float) and share > 0 for share in shares)
