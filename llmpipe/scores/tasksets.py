"""Tasksets of the library verifiers as environments that ask once: `verifiers/NAME`, where the
package NAME is installed and exports a taskset.

Of the library nothing is used but its tasks and their rewards: answers are drawn by llmpipe. What a
task needs beside, a sandbox, tools or a user who answers, there is not, and a reward that needs a
runtime would be left out by the library without a word: such a taskset is refused by name.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llmpipe.errors import INTEGRITY, UserError, first_line

PACKAGE = "verifiers"


@dataclass(frozen=True)
class Tasks:
    """Tasks that each ask one question."""

    name: str
    tasks: list[Any]

    def questions(self) -> Iterator[list[dict[str, str]]]:
        for task in self.tasks:
            yield _turns(self.name, task)

    def score(self, number: int, asked: str, answer: str) -> float:
        """By the task: the sum of its rewards, each times its weight."""
        task = self.tasks[number]
        turns = _turns(self.name, task)
        refuse_another(self.name, turns[-1]["content"], asked)
        try:
            return asyncio.run(_scored(task, turns, answer))
        except Exception as error:  # whatever somebody's reward raises
            raise UserError(f"{self.name}: task {number}: {first_line(error)}") from error


def opened(name: str, questions: int, seed: int, options: Mapping[str, Any]) -> Tasks:
    """The first tasks of a taskset, shuffled by the seed where they come to an end.

    Raises UserError for one that is not installed, for an option that it does not know, and for one
    that needs what there is not.
    """
    from verifiers import v1

    short = name.removeprefix(f"{PACKAGE}/")
    try:
        config = v1.taskset_config_type(short).model_validate({**options, "id": short})
        taskset = v1.load_taskset(config)
    except ModuleNotFoundError:
        remedy = "install its package, which exports a Taskset"
        raise UserError(f"{name}: no such taskset is installed", remedy) from None
    except Exception as error:  # of a package without one, of pydantic for an option, and others
        raise UserError(f"{name}: {first_line(error)}") from None
    tasks = list(islice(taskset.shuffle(seed) if taskset.bounded else taskset, questions))
    if not tasks:
        raise UserError(f"{name}: has no task")
    _refuse_more_than_rewards(name, tasks[0])
    return Tasks(name, tasks)


def refuse_another(name: str, question: str, asked: str) -> None:
    """Raise UserError (3) where an environment's question is another one than was asked."""
    if question != asked:
        problem = f"{name}: asks otherwise than when its questions were prepared"
        raise UserError(problem, "install the version of then, or begin anew (--fresh)", INTEGRITY)


def _refuse_more_than_rewards(name: str, task: Any) -> None:
    """Raise UserError where a task needs more than an answer to be scored. All tasks of a taskset
    are of one kind."""
    rewards = task.hooks("reward")
    needed = "a container" if task.NEEDS_CONTAINER else ""
    needed = needed or ("tools" if type(task).toolsets(task.config) else "")
    for reward in rewards:
        runtime = inspect.signature(reward).parameters.get("runtime")
        if runtime is not None and runtime.default is inspect.Parameter.empty:
            needed = needed or f"a runtime for {reward.__name__}"
    if needed:
        remedy = "write an environment of turns: environment: ./file.py:Name"
        raise UserError(f"{name}: its tasks need {needed}, which is not there", remedy)
    if not rewards and not task.plugged_judges():
        raise UserError(f"{name}: its tasks have no reward")


def _turns(name: str, task: Any) -> list[dict[str, str]]:
    """What a task asks, its system turn first."""
    data = task.data
    if data.prompt is None:
        raise UserError(f"{name}: a task asks nothing: its user opens the conversation")
    turns = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    if isinstance(data.prompt, str):
        return [*turns, {"role": "user", "content": data.prompt}]
    for message in data.prompt:
        if not isinstance(message.content, str):
            raise UserError(f"{name}: a task shows what is no text")
        turns.append({"role": message.role, "content": message.content})
    return turns


async def _scored(task: Any, turns: list[dict[str, str]], answer: str) -> float:
    from verifiers import v1

    kinds = {
        "system": v1.SystemMessage,
        "user": v1.UserMessage,
        "assistant": v1.AssistantMessage,
    }
    messages = [kinds[turn["role"]](content=turn["content"]) for turn in turns]
    messages.append(v1.AssistantMessage(content=answer))
    nodes = [
        v1.MessageNode(parent=i - 1 if i else None, message=message, sampled=i == len(turns))
        for i, message in enumerate(messages)
    ]
    trace = v1.Trace(
        task=v1.TraceTask(type=type(task).__name__, data=task.data),
        agent=v1.AgentInfo(config=v1.AgentConfig()),
        nodes=nodes,
        is_completed=True,
        ok=True,
    )
    await task.score(trace)
    return float(trace.reward)
