"""What is exported: the model in fp32, its adapter merged, once it is seen to be the one that was
published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import noise, screen
from llmpipe.errors import INTEGRITY, Say, UserError
from llmpipe.export.ask import ask
from llmpipe.export.tensors import weights_of
from llmpipe.models.adapters import is_tied, merged, on_base, updates_of
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.run.artifact import manifest_beside
from llmpipe.run.manifest import Manifest
from llmpipe.run.probe import Probe, agreement_of, compare, tolerance

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SPREAD = 2
"""Times as far as bf16 is seen to move a model it may move it elsewhere, where it rounds weights,
and sums in another order."""


@dataclass
class Source:
    """The model that every format is made of, and that every reader is held against."""

    folder: Path
    """Of the model, or the adapter."""
    base: Path | None
    """What lies under the adapter."""
    model: PreTrainedModel
    """In fp32 on the CPU, the adapter merged."""
    tokenizer: Tokenizer
    template_kwargs: dict[str, Any]
    """Variables of the chat template in training."""
    probe: Probe
    """What the model says."""
    in_bf16: Probe
    """What it says where its sums are rounded to bf16, an adapter beside its base."""
    updates: dict[str, Tensor]
    """What the adapter has added to weights, by their names, as `updates_of` gives them."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Its weights by name, as `weights_of` lists them."""
        return weights_of(self.model)

    def tolerance(self, *dtypes: torch.dtype) -> float:
        """Nats that a log-probability may move by where weights or sums are rounded to these.

        Where half precision moves this very model further than most, as preferences make it that
        are learned with vigour, what was seen counts.
        """
        layers = getattr(self.model.config.get_text_config(), "num_hidden_layers", 1)
        kinds = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        most = tolerance(self.probe, layers, *kinds)
        assert most is not None, kinds
        epsilon = max(torch.finfo(dtype).eps for dtype in dtypes)
        if epsilon <= torch.finfo(torch.float32).eps:
            return most
        seen = agreement_of(self.probe, self.in_bf16).log_prob_difference
        if not math.isfinite(seen):
            return most  # nothing was seen
        return max(most, SPREAD * seen * epsilon / torch.finfo(torch.bfloat16).eps)


@screen.doing("loading the model that is to be exported")
def load_source(folder: Path, base: Path | None, say: Say) -> Source:
    """Load a model, and an adapter on its base, and compare it with what its manifest says of it.

    Raises UserError (3) where it says something else than when it was published.
    """
    noise.silence()
    manifest = manifest_beside(folder)
    kwargs = manifest.asked.chat_template_kwargs if manifest else {}
    tokenizer = load_tokenizer(folder)
    model: Any = load_model(base or folder).eval()
    if base:
        model = on_base(model, folder, tokenizer).eval()
    probe = ask(model, tokenizer, kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        in_bf16 = ask(model, tokenizer, kwargs)
    updates = {}
    if base:
        updates = updates_of(model)
        model = merged(model)
        model.config.tie_word_embeddings = is_tied(model)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    source = Source(folder, base, model, tokenizer, kwargs, probe, in_bf16, updates)
    if base:
        again = ask(model, tokenizer, kwargs)
        compare(probe, again, "the adapter, merged", source.tolerance(torch.float32))
    if probe.unasked:
        say(f"probe: {probe.unasked}")
    if not probe.asked:
        problem = f"{folder}: not one question of the probe fits the model's context"
        raise UserError(problem, "nothing would show that an export is the model", INTEGRITY)
    _as_published(manifest, source, say)
    return source


def _as_published(manifest: Manifest | None, source: Source, say: Say) -> None:
    """Hold a model against the probe that was taken when it was published, in its precision."""
    recorded = manifest.probe if manifest else None
    if recorded is None:
        say("probe: none was taken when the model was published, so it is taken of what lies there")
        return
    dtype = PRECISIONS.get(recorded.precision)
    most = source.tolerance(dtype) if dtype else None
    seen = source.in_bf16 if dtype == torch.bfloat16 else source.probe
    agreement = compare(recorded, seen, str(source.folder), most)
    if most is None and 2 * agreement.equal_answers < agreement.answers:
        same = f"{agreement.equal_answers} of {agreement.answers} answers are those"
        problem = f"{source.folder}: {same} of the model that was published"
        hint = f"its weights had fewer bits then ({recorded.precision}), but half should be equal"
        raise UserError(problem, hint, INTEGRITY)
    difference = f"log-probabilities differ by {agreement.log_prob_difference:.1e}"
    answers = f"{agreement.equal_answers} of {agreement.answers} answers are equal"
    say(f"probe: as published in {recorded.precision}: {difference}, {answers}")
