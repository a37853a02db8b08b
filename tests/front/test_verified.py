"""What lies in `.prepared` is used as it was made, or not at all: every file of it, hurt in every
way, before a command and in the middle of one."""

import gzip
import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from datasets import Dataset

from llmpipe.data.examples import Document
from llmpipe.data.prepared import PreparedRows
from llmpipe.data.sources import Origin
from llmpipe.errors import UserError
from llmpipe.front.verified import verifying
from llmpipe.recipe.sections import Rows
from llmpipe.run.artifact import Artifact
from llmpipe.run.manifest import Asked
from llmpipe.run.outcome import LAUNCH
from llmpipe.run.plan import Plan
from llmpipe.sums import SUMS, Verification, fingerprint
from tests import life, store
from tests.training.test_life import change_tokens

PAIRS = {
    "train": [{"path": str(life.TINY / "pairs.jsonl")}],
    "eval": {"holdout": 0.1},
    "max_length": 64,
}
ROWS = [{"path": str(life.TINY / "rows.jsonl")}]
PERPLEXITY = {"name": "chat", "task": "perplexity", "data": ROWS}


def sft(run, **changes):
    return life.write(run, **changes)


def evaluation(run, **changes):
    values = {
        "stage": "eval",
        "run": str(run),
        "models": {"base": str(life.TINY / "model")},
        "tasks": [life.put(dict(PERPLEXITY), changes)],
    }
    path = run.parent / "eval.yaml"
    path.write_text(json.dumps(values))
    return path


def merged(run, **changes):
    values = life.recipe(run, stage="reward", model="artifact:lora", data=PAIRS, **changes)
    path = run.parent / "reward.yaml"
    path.write_text(json.dumps({name: part for name, part in values.items() if name != "samples"}))
    return path


def texts(run, **changes):
    """A pretraining whose tokenizer is trained first."""
    values = {
        "stage": "pretrain",
        "run": str(run),
        "architecture": {"kind": "gpt2", "layers": 1, "width": 16, "heads": 2},
        "tokenizer": {"vocab_size": 300},
        "data": {"train": [{"path": str(store.texts())}], "max_length": 32},
        "optim": {"learning_rate": 1e-3, "batch_tokens": 64, "steps": 2},
    }
    path = run.parent / "pretrain.yaml"
    path.write_text(json.dumps(life.put(values, changes)))
    return path


KEPT = {
    "tokens": (sft, "[0-9a-f]" * 64),
    "items": (evaluation, "eval-*"),
    "merged": (merged, "merged-*"),
    "tokenizer": (texts, "tokenizer-*"),
}
"""By what is kept, a recipe that keeps it, and its folder in `.prepared`."""

OTHER = {
    "tokens": {"seed": 1},
    "items": {"data": [ROWS[0] | {"limit": 5}]},
    "tokenizer": {"tokenizer__vocab_size": 310},
}
"""What is changed in a recipe of another one of its kind."""


def folder_of(what, run):
    (folder,) = (run / ".prepared").glob(KEPT[what][1])
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """{what is kept: a run that keeps it, and the folder of another one}"""
    known = {}

    def make(what):
        if what not in known:
            run, another = (tmp_path_factory.mktemp(what) / "run" for _ in range(2))
            if what == "merged":
                store.made(life.write(run, stage="lora", adapter={"rank": 4, "alpha": 8}))
                shutil.rmtree(run / ".prepared", ignore_errors=True)
            life.command(KEPT[what][0](run), only_prepare=True)
            known[what] = run, None
            if what in OTHER:
                life.command(KEPT[what][0](another, **OTHER[what]), only_prepare=True)
                known[what] = run, folder_of(what, another)
        return known[what]

    return make


def hurt(victim: Path, how: str, other: Path | None) -> None:
    """Hurt a file. `other`: a file that could take its place."""
    data = bytearray(victim.read_bytes())
    if how == "flipped":
        data[len(data) // 3] ^= 4
        victim.write_bytes(data)
    elif how == "cut":
        victim.write_bytes(data[: len(data) // 2])
    elif how == "emptied":
        victim.write_bytes(b"")
    elif how == "removed":
        victim.unlink()
    elif how == "added":
        victim.with_name("one-more.json").write_text("{}")
    elif how == "a link":
        aside = victim.with_name(f".{victim.name}")
        victim.rename(aside)
        shutil.move(aside, victim.parents[2] / f"aside-{victim.name}")
        victim.symlink_to(victim.parents[2] / f"aside-{victim.name}")
    else:
        assert how == "swapped" and other
        shutil.copyfile(other, victim)


def changes(victim: Path, how: str, other: Path | None) -> bool:
    """Whether it is another file then."""
    if not victim.stat().st_size and how in ("flipped", "cut", "emptied"):
        return False
    if how == "removed" and victim.name == SUMS:
        return False  # see `test_what_an_older_llmpipe_made`
    if how == "swapped":
        return other is not None and other.read_bytes() != victim.read_bytes()
    return True


def in_place_of(victim: Path, folder: Path, another: Path | None) -> Path | None:
    """The file of that name in another folder; where there is none, the next one of its own."""
    if another:
        name = victim.relative_to(folder)
        return another / name if (another / name).is_file() else None
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return files[(files.index(victim) + 1) % len(files)]


HURTS = ["flipped", "cut", "emptied", "swapped", "a link", "removed", "added"]
SOON = {("tokens", "flipped", "meanwhile"), ("items", "flipped", "meanwhile")}
SOON |= {("merged", "flipped", "meanwhile"), ("tokens", "swapped", "before")}
CASES = [
    case if case in SOON else life.by_the_dozen(*case)
    for case in (
        (what, how, when)
        for what in KEPT
        for how in HURTS
        for when in ("before", "meanwhile")
        if (what, when) != ("tokenizer", "meanwhile")  # training does not read it
    )
]


@pytest.mark.parametrize(("what", "how", "when"), CASES)
def test_every_file_of_every_folder(prepared, tmp_path, monkeypatch, what, how, when):
    source, another = prepared(what)
    folder = folder_of(what, source)
    victims = sorted(path.relative_to(source) for path in folder.rglob("*") if path.is_file())
    hurts = 0
    for name in victims:
        other = in_place_of(source / name, folder, another)
        if not changes(source / name, how, other):
            continue
        run = tmp_path / str(hurts) / "run"
        shutil.copytree(source, run)
        path = KEPT[what][0](run)
        if when == "before":
            hurt(run / name, how, other)
        else:
            in_the_middle(monkeypatch, lambda at=run / name, other=other: hurt(at, how, other))
        with pytest.raises(UserError) as refused:
            life.command(path)
        assert refused.value.code == 3, name
        named = "one-more.json" if how == "added" else name.name
        assert named in refused.value.message or SUMS in refused.value.message, name
        assert f"remove {folder_of(what, run)} and run the same" in refused.value.hint
        hurts += 1
    assert hurts >= (1 if how == "swapped" else len(victims) - 2)


def in_the_middle(monkeypatch, action):
    """Do something between the preparing and the training of a command."""
    start = life.start_here.__wrapped__ if hasattr(life.start_here, "__wrapped__") else None
    start = start or life.start_here

    def started(what, *arguments, **options):
        if what == "train":
            action()
        start(what, *arguments, **options)

    started.__wrapped__ = start
    monkeypatch.setattr(life, "start_here", started)


def test_tokens_that_were_changed_are_not_trained_on(prepared, tmp_path):
    run = shutil.copytree(prepared("tokens")[0], tmp_path / "run")
    change_tokens(folder_of("tokens", run) / "train.arrow")
    with pytest.raises(UserError, match=r"train\.arrow: sha256 ") as refused:
        life.command(sft(run))
    assert refused.value.code == 3
    assert not (run / "sft" / "metrics.jsonl").exists()


def test_the_remedy(prepared, tmp_path):
    """What the message says to do makes of it what it would have been."""
    straight = store.made(sft(tmp_path / "straight"))
    run = shutil.copytree(prepared("tokens")[0], tmp_path / "run")
    (folder_of("tokens", run) / "eval.arrow").write_bytes(b"")
    with pytest.raises(UserError) as refused:
        life.command(sft(run))
    shutil.rmtree(re.search(r"remove (\S+) and", refused.value.hint)[1])
    assert life.essence(life.command(sft(run))) == life.essence(straight)


def exchange_rows(folder, _):
    """The rows to train on for those to evaluate on."""
    train, held_out = folder / "train.arrow", folder / "eval.arrow"
    kept = train.read_bytes()
    train.write_bytes(held_out.read_bytes())
    held_out.write_bytes(kept)


def exchange_folders(folder, another):
    """The whole folder for another one, table and all."""
    shutil.rmtree(folder)
    shutil.copytree(another, folder)


def forge_folder(folder, _):
    """A count, and a table that agrees with it."""
    record = folder / "prepared.json"
    record.write_text(re.sub(r'"train": \d+', '"train": 7', record.read_text()))
    from llmpipe.sums import seal

    seal(folder)


def forge_record(folder, _):
    """A count that the artifact keeps."""
    record = next(folder.parents[1].glob("*/prepared.json"))
    values = json.loads(record.read_text())
    values["tokens"]["train_supervised"] += 1
    record.write_text(json.dumps(values))


def link_folder(folder, another):
    aside = folder.parents[1] / "aside"
    folder.rename(aside)
    folder.symlink_to(aside)


TRICKS = [exchange_rows, exchange_folders, forge_folder, forge_record, link_folder]


@pytest.mark.parametrize("trick", TRICKS, ids=lambda trick: trick.__name__)
def test_what_fits_and_is_another(prepared, tmp_path, monkeypatch, trick):
    """By the time that training begins, what was prepared is something else."""
    source, another = prepared("tokens")
    run = shutil.copytree(source, tmp_path / "run")
    in_the_middle(monkeypatch, lambda: trick(folder_of("tokens", run), another))
    with pytest.raises(UserError) as refused:
        life.command(sft(run))
    assert refused.value.code == 3
    assert not (run / "sft" / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["merged", life.by_the_dozen("tokenizer")])
def test_what_an_older_llmpipe_made(prepared, tmp_path, what):
    """A model or a tokenizer without a table is made anew, whatever lies there."""
    run = shutil.copytree(prepared(what)[0], tmp_path / "run")
    folder = folder_of(what, run)
    whole = (folder / "tokenizer.json").read_bytes()
    (folder / SUMS).unlink()
    (folder / "tokenizer.json").write_text("{}")
    life.command(KEPT[what][0](run), only_prepare=True)
    assert (folder / "tokenizer.json").read_bytes() == whole and (folder / SUMS).exists()


def test_rows_of_an_older_llmpipe_are_prepared_anew(prepared, tmp_path, capsys):
    run = shutil.copytree(prepared("tokens")[0], tmp_path / "run")
    folder = folder_of("tokens", run)
    (folder / SUMS).unlink()
    older = folder.rename(folder.with_name("0" * 64))
    life.command(sft(run), only_prepare=True)
    assert "that an older llmpipe prepared, without sums" in capsys.readouterr().out
    assert folder.exists() and older.exists()


@pytest.mark.parametrize("whole", [True, False])
def test_one_process_of_a_machine_verifies(prepared, tmp_path, monkeypatch, whole):
    """The others take its word for it, whichever it is."""
    run = shutil.copytree(prepared("tokens")[0], tmp_path / "run")
    artifact = Artifact(run / "sft")
    record = PreparedRows.whole(artifact.path / "prepared.json")
    job = SimpleNamespace(artifact=artifact, prepared=run / ".prepared", plan=Plan("", Asked(), {}))
    if not whole:
        change_tokens(record.folder(job.prepared) / "train.arrow")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv(LAUNCH, "this")
    hashed = []
    monkeypatch.setattr("llmpipe.front.verified.Verification", counting(hashed))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        finish = verifying(job, record)
        with nullcontext() if whole else pytest.raises(UserError, match=r"train\.arrow") as refused:
            finish()
        assert whole or refused.value.code == 3
    assert len(hashed) == 1


@pytest.mark.parametrize("left", [{"launch": "earlier"}, {"launcher": "7 9"}, {"launch": 7}])
def test_a_verdict_of_another_launch_is_not_believed(prepared, tmp_path, monkeypatch, left):
    """Nor one of another version."""
    run = shutil.copytree(prepared("tokens")[0], tmp_path / "run")
    artifact = Artifact(run / "sft")
    record = PreparedRows.whole(artifact.path / "prepared.json")
    job = SimpleNamespace(artifact=artifact, prepared=run / ".prepared", plan=Plan("", Asked(), {}))
    (run / ".locks").mkdir(exist_ok=True)
    (run / ".locks" / "sft.0.verdict").write_text(json.dumps(left))
    monkeypatch.setenv(LAUNCH, "this")
    monkeypatch.setenv("LOCAL_RANK", "1")
    wait = verifying(job, record)
    monkeypatch.setenv("LOCAL_RANK", "0")
    other = Thread(target=wait, daemon=True)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    verifying(job, record)()
    other.join(20)
    assert not other.is_alive()


def counting(made):
    class Counted(Verification):
        def __init__(self, folders):
            super().__init__(folders)
            made.append(self)

    return Counted


@pytest.mark.faults
def test_two_ranks_agree(tmp_path):
    path = sft(tmp_path / "run", launch__processes=2, launch__micro_batch_size=1)
    made = life.pair(path)
    (verdict,) = (made.run / ".locks").glob("sft.*.verdict")
    assert json.loads(verdict.read_text()).keys() == {"launch"}


def test_rows_that_change_under_way_are_not_prepared(tmp_path, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    shutil.copyfile(life.TINY / "rows.jsonl", rows)
    path, start = sft(tmp_path / "run", data__train=[{"path": str(rows)}]), life.start_here

    def started(action, *arguments, **options):
        rows.write_text(rows.read_text().replace("grass", "glass"))
        start(action, *arguments, **options)

    monkeypatch.setattr(life, "start_here", started)
    with pytest.raises(UserError, match=r"rows\.jsonl: was changed since the command") as refused:
        life.command(path)
    assert refused.value.code == 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda rows: shutil.copy(rows / "a.jsonl", rows / "c.jsonl"), r"/rows: was changed"),
        (lambda rows: (rows / "b.jsonl").unlink(), r"/rows: was changed"),
        (
            lambda rows: (rows / "b.jsonl").write_text('{"text": "x"}'),
            r"rows/b\.jsonl: was changed",
        ),
        (lambda rows: swap(rows / "a.jsonl", rows / "b.jsonl"), r"/rows: was changed"),
    ],
    ids=["added", "removed", "another", "swapped"],
)
def test_a_folder_of_rows_that_changes_under_way(tmp_path, monkeypatch, change, named):
    lines = (life.TINY / "rows.jsonl").read_text().splitlines(keepends=True)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text("".join(lines[:40]))
    (rows / "b.jsonl").write_text("".join(lines[40:]))
    path, start = sft(tmp_path / "run", data__train=[{"path": str(rows)}]), life.start_here

    def started(action, *arguments, **options):
        change(rows)
        start(action, *arguments, **options)

    monkeypatch.setattr(life, "start_here", started)
    with pytest.raises(UserError, match=named) as refused:
        life.command(path)
    assert refused.value.code == 3
    assert not list((tmp_path / "run" / ".prepared").glob("*/train.arrow"))


def swap(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.parquet", "rows.csv.gz"])
def test_rows_that_are_written_to_while_they_are_read(tmp_path, file):
    """Reading them may take hours, in which nobody hashes them again."""
    path = tmp_path / file
    texts = [f"Text number {i} of many." for i in range(2000)]
    if file.endswith("jsonl"):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif file.endswith("parquet"):
        Dataset.from_dict({"text": texts}).to_parquet(str(path))
    else:
        path.write_bytes(gzip.compress("\n".join(["text", *texts]).encode()))
    source = Rows(path=str(path))
    before = Origin(source, {})
    before.open((Document,))
    assert sum(len(chunk.rows) for chunk in before.chunks) == len(texts)
    origin = Origin(source, {})
    origin.open((Document,))
    next(origin.chunks)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"t", b"T", 1))
    with pytest.raises(UserError, match=rf"{file}: was changed while its rows were read") as error:
        list(origin.chunks)
    assert error.value.code == 3


def test_a_template_that_changes_under_way_is_not_used(tmp_path, monkeypatch):
    template = tmp_path / "mine.jinja"
    shutil.copyfile(life.TINY / "model" / "chat_template.jinja", template)
    path = sft(tmp_path / "run", data__template=str(template))
    in_the_middle(monkeypatch, lambda: template.write_text(template.read_text() + " "))
    with pytest.raises(UserError, match=r"mine\.jinja: was changed since the command") as refused:
        life.command(path)
    assert refused.value.code == 3


def test_a_plan_hashes_a_file_once(tmp_path):
    """Also where it is a second name, and not where it was written to meanwhile."""
    from llmpipe.files.tables import hashing_once, sha256_file

    path, read = tmp_path / "weights", []
    path.write_bytes(b"a" * 100)
    (tmp_path / "again").hardlink_to(path)
    with hashing_once():
        first = sha256_file(path, read.append)
        assert sha256_file(tmp_path / "again", read.append) == first and read == [100]
        path.write_bytes(b"b" * 101)
        assert sha256_file(path, read.append) != first
    assert sha256_file(path, read.append) and read == [100, 101, 101]


CHANGED = [
    case if case[1] == "flipped" else life.by_the_dozen(*case)
    for case in (
        (what, how)
        for what in ("folder", "artifact", "base", "measured")
        for how in ("flipped", "cut", "removed", "added", "a link")
    )
]


@pytest.mark.parametrize(("what", "how"), CHANGED)
def test_a_model_that_changes_between_plan_and_use(prepared, tmp_path, monkeypatch, what, how):
    """It was verified when the command began; what is used is what was verified."""
    run, folder = tmp_path / "run", shutil.copytree(life.TINY / "model", tmp_path / "model")
    victim, model = folder / "model.safetensors", str(folder)
    adapter = {"stage": "lora", "adapter": {"rank": 2, "alpha": 4}, "optim__steps": 1}
    if what == "artifact":
        shutil.copytree(prepared("merged")[0], run, ignore=shutil.ignore_patterns(".prepared"))
        victim, model = run / "lora" / "model" / "adapter_model.safetensors", "artifact:lora"
        adapter["adapter"] = {"continue": True}
    elif what == "base":
        life.command(life.write(run, model=model, name="first", **adapter))
        model = "artifact:first"
        adapter["adapter"] = {"continue": True}
    path = life.write(run, model=model, name="next", **adapter)
    if what == "measured":
        path = evaluation(run)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"models": {"base": model}}))
    in_the_middle(monkeypatch, lambda: hurt(victim, how, None))
    with pytest.raises(UserError, match="was changed since it was verified") as refused:
        life.command(path)
    assert refused.value.code == 3


def test_the_table_knows_itself(tmp_path):
    from llmpipe import sums

    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("a")
    named = sums.seal(folder)
    assert sums.verify(folder) == [] == sums.verify(sums.Kept(folder, named))
    assert sums.verify(sums.Kept(folder, "0" * 64)) == [
        "sums.json: is not the table that was verified"
    ]
    document = json.loads((folder / SUMS).read_text())
    for broken in (
        [],
        document | {"files": {}},
        {"files": 7, "fingerprint": fingerprint({"files": 7})},
        {"files": {"a": 7}, "fingerprint": fingerprint({"files": {"a": 7}})},
    ):
        (folder / SUMS).write_text(json.dumps(broken))
        assert sums.verify(folder) == ["sums.json: damaged"]
    (folder / SUMS).unlink()
    os.mkfifo(folder / SUMS)
    assert sums.verify(folder) == ["sums.json: no file, but a pipe or a device"]


def test_what_is_somebodys_own_beside_the_rows_stays(tmp_path):
    """Though it is called nearly as what a killed process leaves, which goes."""
    path = sft(tmp_path / "run", optim__steps=1, evaluation={})
    made = life.command(path)
    (kept,) = [path for path in (made.run / ".prepared").glob("*") if len(path.name) == 64]
    copy, left = (kept.with_name(f".{kept.name}.{end}") for end in ("bak", "999999999"))
    shutil.copytree(kept, copy)
    kept.rename(left)
    life.command(path, fresh=True)
    assert kept.is_dir() and copy.is_dir() and not left.exists()
