"""The reference of a policy that learns from preferences: its parent, never the untuned base.

It is a copy of the parent, the parent with a new adapter off, the parent's own adapter, or, with
`precompute:`, the parent's log-probabilities computed beforehand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import digest
from llmpipe.files.paths import files_below
from llmpipe.files.writing import remove, settle
from llmpipe.models.adapters import upcast_trained
from llmpipe.models.load import Setup, load_copy
from llmpipe.parallel import zero
from llmpipe.parallel.parts import is_sharded, looking, reshard
from llmpipe.parallel.tensors import whole
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.sums import Kept, check, is_sealed, seal
from llmpipe.training.training import Training

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number."""
AT_ONCE = {"cpu": 1 << 14, "cuda": 1 << 24}
"""Numbers that are summed at once: as many as a cache holds, or as keep a device busy."""


def copied(setup: Setup[sections.Hosted], *, precompute: bool) -> PreTrainedModel | None:
    """A frozen copy of the parent, where nothing else can be the reference."""
    if setup.recipe.adapter or precompute:
        return None
    reference = load_copy(setup).requires_grad_(False)
    if is_sharded(reference):  # no backward pass comes, after which it would be in parts again
        reference.register_forward_hook(lambda model, *_: reshard(model))
    return reference


class Referenced(Trainer):
    """Mixed in between `Durable` and one of TRL's trainers that have a reference."""

    training: Training[sections.Hosted]

    def begin_reference(self) -> str:
        """Make the reference the parent, and tell what it is."""
        adapter, base = self.training.recipe.adapter, self.training.setup.base
        hardware = self.training.hardware
        if hardware.zero and hardware.bf16 and self.ref_model is not None:  # else Accelerate's task
            zero.computing(self.accelerator.unwrap_model(self.ref_model), hardware.autocast())
        if adapter and not base:
            # an adapter that begins at nothing is the parent when it is off: the same, and faster
            self.forget_reference()
        else:
            parent_as_reference(self.model)
        if self.precompute_ref_logps:
            return "its log-probabilities, computed beforehand"
        if base:
            return "the parent's adapter"
        return "the parent, the adapter off" if adapter else "a copy of the parent"

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        """TRL's cache knows nothing of how the numbers are computed; its key now says it. The file
        has a folder of its own in `.prepared`, with a table.
        """
        parent_as_reference(self.model)
        key = [
            dataset._fingerprint,
            self.training.hardware.bf16,
            str(self.args.device),
            torch.get_num_threads(),
            torch.__version__,
            self.args.precompute_ref_batch_size,
            self.args.world_size,
            self.model.config._attn_implementation,
        ]
        dataset._fingerprint = digest(key)[:32]
        kept = _LogProbs(self.training.job.prepared, self.accelerator)
        dataset._get_cache_file_path = kept.path
        self.accelerator.wait_for_everyone = kept.seal  # before all read what the first has written
        with looking(self.model):
            with_reference = super()._precompute_ref_logps(dataset, *args)
        del dataset._get_cache_file_path, self.accelerator.wait_for_everyone
        return with_reference

    def reference_hash(self) -> str | None:
        """Of what the reference's log-probabilities come from; None where they are computed
        beforehand. Collective.
        """
        if self.precompute_ref_logps:
            return None
        if self.ref_model is not None:
            return fingerprint(_tensors(self.accelerator.unwrap_model(self.ref_model)))
        tensors = _tensors(self.accelerator.unwrap_model(self.model))
        return fingerprint({n: tensor for n, tensor in tensors.items() if ".default" not in n})

    def refuse_changed_reference(self, before: str | None) -> None:
        """Raises UserError (3) when the reference is no longer what its hash was `before`."""
        if self.reference_hash() != before:
            hint = "please report it; nothing was published"
            raise UserError("the reference changed in training", hint, INTEGRITY)

    def forget_reference(self) -> None:
        """Leave the policy's own adapter alone in the model."""
        forget(self.model)


class _LogProbs:
    """A reference's log-probabilities of prepared rows, in a folder of `.prepared`.

    Both methods are called by every process.
    """

    def __init__(self, prepared: Path, accelerator: Accelerator):
        self.prepared = prepared
        self.accelerator = accelerator
        self.world = World(accelerator)
        self.folder = prepared

    def path(self, fingerprint: str) -> str:
        """Where they lie, verified, or are to be written.

        Raises UserError (3) where they are not as they were written.
        """
        folder = self.prepared / f"reference-{fingerprint[:16]}"
        if self.accelerator.is_main_process and not is_sealed(folder):
            remove(folder)  # of a process that was killed
            folder.mkdir(parents=True)
        self.folder = self.world.bring(folder)
        if is_sealed(self.folder) and self.accelerator.is_local_main_process:
            check(Kept(self.folder))
        self.world.wait()
        return str(self.folder / "log_probs.arrow")

    def seal(self) -> None:
        """Write the table of what was computed just now, and let all see it."""
        if self.accelerator.is_main_process:
            settle(files_below(self.folder))
            seal(self.folder)
        self.world.wait()
        self.world.bring(self.folder)


def forget(model: Any) -> None:
    """Delete the adapter `ref` that TRL puts beside one that learns."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")


def parent_as_reference(model: Any) -> None:
    """Make the adapter `ref` the very copy of `default`: TRL's leaves out trained embeddings."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".ref" in name:
            parameter.data = parameters[name.replace(".ref", ".default")].data.clone()
    upcast_trained(model)


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a file would hold; the very weights, which know whether they are in parts."""
    return model.state_dict(keep_vars=True)


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 of names and sums of tensors, made where they lie: a model need not leave a GPU for
    it, and of one in parts, whose sha256 is that of the whole one, a tensor at a time is whole.
    Every change of one number changes it, and others all but surely; it is no proof against
    somebody who looks for two that are alike. Collective of a model in parts.
    """
    everything = ((name, whole(tensor)) for name, tensor in tensors.items())
    told = [(name, [*tensor.shape], int(_sum_of_bits(tensor))) for name, tensor in everything]
    return digest(sorted(told))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The numbers of a tensor, as integers, times odd ones that grow with their place: int64 [],
    modulo 2 ** 64."""
    plain = tensor.detach().contiguous().view(-1)
    bits = plain.view(INTEGERS[plain.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    at_once = AT_ONCE[bits.device.type]
    for start in range(0, len(bits), at_once):
        part = bits[start : start + at_once]
        places = torch.arange(start, start + len(part), device=bits.device)
        total += (part * (2 * places + 1)).sum()
    return total
