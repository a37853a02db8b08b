"""What was saved as it lies in files: the tokenizer, and tensors, whole, finite and the trained
ones; and how it is told that something is not so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import INTEGRITY, NUMERIC, UserError
from llmpipe.faults import reading
from llmpipe.models.pretrained import load_tokenizer

PROBE = "The quick brown fox jumps over 13 lazy dogs.\nWas wäre, wenn? 你好 \U0001f642"


@dataclass(frozen=True)
class Verified:
    """What was compared after reloading, as the manifest holds it."""

    tensors: int
    """How many were saved."""
    max_logit_difference: float
    stops_at: int | list[int] | None = None
    merged_difference: float | None = None
    """The greatest difference of a logit after an adapter was merged into its base, in fp32."""
    quantized_to_merged_difference: float | None = None
    """The mean difference of a logit of the quantized base with its adapter and the merged one."""

    def record(self) -> dict[str, Any]:
        """For a manifest, without what was not compared."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def refuse(difference: str, code: int = INTEGRITY) -> NoReturn:
    """Raise UserError with how what was saved differs from what was trained."""
    hint = "nothing was published; the checkpoints are kept"
    raise UserError(f"verification failed: {difference}", hint, code)


def same_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """It splits a text as in training, with the same tokens for the ends and the same template."""
    reloaded = load_tokenizer(folder)
    for name in ("pad_token_id", "eos_token_id", "chat_template"):
        saved, trained = getattr(reloaded, name), getattr(tokenizer, name)
        if saved != trained:
            refuse(f"{name} is {saved!r} after reloading, {trained!r} in training")
    if reloaded(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        refuse("the tokenizer splits a probe text differently after reloading")


def same_tensors(
    trained: dict[str, torch.Tensor], folder: Path, may_be_renamed: bool = False
) -> int:
    """Every saved tensor is whole, finite and the trained one; returns how many there are."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, "safetensors"), safe_open(path, framework="pt") as file:
            names = list(file.keys())
            count += len(names)
            for name in names:
                _same_tensor(f"{path.name}: {name}", file.get_tensor(name), trained.get(name))
                if name not in trained and not may_be_renamed:
                    refuse(f"{path.name}: {name} is not the tensor that was trained")
    return count


def _same_tensor(place: str, saved: torch.Tensor, trained: torch.Tensor | None) -> None:
    if saved.numel() == 0:
        refuse(f"{place} is empty")
    if not torch.isfinite(saved).all():
        refuse(f"{place} holds NaN or Inf", NUMERIC)
    if trained is not None and not equal(saved, trained):
        refuse(f"{place} is not the tensor that was trained")


def equal(saved: torch.Tensor, trained: torch.Tensor) -> bool:
    """Whether they hold the same numbers in the precision that was saved."""
    return torch.equal(saved, trained.to(saved.dtype))
