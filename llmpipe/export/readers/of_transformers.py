"""transformers as a reader: of model folders, of GGUF files, and through PEFT of adapters."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import upstream
from llmpipe.errors import INTEGRITY
from llmpipe.export.ask import ask
from llmpipe.export.source import Source
from llmpipe.export.tensors import refuse, same_weights, weights_of
from llmpipe.faults import reading
from llmpipe.models.adapters import WEIGHTS, attach, is_tied, make_fit
from llmpipe.models.adapters import tensors_of as adapter_tensors
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.run.weights import tensors_in


class Loaded:
    """A model that transformers computes, in fp32."""

    computes_in = torch.float32

    def __init__(self, name: str, model: Any, tokenizer: Tokenizer, source: Source, tensors: int):
        self.name = name
        self.model: Any = model
        self.tokenizer = tokenizer
        self.kwargs = source.template_kwargs
        self.tensors = tensors

    def probe(self) -> Any:
        return ask(self.model, self.tokenizer, self.kwargs)

    def predicts(self, ids: list[int]) -> Tensor:
        return predictions(self.model, ids)

    def close(self) -> None:
        self.model = None


@torch.no_grad()
def predictions(model: Any, ids: list[int]) -> Tensor:
    """Logits of every token of a sequence: float32 [tokens, vocabulary], on the CPU."""
    row = torch.tensor([ids], device=model.device)
    logits: Tensor = model(input_ids=row, use_cache=False).logits[0].float().cpu()
    return logits


def read_model(folder: Path, source: Source, dtype: torch.dtype | None) -> Loaded:
    """A model folder. Raises UserError (3) where its weights are not the source's."""
    model = load_model(folder).eval()  # refuses missing and left over tensors
    seen = weights_of(model)
    same_head(model, source)
    tensors = same_weights(source.weights, seen, dtype, updates=source.updates)
    return Loaded(named("transformers"), model, load_tokenizer(folder), source, tensors)


def read_adapter(folder: Path, source: Source) -> Loaded:
    """An adapter on its base, through PEFT. Raises UserError (3) where it applies nothing, or not
    all of what was written, or something else."""
    assert source.base is not None
    tokenizer = load_tokenizer(folder)
    base = load_model(source.base)
    make_fit(base, folder, tokenizer)
    model = attach(base, folder).eval()  # refuses missing and left over tensors
    applied = adapter_tensors(model)
    written = tensors_in(folder / WEIGHTS)
    if not applied or len(applied) != len(written):
        refuse(f"the reader applied {len(applied)} of {len(written)} tensors of the adapter")
    as_published = load_model(source.base)
    make_fit(as_published, source.folder, tokenizer)
    expected = adapter_tensors(attach(as_published, source.folder))
    same_weights(expected, applied, torch.float32, updates={})
    return Loaded(named("peft"), model, tokenizer, source, len(applied))


def read_gguf(file: Path, source: Source, dtype: torch.dtype | None) -> Loaded:
    """A GGUF file as transformers reads it, dequantized. Raises UserError (3) where it cannot, or
    where the weights are not the source's."""
    place = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    with reading(file, "GGUF", Exception, code=INTEGRITY):
        tokenizer = AutoTokenizer.from_pretrained(**place)
        model = AutoModelForCausalLM.from_pretrained(
            **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        ).eval()
    upstream.forget_routing(model.config)
    tensors = same_weights(source.weights, weights_of(model), dtype, updates=source.updates)
    return Loaded(named("transformers"), model, tokenizer, source, tensors)


def same_head(model: PreTrainedModel, source: Source) -> None:
    """Raise UserError (3) where embeddings and head share their weights in one model alone."""
    ours, theirs = is_tied(source.model), is_tied(model)
    if ours != theirs:
        words = {True: "share their weights", False: "have weights of their own"}
        refuse(
            f"lm_head.weight: embeddings and head {words[theirs]}, and {words[ours]} in training"
        )


def named(package: str) -> str:
    """A library with its version."""
    return f"{package} {version(package)}"
