"""TRL's fused head, which scores tokens without their logits: by a kernel of ours on a CPU, and
without a word to the host on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS

from llmpipe.kernels import cpu
from llmpipe.kernels.log_probs import head_of

CHUNK = 32768
"""Columns of logits that exist at once, for some thousands of tokens."""


def score_labels(device_type: str) -> None:
    """On a CPU: let TRL's fused head score the positions that have a label, by `LogProbs`."""
    if device_type != "cpu":
        return
    import trl.trainer.utils  # here, since it imports bitsandbytes, which `silence` has to precede

    trl.trainer.utils._use_triton = _scores_labels_only
    trl.trainer.utils._ChunkedLogProbFunction = LogProbs


def _scores_labels_only(device: torch.device) -> bool:
    """In place of TRL's `_use_triton`, which decides whether only positions with a label count."""
    return device.type in ("cpu", "cuda", "xpu")


class LogProbs:
    """`trl.kernels.ChunkedLogProbFunction` on CPU: the same arguments and outputs, fewer passes.

    What the kernel does not know (biases, soft caps, scales, the sum of squares) stays TRL's.
    """

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
    ) -> tuple[Tensor | None, ...]:
        """hidden [tokens, width], weight [vocabulary, width], targets [tokens]; `options`:
        temperature, chunk size, soft cap, scale, and the names of the outputs.

        Returns log-probabilities, entropy, sum of squares, mean logits, whether it is the
        likeliest: [tokens] each, or None where it is not among the outputs.
        """
        temperature, _, softcap, scale, outputs = options
        plain = bias is None and softcap is None and scale == temperature == 1.0
        if hidden.device.type != "cpu" or not plain or "log_sum_sq_probs" in outputs:
            return ChunkedLogProbFunction.apply(hidden, weight, bias, targets, *options)
        scores = cpu.log_probs(hidden, weight, targets, outputs)
        return scores.log_probs, scores.entropy, None, scores.mean_logits, scores.is_top1


def read_predictors(model: Any, outputs: tuple[str, ...]) -> None:
    """Let TRL's fused head of `model`, a causal one, also take `predictors`, int64 [targets]: the
    places in a batch of one row that are scored. Where they lie the host knows; TRL asks the
    device, and waits for it.

    `outputs`: what is said of each beside its log-probability.
    """
    fused = model.forward

    def forward(self: Any, *args: Any, predictors: Tensor | None = None, **kwargs: Any) -> Any:
        if predictors is None:
            return fused(*args, **kwargs)
        return _scored(self, predictors, outputs, *args, **kwargs)

    model.forward = MethodType(forward, model)


def _scored(
    model: Any,
    predictors: Tensor,
    outputs: tuple[str, ...],
    *args: Any,
    labels: Tensor,
    fused_lm_head: bool,
    **kwargs: Any,
) -> Any:
    """TRL's output for those places alone, [targets] each."""
    from trl.trainer.utils import FusedCausalLMOutput

    assert fused_lm_head  # nothing else is asked of a batch that has `predictors`
    hidden = model.base_model(*args, **kwargs).last_hidden_state[0].index_select(0, predictors)
    targets = labels[0].index_select(0, predictors + 1)
    log_probs, *more = _scores(model, hidden, targets, outputs)
    return FusedCausalLMOutput(
        log_probs=log_probs,
        label_mask=torch.ones_like(targets, dtype=torch.bool),
        **dict(zip(OPTIONAL_OUTPUTS, more, strict=True)),
    )


def _scores(
    model: Any, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...]
) -> tuple[Tensor | None, ...]:
    """Log-probabilities of targets, [targets], and TRL's other outputs in their order."""
    head = head_of(model)
    linear = head.linear
    bias = getattr(linear, "bias", None)
    scores: tuple[Tensor | None, ...] = ChunkedLogProbFunction.apply(
        hidden, linear.weight, bias, targets, 1.0, CHUNK, head.cap, head.scale, outputs
    )
    return scores


def read_targets(
    model: Any,
    outputs: tuple[str, ...],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Let TRL's fused head of `model`, a causal one, also take `targets`, int64 [targets]: the
    places of what is learned in a padded batch, among the tokens of all rows but their first ones.

    `outputs`: what is said of each beside its log-probability; `autocast`: what a pass runs in
    where Accelerate was given the model before.
    """
    fused = model.forward

    def forward(self: Any, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return fused(*args, **kwargs)
        with autocast():
            return _scored_in_place(self, targets, outputs, *args, **kwargs)

    model.forward = MethodType(forward, model)


def _scored_in_place(
    model: Any,
    targets: Tensor,
    outputs: tuple[str, ...],
    *args: Any,
    labels: Tensor,
    fused_lm_head: bool,
    **kwargs: Any,
) -> Any:
    """TRL's output of a padded batch, [rows, tokens - 1] each, 0 where nothing is learned."""
    from trl.trainer.utils import FusedCausalLMOutput

    assert fused_lm_head  # nothing else is asked of a batch that has `targets`
    states = model.base_model(*args, **kwargs).last_hidden_state
    labels = labels[:, 1:]
    before = targets + targets // labels.shape[1]  # its predictor, among the tokens of all rows
    hidden = states.flatten(0, 1).index_select(0, before)
    scores = _scores(model, hidden, labels.flatten().index_select(0, targets), outputs)
    spread = [
        None
        if score is None
        else score.new_zeros(labels.numel()).index_copy(0, targets, score).view(labels.shape)
        for score in scores
    ]
    return FusedCausalLMOutput(
        log_probs=spread[0],
        label_mask=labels != -100,
        **dict(zip(OPTIONAL_OUTPUTS, spread[1:], strict=True)),
    )
