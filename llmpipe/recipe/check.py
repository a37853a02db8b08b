"""Complaints: values against a schema, every problem with its `file:line` and the nearest name.

    recipe = load(Path("recipes/alpaca.yaml"), SFTRecipe, sets=["optim.learning_rate=1e-5"])

`llmpipe.recipe.yaml` turns a file into plain values plus a map from each value's path to its line;
`validate` hands the values to pydantic and says in a recipe's words what pydantic says of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llmpipe.errors import UserError, near, nearest
from llmpipe.files.paths import modules_in
from llmpipe.recipe.sections import Hosted, Recipe
from llmpipe.recipe.yaml import Loc, Where, apply_sets, dotted, read
from llmpipe.secrets import secrets_in

if TYPE_CHECKING:
    from llmpipe.recipe.expected import Expected

STAGES = Path(__file__).parent.parent / "stages"  # listed, not imported: it is a floor above

KEYS = ("run", "stages", "expected")  # of a pipeline

STAGES_AT_MOST = 200  # of a pipeline

MOST = 50  # complaints that are shown of one recipe

MORE = "more may be wrong; mend these first"

LONGEST = 1000  # characters of one

AXOLOTL, LLAMA_FACTORY = "Axolotl", "LLaMA-Factory"

SIGNS: dict[str, tuple[str, set[str]]] = {
    AXOLOTL: ("base_model", {"datasets", "sequence_len", "micro_batch_size", "num_epochs"}),
    LLAMA_FACTORY: ("model_name_or_path", {"finetuning_type", "cutoff_len", "dataset", "template"}),
}
"""By which keys a config of another tool is known: by one, and one of several."""

SchemaOf = Callable[[str], type[Recipe]]  # the recipe class of a stage, by its name


@dataclass(frozen=True)
class Located:
    """A recipe, and where each of its values was written."""

    recipe: Recipe
    where: Where
    file: str

    def line(self, field: str) -> str:
        """`file:line` of a field by its dotted path, or of what is written above it."""
        lines = {dotted(loc): line for loc, line in self.where.items()}
        while field and field not in lines:
            field = field.rpartition(".")[0]
        return lines.get(field, f"{self.file}:1")


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline's file says."""

    stages: list[Located | None]
    """In their order; None where one is no valid recipe."""
    names: list[str | None]
    """What each stage's artifact is called, as far as that can be told."""
    problems: list[str]
    """Everything that is wrong with the file by itself, each with its line."""
    expected: list[Expected]
    """What was published of it."""


def load(path: Path, schema: type[Recipe], sets: list[str] | None = None) -> Recipe:
    """Read, override and validate one recipe file."""
    return locate(path, schema, sets).recipe


def locate(path: Path, schema: type[Recipe], sets: list[str] | None = None) -> Located:
    """Read, override and validate one recipe file, and keep the lines."""
    values, where = read(path)
    if isinstance(values, dict):
        refuse_foreign(values, path)
        if "stages" in values and "stages" not in schema.model_fields:
            problem = f"{where[('stages',)]}: this is a pipeline of several stages"
            raise UserError(problem, f"use `llmpipe run {path}`")
        apply_sets(values, where, sets or [])
        _refuse_other_stage(values, where, schema, path)
    return Located(validate(values, where, schema, str(path)), where, str(path))


def tool_of(values: Any) -> str | None:
    """Which other tool's config this is; None of a recipe, and where nobody knows."""
    keys = set(values) if isinstance(values, dict) else set()
    known = (tool for tool, (sign, others) in SIGNS.items() if sign in keys and others & keys)
    return next(known, None)


def refuse_foreign(values: Any, path: Path) -> None:
    """Raise UserError for another tool's config: every key would be wrong."""
    if tool := tool_of(values):
        problem = f"{path}:1: this is a config of {tool}, and no recipe"
        raise UserError(problem, f"`llmpipe init --from {path}` writes a recipe of it")


def _refuse_other_stage(
    values: dict[str, Any], where: Where, schema: type[Recipe], path: Path
) -> None:
    """Raise UserError for a recipe of another stage: its fields are others, and all were wrong.

    A name that is no stage is among the complaints of `validate`.
    """
    asked = schema.model_fields["stage"].default
    stage = values.get("stage")
    if stage != asked and _is_stage(stage):
        problem = f"{where[('stage',)]}: this is a recipe for {stage}, not for {asked}"
        raise UserError(problem, f"use `llmpipe {stage} {path}`")


def _is_stage(name: Any) -> bool:
    return name in modules_in(STAGES)


def load_pipeline(path: Path, schema: SchemaOf, sets: list[str] | None = None) -> Pipeline:
    """Read a pipeline: `run:` and a list `stages:` of recipes.

    Raises UserError for a file that is none; what is wrong in a stage is among its `problems`.
    """
    values, where = read(path)
    _refuse_no_pipeline(values, path)
    apply_sets(values, where, sets or [], lambda key: _in_stages(key, values["stages"]))
    _refuse_no_pipeline(values, path)
    problems = [
        f"{where[(key,)]}: {key}: unknown key{near(key, KEYS)}; a pipeline has {', '.join(KEYS)}"
        for key in values
        if key not in KEYS
    ]
    stages: list[Located | None] = []
    lines = _lines_by_stage(where)
    for i in range(len(values["stages"])):
        try:
            stages.append(_stage_of_pipeline(i, values, lines.get(i, {}), schema, str(path)))
        except UserError as error:
            stages.append(None)
            problems.append(error.message)
    names = [_name_of(stage) for stage in values["stages"]]
    expected = _expected(values.get("expected", []), names, where, str(path), problems)
    return Pipeline(stages, names, problems, expected)


def _expected(
    values: Any, names: list[str | None], where: Where, file: str, problems: list[str]
) -> list[Expected]:
    """What was published of a pipeline; what is wrong with it is added to `problems`."""
    from llmpipe.recipe.expected import Expected  # here: few recipes have any

    numbers = []
    entries = values if isinstance(values, list) else [values]
    for i, entry in enumerate(entries):
        loc: Loc = ("expected", i) if entries is values else ("expected",)
        complaints = Complaints(where, file)
        try:
            number = Expected.model_validate(entry)
            numbers.append(number)
            if number.artifact not in names:
                hint = near(number.artifact, [name for name in names if name])
                at = (*loc, "artifact")
                complaints.add(at, at, f"no stage makes {number.artifact}{hint}")
        except ValidationError as errors:
            for error in errors.errors(include_url=False):
                at = (*loc, *error["loc"])
                complaints.add(at if at in where else loc, at, message_of(error, Expected))
        problems += complaints.in_order()
    return numbers


def _refuse_no_pipeline(values: Any, path: Path) -> None:
    """Raise UserError where there is no list of stages."""
    refuse_foreign(values, path)
    stages = values.get("stages") if isinstance(values, dict) else None
    if isinstance(stages, list) and len(stages) > STAGES_AT_MOST:
        raise UserError(f"{path}:1: a pipeline has at most {STAGES_AT_MOST} stages", "divide it")
    if isinstance(stages, list) and stages:
        return
    stage = values.get("stage") if isinstance(values, dict) else None
    if _is_stage(stage):
        problem = f"{path}:1: this is a recipe for {stage}, not a pipeline of several stages"
        raise UserError(problem, f"use `llmpipe {stage} {path}`")
    problem = f"{path}:1: a pipeline has `run:` and a list `stages:`"
    raise UserError(problem, "for one stage: llmpipe STAGE RECIPE")


def _lines_by_stage(where: Where) -> dict[int, Where]:
    """Of each stage of a pipeline: the line of every value, and of the pipeline's `run:`."""
    run: Where = {loc: line for loc, line in where.items() if loc == ("run",)}
    lines: dict[int, Where] = {}
    for loc, line in where.items():
        if loc[:1] == ("stages",) and len(loc) > 1 and isinstance(loc[1], int):
            lines.setdefault(loc[1], dict(run))[loc[2:]] = line
    return lines


def _in_stages(key: str, stages: list[Any]) -> str:
    """Where `--set NAME.field` of a pipeline goes: `stages.N.field`. Raises UserError."""
    if key in ("", *KEYS) or key.startswith(("stages.", "expected.")):
        return key
    names = [name for name in map(_name_of, stages) if name]
    for i, stage in enumerate(stages):
        name = _name_of(stage)
        if name and key.startswith(f"{name}."):
            return f"stages.{i}{key.removeprefix(name)}"
    first, _, rest = key.partition(".")
    meant = nearest(first, names)
    example = f"{meant}.{rest or 'FIELD'}" if meant else f"{(names or ['NAME'])[0]}.{key}"
    problem = f"a pipeline has several stages: {', '.join(names)}"
    raise UserError(problem, f"say of which one: --set {example}=")


def _name_of(document: Any) -> str | None:
    """The name of what a stage of a pipeline makes."""
    name = document.get("name") or document.get("stage") if isinstance(document, dict) else None
    return name if isinstance(name, str) else None


def _stage_of_pipeline(
    i: int, values: dict[str, Any], where: Where, schema: SchemaOf, name: str
) -> Located:
    """The recipe at a place in `stages:`; it takes the pipeline's `run:` unless it has its own.

    `where` of the pipeline's `run:` and of the stage's own values.
    """
    line = where.get((), f"{name}:1")
    document = values["stages"][i]
    if not isinstance(document, dict) or not isinstance(document.get("stage"), str):
        raise UserError(f"{line}: stages.{i}: each entry is a recipe and names its `stage:`")
    lines = dict(where)
    if "run" in values:
        document = {"run": values["run"], **document}
    try:
        stage_schema = schema(document["stage"])
    except UserError as error:  # no such stage
        raise UserError(f"{lines.get(('stage',), line)}: {error.message}") from None
    return Located(validate(document, lines, stage_schema, name), lines, name)


def validate(values: Any, where: Where, schema: type[Recipe], name: str) -> Recipe:
    """Plain values -> a recipe of `schema`.

    Raises one UserError with every problem, in the order of the file.
    """
    if not isinstance(values, dict):
        raise UserError(f"{name}:1: a recipe is a mapping of keys to values")
    recipe = None
    complaints = Complaints(where, name)
    for loc, what in secrets_in(values):
        complaints.add(loc, loc, f"looks like {what}; {FROM_ENVIRONMENT}")
    try:
        recipe = schema.model_validate(values)
    except ValidationError as errors:
        for error in errors.errors(include_url=False):
            complaints.add_error(error, schema)
            if complaints.are_enough:
                break
    trainer = values.get("trainer")
    if isinstance(trainer, dict) and issubclass(schema, Hosted):
        for key, message in schema.trainer_config.problems(trainer):
            complaints.add(("trainer", key), ("trainer", key), message)
            if complaints.are_enough:
                break
    if complaints.lines or recipe is None:
        raise UserError("\n".join(complaints.in_order()))
    return recipe


FROM_ENVIRONMENT = (
    "a recipe is written into every artifact, so secrets come from the environment (HF_TOKEN, "
    "WANDB_API_KEY)"
)


class Complaints:
    """What is wrong in a file, one complaint for each place."""

    def __init__(self, where: Where, name: str):
        self.where = where
        self.name = name
        self.lines: dict[tuple[str, str], str] = {}

    @property
    def are_enough(self) -> bool:
        """Whether nobody would read any more of them."""
        return len(self.lines) >= MOST

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
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
        self.lines.setdefault((line, path), f"{line}: {path or 'recipe'}: {message}")

    def in_order(self) -> list[str]:
        """All of them, by their line."""
        by_line = sorted((_number(line), text) for (line, _), text in self.lines.items())
        lines = [text for _, text in by_line]
        return [*lines, f"... {MORE}"] if self.are_enough else lines

    def _written(self, loc: Loc) -> Loc:
        """The part of a location that exists in the file; pydantic adds names of types to it."""
        written: Loc = ()
        for part in loc:
            if (*written, part) in self.where:
                written = (*written, part)
        return written


def _number(line: str) -> int:
    """12 of `recipes/sft.yaml:12`, and 0 of `--set`."""
    match = re.search(":([0-9]{1,9})$", line)
    return int(match[1]) if match else 0


def message_of(error: ErrorDetails, schema: type[BaseModel]) -> str:
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
            hint = near(str(given)[:LONGEST], _quoted(expected))
            return f"{_short(given)} is not one of {expected}{hint}"
        case "union_tag_invalid":
            tag = str(context["tag"])
            tags = _quoted(context["expected_tags"])
            hint = near(tag[:LONGEST], tags)
            return f"{_short(tag)} is not one of {', '.join(tags)}{hint}"
        case "value_error":
            return message
        case "model_type" | "dict_type" | "model_attributes_type":
            section = section_at(schema, error["loc"])
            return f"should be a section such as {_such_as(section)}, not {_short(given)}"
        case "bool_type" | "list_type":
            return f"{KINDS[error['type']]}, not {_short(given)}"
        case "string_type":
            quoted = "; in quotes it is" if isinstance(given, (bool, int, float)) else ""
            return f"should be text, not {_short(given)}{quoted}"
        case _:
            return f"{message}, not {_short(given)}"


KINDS = {
    "bool_type": "should be true or false",
    "list_type": "should be a list, such as [one, two]",
}
"""What pydantic names by Python's types."""


def _short(value: Any) -> str:
    shown = repr(value)
    return f"{shown[:60]}..." if len(shown) > 60 else shown


def _such_as(section: type[BaseModel] | None) -> str:
    """An example of a section: its first field, with the value that it has unless set."""
    if section is None:
        return "{key: value}"
    name, field = next(iter(fields_of(section).items()))
    value = field.get_default(call_default_factory=False)
    plain = type(value) in (int, float, str)
    return f"{{{name}: {value if plain else '...'}}}"


def _quoted(text: str) -> list[str]:
    """The words in a text that stand in quotes."""
    return re.findall(r"'([^']*)'", text)


def _meant(loc: Loc, schema: type[BaseModel]) -> str:
    """What an unknown key was meant to be: one of this section, one of another, or any of these."""
    key = str(loc[-1])[:LONGEST]
    section = section_at(schema, loc[:-1])
    known = list(fields_of(section)) if section else []
    if hint := near(key, known):
        return hint
    paths = _paths(schema)
    like = nearest(key, paths, cutoff=0.75)
    if path := paths.get(key) or (paths[like] if like else None):
        return f"; did you mean '{path}'?"
    return f"; known here: {', '.join(known)}"


@cache
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
