"""The equations of GRPO and its kin, as functions of tensors: what an answer is worth beside the
others of its group, and how much each of its tokens counts. tests/rl/test_conformance.py has each
once more, as a loop over numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmpipe.rl.method import Total

# Added to a deviation. Answers that a reward model scores alike but for rounding would else be told
# apart as if they were right and wrong.
ROUNDING = 1e-4


def have_spread(scores: Tensor) -> Tensor:
    """Which groups have answers of more than one score: [groups, group] -> bool [groups]."""
    return scores.max(1).values > scores.min(1).values


def advantages(scores: Tensor, baseline: str, normalize: str) -> Tensor:
    """What each answer is worth beside the others of its group, [groups, group] -> the same.

    group: A_i = r_i - mean(r) (Shao 2024, section 4.1.2; without the deviation Liu 2025);
    leave-one-out: A_i = r_i - mean of r_j over j != i (Ahmadian 2024). Of `normalize: std` this is
    divided by std(r), which is that of a sample.
    """
    mean = scores.mean(1, keepdim=True)
    if baseline == "leave-one-out":
        mean = (scores.sum(1, keepdim=True) - scores) / (scores.shape[1] - 1)
    above = scores - mean
    return above / (scores.std(1, keepdim=True) + ROUNDING) if normalize == "std" else above


def weights(lengths: Sequence[int], loss: str, total: Total, most: int) -> Tensor:
    """How much each token counts in the loss of a minibatch, so that this is a plain sum; float64
    [tokens of the responses of these `lengths`].

    token: 1 / all tokens (Yu 2025, eq. 12); sequence: 1 / (answers x the answer's own length) (Shao
    2024, eq. 3); constant: 1 / (answers x `most`) (Liu 2025). `total`: of the whole minibatch, that
    of all processes; `most`: tokens of the longest answer that may be.
    """
    by_answer = {
        "token": [1 / total.tokens for _ in lengths],
        "sequence": [1 / (total.answers * length) for length in lengths],
        "constant": [1 / (total.answers * most) for _ in lengths],
    }[loss]
    each = torch.tensor(by_answer, dtype=torch.float64)
    return each.repeat_interleave(torch.tensor(lengths))


def of_sequences(log_ratio: Tensor, lengths: Sequence[int]) -> Tensor:
    """The mean log-ratio of each answer, in the place of that of each of its tokens (Zheng 2025,
    eq. 7): [tokens] -> [tokens]."""
    parts = log_ratio.split(list(lengths))
    return torch.cat([part.mean().expand(len(part)) for part in parts])
