"""`sample`: every prompt answered several times, every answer scored, rows made of the best.

Prompts are answered a few at a time, always the same ones together, and kept in the book that
`eval` has: what is there is not drawn again, and neither a kill nor the number of processes changes
an answer.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from llmpipe import noise
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, NUMERIC, UserError
from llmpipe.evaluation.book import Book, Line, Settings
from llmpipe.evaluation.candidate import settings_of
from llmpipe.files.writing import write_whole
from llmpipe.models.device import keep_imports, make_exact, take_device
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.hardware import Hardware
from llmpipe.models.load import load_any, stop_at
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.parallel.world import World
from llmpipe.recipe.sample import SampleRecipe
from llmpipe.rl.actors import Actors, Cast, Distribution, Role
from llmpipe.rl.build import refuse_no_reward_models
from llmpipe.rl.chosen import REASONS, Asked, Sample, Tally, outcome
from llmpipe.rl.rewards import Rewards, scored_together
from llmpipe.rl.rollout.engine import Terms
from llmpipe.rl.rollout.local import Local
from llmpipe.rl.sampling import Said, Sampler
from llmpipe.rl.seeds import Place, Use
from llmpipe.rl.sources.source import Row
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.job import Job
from llmpipe.run.machine import local_world_size, thread_count
from llmpipe.run.made import Made
from llmpipe.run.progress import Progress, duration
from llmpipe.scores.thinking import ENDING, TAG, opening_of
from llmpipe.sums import content
from llmpipe.training.rows import dataset

TASK = "sample"
"""What the lines of the book are of."""

ASKED = [field.name for field in fields(Asked)]
"""What a line has of its prompt."""

PARTS = 10
"""Lines that the log has of all answers."""


def train(job: Job[SampleRecipe], prepared: PreparedRows) -> Made:
    """Draw, score, and write the rows; returns what the manifest says of them.

    Raises UserError (3) where a model is of the wrong kind, and (4) where no row came of it.
    """
    noise.silence()
    keep_imports()
    _refuse_other_kinds(job)
    take_device()
    recipe, say = job.recipe, job.say
    settings = settings_of(recipe.precision, recipe.launch.batch_size, bool(job.bases))
    if settings.device == "cuda":
        make_exact()
    world = World.of(settings.device)
    book = Book(job.artifact.path / "samples.jsonl", settings, job.plan.identity, say, world)
    with world.as_one():
        if world.is_first:  # on another machine a copy may have times of its own
            job.plan.refuse_changed_models()  # it may be a while ago that they were verified
    drawing = _drawing(job, prepared, book, settings)
    begun = time.monotonic()
    drawing.answer_all()
    if not world.is_first:
        return Made(final={})
    made = Made(_written(job, drawing), hardware=drawing.hardware.describe())
    made.facts = prepared.facts()
    folder = prepared.folder(job.prepared)
    write_whole(job.artifact.path / "rejected.jsonl", content(folder, "rejected.jsonl"))
    say(f"{made.final['answers']:,} answers, in {duration(time.monotonic() - begun)} just now")
    return made


def _refuse_other_kinds(job: Job[SampleRecipe]) -> None:
    refuse_no_reward_models(job)
    if is_reward_model(job.weights):
        problem = f"model: {job.recipe.model}: a reward model, which gives no answers"
        raise UserError(problem, code=INTEGRITY)


def _drawing(
    job: Job[SampleRecipe], prepared: PreparedRows, book: Book, settings: Settings
) -> Drawing:
    """All that answers and scores, loaded."""
    recipe = job.recipe
    folder = prepared.folder(job.prepared)
    tokenizer = load_tokenizer(folder / "tokenizer")
    hardware = Hardware(
        device=settings.device,
        processes=book.world.size,
        threads=thread_count(recipe.launch, local_world_size()),
        micro_batch_size=recipe.launch.batch_size,
        accumulation=1,
        bf16=settings.precision == "bf16",
        attention="sdpa",
    )
    base = job.bases.get("model")
    model = load_any(job.model, base, tokenizer, bf16=hardware.bf16)
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    stop_at(causal, tokenizer, prepared.stop_tokens)
    job.say(f"model: {causal.num_parameters() / 1e6:,.1f} M parameters, {settings.precision}")
    rollout = recipe.rollout
    actors = Actors(
        Cast(causal, Role(causal), None, None, None),
        Distribution(rollout.temperature, learns_entropy=False),
    )
    sampling = Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k)
    batch_size = recipe.launch.batch_size
    terms = Terms(actors, tokenizer, hardware, sampling, batch_size, recipe.seed, job.say)
    return Drawing(
        job,
        hardware,
        Sampler(Local(terms), tokenizer, book.world),
        Rewards(job, hardware, actors, prepared),
        book,
        dataset(folder / "train.arrow"),
    )


@dataclass(frozen=True)
class Drawing:
    """What draws and scores, and what is kept of it."""

    job: Job[SampleRecipe]
    hardware: Hardware
    sampler: Sampler
    rewards: Rewards
    book: Book
    prompts: Dataset
    """As the kind of data `prompts` has them."""

    @property
    def label(self) -> str:
        """What the book calls the model."""
        return self.job.plan.models["model"].reference

    @property
    def teller(self) -> str | None:
        """The source of reward that says by a 1 what is right, where there is one."""
        pairs = zip(self.job.recipe.reward, self.rewards.sources, strict=True)
        return next((source.name for section, source in pairs if section.tells_right), None)

    def answer_all(self) -> None:
        """Answer every prompt that the book does not hold. Collective."""
        every = list(self._batches())
        missing = [
            batch for batch in every if not self.book.holds(TASK, self.label, map(int, batch))
        ]
        total = sum(map(len, missing))
        if missing != every:
            done = len(self.prompts) - total
            self.job.say(f"{done:,} of {len(self.prompts):,} prompts are answered already")
        progress = Progress(self.job.say)
        begun, answered, shown = time.monotonic(), 0, 0
        size, rank = self.book.world.size, self.book.world.rank
        for start in range(0, len(missing), size):
            together = missing[start : start + size]
            mine = together[rank] if rank < len(together) else range(0)
            self.book.add(self._answered(mine))
            answered += sum(map(len, together))
            rate = answered / (time.monotonic() - begun)
            eta = duration((total - answered) / rate)
            line = f"{answered:,} of {total:,} prompts  {rate:.1f} prompts/s  ETA {eta}"
            progress.note(line)
            if answered * PARTS // total > shown:
                shown = answered * PARTS // total
                self.job.say(line)
        progress.close()
        self.sampler.engine.release()

    def _batches(self) -> Iterator[range]:
        """The prompts that are answered together, by their places."""
        recipe = self.job.recipe
        at_once = max(1, recipe.launch.batch_size // recipe.rollout.group)
        for begin in range(0, len(self.prompts), at_once):
            yield range(begin, min(begin + at_once, len(self.prompts)))

    def _answered(self, places: Sequence[int]) -> list[Line]:
        """A line for each of these prompts. Collective."""
        group = self.job.recipe.rollout.group
        prompts = [self.prompts[place] for place in places]
        numbers = [
            Place(Use.SAMPLE, 0, place * group + i) for place in places for i in range(group)
        ]
        each = [row for row in prompts for _ in range(group)]
        said = self.sampler.draw(each, numbers, lambda *_: None)
        scores = scored_together(self.rewards, said, self.book.world)
        answers = [
            Sample(
                one.response,
                scores.total[i],
                {name: values[i] for name, values in scores.by_source.items()},
                len(one.episode.response),
                one.episode.ended,
                self._is_whole(one),
            )
            for i, one in enumerate(said)
        ]
        return [
            self._line(place, self._asked(row), answers[i * group : (i + 1) * group])
            for i, (place, row) in enumerate(zip(places, prompts, strict=True))
        ]

    def _asked(self, prompt: Row) -> Asked:
        """A prepared prompt, with the tag behind it that opens a block of thought."""
        row = json.loads(prompt["row"])
        text = self.sampler.tokenizer.decode(prompt["prompt_ids"][-ENDING:])
        is_in_it = isinstance(row["prompt"], str) and row["prompt"].rstrip().endswith(TAG)
        return Asked(row["prompt"], row["tools"], "" if is_in_it else opening_of(text))

    def _is_whole(self, said: Said) -> bool:
        """Whether its text has all of an answer but the token that ended it."""
        tokens = said.episode.response
        tokens = tokens[:-1] if said.episode.ended else tokens
        every: str = self.sampler.tokenizer.decode(tokens)
        return every == said.response

    def _line(self, place: int, asked: Asked, answers: Sequence[Sample]) -> Line:
        made = outcome(self.job.recipe, asked, answers)
        shown = asked.shown | {"answers": [asdict(answer) for answer in answers]}
        why = {"without": made.without} if made.without else {}
        return Line(TASK, self.label, place, shown=shown | why)


def _written(job: Job[SampleRecipe], drawing: Drawing) -> dict[str, Any]:
    """Write samples.jsonl in the order of the prompts, and rows.jsonl; what the manifest says.

    Raises UserError (4) where there is no row.
    """
    book, say = drawing.book, job.say
    book.close([TASK], [drawing.label])
    tally, without = Tally(), Counter[str]()
    rows: list[dict[str, Any]] = []
    for line in sorted(book.lines.values(), key=lambda line: line.order):
        answers = [Sample(**answer) for answer in line.shown["answers"]]
        asked = Asked(**{name: value for name, value in line.shown.items() if name in ASKED})
        made = outcome(job.recipe, asked, answers)
        without.update([made.without] if made.without else [])
        rows += made.rows
        tally.add(answers, len(made.rows), drawing.teller)
    counted = {reason: without[reason] for reason in REASONS if without[reason]}
    said = "".join(f"; {count:,} without: {reason}" for reason, count in counted.items())
    say(f"{tally.prompts:,} prompts, {tally.rows:,} rows of {job.recipe.write}{said}")
    if not rows:
        hint = "see samples.jsonl; draw more answers, or warmer, or take easier prompts"
        raise UserError(f"{job.artifact.path}: nothing to learn{said}", hint, NUMERIC)
    _write(job.artifact.rows, rows)
    return tally.final(drawing.teller) | {"without": counted}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode())
