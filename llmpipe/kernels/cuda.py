"""Attention document by document, on a GPU of NVIDIA's."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmpipe.kernels import apart
from llmpipe.kernels.apart import Weighing

WIDEST = 256
"""Numbers of a head, at most, that flash-attention takes."""


def attend_documents(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, how: Weighing
) -> Tensor:
    """`apart.attend_documents`, by flash-attention's kernel for rows of documents where it can.

    That one computes in half precision, without dropout, and needs a card of 2020 or later.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if how.dropout or not _fits(query, value):
        return apart.attend_documents(query, key, value, ends, longest, how)
    rows = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
    back = -1 if how.window is None else how.window - 1  # beside the token itself
    return attend_rows(*rows, ends, longest, how.scaling, back)[0][None]


def _fits(query: Tensor, value: Tensor) -> bool:
    """Whether flash-attention takes such tensors on their card."""
    width = query.shape[-1]
    half = value.dtype in (torch.bfloat16, torch.float16)
    even = width % 8 == 0 and width <= WIDEST and width == value.shape[-1]
    return half and even and _is_recent(query.device)


@cache
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


# --- flash-attention, deterministic where that is asked for ---


@torch.library.custom_op("llmpipe::attend_rows", mutates_args=())
def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scaling: float | None,
    back: int,
) -> tuple[Tensor, Tensor]:
    """Causal attention of documents end to end (Dao 2023, https://arxiv.org/abs/2307.08691).

    query [tokens, heads, dim], key and value [tokens, kv_heads, dim], `ends` int32 [documents + 1];
    a token sees `back` tokens before it, -1: all. Returns [tokens, heads, dim], and the logarithms
    of the sums of weights, [heads, tokens], for the backward pass.

    `torch.nn.attention.varlen` has the same kernel, but its backward pass adds up in any order
    unless all of PyTorch is strictly deterministic, and much of it cannot be.
    """
    attended, log_sums, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        0.0,
        back < 0,
        False,
        scale=scaling,
        window_size_left=back,
        window_size_right=0,
    )
    return attended, log_sums


@attend_rows.register_fake
def _shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scaling: float | None,
    back: int,
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = query.shape
    return torch.empty_like(query), query.new_empty(heads, tokens, dtype=torch.float32)


@torch.library.custom_op("llmpipe::attend_rows_backward", mutates_args=())
def _backward(
    grads: list[Tensor],
    saved: list[Tensor],
    longest: int,
    scaling: float | None,
    back: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grads`: of what was attended, alone; `saved`: query, key, value, ends, and the results."""
    query, key, value, ends, attended, log_sums = saved
    with _strictly():
        gradients = torch.ops.aten._flash_attention_backward(
            grads[0].contiguous(),
            query,
            key,
            value,
            attended,
            log_sums,
            ends,
            ends,
            longest,
            longest,
            0.0,
            back < 0,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # of dropout, which is none
            torch.empty(0, device=query.device),
            scale=scaling,
            window_size_left=back,
            window_size_right=0,
        )
    of_query, of_key, of_value = gradients
    return of_query, of_key, of_value


@_backward.register_fake
def _backward_shapes(
    grads: list[Tensor],
    saved: list[Tensor],
    longest: int,
    scaling: float | None,
    back: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(saved[0]), torch.empty_like(saved[1]), torch.empty_like(saved[2])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ends, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, ends, *output)


def _differentiate(ctx: Any, of_attended: Tensor, of_log_sums: Tensor) -> tuple[Any, ...]:
    gradients = _backward([of_attended], list(ctx.saved_tensors), *ctx.numbers)
    return (*gradients, None, None, None, None)


attend_rows.register_autograd(_differentiate, setup_context=_save)


@contextmanager
def _strictly() -> Iterator[None]:
    """Where PyTorch was asked to be deterministic if it can, be so: flash-attention can, and only
    does where a warning would not be enough.
    """
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not (warns and torch.are_deterministic_algorithms_enabled()):
        yield
        return
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(True, warn_only=True)
