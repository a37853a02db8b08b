"""From which checkpoints of other versions an update goes on as it would have."""

import json
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from llmpipe.errors import UserError
from llmpipe.recipe.reinforcement import KL
from llmpipe.rl import state

LEARNER = SimpleNamespace(
    recipe=SimpleNamespace(optim=SimpleNamespace(warmup=4)), steps=12, weights={}
)


def restore(tmp_path, step, version):
    folder = tmp_path / f"step-{step}"
    folder.mkdir()
    (folder / "llmpipe.json").write_text(json.dumps({"version": version}))
    state.restore(folder, state.State.begin(KL()), LEARNER)


@pytest.mark.parametrize(("step", "version"), [(1, 2), (3, 2), (4, 1), (9, 4)])
def test_a_checkpoint_that_would_go_on_otherwise_is_refused(tmp_path, step, version):
    """Version 2 warmed up from 0."""
    with pytest.raises(UserError, match=f"step-{step}.*other learning rates") as refused:
        restore(tmp_path, step, version)
    assert refused.value.code == 3 and "--fresh" in refused.value.hint


@pytest.mark.parametrize(("step", "version"), [(4, 2), (1, 3), (12, 3)])
def test_any_other_is_read(tmp_path, step, version):
    with pytest.raises(ValidationError, match="moments"):  # which is not in this one
        restore(tmp_path, step, version)
