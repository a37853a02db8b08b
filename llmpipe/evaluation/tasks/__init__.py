"""The tasks of `eval`, each in a file of its own. `AnyTask` is the one table of them."""

from typing import Annotated

from pydantic import Field

from llmpipe.evaluation.tasks.choice import Choice
from llmpipe.evaluation.tasks.generate import Generate
from llmpipe.evaluation.tasks.harness import Harness
from llmpipe.evaluation.tasks.perplexity import Perplexity
from llmpipe.evaluation.tasks.preference import Preference

__all__ = ["AnyTask", "Choice", "Generate", "Harness", "Perplexity", "Preference"]

AnyTask = Annotated[
    Perplexity | Generate | Choice | Preference | Harness, Field(discriminator="task")
]
