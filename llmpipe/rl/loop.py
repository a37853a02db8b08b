"""One update after the other: draw responses, score them, judge them, learn from them. Checkpoints
lie between updates. `ppo` and `grpo` say how they are judged, and what of them is learned. Where an
environment of turns takes part (`turns`), a response is what the policy says in all of its turns.

Nothing random has a state to keep: what an update draws depends on the seed, the update and the
episode alone, so that a resumed run goes on bit by bit, and every way to cut a batch gives the same
episodes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

from llmpipe.data.kinds.prompts import PROMPTS
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import Stopped
from llmpipe.models.device import release_memory
from llmpipe.models.hardware import Hardware, platform_of
from llmpipe.models.load import set_up
from llmpipe.models.moved import Start
from llmpipe.parallel.world import World
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl import heldout, solved
from llmpipe.rl.build import build
from llmpipe.rl.experience import Experience, measure
from llmpipe.rl.fitting import fit_passes
from llmpipe.rl.journal import Journal
from llmpipe.rl.learner import Learner
from llmpipe.rl.lengths import Lengths
from llmpipe.rl.method import Answer, Ground, Method, worths
from llmpipe.rl.passes import PassSize
from llmpipe.rl.rewards import Rewards, scored_together
from llmpipe.rl.rollout.build import sampler_of
from llmpipe.rl.seeds import Place, Shuffled, Use
from llmpipe.rl.solved import Pass, Rows
from llmpipe.rl.state import State, record, restore, save_tensors
from llmpipe.rl.tracking import accelerator
from llmpipe.rl.watch import PARTIAL, TELLING, Metrics, not_finite, warn
from llmpipe.run import checkpoints
from llmpipe.run.job import Job
from llmpipe.run.made import Made
from llmpipe.run.manifest import Leg
from llmpipe.run.signals import Signals
from llmpipe.training.conclude import conclude
from llmpipe.training.resume import refuse_another_strategy
from llmpipe.training.rows import dataset
from llmpipe.training.samples import answer_samples, samples_size
from llmpipe.training.saving import Content, Saving
from llmpipe.training.schedule import say_if_peak_is_missed
from llmpipe.training.training import Training

R = TypeVar("R", bound=RLRecipe)
MethodOf = Callable[[Ground[R], State], Method]


def train(job: Job[R], prepared: PreparedRows, method: MethodOf[R]) -> Made:
    """Train a policy and publish it; returns what the manifest says of it."""
    setup = set_up(job, prepared)
    world = World(accelerator(job, setup.hardware))
    actors = build(setup)
    rewards = Rewards(job, setup.hardware, actors, prepared)
    policy = actors.cast.published
    training = Training(setup, PROMPTS, policy)
    ground = Ground(job.recipe, actors, setup.hardware, world)
    state = State.begin(job.recipe.reference)
    loop = Loop(training, ground, rewards, method(ground, state), state)
    answer_samples(loop, setup.tokenizer, "before")
    final = loop.fit()
    # one by one: `end_training` would end the processes' group as well
    for tracker in world.accelerator.trackers:
        tracker.finish()
    actors.leave_only_policy()
    answer_samples(loop, setup.tokenizer, "after")
    return conclude(loop, training, final)


class Loop:
    """A training, and how it moves on."""

    def __init__(
        self,
        training: Training[RLRecipe],
        ground: Ground[RLRecipe],
        rewards: Rewards,
        method: Method,
        state: State,
    ):
        self.training = training
        self.world = ground.world
        self.actors = ground.actors
        self.rewards = rewards
        self.method = method
        self.state = state
        self.recipe: RLRecipe = ground.recipe
        self.artifact = training.artifact
        self.say = training.say
        self.accelerator = ground.world.accelerator
        self.start = Start.of(training.model)
        self.held_out = training.eval_rows()
        self.lengths = Lengths.of(training, self.actors)
        self.journal = Journal(self.artifact, self.world, self.say)
        self.sampler = sampler_of(training, ground, rewards, self.lengths)
        self.prompts = Shuffled(self._solved(training.train_rows()), self.recipe.seed, Use.ORDER)
        self.steps = _updates(self.recipe, len(self.prompts.rows))
        say_if_peak_is_missed(self.recipe, self.steps, self.say)
        mixture = _mixture_rows(training)
        self.learner = Learner(ground, method, self.steps, mixture)
        before = checkpoints.settings(self.artifact.checkpoints).get("micro_batch_size")
        self.learner.pass_size = PassSize.of(self.recipe.launch, self.hardware, before)
        self.say(
            f"update: {self.recipe.optim.batch_size} episodes, "
            f"in passes of up to {self.learner.pass_size.words} a process"
        )
        if self.recipe.rollout.is_partial:
            self.say(PARTIAL)
        checkpoint, device = self.recipe.checkpoint, self.hardware.device
        self.saving = Saving(self.artifact.checkpoints, checkpoint, device, self.world, self.say)
        self.resumes = False
        self.exact = True
        self._go_on_from_checkpoint()

    def _solved(self, rows: Rows) -> Rows:
        """The prompts that are neither too hard nor too easy, where the recipe asks for these."""
        home = self.artifact
        first = Pass(
            self.recipe,
            self.sampler,
            self.rewards,
            self.world,
            home.path / solved.FILE,
            self.say,
            lambda done, count: self.journal.note(f"{done:,} of {count:,} prompts tried"),
        )
        # rank 0's alone are told: a mirror may have lost its own
        has_begun = self.world.told(lambda: any(home.checkpoints.glob("step-*")))
        return first.choose(rows, has_begun=has_begun)

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
        with self.saving:
            stop = self._update_to_the_end(signals)
        if stop:
            raise Stopped(stop, f"stopped at step {self.state.step}, checkpoint written")
        signals.deferred = False
        self.sampler.engine.release()
        self.journal.close()
        if self.state.skipped:
            groups = f"{self.state.skipped:,} of {self.steps * self.recipe.prompts:,} groups"
            self.say(f"{groups} were skipped: their answers all scored alike")
        self.world.wait()
        if self.recipe.mixture is None:
            self.state.sameness.refuse()
        return self._final()

    def _update_to_the_end(self, signals: Signals) -> int:
        """Update to the end, or until a signal is served; its exit code, 0 for none."""
        stop = 0
        while self.state.step < self.steps and not stop:
            metrics = self.update()
            self.saving.poll()
            if self._due(self.recipe.log.every):
                self.journal.write(self.state.step, metrics)
            self.state.evaluation_due = self._evaluates_now()
            stop = self.world.stop_code(signals)
            if self.state.evaluation_due and not stop:
                self._evaluate()
                stop = self.world.stop_code(signals)
            if stop or self._due(self.recipe.checkpoint.every):
                self.save(last=bool(stop) or self.state.step == self.steps)
        return stop

    def update(self) -> Metrics:
        """Draw, score, judge, learn; what there is to say of it."""
        begun = time.monotonic()
        rate = self.learner.schedule.set_rate(self.state.step)
        batch = self.method.rollout(self._draw)
        if not self.state.step:  # what drawing holds is in memory now
            fit_passes(self, *self.lengths.longest_episode(batch.drawn, self.world))
        experiences, metrics = self.judge(batch.answers)
        judged = time.monotonic()
        self._note("learning from them")
        metrics |= batch.metrics | self.learner.learn(self.state.step, experiences)
        self.state.step += 1
        totals = self.world.totals(self._sums(batch.drawn))
        drawn, tokens = totals.pop("answers"), totals.pop("tokens")
        self.state.tokens += int(tokens)
        metrics |= {name: total / drawn for name, total in totals.items()}
        seconds = time.monotonic() - begun
        metrics |= {
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "episodes_per_second": drawn / seconds,
            "rollout_share": (judged - begun) / seconds,
            "coefficient": self.state.coefficient.value,
        }
        if "objective/kl" in metrics:
            self.state.coefficient.adapt(metrics["objective/kl"], self.recipe.optim.batch_size)
        self.journal.at(self.state.step, metrics)
        if self._due(self.recipe.log.every):
            self.journal.show(self.state.step, batch.answers, self.recipe.group)
        self._warn(metrics)
        return metrics

    def _draw(self, slots: Sequence[int], asked: int) -> list[Answer]:
        """Responses with their scores, of this process, to further prompts, one for each of these
        slots of the batch; `asked`: prompts of the update before."""
        step, group, world = self.state.step, self.recipe.group, self.world
        first = step * self.recipe.prompts + self.state.replaced + asked
        prompts = [self.prompts[first + i] for i in range(len(slots))]
        places = [slot * group + number for slot in slots for number in range(group)]
        mine = [at for at, place in enumerate(places) if place % world.size == world.rank]
        numbers = [Place(Use.DRAW, step, asked * group + at) for at in mine]
        answered = [prompts[at // group] for at in mine]
        said = self.sampler.draw(answered, numbers, self._note_answers)
        self._note("scoring answers")
        scores = scored_together(self.rewards, said, world)
        by_source = [
            dict(zip(scores.by_source, each, strict=True))
            for each in zip(*scores.by_source.values(), strict=True)
        ]
        return [
            Answer(places[at], each.row, each.episode, each.response, score, of_sources)
            for at, each, score, of_sources in zip(mine, said, scores.total, by_source, strict=True)
        ]

    def _sums(self, answers: Sequence[Answer]) -> Metrics:
        """Of this process's answers: how many, their tokens, their turns and what an environment
        said there, and every source's scores, where there are several."""
        episodes = [answer.episode for answer in answers]
        tokens = sum(len(episode.response) for episode in episodes)
        sums = {"answers": float(len(answers)), "tokens": float(tokens)}
        if self.recipe.plays:
            sums["turns/policy"] = sum(episode.turns for episode in episodes)
            sums["turns/environment_tokens"] = sum(each.inserted_tokens for each in episodes)
        names = [source.name for source in self.rewards.sources]
        for name in names if len(names) > 1 else ():
            sums[f"scores/{name}"] = sum(answer.by_source[name] for answer in answers)
        return sums

    def judge(self, answers: Sequence[Answer]) -> tuple[dict[int, Experience], Metrics]:
        """What is learned from each of this process's answers, by its place, and what is worth
        watching in all processes."""
        episodes = [answer.episode for answer in answers]
        measured = measure(self.actors, episodes, self.learner.pass_size, self.hardware, self.world)
        worth = worths(answers, self.recipe)
        self.state.sameness.add(
            -self.world.greatest(-float(worth.min())), self.world.greatest(float(worth.max()))
        )
        experiences, metrics = self.method.judge(measured, answers, worth)
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise not_finite(self.state.step, name, value)
        return experiences, metrics

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
        """The last metrics, as the manifest has them. Collective."""
        lines = self.journal.lines()
        last = [line for line in lines if "objective/scores" in line][-1]
        names = ("loss", "objective/scores", "objective/kl")
        final = {name: last[name] for name in names if name in last}
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

    def save(self, *, last: bool) -> None:
        """A checkpoint. Rank 0 writes it, but for the other processes' parts of models."""
        self.journal.note(f"saving step {self.state.step}")
        content = self._content() if self.world.is_first else None
        with self.saving.checkpoint(self.state.step, content, at_once=last) as folder:
            if self.learner.is_sharded or content:
                save_tensors(self.learner, folder, self.saving.tensors)

    def _content(self) -> Content:
        """What a checkpoint has beside its tensors."""
        sizes = self.journal.sizes()
        kept = record(self.state, self.learner, self.journal.seconds, list(sizes.values()))
        origin = checkpoints.Origin(
            identity=self.training.identity,
            machine=self._machine(),
            exact=self.exact,
            legs=self.legs,
        )
        return Content(origin, kept.model_dump(), sizes | samples_size(self.artifact))

    def _go_on_from_checkpoint(self) -> None:
        """Go on from the newest checkpoint, where there is one, or begin anew."""
        job = self.training.job
        if self.recipe.adapter is None:  # which is saved alike by either
            refuse_another_strategy(job.artifact.checkpoints, self.hardware, adapts=False)
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
        kept = restore(folder, self.state, self.learner)
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


def _updates(recipe: RLRecipe, prompts: int) -> int:
    """How many updates a training has."""
    optim = recipe.optim
    return optim.steps or max(1, math.ceil(optim.epochs * prompts / recipe.prompts))


def _mixture_rows(training: Training[RLRecipe]) -> Sequence[dict[str, Any]] | None:
    """Sft data that is mixed in."""
    mixture = training.prepared.mixture
    if mixture is None:
        return None
    rows: Sequence[dict[str, Any]] = dataset(mixture.folder(training.job.prepared) / "train.arrow")
    return rows
