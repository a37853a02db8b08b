"""`expected:` of a pipeline: what was published of it, and what `llmpipe reproduce` allows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from llmpipe.recipe.sections import Name, Section


class Expected(Section):
    """A published number."""

    artifact: Name
    """Which of the pipeline's artifacts has it."""
    metric: str
    """Of an evaluation TASK.METRIC, as `llmpipe show` has it; of a training what its manifest holds
    in `final`, such as `eval_loss` or `ranking.accuracy`."""
    model: Name | None = None
    """Of an evaluation: which of its `models`."""
    value: float
    """The number that was published."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """By how much another run may depart from it, either way."""
    at_least: float | None = None
    """Instead: the least that reproduces it."""
    at_most: float | None = None
    """Instead: the most that reproduces it."""
    source: str
    """Where it was published."""
    ran: str | None = None
    """When and on what this very pipeline was run to it; without that it was not run yet."""

    @model_validator(mode="after")
    def _bounded(self) -> Expected:
        bounds = (self.tolerance, self.at_least, self.at_most)
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError("give one of tolerance, at_least and at_most")
        return self

    @property
    def shown(self) -> str:
        """The number and what reproduces it, in words."""
        if self.tolerance is not None:
            return f"{self.value:g} +- {self.tolerance:g}"
        if self.at_least is not None:
            return f"{self.value:g}, at least {self.at_least:g}"
        return f"{self.value:g}, at most {self.at_most:g}"

    def holds(self, obtained: float) -> bool:
        """Whether a number reproduces it; NaN does not."""
        if self.tolerance is not None:
            return abs(obtained - self.value) <= self.tolerance + 1e-9
        if self.at_least is not None:
            return obtained >= self.at_least
        return self.at_most is not None and obtained <= self.at_most
