"""outcome.json: what a worker says of its end, and what the command makes of it."""

import json

import pytest

from llmpipe.errors import DONE, NUMERIC, SIGTERM, Stopped, UserError
from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import Outcome


@pytest.fixture
def artifact(tmp_path):
    return Artifact(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "written"),
    [
        (Outcome(DONE), {"code": 0}),
        (Outcome(SIGTERM, "stopped at step 3"), {"code": 143, "message": "stopped at step 3"}),
        (
            Outcome.of(UserError("loss is NaN", "lower it", NUMERIC)),
            {"code": 4, "message": "loss is NaN", "hint": "lower it"},
        ),
    ],
)
def test_what_is_written_is_read_again(artifact, outcome, written):
    outcome.write(artifact)
    assert json.loads((artifact.path / "outcome.json").read_text()) == written
    assert Outcome.read(artifact) == outcome


def test_what_it_raises():
    Outcome(DONE).check()
    with pytest.raises(Stopped) as stopped:
        Outcome(SIGTERM, "stopped at step 3").check()
    assert (stopped.value.code, stopped.value.message) == (143, "stopped at step 3")
    with pytest.raises(UserError) as failed:
        Outcome(NUMERIC, "loss is NaN", "lower it").check()
    assert (failed.value.code, failed.value.hint) == (4, "lower it")


@pytest.mark.parametrize("text", ["", "[]", '{"message": "no code"}', '{"code": "4"}', "{"])
def test_a_damaged_one_is_none(artifact, text):
    (artifact.path / "outcome.json").write_text(text)
    assert Outcome.read(artifact) is None
    Outcome.clear(artifact)
    Outcome.clear(artifact)  # nothing to forget
    assert Outcome.read(artifact) is None
