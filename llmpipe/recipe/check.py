"""Complaints: values against a schema, every problem with its `file:line` and the nearest known name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from llmpipe.errors import UserError, near
from llmpipe.recipe.sections import Hosted, Recipe
from llmpipe.recipe.yaml import Loc, Where, _dotted, apply_sets, read


def _section_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The section class that the value at `loc` belongs to; a choice of sections has its tag in `loc`."""
    options = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        if len(options) > 1:
            options = [
                o
                for o in options
                if any(part in get_args(f.annotation) for f in o.model_fields.values())
            ]
            continue
        field = fields_of(options[0]).get(part) if options else None
        if field is None:
            return None
        options = _models_in(field.annotation)
    return options[0] if options else None


def fields_of(section: type[BaseModel]) -> dict[str, Any]:
    """The fields by the names that a recipe has for them (`continue` is none that Python allows)."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _all_names(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every field name of a recipe -> its dotted path."""
    names: dict[str, str] = {}
    for name, field in fields_of(model).items():
        names.setdefault(name, prefix + name)
        for inner in _models_in(field.annotation):
            for sub, path in _all_names(inner, f"{prefix}{name}.").items():
                names.setdefault(sub, path)
    return names


def _complaint(error: dict, schema: type[BaseModel]) -> tuple[Loc, str]:
    loc, kind = error["loc"], error["type"]
    if kind == "extra_forbidden":
        section = _section_at(schema, loc[:-1])
        known = list(fields_of(section)) if section else []
        hint = near(str(loc[-1]), known)
        elsewhere = _all_names(schema)
        if not hint and (path := elsewhere.get(str(loc[-1]))):
            hint = f"; did you mean '{path}'?"
        if not hint and (
            match := difflib.get_close_matches(str(loc[-1]), list(elsewhere), n=1, cutoff=0.75)
        ):
            hint = f"; did you mean '{elsewhere[match[0]]}'?"
        return loc, "unknown key" + (hint or f"; known here: {', '.join(known)}")
    if kind == "missing":
        return loc, "required, but missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return loc, f"{error['input']!r} is not one of {error['ctx']['expected']}" + near(
            str(error["input"]), choices
        )
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        tag = error["ctx"]["tag"]
        return loc, f"'{tag}' is not one of {', '.join(choices)}" + near(str(tag), choices)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = repr(error["input"])
    return (
        loc,
        message
        if kind == "value_error"
        else f"{message}, not {shown[:60]}{'...' if len(shown) > 60 else ''}",
    )


def _known_loc(loc: Loc, where: Where, values: Any) -> Loc:
    """The part of a pydantic location that exists in the file (unions add type names at the end)."""
    kept: list[str | int] = []
    for part in loc:
        if (*kept, part) in where:
            kept.append(part)
    return tuple(kept)


def validate(values: Any, where: Where, schema: type[Recipe], name: str) -> Recipe:
    """Plain values -> a recipe of `schema`; raises one UserError with every problem, in the order of the file."""
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: a recipe is a mapping of keys to values")
    problems: dict[tuple[str, str], tuple[int, str]] = {}
    recipe = None
    try:
        recipe = schema.model_validate(values)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            loc, message = _complaint(error, schema)
            known = _known_loc(loc, where, values)
            at = where.get(known, f"{name}:1")
            if error["type"] in ("missing", "extra_forbidden"):
                shown: Loc = (*_known_loc(loc[:-1], where, values), loc[-1])
            else:
                shown = known
            problems.setdefault(
                (at, _dotted(shown)), (_line(at), f"{at}: {_dotted(shown) or 'recipe'}: {message}")
            )
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and issubclass(schema, Hosted):
        for key, message in schema.trainer_config.problems(trainer).items():
            at = where.get(("trainer", key), f"{name}:1")
            problems[(at, key)] = (_line(at), f"{at}: {_dotted(('trainer', key))}: {message}")
    if problems:
        raise UserError("\n".join(text for _, text in sorted(problems.values())))
    assert recipe is not None
    return recipe


def _line(at: str) -> int:
    tail = at.rpartition(":")[2]
    return int(tail) if tail.isdigit() else 0


def load(path: Path, schema: type[Recipe], sets: list[str] | None = None) -> Recipe:
    """Read, override and validate one recipe file."""
    values, where = read(path)
    if isinstance(values, dict):
        if "stages" in values and "stages" not in schema.model_fields:
            raise UserError(
                f"{where[('stages',)]}: this is a pipeline of several stages", f"llmpipe run {path}"
            )
        apply_sets(values, where, sets or [])
    return validate(values, where, schema, str(path))


def load_pipeline(
    path: Path, schema: Callable[[str], type[Recipe]], sets: list[str] | None = None
) -> list[Recipe]:
    """Read a pipeline: `run:` and a list `stages:` of recipes, all checked before the first one starts."""
    values, where = read(path)
    name = str(path)
    if (
        not isinstance(values, dict)
        or not isinstance(values.get("stages"), list)
        or not values["stages"]
    ):
        raise UserError(
            f"{name}:1: a pipeline has `run:` and a list `stages:`",
            "for one stage: llmpipe STAGE RECIPE",
        )
    apply_sets(values, where, sets or [])
    problems = [
        f"{where[(key,)]}: {key}: unknown key{near(key, ['run', 'stages'])}; a pipeline has run and stages"
        for key in values
        if key not in ("run", "stages")
    ]
    recipes: list[Recipe] = []
    for i, document in enumerate(values["stages"]):
        at = where.get(("stages", i), f"{name}:1")
        if not isinstance(document, dict) or not isinstance(document.get("stage"), str):
            problems.append(f"{at}: stages.{i}: each entry is a recipe and names its `stage:`")
            continue
        inner = {loc[2:]: line for loc, line in where.items() if loc[:2] == ("stages", i)}
        if "run" in values:
            inner.setdefault(("run",), where.get(("run",), at))
            document = {"run": values["run"], **document}
        try:
            recipes.append(validate(document, inner, schema(document["stage"]), name))
        except UserError as error:
            prefix = (
                ""
                if error.message.startswith(name) or error.message.startswith("--set")
                else f"{at}: "
            )
            problems.append(prefix + error.message)
    names = [recipe.artifact for recipe in recipes]
    problems += [
        f"{name}:1: two stages are called '{n}'; give one a `name:`"
        for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UserError("\n".join(problems))
    return recipes
