"""Which activations layers keep for their backward pass, and which they compute again.

`full` keeps what goes into a layer, by transformers' own checkpointing. `selective` keeps what came
of matrix products and attention as well (Korthikanti 2022, https://arxiv.org/abs/2205.05198): what
lies between them costs much memory and little time.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.utils.checkpoint import (
    CheckpointPolicy,
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
    return create_selective_checkpoint_contexts(policy)


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
