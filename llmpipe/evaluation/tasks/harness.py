"""EleutherAI's lm-evaluation-harness, on the loaded model; its own numbers are what counts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from llmpipe.errors import Say, UserError, near
from llmpipe.evaluation.book import Book, Line, Reported
from llmpipe.evaluation.task import Item, Task, Template
from llmpipe.files.paths import expanded
from llmpipe.recipe.sections import ELSEWHERE, Positive

if TYPE_CHECKING:
    from llmpipe.evaluation.candidate import Candidate

REPORTED = "reported"  # the item of the line that holds the harness's own numbers


class Harness(Task):
    task: Literal["harness"]
    """Tasks of EleutherAI's lm-evaluation-harness."""
    tasks: Annotated[list[str], Field(min_length=1)]
    """Their names."""
    folder: str | None = None
    """A folder with task files of your own."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; the task's own number unless set."""
    limit: Positive | None = None
    """Take this many items of each task."""
    template: Template = "none"
    """`auto` is the harness's --apply_chat_template."""

    @field_validator("folder")
    @classmethod
    def _exists(cls, folder: str | None) -> str | None:
        if folder and not folder.startswith(ELSEWHERE) and not os.path.isdir(expanded(folder)):
            raise ValueError(f"{folder}: no such folder")
        return folder

    @property
    def packages(self) -> set[str]:
        return {"lm_eval"}

    def metrics(self, kind: str | None) -> set[str] | None:
        return set() if kind == "reward-model" else None

    def files(self) -> dict[str, str]:
        return {"folder": self.folder} if self.folder else {}

    def measure(self, model: Candidate, items: list[Item], book: Book, seed: int, say: Say) -> None:
        """Score all of it at once: the harness has its own items, and cannot go on from a part.

        Of several processes each scores all of it, and the first one's lines are kept.
        """
        if book.holds(self.label, model.label, [REPORTED]):
            return
        if book.world.size > 1:
            all_of_it = f"each of {book.world.size} processes scores all of it"
            say(f"{self.label}: {all_of_it}, and takes as long as one")
        results = self._evaluate(model, seed)
        lines = [
            self._line(model, name, sample)
            for name in results["results"]
            for sample in results["samples"].get(name, [])
        ]
        reported = Line(self.label, model.label, REPORTED, reported=self._reported(results))
        book.add([*lines, reported] if book.world.is_first else [])
        say(f"{model.label} on {self.label}: {len(lines):,} items")

    def _evaluate(self, model: Candidate, seed: int) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        kwargs = {"chat_template_args": model.kwargs} if model.kwargs else {}
        wrapped = HFLM(
            pretrained=model.model,
            tokenizer=model.tokenizer,
            batch_size=model.batch_size,
            **kwargs,
        )
        results: dict[str, Any] = simple_evaluate(
            wrapped,
            tasks=self.tasks,
            num_fewshot=self.fewshot,
            limit=self.limit,
            apply_chat_template=self.template == "auto",
            task_manager=self._manager(),
            bootstrap_iters=100,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        return results

    def _manager(self) -> Any:
        """lm_eval's TaskManager that knows the tasks. Raises UserError for one that it does not."""
        from lm_eval.tasks import TaskManager

        folder = str(expanded(self.folder)) if self.folder else None
        if folder:
            manager = TaskManager(include_path=folder, include_defaults=False)
            if set(self.tasks) <= set(manager.all_tasks):
                return manager
        manager = TaskManager(include_path=folder)  # reads the thousands of tasks that come with it
        if unknown := sorted(set(self.tasks) - set(manager.all_tasks)):
            hint = near(unknown[0], manager.all_tasks)
            raise UserError(f"{self.label}: the harness has no task '{unknown[0]}'{hint}")
        return manager

    def _metric(self, name: str, metric: str, filter_name: str) -> str:
        """The only task's metrics stand alone, those of a group's parts behind the part's name."""
        part = "" if [name] == self.tasks else f"{name}."
        filtered = "" if filter_name == "none" else f".{filter_name}"
        return f"{part}{metric}{filtered}"

    def _reported(self, results: dict[str, Any]) -> dict[str, Reported]:
        """The harness's numbers, which it keeps as {task: {"metric,filter": value}}."""
        reported = {}
        for name, numbers in results["results"].items():
            count = results["n-samples"].get(name, {}).get("effective", 0)
            for key, value in numbers.items():
                metric, _, filter_name = key.partition(",")
                is_number = isinstance(value, float) and filter_name
                if not is_number or metric.endswith("_stderr"):
                    continue
                error = numbers.get(f"{metric}_stderr,{filter_name}")
                error = error if isinstance(error, float) else None
                reported[self._metric(name, metric, filter_name)] = Reported(value, error, count)
        return reported

    def _line(self, model: Candidate, name: str, sample: dict[str, Any]) -> Line:
        """One sample of the harness, of one of its tasks and filters."""
        filter_name = sample["filter"]
        shown = {
            "prompt": str(sample["arguments"])[:2000],
            "reference": str(sample["target"]),
            "answers": [str(sample["filtered_resps"])[:2000]],
        }
        scores = {
            self._metric(name, metric, filter_name): float(sample[metric])
            for metric in sample["metrics"]
            if isinstance(sample[metric], int | float)
        }
        item = f"{name}/{sample['doc_id']:08}/{filter_name}"
        return Line(self.label, model.label, item, shown=shown, scores={**scores})
