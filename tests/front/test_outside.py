"""Under an outside launcher rank 0's word reaches the other ranks of its own launch alone."""

import socket
import time

import pytest

from llmpipe.front import outside
from llmpipe.run.artifact import Artifact


@pytest.fixture
def artifact(tmp_path):
    (tmp_path / ".locks").mkdir()
    return Artifact(tmp_path / "sft")


class Waited(Exception):
    """It would wait on."""


def wait(artifact):
    def sleep(seconds):
        raise Waited

    return outside.wait_for_word(artifact, sleep)


def leave(artifact, **changes):
    word = {
        "action": "train",
        "host": socket.gethostname(),
        "parent": outside.parent_id(),
        "time": time.time(),
    }
    outside.Word(**word | changes).to_file(outside.word_path(artifact))


def test_a_word_of_this_launch_is_heeded_however_old(artifact):
    with pytest.raises(Waited):
        wait(artifact)
    outside.give_word(artifact, "skip")
    assert wait(artifact) == "skip"
    leave(artifact, time=0.0)
    assert wait(artifact) == "train"


def test_a_word_of_another_launch_is_not(artifact):
    leave(artifact, parent="1 1")
    with pytest.raises(Waited):
        wait(artifact)


def test_from_another_machine_only_a_young_word_counts(artifact):
    leave(artifact, host="elsewhere", parent="1 1")
    assert wait(artifact) == "train"
    leave(artifact, host="elsewhere", parent="1 1", time=time.time() - 3600)
    with pytest.raises(Waited):
        wait(artifact)
