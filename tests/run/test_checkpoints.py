"""From which checkpoint a training goes on, and whether what comes of it is exact."""

import json
from contextlib import nullcontext

import pytest

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files.json import write_json
from llmpipe.files.tables import FileEntry
from llmpipe.run import checkpoints
from llmpipe.run.manifest import Leg
from llmpipe.sums import SUMS, fingerprint
from tests import life

HERE = {"device": "a card", "torch": "2.12", "trl": "1.13"}
SISTER = {**HERE, "device": "its sister"}


def write(home, step, legs, exact=True):
    origin = checkpoints.Origin(identity="a", machine={"threads": 1}, exact=exact, legs=legs)
    with checkpoints.writing(home, step, origin, dict) as staging:
        (staging / "weights").write_text("1")


def pick(home, platform, lines):
    return checkpoints.pick(home, "a", {"threads": 1}, platform, lines.append)


def test_the_same_platform_is_exact(tmp_path):
    legs, lines = [Leg(after=0, platform=HERE)], []
    write(tmp_path, 3, legs)
    assert pick(tmp_path, HERE, lines) == (tmp_path / "step-3", True, legs)
    assert lines == []


class Two:
    """This process, and another one to which `of_other` happens."""

    rank, size = 0, 2

    def __init__(self, of_other, is_mirrored=False):
        self.of_other = of_other
        self.is_mirrored = is_mirrored
        self.brought = []

    def bring(self, path):
        self.brought.append(path)
        return path

    def gather(self, mine):
        return [mine, self.of_other(mine)]


def test_what_another_process_does_not_see_whole_is_passed_over(tmp_path):
    for step in (3, 6):
        write(tmp_path, step, [Leg(after=0, platform=HERE)])
    lines, asked = [], iter([[3], ["weights: cannot be read"], [], []])
    other = Two(lambda mine: next(asked))
    origin = ("a", {"threads": 1}, HERE, lines.append)
    assert checkpoints.pick(tmp_path, *origin, world=other).path == tmp_path / "step-3"
    assert "checkpoint step-6 is damaged (weights: cannot be read)" in lines[0]
    asked = iter([[3, 6, 9], [], [], []])  # one that only the other process sees
    assert checkpoints.pick(tmp_path, *origin, world=other).path == tmp_path / "step-6"
    assert "checkpoint step-9 is damaged (sums.json: damaged or missing)" in lines[1]


def test_another_machine_is_sent_what_is_whole_and_no_more(tmp_path):
    """What rank 0 finds damaged is named, also in a part that it does not read itself."""
    for step in (3, 6):
        write(tmp_path, step, [Leg(after=0, platform=HERE)])
    (tmp_path / "step-6" / "weights").write_text("others")
    world = Two(lambda mine: [], is_mirrored=True)
    lines = []
    origin = ("a", {"threads": 1}, HERE, lines.append)
    assert checkpoints.pick(tmp_path, *origin, world=world).path == tmp_path / "step-3"
    assert world.brought == [tmp_path / "step-3"] and "step-6 is damaged (weights" in lines[0]


def test_a_part_that_is_not_seen_as_it_was_written_is_no_checkpoint(tmp_path):
    """Rank 0 may see less of a file than its writer, where a server of files lies between them."""
    origin = checkpoints.Origin(identity="a", machine={}, exact=True, legs=[])
    name, entry = "sharded/shard-00002-of", FileEntry(3, "of three bytes")
    for seen in (b"12", None, b"123"):
        fails = seen != b"123"
        expected = pytest.raises(UserError, match="3 were written") if fails else nullcontext()
        with (
            expected as refused,
            checkpoints.writing(tmp_path, 1, origin, dict, hashed={name: entry}) as staging,
        ):
            (staging / "sharded").mkdir()
            if seen is not None:
                (staging / name).write_bytes(seen)
        if fails:
            assert refused.value.code == INTEGRITY and not (tmp_path / "step-1").exists()
    assert checkpoints.Sums.read(tmp_path / "step-1").files[name] == entry


@pytest.mark.parametrize(
    ("there", "now", "said"),
    [
        (HERE, SISTER, "device a card there, its sister now"),
        (HERE, {**HERE, "torch": "2.13"}, "torch 2.12 there, 2.13 now"),
        (HERE, {**HERE, "cudnn": "9"}, "cudnn none there, 9 now"),
        ({**HERE, "bitsandbytes": "0.49"}, HERE, "bitsandbytes 0.49 there, none now"),
        ({**HERE, "torch": "2.11"}, SISTER, "a card there, its sister now, torch 2.11 there"),
    ],
)
def test_another_platform_goes_on_and_is_not_exact(tmp_path, there, now, said):
    lines = []
    write(tmp_path, 3, [Leg(after=0, platform=there)])
    legs = [Leg(after=0, platform=there), Leg(after=3, platform=now)]
    assert pick(tmp_path, now, lines) == (tmp_path / "step-3", False, legs)
    assert len(lines) == 1 and "step-3: what comes of it is not exact" in lines[0]
    assert said in lines[0]


def test_it_stays_inexact_on_the_way_back(tmp_path):
    """The last leg is compared; that there was another one is in what it counts as."""
    legs, lines = [Leg(after=0, platform=HERE), Leg(after=3, platform=SISTER)], []
    write(tmp_path, 6, legs, exact=False)
    assert pick(tmp_path, SISTER, lines) == (tmp_path / "step-6", False, legs)
    assert lines == []
    assert pick(tmp_path, HERE, lines).legs == [*legs, Leg(after=6, platform=HERE)]
    assert len(lines) == 1


def test_an_old_checkpoint_does_not_say(tmp_path):
    write(tmp_path, 3, [])
    sums = json.loads((tmp_path / "step-3" / SUMS).read_text())
    del sums["legs"]
    write_json(tmp_path / "step-3" / SUMS, sums | {"fingerprint": fingerprint(sums)})
    lines = []
    assert pick(tmp_path, HERE, lines).legs == [Leg(after=3, platform=HERE)]
    assert not pick(tmp_path, HERE, lines).exact and "it does not say" in lines[0]


def test_other_settings_refuse_before_platforms_are_compared(tmp_path):
    write(tmp_path, 3, [Leg(after=0, platform=HERE)])
    with pytest.raises(UserError, match="threads 1 there, 2 now"):
        checkpoints.pick(tmp_path, "a", {"threads": 2}, SISTER, pytest.fail)


def test_what_an_older_checkpoint_was_computed_with_is_known(tmp_path):
    """It knows nothing of a choice that is newer; where layers are compiled, that decides bits."""
    write(tmp_path, 3, [Leg(after=0, platform=HERE)])
    now = {"threads": 1, "activation_checkpointing": "none"}
    assert checkpoints.pick(tmp_path, "a", now, HERE, pytest.fail).exact
    with pytest.raises(UserError, match="activation_checkpointing none there, full now"):
        checkpoints.pick(tmp_path, "a", now | {"activation_checkpointing": "full"}, HERE, print)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("stage", "hook"), [("sft", "kill_after_checkpoint_2"), ("ppo", "ppo_kill_after_2")]
)
def test_a_command_goes_on_on_a_sister_card(tmp_path, monkeypatch, capsys, stage, hook):
    """A preempted job ends, and its manifest says on what it was computed."""
    from llmpipe.models import hardware
    from tests.rl import test_ppo

    writes = {"sft": life.write, "ppo": test_ppo.write}[stage]
    path = writes(tmp_path / "run", checkpoint__every=2)
    trial = life.Trial(path, hook=hook)
    assert trial.wait() < 0, trial.text()
    real = hardware.installed
    monkeypatch.setattr(hardware, "device_name", lambda device: "its sister")
    monkeypatch.setattr(hardware, "installed", lambda name: "9.9" if name == "trl" else real(name))
    training = life.command(path).verify().training
    assert not training.exact_resume
    assert [leg.after for leg in training.legs] == [0, 2]
    assert training.legs[1].platform == {
        **training.legs[0].platform,
        "device": "its sister",
        "trl": "9.9",
    }
    out = capsys.readouterr().out
    assert "not exact" in out and f"trl {real('trl')} there, 9.9 now" in out
