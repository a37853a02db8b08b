"""Weights that cannot be read are said to be so, and not to be damaged."""

import errno
import os

import pytest

from llmpipe.errors import UserError
from llmpipe.run import weights
from llmpipe.run.weights import tensors_in


def test_weights_of_somebody_else(tmp_path, monkeypatch):
    """Root may read them, so the refusal is played."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(weights.os, "open", refuse)
    with pytest.raises(UserError) as refused:
        tensors_in(path)
    assert refused.value.message.endswith("file: cannot be read: Permission denied")
    assert str(path) in refused.value.message and "Errno" not in refused.value.message


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (os.mkdir, "cannot be read: Is a directory"),
        (lambda path: None, "no such file or folder"),
        (lambda path: path.write_bytes(b"x"), "unpack requires a buffer"),
    ],
    ids=["a folder", "missing", "cut"],
)
def test_what_is_no_file_of_weights(tmp_path, place, words):
    path = tmp_path / "model.safetensors"
    place(path)
    with pytest.raises(UserError, match=words) as refused:
        tensors_in(path)
    assert refused.value.code == 3
