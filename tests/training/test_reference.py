"""What a policy is compared with stays what it was."""

import pytest
import torch

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.training import reference
from llmpipe.training.reference import Referenced, fingerprint

TYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_change_of_a_tensor_changes_its_fingerprint(monkeypatch, dtype):
    values = torch.randint(0, 2 if dtype == torch.bool else 100, (5, 7)).to(dtype)
    before = fingerprint({"a": values, "b": values})
    monkeypatch.setitem(reference.AT_ONCE, "cpu", 4)  # which is how memory is saved, and no more
    assert fingerprint({"b": values.clone(), "a": values.t().contiguous().t()}) == before

    altered = values.clone()
    altered[4, 6] = altered[4, 6] == 0
    swapped = values.clone()
    swapped[[0, 4]] = swapped[[4, 0]]
    others = [
        {"a": altered, "b": values},
        {"a": values, "b": altered},
        {"a": values, "c": values},
        {"a": values, "b": values.view(7, 5)},
        {"a": values},
    ]
    if not torch.equal(swapped, values):
        others.append({"a": swapped, "b": values})
    fingerprints = {fingerprint(tensors) for tensors in others}
    assert len(fingerprints) == len(others) and before not in fingerprints


def test_a_reference_that_has_changed_is_refused(monkeypatch):
    weights = torch.randn(3, 3)
    monkeypatch.setattr(Referenced, "reference_hash", lambda _: fingerprint({"weight": weights}))
    trainer = Referenced.__new__(Referenced)
    before = trainer.reference_hash()
    trainer.refuse_changed_reference(before)
    weights[1, 1] += 1e-6
    with pytest.raises(UserError, match="the reference changed") as refused:
        trainer.refuse_changed_reference(before)
    assert refused.value.code == INTEGRITY
