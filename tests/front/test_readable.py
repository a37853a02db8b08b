"""A GGUF file is read once for all runs of a user, into a cache in which nothing half written or
damaged is ever used; where that takes nothing, the run has it itself.
"""

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.front import launch, readable
from llmpipe.run.artifact import Artifact
from llmpipe.run.gguf import architectures, check_gguf
from llmpipe.run.machine import IN_RUN
from llmpipe.run.verify import verify_run
from llmpipe.sums import SUMS, verify
from tests import disks, ggufs, life

READING = "of GGUF, once for all runs"
ALONE = "so it is read for this run alone"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a GGUF file, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ggufs.write(life.TINY / "model", tmp_path / "m.gguf")
    return tmp_path


def write(here: Path, run: str, **changes) -> Path:
    """A step of an adapter on the file."""
    return life.write(
        here / run,
        **{
            "stage": "lora",
            "model": str(here / "m.gguf"),
            "adapter": {"rank": 2, "alpha": 4},
            "optim__steps": 1,
            "evaluation": {},
            "data__eval": {},
            "samples": {},
            **changes,
        },
    )


def cached(here: Path) -> Path:
    (folder,) = (here / "cache" / "llmpipe" / "models").glob("gguf-*")
    return folder


def own(here: Path, run: str) -> list[Path]:
    return sorted((here / run / ".prepared").glob("*gguf-*"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def weights(artifact: Artifact) -> dict:
    return life.essence(artifact)["files"]


def test_it_is_read_once_for_all_runs(here, capsys):
    first = life.command(write(here, "one"))
    said = capsys.readouterr().out
    assert said.count(READING) == 1 and f"for PEFT its base is {cached(here)}" in said
    assert verify(cached(here)) == [] and own(here, "one") == []
    base = first.manifest().base
    assert base.kind == "gguf" and base.folder is None and set(base.identity) == {"gguf"}

    second = life.command(write(here, "two"))
    assert READING not in capsys.readouterr().out
    assert weights(second) == weights(first)
    verify_run(here / "two", print, print)

    (here / "m.gguf").rename(here / "other.gguf")  # its content decides, not its name
    life.command(write(here, "three", model=str(here / "other.gguf")))
    assert READING not in capsys.readouterr().out


def test_a_deleted_cache_is_made_again(here, capsys):
    life.command(write(here, "one"))
    shutil.rmtree(here / "cache")
    capsys.readouterr()
    life.command(write(here, "one"), fresh=True)
    assert capsys.readouterr().out.count(READING) == 1


def test_a_run_that_has_it_itself_goes_on_with_that(here, capsys, monkeypatch):
    """As older code left it, and as other machines have to see it."""
    monkeypatch.setenv(IN_RUN, "1")
    straight = life.command(write(here, "one", optim__steps=3, checkpoint__every=1))
    (kept,) = own(here, "one")
    assert not (here / "cache" / "llmpipe" / "models").exists()
    assert straight.manifest().base.folder == f"../.prepared/{kept.name}"
    capsys.readouterr()
    monkeypatch.delenv(IN_RUN)
    life.command(write(here, "one", name="next", model="artifact:lora"))
    verify_run(here / "one", print, print)
    said = capsys.readouterr().out
    assert "of GGUF" not in said and f"{kept}  kept to be read again" in said
    (here / "m.gguf").unlink()
    life.command(write(here, "one", name="last", model="artifact:lora"))
    assert not (here / "cache" / "llmpipe" / "models").exists()


def test_what_was_read_does_for_a_file_that_is_gone(here, capsys):
    """As long as it is whole; then it is said, since nothing can make it again."""
    life.command(write(here, "one"))
    (here / "m.gguf").unlink()
    on_top = {"model": "artifact:lora"}
    life.command(write(here, "one", name="next", **on_top))
    assert READING in capsys.readouterr().out  # of the first one alone
    flip(cached(here) / "config.json")
    with pytest.raises(UserError, match=r"config\.json: sha256") as refused:
        life.command(write(here, "one", name="third", **on_top))
    assert refused.value.code == 3
    (cached(here) / SUMS).unlink()
    with pytest.raises(UserError, match=r"m\.gguf: lies neither where it was nor at") as refused:
        life.command(write(here, "one", name="last", **on_top))
    assert refused.value.code == 3


def test_several_machines_have_it_in_the_run(monkeypatch):
    assert IN_RUN not in launch.environment("convert", 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launch.environment("convert", 1)[IN_RUN] == "1"


@pytest.mark.parametrize("left", ["without a table", "half written"])
def test_what_a_kill_left_is_not_used(here, capsys, left):
    life.command(write(here, "one"))
    folder = cached(here)
    if left == "half written":
        folder.rename(folder.with_name(f".{folder.name}.staging"))
    else:
        (folder / SUMS).unlink()
        flip(folder / "model.safetensors")
    capsys.readouterr()
    life.command(write(here, "two"))
    assert capsys.readouterr().out.count(READING) == 1
    assert verify(cached(here)) == []
    assert [path.name for path in cached(here).parent.glob(".gguf*")] == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", SUMS])
def test_a_damaged_one_is_made_again(here, capsys, name):
    life.command(write(here, "one"))
    flip(cached(here) / name)
    capsys.readouterr()
    life.command(write(here, "two"))
    said = capsys.readouterr().out
    assert said.count(READING) == 1 and f"{name}: " in said and "is made again" in said
    assert verify(cached(here)) == []


def test_damage_that_a_glance_does_not_see_is_found_before_it_is_trained_on(
    here, capsys, monkeypatch
):
    first = life.command(write(here, "one"))
    monkeypatch.setattr(readable, "BESIDE_WEIGHTS", 1 << 10)
    flip(cached(here) / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: sha256") as refused:
        life.command(write(here, "two"))
    assert refused.value.code == 3
    assert refused.value.hint == "run the same command again: it is made anew"
    capsys.readouterr()
    assert weights(life.command(write(here, "two"))) == weights(first)
    assert capsys.readouterr().out.count(READING) == 1


def with_cache(cache: str, path: str, out: str) -> None:
    """A command in a process of its own, with a cache."""
    os.environ["XDG_CACHE_HOME"] = cache
    life._trial(path, out, (), None)


def test_two_processes_at_once_read_it_once(here):
    paths = [write(here, run) for run in ("one", "two")]
    outs = [path.with_suffix(".out") for path in paths]
    cache = str(here / "cache")
    trials = [
        life.forked(with_cache, cache, str(path), str(out))
        for path, out in zip(paths, outs, strict=True)
    ]
    for trial in trials:
        trial.join(120)
    texts = "".join(out.read_text() for out in outs)
    assert [trial.exitcode for trial in trials] == [0, 0], texts
    assert texts.count(READING) == 1 and verify(cached(here)) == []


def test_a_cache_that_cannot_be_made_is_done_without(here, capsys, monkeypatch):
    (here / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "a file"))
    life.command(write(here, "one"))
    said = capsys.readouterr().out
    assert said.count(ALONE) == 1 and "Not a directory" in said
    (kept,) = own(here, "one")
    assert verify(kept) == []
    life.command(write(here, "one", name="again"))
    assert "of GGUF" not in capsys.readouterr().out


def test_a_cache_without_locks_is_done_without(here, capsys, monkeypatch):
    flock = fcntl.flock

    def locked(descriptor, kind):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(here / "cache")):
            raise OSError(errno.ENOLCK, "No locks available")
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", locked)
    life.command(write(here, "one"))
    said = capsys.readouterr().out
    assert said.count(ALONE) == 1 and "No locks available" in said
    assert verify(own(here, "one")[0]) == []


def on_a_disk(options: str, cache: str, path: str, out: str) -> None:
    """`with_cache`, and the cache is a disk with these options."""
    disks.disk(Path(cache), options)
    with_cache(cache, path, out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("size=64k", "are free, and"),
        ("size=1m,nr_inodes=5", "No space left on device"),
        ("size=1m,ro", "Read-only file system"),
    ],
    ids=["full", "inodes", "read-only"],
)
def test_a_cache_without_room_is_done_without(here, options, words):
    path = write(here, "one")
    out = path.with_suffix(".out")
    trial = life.forked(on_a_disk, options, str(here / "cache"), str(path), str(out))
    trial.join(120)
    said = out.read_text()
    assert trial.exitcode == 0, said
    assert said.count(ALONE) == 1 and words in said
    assert verify(own(here, "one")[0]) == []


def test_a_run_without_room_is_one_line(here, monkeypatch):
    """And nothing is read for it."""
    monkeypatch.setenv(IN_RUN, "1")
    monkeypatch.setattr(readable, "FP32", 1 << 60)
    with pytest.raises(UserError, match=r"are free, and [\d.]+ GB needed for m\.gguf") as refused:
        life.command(write(here, "one"))
    assert refused.value.code == 5 and own(here, "one") == []


# --- before it is read ----------------------------------------------------------------------------


@pytest.fixture
def unread(monkeypatch):
    """No weights may be read."""

    def read(*_):
        raise AssertionError("the file was read")

    monkeypatch.setattr(readable, "_read", read)


def refusal(llmpipe, path: Path) -> str:
    code, out, err = llmpipe("lora", path)
    assert (code, out) == (2, "") and err.startswith(f"error: {path}:"), err
    return err


def test_conversations_without_a_template_are_refused_first(here, llmpipe, unread):
    ggufs.write(life.TINY / "model", here / "m.gguf", template=False)
    assert not check_gguf(here / "m.gguf").has_template
    said = refusal(llmpipe, write(here, "one"))
    assert "the model's tokenizer has no chat template; set data.template: chatml" in said
    assert not (here / "one").exists()


def test_texts_need_no_template(here):
    ggufs.write(life.TINY / "model", here / "m.gguf", template=False)
    (here / "texts.jsonl").write_text('{"text": "Grass is green."}\n' * 8)
    rows = [{"path": str(here / "texts.jsonl")}]
    life.command(write(here, "one", data__train=rows))


def test_a_kind_that_transformers_does_not_read_is_refused_first(here, llmpipe, unread):
    ggufs.write(life.TINY / "model", here / "m.gguf", kind="rwkv9")
    said = refusal(llmpipe, write(here, "one"))
    assert "transformers reads no GGUF of the kind rwkv9; take the model as safetensors" in said


def test_a_cut_file_is_refused_first(here, llmpipe, unread):
    data = (here / "m.gguf").read_bytes()
    (here / "m.gguf").write_bytes(data[: len(data) // 2])
    assert "its tensors end at" in refusal(llmpipe, write(here, "one"))


def test_the_kinds_are_those_that_transformers_reads():
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    assert architectures() == {*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES}
    assert {"llama", "qwen2", "gemma3"} <= architectures()
