"""One update after the other: draw responses, score them, judge them, learn from them. Checkpoints
lie between updates.

Nothing random has a state to keep: what an update draws depends on the seed, the update and the
episode alone, so that a resumed run goes on bit by bit, and every way to cut a batch gives the same
episodes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import Stopped, UserError
from llmpipe.files import Table
from llmpipe.models.drawing.draw import Episode, Sampling
from llmpipe.models.hardware import Hardware, platform_of, release_memory
from llmpipe.models.load import set_up
from llmpipe.models.moved import Start
from llmpipe.parallel import World
from llmpipe.recipe.reinforcement import Algorithm, PPORecipe
from llmpipe.rl import heldout, policy_gradient, state
from llmpipe.rl.actors import Actors
from llmpipe.rl.build import build
from llmpipe.rl.experience import Experience, measure
from llmpipe.rl.fitting import fit_passes
from llmpipe.rl.journal import Journal, Shown
from llmpipe.rl.learner import Learner
from llmpipe.rl.passes import PassSize
from llmpipe.rl.rewards import Rewards, Row, Scores, scored_together
from llmpipe.rl.rollout.engine import Engine, Terms
from llmpipe.rl.rollout.local import Local
from llmpipe.rl.rollout.vllm import PROBES, VLLM
from llmpipe.rl.sampling import Sampler
from llmpipe.rl.seeds import Place, Shuffled, Use
from llmpipe.rl.tracking import accelerator
from llmpipe.rl.watch import PARTIAL, TELLING, Metrics, RolloutSums, not_finite, warn
from llmpipe.run import checkpoints
from llmpipe.run.context import refuse_rollouts, tokens_of
from llmpipe.run.job import Job
from llmpipe.run.made import Made
from llmpipe.run.manifest import Leg
from llmpipe.training.conclude import conclude
from llmpipe.training.resume import refuse_another_strategy
from llmpipe.training.rows import dataset
from llmpipe.training.samples import answer_samples, samples_size
from llmpipe.training.schedule import say_if_peak_is_missed
from llmpipe.training.training import Training


def train(job: Job[PPORecipe], prepared: PreparedRows) -> Made:
    """Train a policy and publish it; returns what the manifest says of it."""
    setup = set_up(job, prepared)
    world = World(accelerator(job, setup.hardware))
    actors = build(setup)
    rewards = Rewards(job, setup.hardware, actors, prepared)
    policy = actors.cast.published
    training = Training(setup, PROMPTS, policy)
    loop = Loop(training, world, actors, rewards)
    answer_samples(loop, setup.tokenizer, "before")
    final = loop.fit()
    # one by one: `end_training` would end the processes' group as well
    for tracker in world.accelerator.trackers:
        tracker.finish()
    actors.leave_only_policy()
    answer_samples(loop, setup.tokenizer, "after")
    return conclude(loop, training, final)


@dataclass(frozen=True)
class Batch:
    """This process's part of an update's batch."""

    places: list[int]
    """Of the prompts in the batch of all processes."""
    rows: list[Row]
    episodes: list[Episode]
    responses: list[str]
    """As a person reads them."""

    @property
    def tokens(self) -> int:
        """Of the responses."""
        return sum(len(episode.response) for episode in self.episodes)

    def shown(self, scores: Scores) -> list[Shown]:
        """The episodes with their scores, to read."""
        columns = zip(self.rows, self.responses, scores.total, self.episodes, strict=True)
        return [
            Shown(row["prompt"], response, score, episode.ended, len(episode.response))
            for row, response, score, episode in columns
        ]


class Loop:
    """A training, and how it moves on."""

    def __init__(
        self, training: Training[PPORecipe], world: World, actors: Actors, rewards: Rewards
    ):
        self.training = training
        self.world = world
        self.actors = actors
        self.rewards = rewards
        self.recipe = training.recipe
        self.artifact = training.artifact
        self.say = training.say
        self.accelerator = world.accelerator
        self.start = Start.of(training.model)
        self.prompts = Shuffled(training.train_rows(), self.recipe.seed, Use.ORDER)
        self.held_out = training.eval_rows()
        self._refuse_too_long()
        self.sampler = Sampler(self._engine(), training.tokenizer)
        self.steps = _updates(self.recipe, training.prepared.rows.train)
        say_if_peak_is_missed(self.recipe, self.steps, self.say)
        mixture = _mixture_rows(training)
        self.learner = Learner(actors, self.recipe, self.hardware, world, self.steps, mixture)
        self.state = state.State.begin(self.recipe.reference)
        before = checkpoints.settings(self.artifact.checkpoints).get("micro_batch_size")
        self.learner.pass_size = PassSize.of(self.recipe.launch, self.hardware, before)
        self.journal = Journal(self.artifact, world, self.say)
        self.say(
            f"update: {self.recipe.optim.batch_size} episodes, "
            f"in passes of up to {self.learner.pass_size.words} a process"
        )
        if self.recipe.rollout.is_partial:
            self.say(PARTIAL)
        self.resumes = False
        self.exact = True
        self._go_on_from_checkpoint()

    @property
    def hardware(self) -> Hardware:
        return self.training.hardware

    def compute_again(self, kind: str) -> None:
        """Let the backward pass compute activations again, `selective` or `full`."""
        self.training.compute_again(kind)
        self.actors.compute_again(kind)

    # --- the loop ---

    def fit(self) -> Metrics:
        """Update to the end; returns the last metrics.

        Raises Stopped when a signal was served, after a checkpoint.
        """
        signals = self.training.job.signals
        signals.deferred = True
        if self.resumes:
            self.say(f"resuming from step-{self.state.step} of {self.steps}")
        self._evaluate_before()
        self.journal.begin(self.state.step, self.steps)
        while self.state.step < self.steps:
            metrics = self.update()
            if self._due(self.recipe.log.every):
                self.journal.write(self.state.step, metrics)
            self.state.evaluation_due = self._evaluates_now()
            stop = self.world.stop_code(signals)
            if self.state.evaluation_due and not stop:
                self._evaluate()
                stop = self.world.stop_code(signals)
            if stop or self._due(self.recipe.checkpoint.every):
                self.save()
            if stop:
                raise Stopped(stop, f"stopped at step {self.state.step}, checkpoint written")
        signals.deferred = False
        self.sampler.engine.release()
        self.journal.close()
        self.world.wait()
        if self.recipe.mixture is None:
            self.state.sameness.refuse()
        return self._final()

    def update(self) -> Metrics:
        """Draw, score, judge, learn; what there is to say of it."""
        begun = time.monotonic()
        size = self.recipe.optim.batch_size
        rate = self.learner.schedule.set_rate(self.state.step)
        batch = self._draw()
        if not self.state.step:  # what drawing holds is in memory now
            fit_passes(self, self._longest_prompt())
        self._note("scoring answers")
        scores = scored_together(self.rewards, batch.rows, batch.responses, self.world)
        experiences, metrics = self.judge(batch.episodes, torch.tensor(scores.total))
        judged = time.monotonic()
        self._note("learning from them")
        metrics |= self.learner.learn(self.state.step, experiences, batch.places)
        self.state.step += 1
        totals = self.world.totals(_by_source(scores) | {"tokens": batch.tokens})
        tokens = totals.pop("tokens")
        self.state.tokens += int(tokens)
        metrics |= {name: total / size for name, total in totals.items()}
        seconds = time.monotonic() - begun
        metrics |= {
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "episodes_per_second": size / seconds,
            "rollout_share": (judged - begun) / seconds,
            "coefficient": self.state.coefficient.value,
        }
        self.state.coefficient.adapt(metrics["objective/kl"], size)
        self.journal.at(self.state.step, metrics)
        if self._due(self.recipe.log.every):
            self.journal.show(self.state.step, batch.shown(scores))
        self._warn(metrics)
        return metrics

    def _draw(self) -> Batch:
        """Responses to this process's share of the next prompts."""
        size = self.recipe.optim.batch_size
        places = list(range(self.world.rank, size, self.world.size))
        asked = [self.prompts[self.state.step * size + place] for place in places]
        prompts = [row["prompt_ids"] for row in asked]
        numbers = [Place(Use.DRAW, self.state.step, place) for place in places]
        episodes = self.sampler.draw(prompts, numbers, self._note_answers)
        responses = [self.sampler.text(episode) for episode in episodes]
        return Batch(places, [json.loads(row["row"]) for row in asked], episodes, responses)

    def judge(self, episodes: list[Episode], scores: Tensor) -> tuple[list[Experience], Metrics]:
        """What is learned from each episode, by the scores [episodes] of this process, and what is
        worth watching in all processes."""
        recipe, algorithm = self.recipe, self.recipe.algorithm
        coefficient = self.state.coefficient.value
        measured = measure(self.actors, episodes, self.learner.pass_size, self.hardware, self.world)
        mask = measured.mask
        raw_scores = scores + recipe.rollout.unfinished * (1 - measured.ended)
        self.state.sameness.add(
            -self.world.greatest(-float(raw_scores.min())),
            self.world.greatest(float(raw_scores.max())),
        )
        shaped = _shaped(raw_scores, algorithm, self.state.moments, self.world)
        estimates = policy_gradient.kl_penalty(
            measured.log_probs, measured.reference, recipe.reference.estimator
        )
        kl = estimates * mask
        rewards = policy_gradient.token_rewards(shaped, kl, mask, coefficient)
        advantages, returns = policy_gradient.advantages(
            rewards, measured.values, mask, algorithm.discount, algorithm.smoothing
        )
        if algorithm.whiten:
            advantages = policy_gradient.whitened(advantages, mask, self.world.sum)
        sums = RolloutSums.of(measured, scores, raw_scores, kl, returns)
        metrics = RolloutSums(**self.world.totals(asdict(sums))).metrics(coefficient)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise not_finite(self.state.step, name, value)
        return measured.experiences(advantages, returns), metrics

    def _due(self, every: int) -> bool:
        """Whether something follows this update that is done every so many, and after the last."""
        return self.state.step == self.steps or self.state.step % every == 0

    def _evaluates_now(self) -> bool:
        """Whether an evaluation follows this update."""
        every = self.recipe.evaluation.every or self.steps
        return self.held_out is not None and self._due(every)

    def _evaluate_before(self) -> None:
        """What a training evaluates before its first update, and a resumed one that a signal put
        off."""
        if self.held_out is None or (self.resumes and not self.state.evaluation_due):
            return
        self._evaluate()
        stop = self.world.stop_code(self.training.job.signals)
        if stop and not self.resumes:
            raise Stopped(stop, "stopped before the first update")

    def _evaluate(self) -> None:
        assert self.held_out is not None
        self.state.evaluation_due = False
        metrics = heldout.evaluate(
            self.sampler, self.rewards, self.held_out, self.world, self._note_answers
        )
        self.journal.write(self.state.step, metrics)

    def _final(self) -> Metrics:
        """The last metrics, as the manifest has them."""
        lines = self.journal.lines()
        last = [line for line in lines if "objective/scores" in line][-1]
        final = {name: last[name] for name in ("loss", "objective/scores", "objective/kl")}
        scores = [line["eval_score"] for line in lines if "eval_score" in line]
        if scores:
            final |= {"eval_score_before": scores[0], "eval_score": scores[-1]}
            self.say(f"held-out score: {scores[0]:.4f} before, {scores[-1]:.4f} after")
        return final

    def _note_answers(self, drawn: int, count: int) -> None:
        self._note(f"{drawn:,} of {count:,} answers drawn")

    def _note(self, what: str) -> None:
        """Show on a terminal what the next update is at."""
        self.journal.note(f"step {self.state.step + 1}/{self.steps}: {what}")

    def _warn(self, metrics: Metrics) -> None:
        self.state.first = self.state.first or metrics
        target = self.recipe.reference.target
        warn(metrics, self.state.first, target, self.state.warned, self.say)
        if self.state.sameness.updates == TELLING:
            self.say(f"warning: {self.state.sameness.shown}: there is nothing to learn from")

    # --- checkpoints ---

    def save(self) -> None:
        """A checkpoint. Rank 0 writes it, but for the other processes' parts of models."""
        hashed: Table = {}
        with self._checkpoint(hashed) if self.world.is_first else nullcontext() as staging:
            if self.learner.is_sharded:
                folder = Path(self.world.gather(str(staging))[0])
                state.save_tensors(self.learner, folder)
                hashed |= checkpoints.parts_in(folder, self.world)
            elif staging:
                state.save_tensors(self.learner, staging)
        self.world.wait()

    @contextmanager
    def _checkpoint(self, hashed: Table) -> Iterator[Path]:
        """The folder of one, published on leaving, when its parts are `hashed`."""
        home = self.artifact.checkpoints
        self.journal.note(f"saving step {self.state.step}")
        sizes = self.journal.sizes()
        seconds = self.journal.seconds
        record = state.record(self.state, self.learner, seconds, list(sizes.values()))
        lines = sizes | samples_size(self.artifact)
        origin = checkpoints.Origin(
            identity=self.training.identity,
            machine=self._machine(),
            exact=self.exact,
            legs=self.legs,
        )
        with checkpoints.writing(
            home, self.state.step, origin, record.model_dump, lines, hashed
        ) as staging:
            yield staging
        checkpoints.rotate(home, self.recipe.checkpoint.keep, set())

    def _go_on_from_checkpoint(self) -> None:
        """Go on from the newest checkpoint, where there is one, or begin anew."""
        job = self.training.job
        if self.recipe.adapter is None:  # which is saved alike by either
            refuse_another_strategy(job.artifact.checkpoints, sharded=self.hardware.sharded)
        platform = platform_of(self.recipe, self.hardware, self.world)
        self.legs = [Leg(after=0, platform=platform)]
        picked = checkpoints.pick(
            job.artifact.checkpoints,
            self.training.identity,
            self._machine(),
            platform,
            job.say,
            inexact=job.inexact,
            world=self.world,
        )
        if picked is None:
            self.journal.cut_back([0, 0])
            return
        folder, self.exact, self.legs = picked
        self.resumes = True
        kept = state.restore(folder, self.state, self.learner)
        self.journal.begun -= kept.seconds
        self.journal.cut_back(kept.bytes)

    def _machine(self) -> dict[str, Any]:
        """Settings that have to be equal for a resumed run to be the straight one."""
        kind = self.hardware.activation_checkpointing
        machine = self.hardware.resume_key() | {
            "rollout_batch_size": self.recipe.launch.rollout_batch_size,
            # as older versions wrote it
            "activation_checkpointing": {"none": False, "full": True}.get(kind, kind),
        }
        machine["micro_batch_size"] = self.learner.pass_size.in_checkpoint
        return machine

    # --- what publishing and samples ask of a trainer ---

    def is_world_process_zero(self) -> bool:
        return self.world.is_first

    def plain_model(self) -> Any:
        return self.actors.cast.published

    def forget_optimizer(self) -> None:
        del self.learner
        release_memory()

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training itself."""
        return {
            "steps": self.state.step,
            "published_step": self.state.step,
            "tokens": self.state.tokens,
            "seconds": round(self.journal.seconds, 1),
            "exact_resume": self.exact,
            "legs": [asdict(leg) for leg in self.legs],
        }

    def _engine(self) -> Engine:
        """What draws."""
        rollout, recipe = self.recipe.rollout, self.recipe
        terms = Terms(
            self.actors,
            self.training.tokenizer,
            self.hardware,
            Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k),
            recipe.launch.rollout_batch_size,
            recipe.seed,
            self.say,
        )
        if rollout.engine == "local":
            return Local(terms)
        if self.world.size > 1:
            problem = f"rollout.engine: vllm draws in one process, and there are {self.world.size}"
            raise UserError(problem, "set launch.processes: 1")
        probe = [
            self.prompts.rows[i]["prompt_ids"] for i in range(min(PROBES, len(self.prompts.rows)))
        ]
        return VLLM(terms, probe, self._longest_prompt())

    # --- what does not fit ---

    def _refuse_too_long(self) -> None:
        """Refuse prompts that leave no room for a response of the model's context."""
        response = self.recipe.rollout.max_new_tokens
        context = tokens_of(self.actors.causal.config.to_dict())
        refuse_rollouts(context, self._longest_prompt(), response)

    def _longest_prompt(self) -> int:
        """Tokens of the longest one."""
        longest = self.training.prepared.lengths.max
        if self.held_out is not None:
            longest = max(longest, *map(len, self.held_out["prompt_ids"]))
        return longest


def _updates(recipe: PPORecipe, prompts: int) -> int:
    """How many updates a training has."""
    optim = recipe.optim
    return optim.steps or max(1, math.ceil(optim.epochs * prompts / optim.batch_size))


def _mixture_rows(training: Training[PPORecipe]) -> Sequence[dict[str, Any]] | None:
    """Sft data that is mixed in."""
    mixture = training.prepared.mixture
    if mixture is None:
        return None
    rows: Sequence[dict[str, Any]] = dataset(mixture.folder(training.job.prepared) / "train.arrow")
    return rows


def _shaped(
    scores: Tensor, algorithm: Algorithm, moments: policy_gradient.Moments, world: World
) -> Tensor:
    """Scores as the algorithm sees them: by their running deviation, and clipped, where the recipe
    says so."""
    if algorithm.normalize_scores:
        wide = scores.double()
        sums = {"count": len(wide), "total": wide.sum(), "squares": (wide**2).sum()}
        moments.add(**world.totals(sums))
        scores = (scores - moments.mean) / moments.deviation
    limit = algorithm.clip_scores
    return scores if limit is None else scores.clamp(-limit, limit)


def _by_source(scores: Scores) -> dict[str, float]:
    """Sums of every source's scores, where there are several."""
    if len(scores.by_source) == 1:
        return {}
    return {f"scores/{name}": sum(values) for name, values in scores.by_source.items()}
