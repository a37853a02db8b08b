"""What can be known ahead: looked at for every stage of a command before the first one starts.

Names, records and the beginnings of files: nothing is hashed and no library imported, so that a
pipeline with a mistake in its last stage ends within a second. Every problem is named at once, each
with its line. What only the work itself can tell, it tells later.
"""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from llmpipe.data.folders import named_files
from llmpipe.data.readers.hub import hub_revision, kept_offline
from llmpipe.errors import DATA, Mistake, UserError, near
from llmpipe.files.paths import expanded, unreachable
from llmpipe.recipe.check import Located, Pipeline
from llmpipe.recipe.names import ARTIFACT
from llmpipe.recipe.places import is_here
from llmpipe.recipe.sample import SampleRecipe
from llmpipe.recipe.sections import TEMPLATES, Launch, Recipe, Rows, Training, is_local
from llmpipe.run import hub
from llmpipe.run.artifact import artifact_of, make_run
from llmpipe.run.context import mistakes_in_lengths, of_folder
from llmpipe.run.datasets import placed_rows, use_of
from llmpipe.run.folders import check_folder, tensors_of
from llmpipe.run.gguf import check_gguf
from llmpipe.run.machine import (
    gpus,
    micro_batch_size,
    on_several_machines,
    outside,
    process_count,
    rank,
)
from llmpipe.run.outlook import Coming, Command, Outlook
from llmpipe.run.plan import kinds_of
from llmpipe.run.reference import Use
from llmpipe.run.strategy import against_offload, against_parts, against_zero
from llmpipe.stages import Foreseeing, stage

PER_CORE = 4  # processes that train, on a machine without GPUs: some wait while others compute

EXTRAS = {
    "math_verify": "llmpipe[eval]",
    "rouge_score": "llmpipe[eval]",
    "sacrebleu": "llmpipe[eval]",
    "lm_eval": "llmpipe[harness]",
    "jsonschema": "llmpipe[rl]",
    "reasoning_gym": "llmpipe[rl]",
    "deepspeed": "llmpipe[zero]",
    "llama_cpp": "llmpipe[gguf]",
    "torchao": "llmpipe[torchao]",
    "compressed_tensors": "llmpipe[compressed-tensors]",
}
"""What to install for a module, where that is not called as the module is."""

OPTIONAL = (*EXTRAS, "vllm", "tensorboard", "wandb", "flash_attn")
"""Packages that some recipes need."""


def to_install(package: str) -> str:
    """How a package is installed that a recipe needs."""
    if package == "vllm":  # asks for an older transformers than ours, and runs with ours
        return "pip install vllm && pip install llmpipe"
    return f"pip install '{EXTRAS.get(package, package.replace('_', '-'))}'"


def check(
    stages: Sequence[Located | None],
    *,
    fresh: bool = False,
    only_prepare: bool = False,
    pipeline: Pipeline | None = None,
) -> None:
    """`look`, and make the run directories, of several machines the first one. Raises UserError (5)
    where that cannot be done.
    """
    look(stages, fresh=fresh, only_prepare=only_prepare, pipeline=pipeline)
    for located in filter(None, stages if leads() else ()):
        make_run(artifact_of(located.recipe).run)


@contextmanager
def others_hear() -> Iterator[None]:
    """Around what a process looks at by itself: on several machines the others hear where it ends
    there, and do not wait for it."""
    try:
        yield
    except UserError as error:
        if on_several_machines():
            from llmpipe.front.outside import leave

            leave(error.code)
        raise


def leads() -> bool:
    """Whether this process looks at models, rows and the run: another machine need not have them,
    since it is sent what it reads of them.
    """
    return rank() == 0 or not on_several_machines()


def look(
    stages: Sequence[Located | None],
    *,
    fresh: bool = False,
    only_prepare: bool = False,
    pipeline: Pipeline | None = None,
) -> None:
    """Raise one UserError with every problem of every stage, each with its `file:line`.

    `stages`: None stands for one of a pipeline that is no valid recipe, which is among the
    pipeline's own problems.
    """
    located = {number: one for number, one in enumerate(stages, 1) if one}
    coming = [Coming(number, one.recipe, kind_made(one.recipe)) for number, one in located.items()]
    unread = _unread(pipeline) if pipeline else ()
    command = Command(coming, fresh, only_prepare, tuple(unread))

    problems = [(DATA, line) for line in pipeline.problems] if pipeline else []
    for this in coming:
        outlook = Outlook(command, this)
        found = [*_same_names(command, this), *mistakes(this.recipe, outlook)]
        problems += _lines(found, located[this.number])
    _raise(problems)
    for this in coming:
        if not leads():
            break
        outlook = Outlook(command, this)
        if not outlook.begun and (this.number > 1 or kept_offline()):
            problems += _lines(_not_on_the_hub(this.recipe), located[this.number])
        reads_at_once = this.number == 1 and not any(_ggufs(this.recipe))
        if not reads_at_once:
            problems += _lines(_in_first_rows(this.recipe, outlook), located[this.number])
    _raise(problems)


def kind_made(recipe: Recipe) -> str:
    """The kind of artifact that a recipe makes."""
    makes = stage(recipe.stage).MAKES
    adapter = isinstance(recipe, Training) and recipe.adapter
    return "adapter" if adapter and makes == "model" else makes


def mistakes(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    """What is wrong with a stage in the place that it has."""
    if leads():
        yield from _in_models(recipe, outlook)
        yield from _in_ggufs(recipe, outlook)
        yield from _in_rows(recipe, outlook)
    yield from _in_files(recipe)
    yield from _in_packages(recipe, outlook)
    if outlook.works and not outlook.finished and not outside():
        yield from _in_processes(recipe)
    if isinstance(recipe, Training) and not outlook.finished:
        yield from _in_launch(recipe)
    if leads():
        yield from _in_beginning(recipe, outlook)


def _in_beginning(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    """What does not go with what a stage begins from, and what it knows more."""
    if isinstance(recipe, Training) and not outlook.finished:
        yield from _in_start(recipe, outlook)
    module = stage(recipe.stage)
    if isinstance(module, Foreseeing):
        yield from module.foresee(recipe, outlook)


def _raise(problems: list[tuple[int, str]]) -> None:
    """Problems in the order of the file; the command ends with the gravest's code, which is 2."""
    if not problems:
        return
    lines = list(dict.fromkeys(line for _, text in problems for line in text.split("\n")))
    lines.sort(key=_number)
    raise UserError("\n".join(lines), code=min(code for code, _ in problems))


def _number(line: str) -> int:
    """12 of `recipes/sft.yaml:12: ...`, and 0 of `--set`."""
    match = re.match(r".*?:([0-9]{1,9}): ", line)
    return int(match[1]) if match and not line.startswith("--set") else 0


def _lines(mistakes: Iterable[Mistake], located: Located) -> list[tuple[int, str]]:
    """Mistakes as they are shown: where, what, and what to do; each behind its exit code."""
    lines = []
    for field, error in mistakes:
        what = "; ".join(error.message.split("\n"))
        if not what.startswith(field):
            what = f"{field}: {what}"
        hint = f"; {error.hint}" if error.hint else ""
        lines.append((error.code, f"{located.line(field)}: {what}{hint}"))
    return lines


def _unread(pipeline: Pipeline) -> Iterator[str]:
    """What the stages would be called that are no valid recipes."""
    for name, located in zip(pipeline.names, pipeline.stages, strict=True):
        if name and located is None:
            yield from (name, f"{name}-merged")


def _same_names(command: Command, this: Coming) -> Iterator[Mistake]:
    """Whether a stage would make what one before it makes."""
    before = {
        os.path.abspath(artifact.path): other.number
        for other in command.coming
        if other.number < this.number
        for artifact, _ in other.artifacts
    }
    for artifact, _ in this.artifacts:
        if number := before.get(os.path.abspath(artifact.path)):
            problem = f"{artifact.name}: stage {number} makes one of that name, too"
            yield Mistake("name", UserError(problem, "give one of them another `name:`"))


# --- models, rows, files --------------------------------------------------------------------------


def _in_models(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    run = artifact_of(recipe).run
    accepts = stage(recipe.stage).ACCEPTS
    for field, reference in recipe.references().items():
        try:
            outlook.look(reference, Use(field, kinds_of(field, accepts), glance=True), run)
        except UserError as error:
            yield Mistake(field, error)


def _in_ggufs(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    """What the headers of GGUF files tell before their weights are read, which takes a minute."""
    for field, path in _ggufs(recipe):
        try:
            if not outlook.finished:
                check_gguf(path).refuse_unread(path)
        except UserError as error:
            yield Mistake(field, error)


def _ggufs(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The fields that name GGUF files that are there."""
    for field, reference in recipe.references().items():
        path = expanded(reference)
        if is_local(reference) and path.suffix == ".gguf" and path.is_file():
            yield field, path


def _lacks_template(recipe: Recipe) -> bool:
    """Whether a stage starts from a GGUF file without a chat template, and names no other."""
    if not isinstance(recipe, Training) or recipe.data.preparation.template != "auto":
        return False
    start = dict(_ggufs(recipe)).get("model")
    return start is not None and not check_gguf(start).has_template


def _in_rows(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    run = artifact_of(recipe).run
    for field, source in recipe.rows().items():
        at = f"{field}.path"
        pinned = outlook.begun or source.revision is not None
        try:
            if source.artifact:
                outlook.look(source.path, use_of(at, glance=True), run)
                continue
            here = is_here(source.path, "data set", pinned=pinned)
            if here and not outlook.is_below(source.path):
                named_files(source)
        except UserError as error:
            yield Mistake(at, error)


def _in_first_rows(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    """What is wrong with the rows that the stage would read first."""
    from llmpipe.data.sources import check_first_rows

    shapes = {} if outlook.finished else stage(recipe.stage).shapes(recipe)
    has_template = not (shapes and _lacks_template(recipe))
    given = recipe.rows()
    for field, source in placed_rows(recipe).items():
        if field not in shapes:
            continue
        try:
            _check_rows_to_come(given[field], shapes[field], recipe, outlook)
            if source.is_here and not outlook.is_below(source.path):
                check_first_rows(source, shapes[field], has_template)
        except UserError as error:
            yield Mistake(f"{field}.path", error)


def _check_rows_to_come(
    source: Rows, shapes: tuple[type, ...], recipe: Recipe, outlook: Outlook
) -> None:
    """Raises UserError where an earlier stage is going to make rows of none of these shapes."""
    from llmpipe.data.layout import formats_of

    maker = outlook.maker(source.path, artifact_of(recipe).run) if source.artifact else None
    if maker is None or not isinstance(maker.recipe, SampleRecipe):
        return
    made, takes = maker.recipe.format, formats_of(shapes)
    if made not in takes:
        problem = f"{source.path}: stage {maker.number} makes rows of format {made} (write)"
        raise UserError(problem, f"this stage takes {', '.join(takes)}")


def _in_files(recipe: Recipe) -> Iterator[Mistake]:
    for field, name in recipe.files().items():
        is_template = field == "data.template"
        try:
            if reason := unreachable(expanded(name)):
                known = ["auto", *TEMPLATES]
                hint = "a path is looked up from the current folder"
                if is_template:
                    reason += f", and not one of {', '.join(known)}{near(name, known)}"
                raise UserError(f"{name}: {reason}", hint)
            if is_template:
                _check_template(name)
        except UserError as error:
            yield Mistake(field, error)


def _check_template(name: str) -> None:
    """Raises UserError for a file that cannot be read, or is no template."""
    from llmpipe.data.formats import Rejected
    from llmpipe.data.template import bounded
    from llmpipe.data.template.choice import template_source
    from llmpipe.data.template.rendering import Template

    text = template_source(Path(), name)
    assert text is not None  # the file is there
    try:
        with bounded():
            Template(text, {}, {})
    except Rejected as error:
        raise UserError(f"{name}: {error.detail}") from None


# --- this machine ---------------------------------------------------------------------------------


def _in_packages(recipe: Recipe, outlook: Outlook) -> Iterator[Mistake]:
    if not outlook.works:
        return
    for field, package in recipe.packages():
        if importlib.util.find_spec(package) is None:
            problem = UserError(f"{package} is not installed", to_install(package))
            yield Mistake(field, problem)
        elif package == "wandb" and not _may_log_in():
            problem = UserError(
                "wandb has no key: WANDB_API_KEY is not set, and nobody has logged in here",
                "wandb login, or WANDB_MODE=offline",
            )
            yield Mistake(field, problem)


def _may_log_in() -> bool:
    """Whether Weights & Biases may find a key, or ask a person for one, or needs none."""
    environment = os.environ
    if environment.get("WANDB_MODE", "online") not in ("online", "run"):
        return True
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if sys.stdin is not None and sys.stdin.isatty():
        return True
    homes = [environment.get("NETRC"), "~/.netrc", "~/_netrc"]
    return any(name and _knows_wandb(expanded(name)) for name in homes)


def _knows_wandb(path: Path) -> bool:
    """Whether a file of passwords has one for it; one that cannot be read may."""
    if not path.is_file():
        return False
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError):
        return True
    server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    return bool(hosts.keys() & {server, "default"})


def _in_start(recipe: Training, outlook: Outlook) -> Iterator[Mistake]:
    """What is longer than the positions of the model, and which layers it has not, where the folder
    is known that the first of all stages starts from."""
    folder = outlook.root(recipe.model, artifact_of(recipe).run) if recipe.model else None
    if folder is None:
        return
    try:
        check_folder(folder)
    except UserError:  # said of the model itself
        return
    context = of_folder(folder)
    if context is not None:
        yield from mistakes_in_lengths(recipe, context)
    weights = [
        name.removesuffix(".weight") for name in tensors_of(folder) if name.endswith(".weight")
    ]
    are_loaded_alike = not any(".experts." in name for name in weights)  # which become one tensor
    if recipe.adapter and weights and are_loaded_alike:
        try:
            recipe.adapter.check_targets([*weights, "lm_head"])  # a tied one has no tensor
        except UserError as error:
            yield Mistake("adapter.targets", error)


def _in_processes(recipe: Recipe) -> Iterator[Mistake]:
    """More processes than this machine is made for."""
    processes, cores = process_count(recipe), len(os.sched_getaffinity(0))
    if 0 < gpus() < processes:
        count = f"{gpus()} GPU{'s' * (gpus() > 1)}"
        error = UserError(f"{processes} processes, and this machine has {count}", "auto is as many")
        yield Mistake("launch.processes", error)
    if not gpus() and processes > PER_CORE * cores:
        problem = f"{processes} processes, and this machine has {cores} cores and no GPU"
        yield Mistake("launch.processes", UserError(problem, "auto is 1 there"))


def _in_launch(recipe: Training) -> Iterator[Mistake]:
    launch = recipe.launch
    assert isinstance(launch, Launch)
    processes = process_count(recipe)
    try:
        micro_batch_size(recipe, processes, gpus() > 0)
    except UserError as error:
        yield Mistake("optim.batch_size", error)
    if launch.strategy in ("fsdp", "hsdp"):
        for problem, remedy in against_parts(recipe, processes):
            problem = f"{launch.strategy}: {problem}"
            yield Mistake("launch.strategy", UserError(problem, remedy))
    if launch.zero:
        for problem, remedy in against_zero(recipe, processes):
            problem = f"{launch.strategy}: {problem}"
            yield Mistake("launch.strategy", UserError(problem, remedy))
    if launch.offload:
        for problem, remedy in against_offload(recipe, processes):
            yield Mistake("launch.offload", UserError(problem, remedy))


# --- the Hub --------------------------------------------------------------------------------------


def _not_on_the_hub(recipe: Recipe) -> Iterator[Mistake]:
    """What the Hub does not have; where it cannot be reached the local cache has to do.

    A stage that need not wait for another asks for itself, and at once.
    """
    for field, reference in recipe.references().items():
        try:
            if not reference.startswith(ARTIFACT) and not is_here(reference, "model"):
                hub.snapshot_of(reference, field)
        except UserError as error:
            yield Mistake(field, error)
    for field, source in recipe.rows().items():
        try:
            if not source.artifact and not is_here(
                source.path, "data set", pinned=source.revision is not None
            ):
                hub_revision(source)
        except UserError as error:
            yield Mistake(f"{field}.path", error)
