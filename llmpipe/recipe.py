"""A recipe: one YAML file, closed, checked all at once, every problem with its line.

    recipe = load(Path("recipes/alpaca.yaml"), SFTRecipe, sets=["optim.learning_rate=1e-5"])

Reading happens in two steps. `read` turns YAML into plain values plus a map from each value's path to its line; it is
stricter than YAML (no anchors, tags or duplicate keys) and reads scalars as YAML 1.2 does, so `1e-5` is a number and
`no` is a string. `validate` hands the values to pydantic and gives every complaint its `file:line` and, for an unknown
name, the nearest known one. Nothing here imports more than pydantic and PyYAML.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from llmpipe.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def cosmetic(*default: Any, **kwargs: Any) -> Any:
    """A field that does not change the artifact, and so is no part of its identity."""
    return Field(*default, json_schema_extra={"identity": False}, **kwargs)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,  # a section is compiled when a recipe is validated, not when it is imported
        # reading them out of the source takes a third of the front door's time, and only `schema` shows them
        use_attribute_docstrings=os.environ.get("LLMPIPE_DOCSTRINGS") == "1",
    )


TEMPLATES = ("chatml", "alpaca", "llama3")  # shipped; any other name but `auto` is a Jinja file


class Rows(Section):
    path: str
    """Where rows come from: a Hub id, or a file, folder or glob (json, jsonl, csv, parquet, txt) starting with `./`,
    `../`, `/` or `~` or ending in one of these suffixes."""
    format: Literal[
        "auto", "text", "alpaca", "sharegpt", "messages", "prompt-completion", "preference", "prompt", "choice"
    ] = "auto"
    """How a row is laid out; `auto` decides by the column names and says what it found."""
    columns: dict[str, str] = {}
    """Your column names mapped to the format's: `{question: prompt, answer: completion}`."""
    subset: str | None = None
    """Configuration name of a Hub dataset."""
    split: str = "train"
    """Split of a Hub dataset."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset; the commit it resolves to is recorded."""
    limit: Positive | None = None
    """Read at most this many rows."""


class Source(Rows):
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often each row is seen per epoch: 2 repeats every row, 0.5 takes a seeded half."""


class Holdout(Section):
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows kept out for evaluation, chosen by content with the recipe's seed, so that equal
    rows fall on the same side."""
    sources: list[Rows] = []
    """Evaluation rows of their own, beside or instead of a holdout."""


class Prepared(Section):
    """What every kind of training data has."""

    train: Annotated[list[Source], Field(min_length=1)]
    """The sources to train on."""
    eval: Holdout = Field(default_factory=Holdout)
    """What is kept for evaluation."""
    max_rejected: Share = 0.01
    """Share of rows that may be rejected before the run stops."""
    processes: Positive | Literal["auto"] = cosmetic("auto")
    """Processes that tokenize; `auto` is one per core, and one alone for small data."""


class Templated(Prepared):
    """Rows that a chat template renders."""

    stream: ClassVar[bool] = False

    template: str = "auto"
    """Chat template: `auto` (the tokenizer's own), `chatml`, `alpaca`, `llama3`, or a Jinja file."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the template, such as `enable_thinking`."""


class Data(Templated):
    kind: ClassVar[str] = "rows"

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest sequence in tokens. A longer conversation is cut after the last whole turn that fits (counted as
    truncated) or rejected; a longer text is split into pieces."""
    packing: bool = True
    """Fill sequences of `max_length` with several rows that do not see one another."""
    loss: Literal["assistant", "all"] = "assistant"
    """Which tokens are learned: the assistant's turns with their end-of-turn token, or every token."""


class Pairs(Templated):
    """Preferences: a prompt with a chosen and a rejected answer."""

    kind: ClassVar[str] = "pairs"
    packing: ClassVar[bool] = False
    loss: ClassVar[str] = "assistant"

    max_length: Annotated[int, Field(ge=8)] = 1024
    """Longest prompt with one of its answers, in tokens; a longer answer is cut there (counted as truncated), and a row
    whose answers are then the same, or whose prompt leaves no room, is rejected."""


class Prompts(Templated):
    """Prompts to answer."""

    kind: ClassVar[str] = "prompts"
    packing: ClassVar[bool] = True
    loss: ClassVar[str] = "assistant"

    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest prompt in tokens; a longer one is rejected."""


class AdamW(Section):
    """The optimizer, and what every schedule has."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate. No single default is right: about 2e-5 for full fine-tuning, 2e-4 for LoRA."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training data."""
    steps: Positive | None = None
    """Stop after this many optimizer steps instead; overrides `epochs`."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Warm-up: a share of the steps if below 1, a number of steps otherwise."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """AdamW's decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient's norm to this; 0 does not clip."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; master weights are fp32 either way. `auto` is bf16 where the hardware has
    it and fp32 elsewhere."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = "adamw"
    """How AdamW keeps its moments: fp32, or 8 bits in blocks (Dettmers 2022); paged moves them to the CPU's memory when
    a GPU is full (Dettmers 2023), and on a CPU means nothing."""


class Optim(AdamW):
    batch_size: Positive = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""


class Adapter(Section):
    rank: Positive = 16
    """Rank of the update: more weights, and more to learn with (LoRA, Hu 2021)."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The update is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in front of the update."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which linear layers get one: all but the head, or those whose names end so."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each weight column apart from its direction (Liu 2024)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    """How the update begins; none changes what the model says at first. pissa (Meng 2024) and olora (Büyükakyüz 2024)
    move a part of the frozen weights into it; what is published is an adapter of twice the rank for the weights as
    they were."""
    embeddings: Literal["new", "all", "none"] = "new"
    """Embeddings to train: those of tokens that were added, all, or none."""
    resume: Annotated[bool, Field(alias="continue")] = True
    """Where `model:` is an adapter: train that one on; `false` merges it into its base and starts a new one."""
    merge: bool = False
    """Publish the merged model too, as the artifact NAME-merged."""

    @property
    def rewrites(self) -> bool:
        """Whether the frozen weights are others than the model's own while this adapter is trained."""
        return self.init in ("pissa", "olora")

    @model_validator(mode="after")
    def _fits(self) -> Adapter:
        if self.rslora and self.dora:
            raise ValueError("rslora and dora are two ways to scale; take one")
        if self.rewrites and self.dora:
            raise ValueError(f"init: {self.init} and dora both decompose the frozen weights; take one")
        return self


class Quantization(Section):
    bits: Literal[4, 8] = 4
    """4: NF4 (QLoRA, Dettmers 2023); 8: LLM.int8()."""
    double: bool = True
    """Quantize the constants of the 4-bit quantization, too: 0.4 bits per weight less."""


class Evaluation(Section):
    every: Positive | None = None
    """Evaluate on the held-out rows every so many steps; without it only before the first and after the last."""
    keep_best: bool = False
    """Publish the checkpoint with the lowest held-out loss instead of the last one."""
    patience: Positive | None = None
    """Stop when the held-out loss has not improved for this many evaluations."""


class Samples(Section):
    prompts: list[str] = []
    """Prompts answered before and after training."""
    max_new_tokens: Positive = 64
    """Longest answer in tokens."""


class Checkpoint(Section):
    every: Positive = cosmetic(100)
    """Write a resumable checkpoint every so many steps."""
    keep: Annotated[int, Field(ge=2)] = cosmetic(2)
    """Keep this many checkpoints; older ones are removed after a newer one is verified."""


class Log(Section):
    every: Positive = cosmetic(10)
    """Write metrics every so many steps."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = cosmetic([])
    """Experiment trackers that also receive the metrics."""


class Machine(Section):
    threads: Positive | Literal["auto"] = "auto"
    """CPU threads per process; `auto` divides the cores."""


class Launch(Machine):
    processes: Positive | Literal["auto"] = "auto"
    """Training processes; `auto` is one per GPU, or one on a CPU."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Sequences per process and forward pass; accumulation makes up the rest of `optim.batch_size`."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


def reference(text: str) -> str:
    """A validator of what names a model."""
    if text.startswith("artifact:") and not re.fullmatch(r"artifact:[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@\d+)?", text):
        raise ValueError(f"'{text}' is not artifact:NAME or artifact:NAME@STEP")
    return text


Reference = Annotated[str, AfterValidator(reference)]


class Recipe(Section):
    """What every stage shares; a stage narrows `stage` and adds its own fields."""

    narrows: ClassVar[str | None] = None  # the stage that this one is, with a field required

    stage: str
    """The kind of work."""
    name: Name | None = cosmetic(None)
    """Folder of the artifact in the run; the stage's name unless set."""
    run: str = cosmetic(...)
    """Directory that holds the artifacts of one pipeline."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything that is drawn: the holdout, the order of the data, the training, sampled answers."""
    launch: Machine = cosmetic(default_factory=Machine)
    """The machine: never part of the result's identity."""

    @property
    def artifact(self) -> str:
        return self.name or self.stage

    @property
    def keeps_adapters(self) -> bool:
        """Whether a model that is an adapter is used as base and adapter; otherwise it is merged first."""
        return True

    def references(self) -> dict[str, str]:
        """Every model that the recipe names, by the path of its field."""
        return {}

    def rows(self) -> dict[str, Rows]:
        """Every source of rows, by the path of its field."""
        return {}

    def files(self) -> dict[str, str]:
        """Every other file or folder whose content decides the result, by the path of its field."""
        return {}


class Training(Recipe):
    """What every stage that trains shares."""

    model: Reference
    """What to start from: a Hub id (`NAME@COMMIT` for one that is not the newest), `./folder`, `./file.gguf`,
    `artifact:NAME` of this run, or `artifact:NAME@STEP`."""
    data: Data
    """Rows and how they become tokens."""
    optim: Optim
    """The optimizer and its schedule."""
    adapter: Adapter | None = None
    """Train a low-rank adapter on a frozen model instead of all weights; the artifact is the adapter."""
    quantization: Quantization | None = None
    """Hold the frozen model in few bits; needs `adapter`."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Evaluation during training."""
    checkpoint: Checkpoint = cosmetic(default_factory=Checkpoint)
    """Resumable state."""
    log: Log = cosmetic(default_factory=Log)
    """Metrics."""
    launch: Launch = cosmetic(default_factory=Launch)
    """The machine: never part of the result's identity."""

    @model_validator(mode="after")
    def _fits(self) -> Training:
        if (self.evaluation.keep_best or self.evaluation.patience) and not self.evaluation.every:
            raise ValueError("evaluation.keep_best and evaluation.patience need evaluation.every")
        if self.evaluation.every and not (self.data.eval.holdout or self.data.eval.sources):
            raise ValueError("evaluation.every needs rows to evaluate on: set data.eval.holdout or data.eval.sources")
        if self.quantization and not self.adapter:
            raise ValueError("quantization: quantized weights cannot be trained; add `adapter:`")
        if self.quantization and self.adapter.rewrites:
            raise ValueError(f"adapter.init: {self.adapter.init} rewrites the frozen weights, and these are quantized")
        return self

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.optim.batch_size

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.data.max_length

    @property
    def steps(self) -> int | None:
        """Optimizer steps, where the recipe says how many."""
        return self.optim.steps

    @property
    def keeps_adapters(self) -> bool:
        return self.adapter is not None and self.adapter.resume

    def references(self) -> dict[str, str]:
        return {"model": self.model}

    def rows(self) -> dict[str, Rows]:
        train = {f"data.train.{i}": source for i, source in enumerate(self.data.train)}
        return train | {f"data.eval.sources.{i}": source for i, source in enumerate(self.data.eval.sources)}

    def files(self) -> dict[str, str]:
        own = self.data.template not in ("auto", *TEMPLATES)
        return {"data.template": self.data.template} if own else {}


class Hosted(Training):
    """What every stage shares whose loop is a library's."""

    trainer: dict[str, Any] = {}
    """Escape hatch: any field of the TRL config underneath that llmpipe does not own, checked by name."""


class Generating(Hosted):
    """What every stage shares that trains a model to answer in such a loop."""

    samples: Samples = Field(default_factory=Samples)
    """Prompts that show what changed."""


def science(section: BaseModel) -> dict[str, Any]:
    """The part of a recipe that decides the result: every field not declared `cosmetic`."""
    out = {}
    for attribute, field in type(section).model_fields.items():
        if (field.json_schema_extra or {}).get("identity") is False:
            continue
        value, name = getattr(section, attribute), field.alias or attribute
        if isinstance(value, BaseModel):
            value = science(value)
        elif isinstance(value, list):
            value = [science(item) if isinstance(item, BaseModel) else item for item in value]
        out[name] = value
    return out


LOCAL_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".gguf", ".jinja")


def is_local(path: str) -> bool:
    """Local paths start with ./, ../, / or ~, or end in a known suffix; everything else is a Hub id."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..") or path.endswith(LOCAL_SUFFIXES)


Loc = tuple[str | int, ...]
Where = dict[Loc, str]  # path of a value -> "file:line"

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_DEPTH = 30  # deeper nesting is no recipe


def _scalar(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) < 100:
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def _plain(node: yaml.Node, name: str, loc: Loc, where: Where, problems: list[str]) -> Any:
    where[loc] = at = f"{name}:{node.start_mark.line + 1}"
    if len(loc) > _DEPTH:
        raise UserError(f"{at}: nested too deeply")
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, name, (*loc, i), where, problems) for i, item in enumerate(node.value)]
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key_at = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(f"{key_at}: a key must be a plain word")
            continue
        key = key_node.value
        if key in out:
            problems.append(
                f"{key_at}: {_dotted((*loc, key))}: given twice; the first is on line "
                f"{where[(*loc, key)].rpartition(':')[2]}"
            )
            continue
        out[key] = _plain(value_node, name, (*loc, key), where, problems)
        where[(*loc, key)] = key_at
    return out


def parse(text: str, name: str) -> tuple[Any, Where]:
    """YAML text -> plain values and the line of each. Raises UserError naming `name:line`."""
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            what = {
                yaml.AnchorToken: "anchors (&name) are not used in recipes; write the value out",
                yaml.AliasToken: "aliases (*name) are not used in recipes; write the value out, or quote it",
                yaml.TagToken: "tags (!name) are not used in recipes; quote the value if it starts with '!'",
            }.get(type(token))
            if what:
                raise UserError(f"{name}:{token.start_mark.line + 1}: {what}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        context = f" ({error.context})" if error.context else ""
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}{context}") from None
    except (yaml.YAMLError, ValueError) as error:
        line = text[: getattr(error, "position", 0)].count("\n") + 1
        raise UserError(f"{name}:{line}: not valid YAML: {getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise UserError(f"{name}:1: nested too deeply") from None
    if node is None:
        raise UserError(f"{name}:1: the file is empty", "`llmpipe init DIR` writes a recipe to start from")
    where: Where = {}
    problems: list[str] = []
    values = _plain(node, name, (), where, problems)
    if problems:
        raise UserError("\n".join(problems))
    return values, where


def read(path: Path) -> tuple[Any, Where]:
    """Read a recipe file; the values and the line of each."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe", "`llmpipe init DIR` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"{path}:1: cannot be read: {reason}") from None
    return parse(text, str(path))


def apply_sets(values: dict, where: Where, sets: list[str]) -> None:
    """Apply `--set key.sub=value` in place; the value is YAML, a number in the path indexes a list."""
    for item in sets:
        key, equals, text = item.partition("=")
        at = f"--set {item}"
        if not equals or not key:
            raise UserError(f"{at}: expected key.sub=value")
        value, _ = parse(text, at) if text.strip() else (None, {})
        loc: list[str | int] = [int(part) if part.isdigit() else part for part in key.split(".")]
        target: Any = values
        for depth, part in enumerate(loc[:-1]):
            if isinstance(target, list) and isinstance(part, int) and part < len(target):
                target = target[part]
            elif isinstance(target, dict) and isinstance(part, str):
                if target.get(part) is None:
                    target[part] = {}
                target = target[part]
            else:
                raise UserError(f"{at}: there is no {'.'.join(map(str, loc[: depth + 1]))} in the recipe")
        last = loc[-1]
        if isinstance(target, list) and isinstance(last, int) and last < len(target):
            target[last] = value
        elif isinstance(target, dict) and isinstance(last, str):
            target[last] = value
        else:
            raise UserError(f"{at}: there is no {key} in the recipe")
        for known in [k for k in where if k[: len(loc)] == tuple(loc)]:
            del where[known]
        where[tuple(loc)] = at


def _section_at(model: type[BaseModel], loc: Loc) -> type[BaseModel] | None:
    """The section class that the value at `loc` belongs to; a choice of sections has its tag in `loc`."""
    options = [model]
    for part in loc:
        if isinstance(part, int):
            continue
        if len(options) > 1:
            options = [o for o in options if any(part in get_args(f.annotation) for f in o.model_fields.values())]
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


def near(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` or nothing."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean '{match[0]}'?" if match else ""


def _complaint(error: dict, schema: type[BaseModel]) -> tuple[Loc, str]:
    loc, kind = error["loc"], error["type"]
    if kind == "extra_forbidden":
        section = _section_at(schema, loc[:-1])
        known = list(fields_of(section)) if section else []
        hint = near(str(loc[-1]), known)
        elsewhere = _all_names(schema)
        if not hint and (path := elsewhere.get(str(loc[-1]))):
            hint = f"; did you mean '{path}'?"
        if not hint and (match := difflib.get_close_matches(str(loc[-1]), list(elsewhere), n=1, cutoff=0.75)):
            hint = f"; did you mean '{elsewhere[match[0]]}'?"
        return loc, "unknown key" + (hint or f"; known here: {', '.join(known)}")
    if kind == "missing":
        return loc, "required, but missing"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return loc, f"{error['input']!r} is not one of {error['ctx']['expected']}" + near(str(error["input"]), choices)
    if kind == "union_tag_invalid":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
        tag = error["ctx"]["tag"]
        return loc, f"'{tag}' is not one of {', '.join(choices)}" + near(str(tag), choices)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    shown = repr(error["input"])
    return loc, message if kind == "value_error" else f"{message}, not {shown[:60]}{'...' if len(shown) > 60 else ''}"


def _known_loc(loc: Loc, where: Where, values: Any) -> Loc:
    """The part of a pydantic location that exists in the file (unions add type names at the end)."""
    kept: list[str | int] = []
    for part in loc:
        if (*kept, part) in where:
            kept.append(part)
    return tuple(kept)


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in loc)


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
            problems.setdefault((at, _dotted(shown)), (_line(at), f"{at}: {_dotted(shown) or 'recipe'}: {message}"))
    trainer = values.get("trainer")
    if isinstance(trainer, dict):
        for key, message in trainer_problems(trainer, schema).items():
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
            raise UserError(f"{where[('stages',)]}: this is a pipeline of several stages", f"llmpipe run {path}")
        apply_sets(values, where, sets or [])
    return validate(values, where, schema, str(path))


def load_pipeline(path: Path, schema: Callable[[str], type[Recipe]], sets: list[str] | None = None) -> list[Recipe]:
    """Read a pipeline: `run:` and a list `stages:` of recipes, all checked before the first one starts."""
    values, where = read(path)
    name = str(path)
    if not isinstance(values, dict) or not isinstance(values.get("stages"), list) or not values["stages"]:
        raise UserError(f"{name}:1: a pipeline has `run:` and a list `stages:`", "for one stage: llmpipe STAGE RECIPE")
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
            prefix = "" if error.message.startswith(name) or error.message.startswith("--set") else f"{at}: "
            problems.append(prefix + error.message)
    names = [recipe.artifact for recipe in recipes]
    problems += [
        f"{name}:1: two stages are called '{n}'; give one a `name:`"
        for n in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UserError("\n".join(problems))
    return recipes


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every default written out."""
    return yaml.safe_dump(recipe.model_dump(by_alias=True), sort_keys=False, allow_unicode=True, width=100)


# Fields of transformers' TrainingArguments that llmpipe sets itself, each with the recipe's name for it, if it has one.
_OWNED = """
    output_dir=run run_name=name seed=seed data_seed=seed learning_rate=optim.learning_rate
    per_device_train_batch_size=optim.batch_size+launch.micro_batch_size
    per_device_eval_batch_size=launch.micro_batch_size
    gradient_accumulation_steps=optim.batch_size+launch.micro_batch_size num_train_epochs=optim.epochs
    max_steps=optim.steps lr_scheduler_type=optim.scheduler warmup_steps=optim.warmup weight_decay=optim.weight_decay
    adam_beta1=optim.beta1 adam_beta2=optim.beta2 adam_epsilon=optim.epsilon max_grad_norm=optim.max_grad_norm
    bf16=optim.precision fp16=optim.precision bf16_full_eval=optim.precision fp16_full_eval=optim.precision
    tf32=optim.precision use_cpu=launch gradient_checkpointing=launch.activation_checkpointing dataset_kwargs=data
    dataset_num_proc=data.processes remove_unused_columns= pad_token= model_init_kwargs=model trust_remote_code=
    eval_strategy=evaluation.every eval_steps=evaluation.every eval_on_start=evaluation do_train= do_eval=
    do_predict= save_strategy=checkpoint.every save_steps=checkpoint.every save_total_limit=checkpoint.keep
    save_only_model=checkpoint save_on_each_node=checkpoint load_best_model_at_end=evaluation.keep_best
    metric_for_best_model=evaluation.keep_best greater_is_better=evaluation.keep_best resume_from_checkpoint=
    restore_callback_states_from_checkpoint= ignore_data_skip= enable_jit_checkpoint=checkpoint
    auto_find_batch_size=launch.micro_batch_size logging_steps=log.every logging_strategy=log.every
    logging_first_step=log.every logging_nan_inf_filter= log_level= report_to=log.trackers disable_tqdm= push_to_hub=
    hub_token= hub_model_id= average_tokens_across_devices= local_rank=launch deepspeed= fsdp= fsdp_config=
    accelerator_config=launch parallelism_config=launch label_smoothing_factor= train_sampling_strategy=
    length_column_name= eval_delay= eval_accumulation_steps= prediction_loss_only= include_for_metrics=
    batch_eval_metrics= hub_strategy= hub_private_repo= hub_always_push= hub_revision= use_liger_kernel=
"""


def owned(text: str) -> dict[str, str]:
    """`field=name` pairs of a stage's own trainer, and those that all trainers have; a + stands for `and`."""
    pairs = (pair.partition("=") for pair in (_OWNED + text).split())
    return {field: name.replace("+", " and ") for field, _, name in pairs}


@cache
def config_fields(package: str, module: str, name: str) -> dict[str, str]:
    """Field -> annotation of a config dataclass and its bases, read from the installed source without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(spec.submodule_search_locations[0], *module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    fields: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                base_name = ast.unparse(base)
                if base_name == "TrainingArguments":
                    fields |= config_fields("transformers", "training_args", "TrainingArguments")
                elif base_name == "_BaseConfig":
                    fields |= config_fields("trl", "trainer.base_config", "_BaseConfig")
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    fields[item.target.id] = ast.unparse(item.annotation)
    return fields


def trainer_problems(trainer: dict[str, Any], schema: type[Recipe]) -> dict[str, str]:
    """What is wrong with the keys of `trainer:`, by key. A schema names its config and what llmpipe owns of it."""
    config: tuple[str, str, str] | None = getattr(schema, "trainer_config", None)
    if config is None:
        return {}
    owned: dict[str, str] = getattr(schema, "trainer_owned", {})
    fields = config_fields(*config)
    problems = {}
    for key in trainer:
        if key in owned:
            problems[key] = f"llmpipe sets this itself{f'; use {owned[key]}' if owned[key] else ''}"
        elif fields and key not in fields:
            free = [name for name in fields if name not in owned]
            hint = near(key, free)
            if not hint and (match := difflib.get_close_matches(key, list(owned), n=1, cutoff=0.6)):
                hint = f"; '{match[0]}' is set by llmpipe" + (f": use {owned[match[0]]}" if owned[match[0]] else "")
            problems[key] = f"{config[2]} has no such field{hint}"
    return problems
