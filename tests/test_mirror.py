"""A mirror of rank 0's run: what arrives is what was sent, whatever lay there and whatever ends."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, local

import pytest
from torch.distributed import HashStore

from llmpipe import mirror, sums
from llmpipe.errors import INTEGRITY, LOST, RESOURCES, UserError
from llmpipe.files.tables import table
from llmpipe.mirror import Channel, Copy, Mirrors, absent, copy_of, lacking
from llmpipe.peers import Peers
from llmpipe.run.artifact import Artifact, mirror_of

LARGE = os.urandom(3 * mirror.CHUNK + 17)


class Clones(HashStore):
    """A store of this process, whose copies are itself."""

    def clone(self):
        return self


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr("torch.distributed.PrefixStore.clone", lambda store: store)
    return Peers(Clones(), "now")


@pytest.fixture
def runs(tmp_path):
    """(rank 0's, with a folder that has a table, and where another machine mirrors it)."""
    theirs, ours = tmp_path / "run", tmp_path / ".run.mirror"
    made = theirs / ".prepared" / "abc"
    (made / "tokenizer").mkdir(parents=True)
    (made / "train.arrow").write_bytes(LARGE)
    (made / "tokenizer" / "tokenizer.json").write_text("{}")
    (made / "empty").touch()
    sums.seal(made)
    return theirs, ours


def sent(peers, theirs, ours, copies, choose=lacking):
    """(files, bytes) that one process sends and another one takes."""
    words = ["there", "back"]
    with ThreadPoolExecutor(2) as pool:
        there, back = (Channel(peers, word, 1) for word in words)
        sends = pool.submit(mirror.offer, there, back, theirs, copies)
        there, back = (Channel(peers, word, 0) for word in words)
        takes = pool.submit(mirror.accept, there, back, ours, choose)
        errors = [each.exception(60) for each in (takes, sends)]
    if errors[0]:
        assert str(errors[0]) == str(errors[1]), "both say the same"
        raise errors[0]
    return sends.result()


def bring(peers, runs, *folders):
    theirs, ours = runs
    copies = [copy_of(theirs / folder, theirs) for folder in folders or (".prepared/abc",)]
    return sent(peers, theirs, ours, copies)


def are_alike(runs):
    theirs, ours = (run / ".prepared" / "abc" for run in runs)
    return not sums.verify(ours) and table(theirs) == table(ours)


def test_what_is_lacking_is_sent_once(peers, runs):
    files, size = bring(peers, runs)
    assert files == 4 and size > len(LARGE) and are_alike(runs)
    assert bring(Peers(Clones(), "later"), runs) == (0, 0)


def flip(folder):
    with (folder / "train.arrow").open("r+b") as file:
        file.seek(1000)
        file.write(bytes([LARGE[1000] ^ 1]))


def truncate(folder):
    os.truncate(folder / "train.arrow", 1000)


def lose(folder):
    shutil.rmtree(folder / "tokenizer")


def link(folder):
    """Something else is behind it, and stays as it is."""
    other = folder.parent.parent / "other"
    other.write_text("somebody's")
    (folder / "empty").unlink()
    (folder / "empty").symlink_to(other)


def link_a_folder(folder):
    other = folder.parent.parent / "others"
    (folder / "tokenizer").rename(other)
    (folder / "tokenizer").symlink_to(other)


def a_folder_for_a_file(folder):
    (folder / "empty").unlink()
    (folder / "empty" / "deep").mkdir(parents=True)


def an_older_one(folder):
    """With a table that agrees with it."""
    (folder / "train.arrow").write_text("older")
    (folder / "more.arrow").write_text("which nobody has any more")
    (folder / sums.SUMS).unlink()
    sums.seal(folder)


def killed_in_the_middle(folder):
    (folder / "train.arrow").unlink()
    (folder / sums.SUMS).unlink()
    (folder / ".train.arrow.arriving").write_bytes(LARGE[:1000])


HURTS = [flip, truncate, lose, link, link_a_folder, a_folder_for_a_file]
HURTS += [an_older_one, killed_in_the_middle]


@pytest.mark.parametrize("hurt", HURTS, ids=lambda hurt: hurt.__name__)
def test_a_mirror_that_is_not_as_rank_0_has_it_is_mended(peers, runs, hurt):
    bring(peers, runs)
    folder = runs[1] / ".prepared" / "abc"
    hurt(folder)
    assert not are_alike(runs)
    files, _ = bring(Peers(Clones(), "later"), runs)
    assert 0 < files <= 4 and are_alike(runs)
    beside = [path.read_text() for path in (runs[1] / "other",) if path.exists()]
    assert beside in ([], ["somebody's"])


def test_what_vouches_for_a_folder_comes_last(peers, runs, monkeypatch):
    """A kill before it leaves a folder that nobody takes for whole."""
    written = []
    write = mirror._write
    monkeypatch.setattr(mirror, "_write", lambda path, *a: written.append(path) or write(path, *a))
    bring(peers, runs)
    assert written[-1].name == sums.SUMS and len(written) == 4
    theirs, ours = runs
    flip(ours / ".prepared" / "abc")
    names = lacking(ours, copy_of(theirs / ".prepared" / "abc", theirs))
    assert names == ["train.arrow", sums.SUMS], "asked for anew"
    assert not (ours / ".prepared" / "abc" / sums.SUMS).exists(), "while the others come"


def test_what_rank_0_has_not_any_more_is_removed_but_for_what_is_spared(peers, runs):
    theirs, ours = runs
    for name in (
        "plan.json",
        "samples.jsonl",
        "checkpoints/step-3/part",
        "checkpoints/step-6/part",
    ):
        path = ours / "sft" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    (ours / "sft" / "checkpoints" / "step-9" / "sharded").mkdir(parents=True)
    (theirs / "sft").mkdir()
    (theirs / "sft" / "plan.json").write_text("new")
    entry = mirror.entry_of(theirs / "sft" / "plan.json")
    tables = Copy("sft/checkpoints", {}, ["step-6"])
    sent(peers, theirs, ours, [tables, Copy("sft", {"plan.json": entry}, ["checkpoints"])])
    left = [path.relative_to(ours / "sft").as_posix() for path in mirror.paths_below(ours / "sft")]
    assert left == ["plan.json", "checkpoints/step-6/part"]
    assert Artifact(ours / "sft").steps == [6], "a folder without files is no checkpoint, either"
    assert (ours / "sft" / "plan.json").read_text() == "new"


def test_of_a_folder_that_rank_0_has_not_nothing_stays(peers, runs):
    bring(peers, runs)
    shutil.rmtree(runs[0] / ".prepared" / "abc")
    assert bring(Peers(Clones(), "later"), runs) == (0, 0)
    assert not list(mirror.paths_below(runs[1]))


def test_of_a_checkpoint_rank_0_takes_what_it_has_not(peers, tmp_path):
    theirs, ours = tmp_path / "run" / "step", tmp_path / "mirror" / "step"
    for folder, rank in ((theirs, 0), (ours, 1)):
        folder.mkdir(parents=True)
        (folder / "both").write_text(f"rank {rank}'s")
        (folder / f"rank{rank}").write_text("state")
    copies = [copy_of(ours, ours.parent)]
    assert sent(peers, ours.parent, theirs.parent, copies, absent) == (1, 5)
    assert (theirs / "both").read_text() == "rank 0's"
    assert (theirs / "rank1").read_text() == "state"


def test_what_arrives_otherwise_than_it_was_told_is_not_kept(peers, runs):
    theirs, ours = runs
    told = copy_of(theirs / ".prepared" / "abc", theirs)
    flip(theirs / ".prepared" / "abc")
    with pytest.raises(UserError, match=r"train.arrow: what arrived is not what was told") as error:
        sent(peers, theirs, ours, [told])
    assert error.value.code == INTEGRITY
    assert not (ours / ".prepared" / "abc" / sums.SUMS).exists()
    assert not list(ours.rglob("*.arriv*")) and not list(ours.rglob("train*"))


def test_a_file_that_is_gone_by_then_is_said_by_both(peers, runs):
    theirs, ours = runs
    told = copy_of(theirs / ".prepared" / "abc", theirs)
    (theirs / ".prepared" / "abc" / "train.arrow").unlink()
    with pytest.raises(UserError, match=r"train.arrow: cannot be read: No such file"):
        sent(peers, theirs, ours, [told])


def test_a_disk_without_room_is_said_before_anything_comes(peers, runs, monkeypatch):
    class Full:
        f_bavail, f_frsize = 1, 4096

    monkeypatch.setattr(mirror.os, "statvfs", lambda path: Full)
    with pytest.raises(UserError, match=r"0.0 MB are free, and 12.6 MB are to come") as error:
        bring(peers, runs)
    assert error.value.code == RESOURCES and not list(mirror.paths_below(runs[1]))


def test_a_disk_that_fills_up_is_said_by_both(peers, runs, monkeypatch):
    def full(path, entry, parts):
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(mirror, "_write", full)
    with pytest.raises(UserError, match="No space left") as error:
        bring(peers, runs)
    assert error.value.code == RESOURCES


@pytest.mark.parametrize("way", ["../out", "/etc", "a/../../b", ""])
def test_nothing_is_written_outside_of_the_run(tmp_path, way):
    entry = {"size": 1, "sha256": "0"}
    for folder, name in ((way, "file"), ("folder", way)):
        with pytest.raises(ValueError, match="is no file of the folder"):
            mirror._checked({"folder": folder, "files": {name: entry}, "spares": []})


def test_what_was_not_offered_is_not_sent(peers, runs):
    """Not by a name that leads out of the run, and nothing of the rest."""
    copies = [copy_of(runs[0] / ".prepared" / "abc", runs[0])]
    secret = runs[0].parent / "secret"
    secret.write_text("somebody's")
    with ThreadPoolExecutor(1) as pool:
        ways = [Channel(peers, word, 1) for word in ("there", "back")]
        sends = pool.submit(mirror.offer, *ways, runs[0], copies)
        way, back = (Channel(peers, word, 0) for word in ("there", "back"))
        list(way.take())
        back.send([b'[[0, "empty"], [0, "../../../secret"]]'])
        try:
            with pytest.raises(UserError, match="secret': is asked for, and was not offered"):
                list(way.take())
        finally:
            peers.store.set("left/1", "75")  # so that one that sends still does not for ever
        assert sends.exception(10).code == INTEGRITY


# --- rank 0, and two machines that wait for their turn ---


@pytest.fixture
def three(peers, tmp_path, monkeypatch):
    """What each of them meets, who see a run each: threads, whose rank is their own."""
    known = local()
    monkeypatch.setattr(mirror, "rank", lambda: known.rank)
    machines = {1: "1", 2: "2"}

    def meet(act):
        def one(rank):
            known.rank = rank
            run = tmp_path / f"run{rank}"
            run.mkdir(exist_ok=True)
            return act(Mirrors(peers, "word", run, machines, rank or None), rank)

        with ThreadPoolExecutor(3) as pool:
            acts = [pool.submit(one, rank) for rank in range(3)]
            try:
                return [each.exception(10) or each.result() for each in acts]
            finally:
                for rank in range(3):  # so that one that waits still does not for ever
                    peers.store.set(f"left/{rank}", "75")

    return meet


def says(error):
    assert isinstance(error, UserError), error
    return error.message


def test_each_machine_is_brought_what_rank_0_has(three):
    def act(mirrors, rank):
        file = mirrors.run / "made" / "file"
        if rank == 0:
            file.parent.mkdir()
            file.write_text("rank 0's")
        return mirrors.bring(lambda: [copy_of(file.parent, mirrors.run)]), file.read_text()

    assert three(act) == [((2, 16), "rank 0's"), ((0, 0), "rank 0's"), ((0, 0), "rank 0's")]


def test_what_rank_0_cannot_offer_is_said_to_all(three):
    asked = []

    def copies():
        asked.append(1)
        raise UserError("a link inside an artifact")

    for error in three(lambda mirrors, rank: mirrors.bring(copies)):
        assert says(error) == "a link inside an artifact"
    assert asked == [1], "of rank 0, once"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_meets_of_three_is_waited_for_by_none(three, rank, monkeypatch):
    """Rank 0's disk is full, or a machine has a link among what it has written."""

    def full(path, entry, parts):
        raise OSError(28, os.strerror(28), str(path))

    if rank == 0:
        monkeypatch.setattr(mirror, "_write", full)

    def act(mirrors, me):
        folder = mirrors.run / "step"
        folder.mkdir()
        (folder / f"part{me}").write_text("state")
        if me == rank != 0:
            (folder / "link").symlink_to(folder / f"part{me}")
        mirrors.collect(folder, {})

    ends = three(act)
    words = "No space left" if rank == 0 else "link: a link inside an artifact"
    told = [end for me, end in enumerate(ends) if not (rank == 2 and me == 1)]
    assert all(words in says(error) for error in told), ends
    assert rank != 2 or ends[1] is None, "it was served before"
    assert rank == 0 or says(ends[0]).startswith(f"machine {rank}: ")


# --- one process, and another one ---


def test_who_sends_is_never_far_ahead(peers):
    """What nobody has taken yet lies in the store's memory."""
    channel = Channel(peers, "word", 1)
    began, over = Event(), Event()

    def message():
        for number in range(3 * mirror.WINDOW):
            if number == mirror.WINDOW:
                began.set()
            yield bytes([number])
        over.set()

    with ThreadPoolExecutor(1) as pool:
        sends = pool.submit(channel.send, message())
        assert began.wait(10) and not over.wait(0.2)
        parts = list(Channel(peers, "word", 0).take())
        sends.result(10)
    assert b"".join(parts) == bytes(range(3 * mirror.WINDOW))


def test_one_that_has_ended_is_not_waited_for(peers):
    peers.store.set("left/1", "75")
    with pytest.raises(UserError, match="rank 1 has ended with 75") as error:
        list(Channel(peers, "word", 1).take())
    assert error.value.code == LOST


def test_a_mirror_lies_beside_the_run_as_deep_as_that():
    """So that the ways of a plan to what lies outside of the run lead to the same places."""
    assert mirror_of(Path("runs/tiny")) == Path.cwd() / "runs" / ".tiny.mirror"
