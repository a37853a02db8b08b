"""What learning from rewards is asked for: the sections that `ppo` and `grpo` both have, and above
them what all have that draw answers and score them. Without torch, for the stages and for the room
`rl`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from llmpipe.recipe.rewards import TURNS, Reward
from llmpipe.recipe.sections import (
    Data,
    Launch,
    Length,
    Optim,
    Positive,
    Prompts,
    Recipe,
    Rows,
    Samples,
    Section,
    Share,
    Source,
    Start,
    Training,
)


class KL(Section):
    """The parent, which the policy is held to."""

    coefficient: Annotated[float, Field(ge=0)] = 0.05
    """Weight of the KL penalty, per token."""
    target: Annotated[float, Field(gt=0)] | None = None
    """Nats per answer that the coefficient is steered towards (Ziegler 2019, section 2.2); without
    it, it stays."""
    horizon: Positive = 10_000
    """Episodes over which the coefficient adapts."""


class Drawn(Section):
    """How answers are drawn that are scored."""

    max_new_tokens: Positive = 128
    """Longest answer in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Logits are divided by it."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that have this share together."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw from so many of the likeliest tokens; 0 is no limit."""
    think: bool = False
    """Have each answer begin with a block of thought: the prompt ends in `<think>`, put there where
    the template puts none, also in the template of what is published, and the block is learned as
    all else is. Rewards look at what follows `</think>`, and at nothing where that never came;
    `format` and `length` see all."""


class Rollout(Drawn):
    """How answers are drawn."""

    engine: Literal["local", "vllm"] = "local"
    """What draws: `local` is the policy itself. `vllm` is a copy of it in vLLM, on the same GPU and
    in one process, which is given the weights before each rollout and held to what the policy says
    of a probe. The two round differently, and so draw different answers. vLLM asks for an older
    transformers than llmpipe does, and runs with its: install vLLM first."""
    solved: Annotated[list[Share], Field(min_length=2, max_length=2)] | None = None
    """`[0.1, 0.9]`: learn from prompts alone that the policy solves neither too rarely nor too
    often: that it answers rightly, before it learns, in a share of `tries` between these. What is
    left out is counted. An answer is right that the first verifier, environment or code among the
    rewards gives 1; of an environment of turns, where its rewards add up to 1."""
    tries: Positive = 8
    """Answers to each prompt that `solved` counts."""
    unfinished: float = 0.0
    """Added to the score of an answer without an end token, mostly negative. A reward model reads
    such an answer as if it had ended there. (Huang 2024 puts it in the score's place instead.)"""
    overlong: Annotated[int, Field(ge=0)] = 0
    """The last so many of `max_new_tokens` cost an answer that needs them: from 0 before them down
    to 1 of its score at the end, in equal steps (DAPO, Yu 2025, equation 13). 0 costs nothing. Of
    several turns it is the last so many that all of them together may have."""

    @property
    def is_partial(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_k > 0 or self.top_p < 1

    @model_validator(mode="after")
    def _long_enough(self) -> Rollout:
        if self.overlong > self.max_new_tokens:
            raise ValueError(
                f"overlong ({self.overlong}) is more than max_new_tokens ({self.max_new_tokens})"
            )
        return self


class Algorithm(Section):
    """How an update learns from its answers."""

    epochs: Annotated[int, Field(ge=1, le=1000)] = 4
    """Passes over each rollout."""
    minibatches: Positive = 4
    """Optimizer steps per pass."""
    clip: Annotated[float, Field(gt=0)] = 0.2
    """How far the probability ratio may leave 1 before the policy's loss stops counting."""
    entropy: Annotated[float, Field(ge=0)] = 0.0
    """Weight of an entropy bonus."""
    stop_kl: Annotated[float, Field(gt=0)] | None = None
    """End an update's passes when the policy has moved so many nats per token since the rollout."""


class Mixed(Data):
    """Rows of a mixture, as `sft` has them."""

    length_field: ClassVar[str] = "mixture.max_length"


class Mixture(Section):
    """PPO-ptx (Ouyang 2022, equation 2): what the policy must not forget is learned beside the
    reward."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Text or conversations, as for `sft`; they are packed, and take the template of `data`."""
    max_length: Length = 512
    """Longest sequence in tokens."""
    batch_size: Positive = 4
    """Sequences beside each optimizer step, over all processes."""
    coefficient: Annotated[float, Field(gt=0)] = 1.0
    """Weight of their loss, nats per token, beside the policy's."""

    def data(self, beside: Prompts) -> Mixed:
        """Its rows, with all else as `beside` has it."""
        same = {
            name: getattr(beside, name)
            for name in ("template", "chat_template_kwargs", "max_rejected", "processes")
        }
        return Mixed(train=self.train, max_length=self.max_length, **same)


class Updates(Optim):
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the norm of the policy's gradient, and that of the critic's, to this; 0 does not
    clip."""
    batch_size: Positive = 64
    """Answers per update, over all processes."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Passes over the prompts."""
    steps: Positive | None = None
    """Stop after this many updates instead; overrides `epochs`."""
    scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the learning rate after the warm-up; both count updates."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """AdamW's epsilon."""


class RolloutLaunch(Launch):
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Episodes per process and training pass; `auto` fills a pass by their tokens. No choice
    changes the losses."""
    rollout_batch_size: Positive = 64
    """Answers that a process draws at a time."""


class Scored(Recipe):
    """What all have that draw answers to prompts and score them."""

    model: Start
    data: Prompts
    """Prompts, and the columns that rewards read."""
    reward: Annotated[list[Reward], Field(min_length=1)]
    """Where scores come from; they are added."""
    rollout: Drawn = Field(default_factory=Drawn)
    """Sampling."""

    @model_validator(mode="after")
    def _thinks(self) -> Scored:
        thinking = self.data.chat_template_kwargs.get("enable_thinking")
        if self.rollout.think and thinking is False:
            raise ValueError("rollout.think, and data.chat_template_kwargs.enable_thinking is off")
        return self

    @model_validator(mode="after")
    def _somebody_asks(self) -> Scored:
        environments = [source for source in self.reward if source.environment]
        if len(environments) > 1:
            raise ValueError("reward: one environment asks, or answers, and there are several")
        if self.asks and self.data.train:
            raise ValueError("data.train: the environment asks, and no rows are read: leave it out")
        if self.asks and self.data.eval.sources:
            raise ValueError("data.eval.sources: the environment asks; hold out a share (holdout)")
        if not self.asks and not self.data.train:
            raise ValueError("data.train: required, but missing: nobody asks anything")
        return self

    @property
    def asks(self) -> Reward | None:
        """The environment that asks, where there is one."""
        return next((source for source in self.reward if source.asks), None)

    @property
    def plays(self) -> Reward | None:
        """The environment that answers the policy's turns, where there is one."""
        return next((source for source in self.reward if source.plays), None)

    def rows(self) -> dict[str, Rows]:
        return {f"data.train.{i}": source for i, source in enumerate(self.data.train)}

    def references(self) -> dict[str, str]:
        named = {f"reward.{i}.model": source.model for i, source in enumerate(self.reward)}
        return {"model": self.model} | {at: name for at, name in named.items() if name}

    def packages(self) -> list[tuple[str, str]]:
        return super().packages() + [
            (f"reward.{i}.{field}", package)
            for i, source in enumerate(self.reward)
            for field, package in source.packages()
        ]

    def files(self) -> dict[str, str]:
        return self.data.files() | {
            f"reward.{i}.{field}": path
            for i, source in enumerate(self.reward)
            for field, path in source.files()
        }


class RLRecipe(Scored, Training):
    """What the loop of `rl` reads; a stage adds its name, its inputs and what is its own."""

    model: Start
    data: Prompts
    """Prompts, and the columns that rewards read."""
    reference: KL = Field(default_factory=KL)
    """How the policy is held to its parent."""
    rollout: Rollout = Field(default_factory=Rollout)
    """Sampling, as long as the policy learns."""
    algorithm: Algorithm = Field(default_factory=Algorithm)
    """How an update learns from them."""
    mixture: Mixture | None = None
    """Rows whose loss is mixed in."""
    optim: Updates
    """The optimizer and its schedule."""
    launch: RolloutLaunch = Field(
        default_factory=RolloutLaunch, json_schema_extra={"identity": False}
    )
    """The machine: never part of the result's identity."""
    samples: Samples = Field(default_factory=Samples)
    """Prompts that show what changed."""

    @model_validator(mode="after")
    def _possible(self) -> RLRecipe:
        if self.adapter and self.adapter.rewrites:
            raise ValueError(
                f"adapter.init: {self.adapter.init} rewrites the model, which is the reference"
            )
        if self.evaluation.keep_best or self.evaluation.patience:
            raise ValueError(
                "evaluation.keep_best and patience: "
                "a score that rises is no sign that the policy got better"
            )
        batch_size, minibatches = self.optim.batch_size, self.algorithm.minibatches
        if batch_size % minibatches:
            raise ValueError(
                f"optim.batch_size ({batch_size}) must be a multiple of "
                f"algorithm.minibatches ({minibatches})"
            )
        if self.quantization and self.quantization.bits == 8:
            raise ValueError(
                "quantization.bits: 8 bits make an answer depend on those beside it; "
                f"{self.stage} takes 4"
            )
        if self.adapter and self.adapter.embeddings == "all":
            raise ValueError(f"adapter.embeddings: {self.stage} trains no embeddings")
        return self

    @model_validator(mode="after")
    def _solved_by(self) -> RLRecipe:
        solved = self.rollout.solved
        if solved is None:
            return self
        if solved[0] > solved[1]:
            raise ValueError(f"rollout.solved: nothing lies between {solved[0]} and {solved[1]}")
        if not any(source.tells_right for source in self.reward):
            raise ValueError(
                "rollout.solved: no reward tells what is right: "
                "that takes a verifier, an environment or code"
            )
        return self

    @model_validator(mode="after")
    def _takes_turns(self) -> RLRecipe:
        if self.plays and self.rollout.think:
            raise ValueError(
                "rollout.think opens a block of thought in the prompt alone, "
                "and with an environment of turns every answer would need one"
            )
        if self.plays and self.rollout.engine == "vllm":
            raise ValueError(
                "rollout.engine: vllm draws single answers, and no turns with an environment: "
                "take the engine local"
            )
        return self

    @model_validator(mode="after")
    def _vllm_can(self) -> RLRecipe:
        if self.rollout.engine != "vllm":
            return self
        if self.rollout.is_partial:
            raise ValueError(
                "rollout.engine: vllm does not say which tokens top_k and top_p left to draw from, "
                "and what is learned would be of another distribution: "
                "take top_k 0 and top_p 1, or the engine local"
            )
        if self.quantization:
            raise ValueError(
                "rollout.engine: vllm is given merged weights, and those of a quantized model "
                "would be rounded anew at each update: take the engine local"
            )
        if self.launch.processes not in ("auto", 1):
            raise ValueError(
                f"rollout.engine: vllm draws in one process, and launch.processes is "
                f"{self.launch.processes}"
            )
        return self

    @property
    def group(self) -> int:
        """Answers to each prompt of an update."""
        return 1

    @property
    def prompts(self) -> int:
        """Prompts of an update."""
        return self.optim.batch_size // self.group

    @property
    def turns(self) -> int:
        """How often the policy speaks in an episode, at most."""
        return self.plays.turns or TURNS if self.plays else 1

    @property
    def max_response(self) -> int:
        """Tokens that the policy says in an episode, at most."""
        return self.turns * self.rollout.max_new_tokens

    @property
    def has_reference(self) -> bool:
        """Whether the parent is kept beside the policy."""
        return True

    @property
    def longest(self) -> int:
        answered = self.data.max_length + self.max_response
        return max(answered, self.mixture.max_length if self.mixture else 0)

    @property
    def packs(self) -> bool:
        return True

    def rows(self) -> dict[str, Rows]:
        mixed = self.mixture.train if self.mixture else []
        held_out = self.data.eval.sources
        return (
            super().rows()
            | {f"data.eval.sources.{i}": source for i, source in enumerate(held_out)}
            | {f"mixture.train.{i}": source for i, source in enumerate(mixed)}
        )

    def packages(self) -> list[tuple[str, str]]:
        drawn_by = [("rollout.engine", "vllm")] if self.rollout.engine == "vllm" else []
        return super().packages() + drawn_by
