"""The reference of a policy that learns from preferences: its parent, never the untuned base.

It is a copy of the parent, the parent with a new adapter off, the parent's own adapter, or, with
`precompute:`, the parent's log-probabilities computed beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import digest
from llmpipe.models.adapters import tensors_hash, upcast_trained
from llmpipe.models.load import Setup, load_copy
from llmpipe.recipe import sections
from llmpipe.training.training import Training


def copied(setup: Setup[sections.Hosted], *, precompute: bool) -> PreTrainedModel | None:
    """A frozen copy of the parent, where nothing else can be the reference."""
    if setup.recipe.adapter or precompute:
        return None
    return load_copy(setup).requires_grad_(False)


class Referenced(Trainer):
    """Mixed in between `Durable` and one of TRL's trainers that have a reference."""

    training: Training[sections.Hosted]

    def begin_reference(self) -> str:
        """Make the reference the parent, and tell what it is."""
        adapter, base = self.training.recipe.adapter, self.training.setup.base
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
        """TRL's cache knows nothing of how the numbers are computed; its key now says it."""
        parent_as_reference(self.model)
        key = [
            dataset._fingerprint,
            self.args.bf16,
            str(self.args.device),
            torch.get_num_threads(),
            torch.__version__,
            self.args.per_device_train_batch_size,
            self.args.world_size,
            self.model.config._attn_implementation,
        ]
        dataset._fingerprint = digest(key)[:32]
        return super()._precompute_ref_logps(dataset, *args)

    def reference_hash(self) -> str | None:
        """Of what the reference's log-probabilities come from; None where they are computed
        beforehand.
        """
        if self.precompute_ref_logps:
            return None
        if self.ref_model is not None:
            return tensors_hash(self.accelerator.unwrap_model(self.ref_model).state_dict())
        tensors = self.accelerator.unwrap_model(self.model).state_dict()
        return tensors_hash({n: tensor for n, tensor in tensors.items() if ".default" not in n})

    def refuse_changed_reference(self, before: str | None) -> None:
        """Raises UserError (3) when the reference is no longer what its hash was `before`."""
        if self.reference_hash() != before:
            hint = "please report it; nothing was published"
            raise UserError("the reference changed in training", hint, INTEGRITY)

    def forget_reference(self) -> None:
        """Leave the policy's own adapter alone in the model."""
        if "ref" in getattr(self.model, "peft_config", {}):
            self.model.delete_adapter("ref")


def parent_as_reference(model: Any) -> None:
    """Make the adapter `ref` the very copy of `default`: TRL's leaves out trained embeddings."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if ".ref" in name:
            parameter.data = parameters[name.replace(".ref", ".default")].data.clone()
    upcast_trained(model)
