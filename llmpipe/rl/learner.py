"""What an update does with its episodes: a few passes, each in minibatches, and for each of these one optimizer step.

Losses are sums over tokens divided by the number of tokens in the whole minibatch, and gradients are summed over
processes once a step, so that neither micro-batches nor processes change the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from llmpipe.errors import NUMERIC, UserError
from llmpipe.models.hardware import Hardware
from llmpipe.parallel import World
from llmpipe.rl import policy_gradient
from llmpipe.rl.actors import Actors, pack, pack_rows
from llmpipe.rl.rollout import MIXED, SHUFFLE, Episode, Shuffled, seeded
from llmpipe.run.machine import full_pass


def pass_tokens(recipe: Any, hardware: Hardware) -> int | None:
    """Tokens that fill a training pass, where `launch.micro_batch_size` is `auto`."""
    on_gpu = hardware.device == "cuda"
    if recipe.launch.micro_batch_size != "auto":
        return None
    dense = on_gpu and hardware.attention != "flash_attention_2"  # a mask of tokens x tokens
    return 2048 if dense else full_pass(on_gpu)


def batches(
    indices: Any, episodes: list[Episode], size: int, tokens: int | None
) -> list[list[int]]:
    """Indices in micro-batches, episodes of like length together: `size` of them, or as many as `tokens` hold."""
    found: list[list[int]] = []
    most, filled = tokens or size, math.inf
    for length, i in sorted(
        (len(episodes[i].prompt) + len(episodes[i].answer), i) for i in indices
    ):
        cost = length if tokens else 1
        if filled + cost > most:
            found.append([])
            filled = 0
        found[-1].append(i)
        filled += cost
    return found


def broken(step: int, what: str, value: float) -> UserError:
    return UserError(
        f"step {step + 1}: {what} is {value}; stopped before the optimizer step",
        "lower optim.learning_rate, or set optim.precision: fp32; nothing was published, checkpoints are kept",
        NUMERIC,
    )


def critical(name: str) -> bool:
    """Whether a parameter is the critic's."""
    return name.startswith(("critic.", "value.")) or ".critic." in name


class Learner:
    """The weights that learn, and their optimizer."""

    def __init__(
        self, actors: Actors, recipe: Any, hardware: Hardware, world: World, mixture: Any = None
    ):
        """`mixture`: sft data whose loss is mixed in."""
        self.mixture = None if mixture is None else Shuffled(mixture, recipe.seed, MIXED)
        self.actors, self.recipe, self.hardware, self.world = actors, recipe, hardware, world
        self.pass_tokens = pass_tokens(recipe, hardware)
        self.weights = actors.learned()
        self.optimizer = self._optimizer()

    def _optimizer(self) -> Any:
        optim = self.recipe.optim
        policy = [p for name, p in self.weights.items() if not critical(name)]
        critic = [p for name, p in self.weights.items() if critical(name)]
        groups = [{"params": policy, "peak": optim.learning_rate},
                  {"params": critic, "peak": self.recipe.critic.learning_rate or optim.learning_rate}]  # fmt: skip
        how = {"lr": optim.learning_rate, "betas": (optim.beta1, optim.beta2), "eps": optim.epsilon}
        if optim.optimizer == "adamw":
            return torch.optim.AdamW(groups, **how, weight_decay=optim.weight_decay, fused=True)
        import bitsandbytes

        kind = {
            "adamw_8bit": "AdamW8bit",
            "paged_adamw": "PagedAdamW",
            "paged_adamw_8bit": "PagedAdamW8bit",
        }
        return getattr(bitsandbytes.optim, kind[optim.optimizer])(
            groups, **how, weight_decay=optim.weight_decay
        )

    def passes(self, episodes: list[Episode]) -> list[list[int]]:
        """Indices of episodes, those of a pass together."""
        return batches(
            range(len(episodes)), episodes, self.hardware.micro_batch_size, self.pass_tokens
        )

    def rate(self, step: int, steps: int) -> float:
        """Set the learning rate of an update: it rises for the warm-up, then falls as the schedule has it."""
        optim = self.recipe.optim
        warm = optim.warmup * steps if optim.warmup < 1 else optim.warmup
        done = max(0.0, step + 1 - warm) / max(1.0, steps - warm + 1)
        share = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
            optim.scheduler
        ]
        share = min((step + 1) / max(warm, 1.0), 1.0) if step + 1 <= warm else share
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        return optim.learning_rate * share

    def learn(self, step: int, episodes: list[Episode], mine: list[int]) -> dict[str, float]:
        """The passes over a rollout; means over its tokens. `mine`: the episodes' places in the batch of all
        processes."""
        how, size = self.recipe.algorithm, self.recipe.optim.batch_size
        place = {i: n for n, i in enumerate(mine)}
        lengths = torch.zeros(size)
        lengths[mine] = torch.tensor([float(len(episode.answer)) for episode in episodes])
        lengths = self.world.sum(lengths)
        sums: dict[str, float] = {}
        norm = steps = seen = 0.0
        for epoch in range(how.epochs):
            order = torch.randperm(size, generator=seeded(self.recipe.seed, SHUFFLE, step, epoch))
            for chosen in order.chunk(how.minibatches):
                tokens = float(lengths[chosen].sum())
                part = [episodes[place[i]] for i in chosen.tolist() if i in place]
                found = self._gradients(part, tokens)
                if self.mixture:
                    found["loss/mixture"] = (
                        self._recited(int(step * how.epochs * how.minibatches + steps)) * tokens
                    )
                found = self.world.totals(found)
                norm += self._step(step, found)
                steps, seen = steps + 1, seen + tokens
                sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
                if how.stop_kl and found["policy/approxkl"] / tokens > how.stop_kl:
                    return self._means(sums, seen, norm, steps)
        return self._means(sums, seen, norm, steps)

    def _means(
        self, sums: dict[str, float], tokens: float, norm: float, steps: float
    ) -> dict[str, float]:
        means = {name: value / tokens for name, value in sums.items()}
        loss = means["loss/policy"] + self.recipe.critic.coefficient * means["loss/value"]
        loss += self.recipe.mixture.coefficient * means["loss/mixture"] if self.mixture else 0.0
        return {"loss": loss, "grad_norm": norm / steps, **means, "optimizer_steps": steps}

    def _gradients(self, episodes: list[Episode], tokens: float) -> dict[str, float]:
        """Add up the gradients of a minibatch of `tokens` in all processes; sums over the tokens of this one."""
        how, critic = self.recipe.algorithm, self.recipe.critic
        watched = (
            "policy/approxkl",
            "policy/clipfrac",
            "policy/entropy",
            "val/ratio",
            "val/clipfrac",
        )
        sums = dict.fromkeys(("loss/policy", "loss/value", *watched), 0.0)
        for part in self.passes(episodes):
            chosen = [episodes[i] for i in part]
            batch = pack(chosen, self.world.device)
            old, advantages, returns, before = (
                torch.cat([getattr(e, name) for e in chosen]).to(self.world.device)
                for name in ("old", "advantages", "returns", "values")
            )
            with self.hardware.autocast():
                spoken, entropy, values = self.actors.spoken(batch)
            loss, found = policy_gradient.policy_loss(spoken, old, advantages, how.clip)
            total = loss - how.entropy * entropy.sum() if how.entropy else loss
            if (
                values is None
            ):  # one graph after the other: activations of both models need not exist at once
                (total / tokens).backward()
                total = 0.0
            with (
                self.actors.as_critic()
            ):  # of the backward pass, too, which may compute the layers again
                with self.hardware.autocast():
                    values = self.actors.valued(batch) if values is None else values
                missed, more = policy_gradient.value_loss(values, before, returns, critic.clip)
                ((total + critic.coefficient * missed) / tokens).backward()
            found |= more | {
                "loss/policy": loss,
                "loss/value": missed,
                "policy/entropy": entropy.sum(),
            }
            sums = {name: value + float(found[name].detach()) for name, value in sums.items()}
        return sums

    def _recited(self, place: int) -> float:
        """Add the gradients of the mixture's rows beside an optimizer step; this process's share of their mean loss."""
        how, size = self.recipe.mixture, self.hardware.micro_batch_size
        at = range(
            place * how.batch_size + self.world.rank, (place + 1) * how.batch_size, self.world.size
        )
        rows, loss = [self.mixture[i] for i in at], 0.0
        batches = [
            pack_rows(rows[i : i + size], self.world.device) for i in range(0, len(rows), size)
        ]
        tokens = float(
            self.world.sum(torch.tensor(float(sum(len(batch.targets) for batch in batches))))
        )
        for batch in batches:
            with self.hardware.autocast():
                found = -self.actors.recited(batch).sum() / tokens
            (how.coefficient * found).backward()
            loss += float(found.detach())
        return loss

    def _step(self, step: int, sums: dict[str, float]) -> float:
        """Sum gradients over processes, check, clip, step; the gradient's norm."""
        for name in (name for name in sums if name.startswith("loss/")):
            if not math.isfinite(sums[name]):
                raise broken(step, name, sums[name])
        for p in self.weights.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if self.world.size > 1:
                torch.distributed.all_reduce(p.grad)
        limit = self.recipe.optim.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.weights.values(), limit or math.inf))
        if not math.isfinite(norm):
            raise broken(step, "gradient norm", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm
