"""What an update does with its episodes: a few passes over them, each in minibatches, and for each
of these one optimizer step.

A pass divides what it sums by what there is in the whole minibatch, that of all processes, and
gradients are summed over processes once a step, so that neither micro-batches nor processes change
the result. What a pass adds is the method's: `ppo`, `grpo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmpipe.data.pack import IGNORED
from llmpipe.models.drawing.draw import Episode
from llmpipe.parallel.parts import add_gradients, refuse_gathered, refuse_whole
from llmpipe.parallel.tensors import clipped_norm
from llmpipe.recipe.reinforcement import Mixture, RLRecipe
from llmpipe.rl.experience import COLUMNS, Experience
from llmpipe.rl.method import Ground, Method, Total
from llmpipe.rl.optimizer import Schedule, make_optimizer, of_critic
from llmpipe.rl.packing import pack_rows, sent, texts_of
from llmpipe.rl.passes import PassSize
from llmpipe.rl.seeds import Shuffled, Use, generator
from llmpipe.rl.watch import Metrics, not_finite

FILLER = {"input_ids": [0, 0], "labels": [IGNORED, 0], "seq_lengths": [2]}
"""A row of sft data, to be learned with no weight."""


@dataclass(frozen=True)
class MixedRows:
    """Sft data whose loss is mixed in (PPO-ptx, Ouyang 2022, eq. 2)."""

    recipe: Mixture
    rows: Shuffled


@dataclass
class _Sums:
    """What the minibatches of an update add up to."""

    metrics: Metrics = field(default_factory=dict)
    """Sums over tokens."""
    tokens: float = 0.0
    norms: Metrics = field(default_factory=dict)
    """Sums over optimizer steps, of gradients."""
    optimizer_steps: float = 0.0

    def add(self, metrics: Metrics, tokens: float, norms: Metrics) -> None:
        _add(self.metrics, metrics)
        _add(self.norms, norms)
        self.tokens += tokens
        self.optimizer_steps += 1


def _add(sums: Metrics, values: Metrics) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value


class Learner:
    """The weights that learn, and their optimizer."""

    def __init__(
        self,
        ground: Ground[RLRecipe],
        method: Method,
        steps: int,
        mixture: Sequence[dict[str, Any]] | None,
    ):
        """`steps`: updates of the whole training; `mixture`: rows of sft data, where the recipe
        mixes any in."""
        self.actors = actors = ground.actors
        self.recipe: RLRecipe = ground.recipe
        self.hardware = ground.hardware
        self.world = ground.world
        self.method = method
        recipe, hardware = self.recipe, self.hardware
        self.pass_size = PassSize.of(recipe.launch, hardware)
        self.mixture: MixedRows | None = None
        if recipe.mixture and mixture is not None:
            rows = Shuffled(mixture, recipe.seed, Use.MIXTURE)
            self.mixture = MixedRows(recipe.mixture, rows)
        self.weights = actors.learned()
        parts = {
            norm: [w for name, w in self.weights.items() if of_critic(name) == critic]
            for norm, critic in (("grad_norm", False), ("val/grad_norm", True))
        }
        self.clipped = {norm: weights for norm, weights in parts.items() if weights}
        for role in actors.cast.learning if hardware.spread else ():
            if actors.adapted:
                refuse_gathered(role.model)
            else:
                refuse_whole(role.model)
                add_gradients(role.model)
        self.optimizer = make_optimizer(actors, recipe)
        self.schedule = Schedule.of(self.optimizer, recipe, steps)

    @property
    def is_sharded(self) -> bool:
        """Whether what learns is in parts, as checkpoints have it."""
        return self.hardware.sharded and not self.actors.adapted

    def learn(self, step: int, experiences: dict[int, Experience]) -> Metrics:
        """The passes over a rollout; means over its tokens.

        `experiences`: by their places in the batch of all processes, of which each process has
        every `world.size`-th; of what is missing everywhere nothing is learned.
        """
        algorithm = self.recipe.algorithm
        size = self.recipe.optim.batch_size
        lengths, whole = self._lengths(experiences)
        sums = _Sums()
        for epoch in range(algorithm.epochs):
            shuffle = generator(self.recipe.seed, Use.SHUFFLE, step, epoch)
            order = torch.randperm(size, generator=shuffle)
            order = order[lengths[order] > 0]
            for chosen in order.chunk(algorithm.minibatches) if len(order) else ():
                total = Total(float(lengths[chosen].sum()), len(chosen))
                minibatch = [experiences[i] for i in chosen.tolist() if i in experiences]
                passes = self._most_passes(chosen, whole) if self.hardware.sharded else 0
                metrics, norms = self.optimizer_step(
                    step, int(sums.optimizer_steps), minibatch, total, passes
                )
                sums.add(metrics, total.tokens, norms)
                moved = metrics["policy/approxkl"] / total.tokens
                if algorithm.stop_kl and moved > algorithm.stop_kl:
                    return self._means(sums)
        return self._means(sums)

    def attempt(self, episode: Episode) -> None:
        """Fill a pass with an episode, as often as there is room for it, and add its gradients."""
        size = self.pass_size
        count = max(1, size.tokens // episode.tokens) if size.tokens else size.episodes
        anything = torch.ones(len(episode.response), device=self.world.device)
        texts = texts_of([episode] * count, self.world.device)
        chosen = [Experience(episode, text, *[anything] * COLUMNS) for text in texts]
        self.method.learn(chosen, Total(1.0, 1.0))

    def _lengths(self, experiences: dict[int, Experience]) -> Tensor:
        """Tokens of every response in the batch of all processes that is learned from, and with its
        prompt, float32 [2, batch]; else 0."""
        lengths = torch.zeros(2, self.recipe.optim.batch_size)
        for place, experience in experiences.items():
            episode = experience.episode
            lengths[:, place] = torch.tensor([len(episode.response), episode.tokens])
        return self.world.sum(lengths)

    def _most_passes(self, chosen: Tensor, lengths: Tensor) -> int:
        """How many passes a minibatch takes in the process that has most of it. Nobody is asked:
        each knows the `lengths` [batch] of all.
        """
        size = self.world.size
        shares = [chosen[chosen % size == rank] for rank in range(size)]
        return max(len(self.pass_size.cut(lengths[share].tolist())) for share in shares)

    def _means(self, sums: _Sums) -> Metrics:
        if not sums.optimizer_steps:  # nothing was there to learn from
            names = ("loss", *self.clipped, *self._watched, "optimizer_steps")
            return dict.fromkeys(names, 0.0)
        means = {name: value / sums.tokens for name, value in sums.metrics.items()}
        loss = self.method.loss(means)
        if self.mixture:
            loss += self.mixture.recipe.coefficient * means["loss/mixture"]
        return {
            "loss": loss,
            **{name: norm / sums.optimizer_steps for name, norm in sums.norms.items()},
            **means,
            "optimizer_steps": sums.optimizer_steps,
        }

    @property
    def _watched(self) -> tuple[str, ...]:
        return (*self.method.watched, *(("loss/mixture",) if self.mixture else ()))

    def optimizer_step(
        self, step: int, number: int, minibatch: list[Experience], total: Total, passes: int
    ) -> tuple[Metrics, Metrics]:
        """Learn from a minibatch; sums over its tokens in all processes, and the norms of the
        gradients. The host reads one tensor, before anything has changed.

        `number`: of the optimizer step in update `step`; `passes`: at least so many, since models
        in parts compute together.
        """
        sums = self._gradients(minibatch, total, passes)
        names = self._watched
        if self.mixture:
            algorithm = self.recipe.algorithm
            before = step * algorithm.epochs * algorithm.minibatches
            loss = self._mixture_gradients(self.mixture, before + number)
            sums = torch.cat([sums, loss[None] * total.tokens])
        self.world.add_up([sums])
        norms = self._clipped_norms()
        read = torch.cat([sums, norms.to(sums.dtype)]).tolist()
        metrics = dict(zip(names, read, strict=False))
        by_part = dict(zip(self.clipped, read[len(names) :], strict=True))
        for name, value in [*metrics.items(), *by_part.items()]:
            watched = name.startswith("loss/") or name in by_part
            if watched and not math.isfinite(value):
                raise not_finite(step, name, value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics, by_part

    def _gradients(self, minibatch: list[Experience], total: Total, least: int) -> Tensor:
        """Add up the gradients of a minibatch; sums over the tokens of this process of what is
        watched, float64 [watched]. `least`: passes that are made."""
        watched = self.method.watched
        sums = torch.zeros(len(watched), dtype=torch.float64, device=self.world.device)
        passes = self.pass_size.cut([each.episode.tokens for each in minibatch])
        for places in passes:
            metrics = self.method.learn([minibatch[i] for i in places], total)
            sums += torch.stack([metrics[name].detach().double() for name in watched])
        for _ in range(len(passes), least):
            # of which nothing is learned
            self.method.learn([self._filler()], Total(math.inf, math.inf))
        return sums

    def _filler(self) -> Experience:
        """An episode of one token."""
        device = self.world.device
        episode = Episode([0], [0], True, torch.zeros(1), None)
        (text,) = texts_of([episode], device)
        return Experience(episode, text, *[torch.zeros(1, device=device)] * COLUMNS)

    def _mixture_gradients(self, mixture: MixedRows, optimizer_step: int) -> Tensor:
        """Add the gradients of the mixture's rows beside an optimizer step; this process's share of
        their mean loss, float64."""
        count = mixture.recipe.batch_size
        places = range(
            optimizer_step * count + self.world.rank,
            (optimizer_step + 1) * count,
            self.world.size,
        )
        rows = [mixture.rows[i] for i in places]
        size = self.hardware.micro_batch_size
        batches = [
            pack_rows(rows[i : i + size], self.world.device) for i in range(0, len(rows), size)
        ]
        targets = torch.tensor(float(sum(len(batch.targets) for batch in batches)))
        tokens = sent(targets, self.world.device)
        self.world.add_up([tokens])
        loss = torch.zeros((), dtype=torch.float64, device=self.world.device)
        most = -(-count // self.world.size)  # of the first process's
        missing = -(-most // size) - len(batches) if self.hardware.sharded else 0
        fillers = [(pack_rows([FILLER], self.world.device), math.inf)] * missing
        for batch, of in [*((batch, tokens) for batch in batches), *fillers]:
            with self.hardware.autocast():
                part = -self.actors.policy_of_text(batch).sum() / of
            (mixture.recipe.coefficient * part).backward()
            loss += part.detach()
        return loss

    def _clipped_norms(self) -> Tensor:
        """Sum gradients over processes and clip them; their norms before it, [parts].

        The critic's is clipped by itself: rewards of any size would shorten the policy's steps.
        """
        self.world.sum_gradients(self.weights.values())
        limit = self.recipe.optim.max_grad_norm or math.inf
        return torch.stack([clipped_norm(weights, limit) for weights in self.clipped.values()])
