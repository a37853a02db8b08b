"""From which checkpoints an update goes on as it would have."""

import json
from types import SimpleNamespace

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.reinforcement import KL
from llmpipe.rl import state


def restore(tmp_path, version):
    folder = tmp_path / "step-9"
    folder.mkdir()
    (folder / "llmpipe.json").write_text(json.dumps({"version": version}))
    state.restore(folder, state.State.begin(KL()), SimpleNamespace(weights={}))


@pytest.mark.parametrize("version", [None, 1, 2, state.VERSION + 1])
def test_a_checkpoint_of_another_version_is_refused(tmp_path, version):
    """Version 1 drew other numbers; version 2 warmed up from 0 and clipped all in one."""
    with pytest.raises(UserError, match=r"step-9.*other learning rates, clipping") as refused:
        restore(tmp_path, version)
    assert refused.value.code == 3 and "--fresh" in refused.value.hint


def test_one_of_this_version_is_read(tmp_path):
    with pytest.raises(UserError, match="moments"):  # which is not in this one
        restore(tmp_path, state.VERSION)
