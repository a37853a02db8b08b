"""Complaints: values against a schema, every problem with its `file:line` and the nearest name.

    recipe = load(Path("recipes/alpaca.yaml"), SFTRecipe, sets=["optim.learning_rate=1e-5"])

`llmpipe.recipe.yaml` turns a file into plain values plus a map from each value's path to its line;
`validate` hands the values to pydantic and says in a recipe's words what pydantic says of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmpipe.errors import UserError, near, nearest
from llmpipe.recipe.sections import Hosted, Recipe
from llmpipe.recipe.yaml import Loc, Where, apply_sets, dotted, read

SchemaOf = Callable[[str], type[Recipe]]  # the recipe class of a stage, by its name


def load(path: Path, schema: type[Recipe], sets: list[str] | None = None) -> Recipe:
    """Read, override and validate one recipe file."""
    values, where = read(path)
    if isinstance(values, dict):
        if "stages" in values and "stages" not in schema.model_fields:
            problem = f"{where[('stages',)]}: this is a pipeline of several stages"
            raise UserError(problem, f"llmpipe run {path}")
        apply_sets(values, where, sets or [])
    return validate(values, where, schema, str(path))


def load_pipeline(path: Path, schema: SchemaOf, sets: list[str] | None = None) -> list[Recipe]:
    """Read a pipeline: `run:` and a list `stages:` of recipes.

    All are checked before the first one starts. Raises one UserError with every problem.
    """
    values, where = read(path)
    name = str(path)
    stages = values.get("stages") if isinstance(values, dict) else None
    if not isinstance(stages, list) or not stages:
        problem = f"{name}:1: a pipeline has `run:` and a list `stages:`"
        raise UserError(problem, "for one stage: llmpipe STAGE RECIPE")
    apply_sets(values, where, sets or [])
    problems = [
        f"{where[(key,)]}: {key}: unknown key{near(key, ['run', 'stages'])}; "
        "a pipeline has run and stages"
        for key in values
        if key not in ("run", "stages")
    ]
    recipes = []
    for i in range(len(values["stages"])):
        try:
            recipes.append(_stage_of_pipeline(i, values, where, schema, name))
        except UserError as error:
            problems.append(error.message)
    artifacts = [recipe.artifact for recipe in recipes]
    for twice in sorted({artifact for artifact in artifacts if artifacts.count(artifact) > 1}):
        problems.append(f"{name}:1: two stages are called '{twice}'; give one a `name:`")
    if problems:
        raise UserError("\n".join(problems))
    return recipes


def _stage_of_pipeline(
    i: int, values: dict[str, Any], where: Where, schema: SchemaOf, name: str
) -> Recipe:
    """The recipe at a place in `stages:`; it takes the pipeline's `run:` unless it has its own."""
    line = where.get(("stages", i), f"{name}:1")
    document = values["stages"][i]
    if not isinstance(document, dict) or not isinstance(document.get("stage"), str):
        raise UserError(f"{line}: stages.{i}: each entry is a recipe and names its `stage:`")
    lines = {loc[2:]: at for loc, at in where.items() if loc[:2] == ("stages", i)}
    if "run" in values:
        lines.setdefault(("run",), where.get(("run",), line))
        document = {"run": values["run"], **document}
    try:
        stage_schema = schema(document["stage"])
    except UserError as error:  # no such stage
        raise UserError(f"{line}: {error.message}") from None
    return validate(document, lines, stage_schema, name)


def validate(values: Any, where: Where, schema: type[Recipe], name: str) -> Recipe:
    """Plain values -> a recipe of `schema`.

    Raises one UserError with every problem, in the order of the file.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: a recipe is a mapping of keys to values")
    recipe = None
    complaints = Complaints(where, name)
    try:
        recipe = schema.model_validate(values)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            complaints.add_error(error, schema)
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and issubclass(schema, Hosted):
        for key, message in schema.trainer_config.problems(trainer).items():
            complaints.add(("trainer", key), ("trainer", key), message)
    if complaints.lines or recipe is None:
        raise UserError("\n".join(complaints.in_order()))
    return recipe


class Complaints:
    """What is wrong in a file, one complaint for each place."""

    def __init__(self, where: Where, name: str):
        self.where = where
        self.name = name
        self.lines: dict[tuple[str, str], str] = {}

    def add_error(self, error: ErrorDetails, schema: type[Recipe]) -> None:
        """What pydantic says."""
        loc = error["loc"]
        written = self._written(loc)
        shown = written
        if error["type"] in ("missing", "extra_forbidden"):  # the key, in the file or not
            shown = (*self._written(loc[:-1]), loc[-1])
        self.add(written, shown, message_of(error, schema))

    def add(self, loc: Loc, shown: Loc, message: str) -> None:
        """`loc`: whose line it is; `shown`: what the complaint is about."""
        line = self.where.get(loc, f"{self.name}:1")
        path = dotted(shown)
        self.lines.setdefault((line, path), f"{line}: {path or 'recipe'}: {message}")

    def in_order(self) -> list[str]:
        """All of them, by their line."""
        by_line = sorted((_number(line), text) for (line, _), text in self.lines.items())
        return [text for _, text in by_line]

    def _written(self, loc: Loc) -> Loc:
        """The part of a location that exists in the file; pydantic adds names of types to it."""
        written: Loc = ()
        for part in loc:
            if (*written, part) in self.where:
                written = (*written, part)
        return written


def _number(line: str) -> int:
    """12 of `recipes/sft.yaml:12`, and 0 of `--set`."""
    tail = line.rpartition(":")[2]
    return int(tail) if tail.isdecimal() else 0


def message_of(error: ErrorDetails, schema: type[Recipe]) -> str:
    """What pydantic found, in a recipe's words, with the nearest name that would do."""
    given = error["input"]
    context = error.get("ctx", {})
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    match error["type"]:
        case "missing":
            return "required, but missing"
        case "extra_forbidden":
            return "unknown key" + _meant(error["loc"], schema)
        case "literal_error":
            expected = context["expected"]
            return f"{given!r} is not one of {expected}{near(str(given), _quoted(expected))}"
        case "union_tag_invalid":
            tag = str(context["tag"])
            tags = _quoted(context["expected_tags"])
            return f"'{tag}' is not one of {', '.join(tags)}{near(tag, tags)}"
        case "value_error":
            return message
        case _:
            shown = repr(given)
            dots = "..." if len(shown) > 60 else ""
            return f"{message}, not {shown[:60]}{dots}"


def _quoted(text: str) -> list[str]:
    """The words in a text that stand in quotes."""
    return re.findall(r"'([^']*)'", text)


def _meant(loc: Loc, schema: type[Recipe]) -> str:
    """What an unknown key was meant to be: one of this section, one of another, or any of these."""
    key = str(loc[-1])
    section = section_at(schema, loc[:-1])
    known = list(fields_of(section)) if section else []
    if hint := near(key, known):
        return hint
    paths = _paths(schema)
    like = nearest(key, paths, cutoff=0.75)
    if path := paths.get(key) or (paths[like] if like else None):
        return f"; did you mean '{path}'?"
    return f"; known here: {', '.join(known)}"


def _paths(section: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every field name of a recipe -> the dotted path where it first occurs."""
    paths: dict[str, str] = {}
    for name, field in fields_of(section).items():
        paths.setdefault(name, prefix + name)
        for inner in sections_in(field.annotation):
            for inner_name, path in _paths(inner, f"{prefix}{name}.").items():
                paths.setdefault(inner_name, path)
    return paths


def fields_of(section: type[BaseModel]) -> dict[str, Any]:
    """The fields by their names in a recipe (`continue` is none that Python allows)."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The section classes that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def section_at(schema: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The section class that the value at `loc` belongs to; None where that is no section."""
    options = [schema]
    for part in loc:
        if isinstance(part, int):  # a place in a list
            continue
        if len(options) > 1:  # a choice of sections has its tag in `loc`
            options = [section for section in options if _has_tag(section, part)]
            continue
        field = fields_of(options[0]).get(part) if options else None
        if field is None:
            return None
        options = sections_in(field.annotation)
    return options[0] if options else None


def _has_tag(section: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in section.model_fields.values())
