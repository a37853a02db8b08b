"""The fields of a recipe: what each is called, what it may hold, and what it means.

A section is closed and frozen; validators refuse, they never repair. A field is documented in the
docstring under it, which `llmpipe schema` shows. What every stage shares is here; a stage adds its
own in `llmpipe.stages`. Nothing here imports more than pydantic.
"""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llmpipe.errors import UserError, near
from llmpipe.recipe.formats import FormatName
from llmpipe.recipe.names import ARTIFACT, NAME, is_name, is_reference
from llmpipe.recipe.optimizers import OPTIMIZERS, OptimizerName
from llmpipe.recipe.trainer import OF_BITSANDBYTES, TrainerConfig

Positive = Annotated[int, Field(ge=1, le=10**9)]

Crowd = Annotated[int, Field(ge=1, le=1024)]  # of processes or threads

Length = Annotated[int, Field(ge=8, le=1 << 24)]  # tokens of a sequence

Share = Annotated[float, Field(ge=0, le=1)]

Name = Annotated[str, Field(pattern=f"^{NAME}$")]


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
        # a section is compiled when a recipe is validated, not when it is imported
        defer_build=True,
        # reading them out of the source takes a third of the front door's time, and only `schema`
        # shows them
        use_attribute_docstrings=os.environ.get("LLMPIPE_DOCSTRINGS") == "1",
    )


TEMPLATES = ("chatml", "alpaca", "llama3")  # shipped; any other name but `auto` is a Jinja file


def template_file(template: str) -> dict[str, str]:
    """What `data.template` names, by its field, where it is a file."""
    return {} if template in ("auto", *TEMPLATES) else {"data.template": template}


class Rows(Section):
    path: str
    """Where rows come from: a Hub id, or a file, folder or glob (json, jsonl, ndjson, csv, tsv, txt
    and these as gz, bz2, xz, zst or lz4; parquet; arrow, as `save_to_disk` leaves it) starting with
    `./`, `../`, `/` or `~` or ending in one of these suffixes; or `artifact:NAME`, what a stage of
    this run that makes rows has made."""
    format: FormatName = "auto"
    """How a row is laid out; `auto` decides by the columns of the first row and says what it found.
    A later row is read by its own columns, and has to say as much as the first one."""
    columns: dict[str, str] = {}
    """Your column names mapped to the format's: `{question: instruction, answer: output}`; so are
    those that a stage reads beside it, such as `label` for kto."""
    subset: str | None = None
    """Configuration name of a dataset of the Hub, or of a folder whose README.md lists several."""
    split: str | None = None
    """Split of a dataset of the Hub, `train` unless set; or of a folder with files of several
    splits by their names (`train-00000-of-00001.parquet`, `test/rows.jsonl`) or by its README.md.
    There, what is not of another split is trained on, and rows to evaluate on need it said."""
    revision: str | None = None
    """Commit, tag or branch of a Hub dataset; the commit it resolves to is recorded."""
    limit: Positive | None = None
    """Read at most this many rows."""

    @model_validator(mode="after")
    def _pins(self) -> Rows:
        if self.artifact is not None and not is_name(self.artifact):
            raise ValueError(f"{self.path!r:.120} is not artifact:NAME")
        if self.revision is not None and self.is_here:
            raise ValueError(f"revision is of a dataset of the Hub, and {self.path} is a path here")
        return self

    @property
    def artifact(self) -> str | None:
        """The name of the artifact of the run that has the rows, where one has."""
        return self.path.removeprefix(ARTIFACT) if self.path.startswith(ARTIFACT) else None

    @property
    def is_here(self) -> bool:
        """Whether the rows lie on this machine, and not on the Hub."""
        return self.artifact is not None or is_local(self.path)


class Source(Rows):
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row is seen per epoch: 2 repeats every row, 0.5 takes a seeded half."""


class Holdout(Section):
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training rows kept out for evaluation, chosen by content with the recipe's seed,
    so that equal rows fall on the same side."""
    sources: list[Rows] = []
    """Evaluation rows of their own, beside or instead of a holdout."""


@dataclass(frozen=True)
class Preparation:
    """How rows become tokens, said alike for every kind of data.

    What a section of a recipe has no field for has its default here.
    """

    max_length: int
    """Longest sequence in tokens."""
    template: str = "auto"
    """Chat template, as in `data.template`."""
    template_kwargs: dict[str, Any] = dataclass_field(default_factory=dict)
    """Extra variables for the template."""
    packing: bool = False
    """Whether several rows share a sequence and do not see one another."""
    learn_all: bool = False
    """Whether every token is learned, not the responses alone."""
    stream: bool = False
    """Whether rows are tokenized while they are trained on, and no copy is kept."""


class Prepared(Section):
    """What every kind of training data has."""

    length_field: ClassVar[str] = "data.max_length"
    """Where a recipe says how long a sequence may be."""
    train: Annotated[list[Source], Field(min_length=1)]
    """The sources to train on."""
    eval: Holdout = Field(default_factory=Holdout)
    """What is kept for evaluation."""
    max_rejected: Share = 0.01
    """Share of rows that may be rejected before the run stops."""
    processes: Crowd | Literal["auto"] = cosmetic("auto")
    """Processes that tokenize; `auto` is one per core, and one alone for small data."""

    @property
    @abstractmethod
    def preparation(self) -> Preparation:
        """How these rows become tokens."""


class Templated(Prepared):
    """Rows that a chat template renders."""

    template: str = "auto"
    """Chat template: `auto` (the tokenizer's own), `chatml`, `alpaca`, `llama3`, or a Jinja
    file."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the template, such as `enable_thinking`."""
    max_length: Length
    """Longest sequence in tokens."""

    @property
    def preparation(self) -> Preparation:
        return Preparation(self.max_length, self.template, self.chat_template_kwargs)

    def files(self) -> dict[str, str]:
        """The template where it is a file, by its field."""
        return template_file(self.template)


class Data(Templated):
    max_length: Length = 1024
    """Longest sequence in tokens. A longer conversation is cut after the last whole turn that fits
    (counted as truncated) or rejected; a longer text is split into pieces."""
    packing: bool = True
    """Fill sequences of `max_length` with several rows that do not see one another."""
    loss: Literal["assistant", "all"] = "assistant"
    """Which tokens are learned: the assistant's turns with their end-of-turn token, or every
    token."""

    @property
    def preparation(self) -> Preparation:
        return Preparation(
            self.max_length,
            self.template,
            self.chat_template_kwargs,
            packing=self.packing,
            learn_all=self.loss == "all",
        )


class Pairs(Templated):
    """Preferences: a prompt with a chosen and a rejected answer."""

    max_length: Length = 1024
    """Longest prompt with one of its answers, in tokens; a longer answer is cut there (counted as
    truncated), and a row whose answers are then the same, or whose prompt leaves no room, is
    rejected."""


class Prompts(Templated):
    """Prompts to answer."""

    train: list[Source] = []
    """The sources to train on; none where a reward is an environment, which asks itself."""

    max_length: Length = 512
    """Longest prompt in tokens; a longer one is rejected."""


class AdamW(Section):
    """The optimizer, and what every schedule has."""

    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate. No single default is right: about 2e-5 for full fine-tuning, 2e-4 for
    LoRA."""
    epochs: Annotated[float, Field(gt=0, le=10**6)] = 1.0
    """Passes over the training data."""
    steps: Positive | None = None
    """Stop after this many optimizer steps instead; overrides `epochs`."""
    warmup: Annotated[float, Field(ge=0, le=10**9)] = 0.03
    """Warm-up: a share of the steps if below 1, a number of steps otherwise; step 1 of w has the
    share 1 / (w + 1) of the peak, never 0."""
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
    """Arithmetic of forward and backward; master weights are fp32 either way. `auto` is bf16 where
    the hardware has it and fp32 elsewhere."""
    optimizer: OptimizerName = "adamw"
    """How AdamW keeps its moments: fp32, or 8 bits in blocks (Dettmers 2022); paged moves them to
    the CPU's memory when a GPU is full (Dettmers 2023), and on a CPU means nothing."""

    @abstractmethod
    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens per optimizer step."""


class Optim(AdamW):
    batch_size: Positive = 32
    """Sequences per optimizer step, over all processes and micro-batches."""
    scheduler: Literal["linear", "cosine", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""

    def sequences(self, length: int) -> int:
        return self.batch_size


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
    """How the update begins; none changes what the model says at first. pissa (Meng 2024) and olora
    (Büyükakyüz 2024) move a part of the frozen weights into it; what is published is an adapter of
    twice the rank for the weights as they were."""
    embeddings: Literal["new", "all", "none"] = "new"
    """Embeddings to train: those of tokens that were added, all, or none. Rows that the model
    lacked are published with the adapter in any case."""
    resume: Annotated[bool, Field(alias="continue")] = True
    """Where `model:` is an adapter: train that one on; `false` merges it into its base and starts a
    new one."""
    merge: bool = False
    """Publish the merged model too, as the artifact NAME-merged."""

    @property
    def rewrites(self) -> bool:
        """Whether the frozen weights are not the model's own while this adapter is trained."""
        return self.init in ("pissa", "olora")

    def is_on(self, layer: str) -> bool:
        """Whether the linear layer of this dotted name gets an update, unless it is the head."""
        return self.targets == "all-linear" or any(_ends_in(layer, name) for name in self.targets)

    def check_targets(self, layers: Sequence[str]) -> None:
        """Raise UserError for a name in `targets` that none of the linear layers ends in: where
        another one does, PEFT would be content, and nothing would tell.
        """
        for name in [] if self.targets == "all-linear" else self.targets:
            if not any(_ends_in(layer, name) for layer in layers):
                last_names = sorted({layer.rpartition(".")[2] for layer in layers})
                problem = f"adapter.targets: no linear layer is called {name}"
                hint = f"there are: {', '.join(last_names)}"
                raise UserError(f"{problem}{near(name, last_names)}", hint)

    @model_validator(mode="after")
    def _fits(self) -> Adapter:
        if self.rslora and self.dora:
            raise ValueError("rslora and dora are two ways to scale; take one")
        if self.rewrites and self.dora:
            raise ValueError(
                f"init: {self.init} and dora both decompose the frozen weights; take one"
            )
        return self


def _ends_in(layer: str, name: str) -> bool:
    """Whether a dotted name ends in these parts."""
    return f".{layer}".endswith(f".{name}")


class Quantization(Section):
    bits: Literal[4, 8] = 4
    """4: NF4 (QLoRA, Dettmers 2023); 8: LLM.int8()."""
    double: bool = True
    """Quantize the constants of the 4-bit quantization, too: 0.4 bits per weight less."""


class Evaluation(Section):
    every: Positive | None = None
    """Evaluate on the held-out rows every so many steps; without it only before the first and after
    the last."""
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
    asynchronous: bool | Literal["auto"] = cosmetic("auto")
    """Write a checkpoint while the next steps run, from a copy in the host's memory: of what
    learns 4 bytes a weight, and its moments, 8 with adamw. The steps stand still for the copy and
    for publishing; a kill meanwhile goes back to the checkpoint before. `auto` where a GPU computes
    the steps: on a CPU the writing takes from them what it saves. What the files hold is the same.
    Where the copy does not fit, and after the last step, it is written at once; what machines with
    a run directory each send to the first one is waited for."""


class Log(Section):
    every: Positive = cosmetic(10)
    """Write metrics every so many steps."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = cosmetic([])
    """Experiment trackers that also receive the metrics."""


class Machine(Section):
    processes: Crowd | Literal["auto"] = "auto"
    """Processes that do the work; `auto` is one per GPU, and one on a CPU."""
    threads: Crowd | Literal["auto"] = "auto"
    """CPU threads per process; `auto` divides the cores."""


class Launch(Machine):
    processes: Crowd | Literal["auto"] = "auto"
    """Training processes; `auto` is one per GPU, or fewer where more do not divide
    `optim.batch_size`; one on a CPU."""
    strategy: Literal["auto", "ddp", "fsdp", "hsdp", "zero2", "zero3"] = "auto"
    """How several processes hold a model: all of it in each (`ddp`), or a part of its weights,
    gradients and moments in each (`fsdp`); beside an adapter, of the frozen weights alone. With
    `hsdp` these parts are on each machine, a whole model together, and only gradients go from
    machine to machine. `auto` is `ddp` where the smallest batch then fits the memory of a device by
    the model's shape, else `fsdp` where the stage allows it; in ppo and grpo it is `ddp`, and
    says where that does not fit; a resumed run keeps to its checkpoint. `zero2` and `zero3` are
    DeepSpeed's stages of ZeRO, experimental, and asked for by name at each resumption: while the
    model trains each process holds a part of gradients and moments, with `zero3` of the weights,
    too; before and after, all of it is in each. They need `pip install 'llmpipe[zero]'`; not in ppo
    and grpo."""
    offload: bool = False
    """Keep each process's part of the weights, gradients and moments in the host's memory, and
    compute the optimizer's step there: for what fits no device even in parts. Every layer is copied
    to the device as it is used, which takes time. Needs `strategy: fsdp` or `hsdp`; not in ppo and
    grpo, and not beside an adapter."""
    micro_batch_size: Positive | Literal["auto"] = "auto"
    """Sequences per process and forward pass; accumulation makes up the rest of
    `optim.batch_size`. `auto` is what keeps a CPU busy, and on a GPU the most that fits its memory,
    by a pass over the longest rows before the first step."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers of the model, which takes some tens of seconds at the first step; `auto`
    on a GPU, but not in ppo and grpo, which have several forms of each layer to compile, nor with
    `fsdp`, `hsdp`, `zero2` and `zero3`."""
    activation_checkpointing: Literal["auto", "none", "selective", "full"] | bool = "auto"
    """What the backward pass computes again instead of keeping it: nothing; all but matrix products
    and attention (`selective`); all of every layer (`full`), which takes a third more time. `auto`
    is `none` on a CPU, and on a GPU where that fits. `true` is `full`, `false` is `none`."""

    @property
    def zero(self) -> int:
        """The stage of ZeRO that is asked for, 0 for none."""
        return {"zero2": 2, "zero3": 3}.get(self.strategy, 0)

    @property
    def checkpointing(self) -> str:
        """`activation_checkpointing` in a word."""
        asked = self.activation_checkpointing
        return ("full" if asked else "none") if isinstance(asked, bool) else asked


def reference(text: str) -> str:
    """A validator of what names a model."""
    if not text.strip():
        raise ValueError("names nothing; give a Hub id, or a path such as ./folder")
    if not is_reference(text):
        raise ValueError(f"{text!r:.120} is not artifact:NAME or artifact:NAME@STEP")
    return text


Reference = Annotated[str, AfterValidator(reference)]

Start = Annotated[
    Reference,
    Field(
        description="What to start from: a Hub id (`NAME@COMMIT` for one that is not the newest), "
        "`./folder`, `./file.gguf`, `artifact:NAME` of this run, or `artifact:NAME@STEP`."
    ),
]


def folder(text: str) -> str:
    """A validator of what names a folder that is written to."""
    if not text.strip():
        raise ValueError("names no folder; `.` is the current one")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"'{text}' is an address, and a run lies in a folder of this machine")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError(f"'{text}': there is no home of that name here")
    return text


class Recipe(Section):
    """What every stage shares; a stage narrows `stage` and adds its own fields."""

    narrows: ClassVar[str | None] = None  # the stage that this one is, with a field required

    stage: str
    """The kind of work."""
    name: Name | None = cosmetic(None)
    """Folder of the artifact in the run; the stage's name unless set."""
    run: Annotated[str, AfterValidator(folder)] = cosmetic(...)
    """Directory that holds the artifacts of one pipeline."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of everything that is drawn: the holdout, the order of the data, the training, sampled
    answers."""
    launch: Machine = cosmetic(default_factory=Machine)
    """The machine: never part of the result's identity."""

    @property
    def artifact(self) -> str:
        return self.name or self.stage

    @property
    def keeps_adapters(self) -> bool:
        """Whether a model that is an adapter is used as base and adapter, not merged first."""
        return True

    def references(self) -> dict[str, str]:
        """Every model that the recipe names, by the path of its field."""
        return {}

    def rows(self) -> dict[str, Rows]:
        """Every source of rows, by the path of its field."""
        return {}

    def datasets(self) -> dict[str, str]:
        """Every reference to rows that an artifact of the run has, by the path of its field."""
        return {f"{at}.path": rows.path for at, rows in self.rows().items() if rows.artifact}

    def files(self) -> dict[str, str]:
        """Every other file or folder whose content decides the result, by the path of its field."""
        return {}

    def packages(self) -> list[tuple[str, str]]:
        """The path of each field that needs a module which may be missing, and the module."""
        return []


class Training(Recipe):
    """What every stage that trains shares."""

    model: Start | None
    """What to start from; only `pretrain` may have none."""
    data: Prepared
    """Rows and how they become tokens; a stage says which rows."""
    optim: AdamW
    """The optimizer and its schedule; a stage says by what steps are counted."""
    adapter: Adapter | None = None
    """Train a low-rank adapter on a frozen model instead of all weights; the artifact is the
    adapter."""
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
            raise ValueError(
                "evaluation.every needs rows to evaluate on: "
                "set data.eval.holdout or data.eval.sources"
            )
        adapter = self.adapter
        if self.quantization and not adapter:
            raise ValueError("quantization: quantized weights cannot be trained; add `adapter:`")
        if self.quantization and adapter and adapter.rewrites:
            raise ValueError(
                f"adapter.init: {adapter.init} rewrites the frozen weights, and these are quantized"
            )
        return self

    @property
    def batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.optim.sequences(self.data.preparation.max_length)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.data.preparation.max_length

    @property
    def packs(self) -> bool:
        """Whether a forward pass lays several rows end to end, for attention to keep apart."""
        return self.data.preparation.packing

    @property
    def is_whole(self) -> bool:
        """Whether a step is no sum over its sequences, and so cannot be cut among processes."""
        return False

    @property
    def least_micro_batch(self) -> int:
        """Sequences that a forward pass needs."""
        return 1

    @property
    def steps(self) -> int | None:
        """Optimizer steps, where the recipe says how many."""
        return self.optim.steps

    @property
    def keeps_adapters(self) -> bool:
        return self.adapter is not None and self.adapter.resume

    def references(self) -> dict[str, str]:
        return {"model": self.model} if self.model else {}

    def rows(self) -> dict[str, Rows]:
        named: dict[str, Rows] = {}
        for i, source in enumerate(self.data.train):
            named[f"data.train.{i}"] = source
        for i, rows in enumerate(self.data.eval.sources):
            named[f"data.eval.sources.{i}"] = rows
        return named

    def packages(self) -> list[tuple[str, str]]:
        named = [("quantization", "bitsandbytes")] if self.quantization else []
        if self.launch.zero:
            named.append(("launch.strategy", "deepspeed"))
        if OPTIMIZERS[self.optim.optimizer].in_bitsandbytes:
            named.append(("optim.optimizer", "bitsandbytes"))
        return [*named, *((f"log.trackers.{i}", name) for i, name in enumerate(self.log.trackers))]

    def files(self) -> dict[str, str]:
        return template_file(self.data.preparation.template)


class Hosted(Training):
    """What every stage shares whose loop is a library's."""

    trainer_config: ClassVar[TrainerConfig]

    trainer: dict[str, Any] = {}
    """Escape hatch: fields of the TRL config underneath that llmpipe neither sets itself nor
    refuses, checked by name and value."""

    def packages(self) -> list[tuple[str, str]]:
        needs = self.trainer.get("optim") in OF_BITSANDBYTES
        return [*super().packages(), *([("trainer.optim", "bitsandbytes")] if needs else [])]

    @model_validator(mode="after")
    def _agrees(self) -> Hosted:
        scheduler = getattr(self.optim, "scheduler", None)
        if "lr_scheduler_kwargs" in self.trainer and scheduler != "cosine":
            raise ValueError(f"trainer.lr_scheduler_kwargs is of cosine, not of {scheduler}")
        options = self.trainer.get("gradient_checkpointing_kwargs", {})
        if self.launch.checkpointing == "selective" and options.get("use_reentrant"):
            raise ValueError(
                "trainer.gradient_checkpointing_kwargs: use_reentrant: true computes whole layers "
                "again; set launch.activation_checkpointing: full"
            )
        if "optim" in self.trainer and self.optim.optimizer != "adamw":
            raise ValueError("trainer.optim and optim.optimizer name two optimizers; take one")
        return self


class Generating(Hosted):
    """What every stage shares that trains a model to answer in such a loop."""

    samples: Samples = Field(default_factory=Samples)
    """Prompts that show what changed."""


def science(section: BaseModel) -> dict[str, Any]:
    """The part of a recipe that decides the result: every field not declared `cosmetic`."""
    decides = {}
    for attribute, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("identity") is False:
            continue
        decides[field.alias or attribute] = _science_of(getattr(section, attribute))
    return decides


def _science_of(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return science(value)
    if isinstance(value, list):
        return [_science_of(item) for item in value]
    return value


LOCAL_SUFFIXES = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".parquet", ".arrow", ".feather"),
    *(".gz", ".bz2", ".xz", ".zst", ".lz4", ".gguf", ".jinja"),
)


ELSEWHERE = ".../"
"""How a path begins of which an artifact holds the name alone; see `places.portable`."""


def is_local(path: str) -> bool:
    """Whether it starts with ./, ../, / or ~, or ends in a known suffix; else it is a Hub id."""
    return (
        path.startswith(("./", "../", "/", "~", ELSEWHERE))
        or path in (".", "..")
        or path.lower().endswith(LOCAL_SUFFIXES)
    )
