"""The model that training starts from, and models to look at.

`set_up` loads the tokenizer and decides the hardware; then a stage loads what it trains: `load_new`
for random weights, `load_policy` for a language model, `load_ranker` for a reward model. The latter
two give all weights to train in fp32, or an adapter on a frozen model where the recipe has
`adapter:`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.faults import writing
from llmpipe.files.writing import remove
from llmpipe.models import adapters, architecture
from llmpipe.models.hardware import Hardware, choose
from llmpipe.models.pretrained import (
    load_model,
    load_tokenizer,
    resize_embeddings,
    rows_of,
    saved_in,
)
from llmpipe.parallel.parts import Spread, plain_class
from llmpipe.parallel.tensors import part_like, part_of
from llmpipe.recipe.sections import Adapter, Training
from llmpipe.run import checkpoints
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.folders import BITSANDBYTES, TORCHAO, quantized_by, tensors_of
from llmpipe.run.footprint import USED
from llmpipe.run.job import Job
from llmpipe.upstream.attention import DOCUMENTS

if TYPE_CHECKING:
    from llmpipe.stages.pretrain import Architecture

R_co = TypeVar("R_co", bound=Training, covariant=True)


@dataclass(frozen=True)
class Setup(Generic[R_co]):
    """What a stage that trains has in hand before there is a model."""

    job: Job[R_co]
    prepared: PreparedRows
    hardware: Hardware
    tokenizer: Tokenizer
    """Of the prepared rows, with the tokens that the template added."""

    @property
    def recipe(self) -> R_co:
        return self.job.recipe

    @property
    def say(self) -> Say:
        return self.job.say

    @property
    def base(self) -> Path | None:
        """The folder under `job.model` where that is an adapter, which is trained on."""
        return self.job.bases.get("model")


def set_up(job: Job[R_co], prepared: PreparedRows) -> Setup[R_co]:
    """Load the tokenizer, decide the hardware, and say so. Raises UserError as `choose` does."""
    weights = job.weights if "model" in job.models else None
    before = checkpoints.settings(job.artifact.checkpoints)
    tokenizer = load_tokenizer(prepared.folder(job.prepared) / "tokenizer")
    drawn = getattr(job.recipe, "architecture", None)  # of pretrain alone
    context = job.recipe.data.preparation.max_length
    shape = architecture.shape_of(drawn, tokenizer, context) if drawn else None
    hardware = choose(job.recipe, job.say, weights, before, shape)
    return Setup(job, prepared, hardware, tokenizer)


def load_new(setup: Setup[Training], shape: Architecture) -> PreTrainedModel:
    """A model of this shape with random weights.

    Raises UserError (2) when transformers refuses the shape.
    """
    spread = setup.hardware.spread
    model = _drawn_in_parts(setup, shape, spread) if spread else _drawn(setup, shape)
    return _made_ready(model, setup)


def _drawn(setup: Setup[Training], shape: Architecture) -> PreTrainedModel:
    recipe = setup.recipe
    return architecture.build(
        shape,
        setup.tokenizer,
        context=recipe.data.preparation.max_length,
        seed=recipe.seed,
        attention=setup.hardware.attention,
    )


def _drawn_in_parts(setup: Setup[Training], shape: Architecture, spread: Spread) -> PreTrainedModel:
    """The very weights that one process would draw, which it leaves in a file: each process reads
    its part of it. Collective.
    """
    world = spread.world()
    folder = setup.job.artifact.path / ".drawn"  # which no finished artifact keeps
    refused = None
    try:
        if world.is_first:
            with writing(folder):
                remove(folder)
                _drawn(setup, shape).save_pretrained(folder)
    except UserError as error:
        refused = error
    world.agree(refused)
    world.bring(folder)
    hardware = setup.hardware
    model = load_model(folder, hardware.attention, device=hardware.place, spread=spread)
    world.wait()
    if world.is_first:
        remove(folder)
    return model


def load_policy(setup: Setup[Training]) -> Any:
    """A language model to train: all of its weights, or PEFT's model with an adapter.

    Raises UserError (3) when the folder holds a reward model, or an adapter that is not the
    recipe's.
    """
    if is_reward_model(setup.job.weights):
        problem = f"model: {setup.recipe.model}: a reward model, which gives no answers"
        raise UserError(problem, code=INTEGRITY)
    adapter = setup.recipe.adapter
    return _load_adapter(setup, adapter) if adapter else _load_whole(setup)


def load_ranker(setup: Setup[Training]) -> Any:
    """A reward model to train, all of its weights or an adapter and the head, which is a new one
    where the folder holds a language model.
    """
    adapter = setup.recipe.adapter
    if adapter:
        return _load_adapter(setup, adapter, scores=True)
    return _load_whole(setup, scores=True)


def load_copy(setup: Setup[Training]) -> PreTrainedModel:
    """Another copy of the language model that training starts from, in fp32: what a reference is,
    and what a critic begins as. It does not know the recipe's stop tokens, since it generates
    nothing.
    """
    hardware = setup.hardware
    model = load_model(
        setup.job.model, hardware.attention, device=hardware.place, spread=hardware.spread
    )
    if not hardware.sharded:  # which does not grow, and was refused where it would have to
        resize_embeddings(model, setup.tokenizer)
    speed_up(model, setup)
    return model


def speed_up(model: PreTrainedModel, setup: Setup[Training]) -> None:
    """Make a model fast on this hardware, without a change of what it computes."""
    upstream.speed_up(model, device_type=setup.hardware.device)
    if setup.hardware.compiles:
        packed = setup.recipe.data.preparation.packing
        # such rows come in one shape, see `training.laid`
        few = packed and model.config._attn_implementation == DOCUMENTS
        upstream.compile_layers(model, dynamic=not few)


def load_any(
    folder: Path,
    base: Path | None,
    tokenizer: Tokenizer,
    *,
    bf16: bool,
    alone: bool = False,
    spread: Spread | None = None,
) -> Any:
    """A model to look at, alone or as adapter on its `base`, in evaluation mode, on the GPU where
    there is one; `spread`: over which processes. One that this GPU does not hold lies on all of
    them, layer by layer, where this process is `alone` with them. Gives a tokenizer without a pad
    token its end token for one; raises UserError (2) when it has neither.

    In fp32 an adapter is merged, which is less work. Not in bf16: there a sum is rounded to the
    base's steps, and an update smaller than half of one is gone.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        problem = f"{folder}: the tokenizer has neither a pad nor an end token"
        raise UserError(problem, "set eos_token in its config")
    dtype = torch.bfloat16 if bf16 else torch.float32  # not cast later: positions are fp32
    if quantized_by(base or folder) in (BITSANDBYTES, TORCHAO):
        dtype = saved_in(base or folder)  # transformers casts only a part of what lies beside them
    scores = base is not None and is_reward_model(folder)
    device = _place(base or folder, dtype, alone)
    model = load_model(base or folder, dtype=dtype, scores=scores, device=device, spread=spread)
    model.config.pad_token_id = tokenizer.pad_token_id
    if base:
        model = adapters.on_base(model, folder, tokenizer)
        if not (bf16 or spread or device == SPREAD):
            model = adapters.merged(model)
    return (model if spread or device == SPREAD else model.to(device)).eval()


SPREAD = "auto"
"""Accelerate's word for layers on one GPU after the other, as far as its memory goes."""


def _place(folder: Path, dtype: torch.dtype, alone: bool) -> str:
    """Where a model to look at is loaded to."""
    if not torch.cuda.is_available():
        return "cpu"
    numbers = sum(math.prod(tensor.shape) for tensor in tensors_of(folder).values())
    free, _ = torch.cuda.mem_get_info()
    fits = numbers * dtype.itemsize < USED * free  # a pass and a cache of answers take of the rest
    return SPREAD if alone and not fits and torch.cuda.device_count() > 1 else "cuda"


def stop_at(model: PreTrainedModel, tokenizer: Tokenizer, stop_tokens: Sequence[str]) -> None:
    """Let these tokens end a model's answers, as its template has them."""
    ids = tokenizer.convert_tokens_to_ids(list(stop_tokens))
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def _load_whole(setup: Setup[Training], scores: bool = False) -> PreTrainedModel:
    torch.manual_seed(setup.recipe.seed)  # of a new head
    hardware = setup.hardware
    model = load_model(
        setup.job.model,
        hardware.attention,
        scores=scores,
        device=hardware.place,
        spread=hardware.spread,
    )
    if scores and hardware.spread:
        _draw_head(model, setup)
    _resize(model, setup)
    return _made_ready(model, setup)


def _draw_head(model: PreTrainedModel, setup: Setup[Training]) -> None:
    """Draw a new head as it is drawn where it is whole: in parts other numbers come of a seed."""
    if is_reward_model(setup.job.weights):
        return
    weight = model.score.weight
    head = torch.nn.Linear(*reversed(weight.shape), bias=False, device="meta", dtype=weight.dtype)
    head.to_empty(device=weight.device)
    torch.manual_seed(setup.recipe.seed)
    model._init_weights(head)
    with torch.no_grad():
        part_of(weight).copy_(part_like(head.weight, weight))


def _load_adapter(setup: Setup[Training], adapter: Adapter, scores: bool = False) -> Any:
    """A frozen model, in the precision of the arithmetic or quantized, with an adapter to train:
    a new one, or the one that the recipe names as its model.
    """
    recipe, base = setup.recipe, setup.base
    if base and adapter.rewrites:
        problem = f"adapter.init: {adapter.init}: the adapter is there already"
        raise UserError(problem, "set adapter.continue: false")
    dtype = setup.hardware.frozen_dtype(adapter)
    torch.manual_seed(recipe.seed)  # of a new head
    model = adapters.load_frozen(
        setup.job.weights,
        recipe.quantization,
        dtype,
        setup.hardware.attention,
        scores,
        setup.hardware.place,
        setup.hardware.spread,
    )
    if scores and setup.hardware.spread:
        _draw_head(model, setup)
    made = _resize(model, setup)
    _made_ready(model, setup)
    parameters = model.num_parameters()
    if adapter.embeddings == "all" and adapters.is_tied(model):
        setup.say("embeddings: they share their weights with the head, and learn apart from it")
    if base:
        if setup.hardware.sharded:
            adapters.refuse_beside_parts(setup.job.model)
        model = adapters.attach(model, setup.job.model, trainable=True)
        adapters.refuse_another(model, adapter)
        adapters.refuse_rows_without_a_home(model, made)
        adapters.freeze_rows(model, adapter)
    else:
        added = setup.tokenizer.convert_tokens_to_ids(setup.prepared.added_tokens)
        if added and setup.hardware.sharded:
            _refuse_new_tokens(setup.prepared.added_tokens)
        model = adapters.begin(model, adapter, sorted({*made, *added}), recipe.seed)
    adapters.forget_base(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = str(dtype).removeprefix("torch.")
    if recipe.quantization:
        precision = f"{recipe.quantization.bits} bits"
    frozen = f"{parameters / 1e6:,.1f} M parameters in {precision}, frozen"
    setup.say(f"model: {frozen}; adapter of {trained / 1e6:,.2f} M trained")
    return model


def _resize(model: PreTrainedModel, setup: Setup[Training]) -> range:
    """Give every token a row; returns the ids of the rows that were made."""
    tokens = rows_of(setup.tokenizer)
    if setup.hardware.sharded:
        _refuse_new_rows(model, tokens)
    rows = resize_embeddings(model, setup.tokenizer)
    if tokens > rows:
        change = f"{rows} -> {tokens} rows, new ones drawn from the distribution of the old"
        setup.say(f"embeddings: {change}")
    return range(rows, tokens)


def _refuse_new_rows(model: PreTrainedModel, tokens: int) -> None:
    """Raise UserError (2) where a model that is sharded lacks rows for so many tokens."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    if tokens > rows:
        raise UserError(
            f"launch.strategy: fsdp: the tokenizer needs {tokens:,} rows of embeddings, the model "
            f"has {rows:,}, and what is sharded does not grow",
            "set launch.strategy: ddp, or a data.template without new tokens",
        )


def _refuse_new_tokens(tokens: Sequence[str]) -> None:
    """Raise UserError (2): an adapter brings rows along for them, and these are in parts."""
    raise UserError(
        f"launch.strategy: fsdp: the template adds {', '.join(tokens)}, and an adapter has no rows "
        "of embeddings beside a model in parts",
        "set launch.strategy: ddp, or a data.template without new tokens",
    )


def _made_ready(model: PreTrainedModel, setup: Setup[Training]) -> PreTrainedModel:
    """`model` with its special tokens and generation as the template has them, and fast on this
    hardware.
    """
    tokenizer = setup.tokenizer
    if model.can_generate():
        stop_at(model, tokenizer, setup.prepared.stop_tokens)
        generation = model.generation_config
        generation.pad_token_id = tokenizer.pad_token_id
        generation.do_sample = False
        generation.temperature = None
        generation.top_p = None
        generation.top_k = None
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    speed_up(model, setup)
    parameters = f"{model.num_parameters() / 1e6:,.1f} M parameters"
    setup.say(f"model: {plain_class(model).__name__}, {parameters}")
    return model
