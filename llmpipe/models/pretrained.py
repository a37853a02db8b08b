"""Models and tokenizers from folders of safetensors and JSON, as `from_pretrained` knows them.
Nothing is downloaded and no code of a model's folder runs.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import noise, screen, upstream
from llmpipe.errors import DATA, INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.parallel.parts import Spread, refuse_uncut, unpin
from llmpipe.run.artifact import is_reward_model
from llmpipe.run.folders import COMPRESSED, quantized_by, tensors_of

PACKED = 4
"""Numbers of a weight that one number of a file may stand for: two in a byte, and a head that is
tied beside the embeddings."""

SLACK = 1 << 29
"""Bytes that a model may have beside its weights: masks, a new head."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises UserError (3) for what transformers cannot read."""
    with reading(folder, "a tokenizer", Exception):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def configuration(folder: Path) -> PretrainedConfig:
    """Of the model in `folder`. Raises UserError (2, 3) for what transformers cannot read."""
    with reading(folder / "config.json", "a configuration", Exception, code=DATA):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    kind = type(config)
    if hidden := next((name for name in vars(config) if callable(getattr(kind, name, None))), None):
        problem = f"{hidden}: stands in the place of a function of transformers'"
        raise UserError(f"{folder / 'config.json'}: {problem}", code=INTEGRITY)
    return config


def saved_in(folder: Path) -> torch.dtype:
    """The precision of what lies beside weights of few bits. Raises UserError as `configuration`
    does."""
    return configuration(folder).dtype or torch.float32


def model_class(
    folder: Path, scores: bool = False, config: PretrainedConfig | None = None
) -> type[PreTrainedModel]:
    """The class that transformers has for the model in `folder`, as a causal language model or,
    with `scores`, as a reward model. Raises UserError (2) when it has none.

    `config`: that of the folder, where it was read.
    """
    config = config or configuration(folder)
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scores else MODEL_FOR_CAUSAL_LM_MAPPING
    known = classes.get(type(config), None)
    if known is None:
        purpose = "reward model" if scores else "language model"
        problem = f"transformers has no {purpose} of the kind {config.model_type}"
        raise UserError(f"{folder}: {problem}", code=DATA)
    return known


@screen.doing("loading a model")
def load_model(
    folder: Path,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    quantization: Any = None,
    scores: bool = False,
    device: str = "cpu",
    spread: Spread | None = None,
) -> PreTrainedModel:
    """A model from safetensors: a reward model where the folder holds one or where it `scores`,
    else a causal language model. A causal model that `scores` gets a head with random weights.

    `quantization`: a configuration of transformers'; `device`: where it is loaded to; `spread`:
    over which processes, each of which reads its part. Raises UserError (2) when transformers
    cannot read the folder or spread the model, (3) when a tensor is missing or left over.
    """
    is_ranker = is_reward_model(folder)
    new_head = scores and not is_ranker
    known = model_class(folder, scores or is_ranker)
    most = sum(math.prod(tensor.shape) for tensor in tensors_of(folder).values())
    # a head that is dropped and one that is new are no news; all else is refused below
    heads = upstream.as_reward_model(known) if new_head else nullcontext()
    offloads = spread is not None and spread.offload
    place = upstream.to_host() if offloads else nullcontext()
    if quantized_by(folder) == COMPRESSED:
        upstream.show_no_bars()
    with (
        reading(folder, "a model", Exception, code=DATA),
        upstream.of_size(known, most * PACKED * torch.float64.itemsize + SLACK),
        heads,
        place,
    ):
        model, report = known.from_pretrained(
            folder,
            **({"num_labels": 1} if scores else {}),
            dtype=dtype,
            quantization_config=quantization,
            device_map=None if device == "cpu" else device,
            attn_implementation=upstream.supported_attention(known, attention),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **(spread.at_load() if spread else {}),
        )
    if problem := _misfit(report):
        raise UserError(f"{folder}: the weights do not fit the model ({problem})", code=INTEGRITY)
    if spread:
        refuse_uncut(model)
    if offloads and not torch.cuda.is_available():
        unpin(model)
    upstream.forget_routing(model.config)
    vars(model.config).pop("auto_map", None)  # which was not used, nor will be where it is saved
    return model


def _misfit(report: dict[str, Any]) -> str:
    """What transformers' loading report complains of, or nothing; three tensors of each
    complaint.
    """
    errors = report.get("error_msgs")
    complaints = []
    for complaint, tensors in report.items():
        if tensors and complaint != "error_msgs":
            names = sorted(map(str, tensors))
            complaints.append(f"{complaint.replace('_', ' ')}: {', '.join(names[:3])}")
    return "; ".join(complaints) or (str(errors) if errors else "")


def resize_embeddings(model: PreTrainedModel, tokenizer: Tokenizer, seed: int = 0) -> int:
    """Give the embeddings a row for every id of the tokenizer at least; returns how many rows there
    were. New ones are drawn from `seed`.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    needed = rows_of(tokenizer)
    if needed > rows:
        # new rows are drawn from the old ones' distribution (Hewitt 2021), to start out harmless
        torch.manual_seed(seed)
        with noise.quiet("transformers.modeling_utils"):
            model.resize_token_embeddings(needed, mean_resizing=True)
    return rows


def rows_of(tokenizer: Tokenizer) -> int:
    """Rows of embeddings that a tokenizer needs: where its ids have gaps, more than it has
    tokens."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def take_generation(model: PreTrainedModel, folder: Path) -> None:
    """Let `model`, where it generates, do so as the one in `folder`: its stop tokens and its
    sampling.
    """
    if model.can_generate():
        with reading(folder / "generation_config.json", "a generation configuration", Exception):
            model.generation_config = GenerationConfig.from_pretrained(folder)
