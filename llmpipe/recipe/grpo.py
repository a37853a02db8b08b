"""What `grpo` has beside the sections of `reinforcement`: groups of answers, and how each answer is
judged by the others of its group. docs/road/grpo.md has which settings are which paper."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.reinforcement import KL, Algorithm, RLRecipe, Rollout


class GroupKL(KL):
    """The parent, which the policy is held to. With a coefficient of 0 none is loaded."""

    place: Literal["loss", "reward"] = "loss"
    """loss: k3 = q/p - 1 + log p/q of each token is added to its loss (Shao 2024, equation 4); in
    expectation that is the gradient of KL(q || p), q the parent. reward: log p/q, summed over the
    answer, is taken off its score, which pulls along the gradient of KL(p || q), as in `ppo`."""


class Groups(Rollout):
    """How answers are drawn."""

    group: Annotated[int, Field(ge=2)] = 8
    """Answers to each prompt. optim.batch_size counts answers, and is a multiple of it."""
    without_spread: Literal["keep", "skip", "resample"] = "keep"
    """What becomes of a group whose answers all have one score, and so no advantage. keep: it
    counts in the mean of the loss, and where KL is in the loss that is learned of it. skip: it is
    left out, and means are over the rest. resample: further prompts are drawn in its place, ten
    times at most, and what has no spread then is skipped (DAPO's dynamic sampling, Yu 2025)."""


class Relative(Algorithm):
    """How an update learns from its answers, each beside the others of its group."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over each rollout. With one of one minibatch every ratio is 1, and nothing is
    clipped."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per pass. They may split groups: advantages are known before."""
    clip_high: Annotated[float, Field(gt=0)] | None = None
    """How far the ratio may rise above 1, where that is not `clip`, which then bounds it from below
    (DAPO's clip-higher, Yu 2025)."""
    baseline: Literal["group", "leave-one-out"] = "group"
    """What is taken off a score: the mean of its group (Shao 2024), or of the others in it (RLOO,
    Ahmadian 2024)."""
    normalize: Literal["std", "none"] = "std"
    """std: what is left is divided by the group's deviation, so that rewards of any size teach
    alike (Shao 2024), and so do groups that nearly agree. none: not (Dr. GRPO, Liu 2025)."""
    loss: Literal["token", "sequence", "constant"] = "token"
    """What the loss is the mean over. token: all tokens of the minibatch (DAPO, Yu 2025).
    sequence: answers, each the mean of its tokens (Shao 2024), whose tokens count the less the
    longer it is. constant: answers, each the sum of its tokens by `max_new_tokens` (Dr. GRPO, Liu
    2025), and by the turns that it may have."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: each token's ratio, or the geometric mean of an answer's (GSPO, Zheng 2025),
    whose bounds are far smaller: 0.0003 and 0.0004 there."""


class GRPORecipe(RLRecipe):
    """The stage adds its name and its inputs."""

    reference: GroupKL = Field(default_factory=GroupKL)
    """How the policy is held to its parent."""
    rollout: Groups = Field(default_factory=Groups)
    """Sampling, as long as the policy learns."""
    algorithm: Relative = Field(default_factory=Relative)
    """How an update learns from them."""

    @model_validator(mode="after")
    def _groups_fit(self) -> GRPORecipe:
        batch_size, group = self.optim.batch_size, self.rollout.group
        if batch_size % group:
            raise ValueError(
                f"optim.batch_size ({batch_size}) counts answers, "
                f"and must be a multiple of rollout.group ({group})"
            )
        if self.reference.target and not self.reference.coefficient:
            raise ValueError("reference.target steers a coefficient, which is 0")
        return self

    @property
    def group(self) -> int:
        return self.rollout.group

    @property
    def has_reference(self) -> bool:
        return self.reference.coefficient > 0
