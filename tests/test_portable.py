"""No file of a run holds a path of the machine that made it, and a run that was moved goes on.

Everything a recipe can name is named in full here, in a folder of a name of its own; no byte of
any file may hold that name, the home or the current folder.
"""

import json
import os
import shutil
import signal
import zipfile
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.files.json import write_json
from llmpipe.report.page import write_report
from llmpipe.report.terminal import show_run
from llmpipe.run.artifact import Artifact, fingerprint
from llmpipe.run.reference import Use, resolve
from llmpipe.run.whereabouts import note, noted
from tests import ggufs, life, store
from tests.front import test_processes

NAME = "a-folder-of-mine-7f3a"
ADAPTER = {"rank": 2, "alpha": 4}
TRAINING = {
    "optim": {"learning_rate": 2e-3, "batch_size": 4, "steps": 2, "precision": "fp32"},
    "checkpoint": {"every": 1},
    "log": {"every": 1, "trackers": ["tensorboard"]},
    "launch": {"processes": 1, "threads": 1, "micro_batch_size": 2},
}


def rows(home, name, **more):
    return {"train": [{"path": f"{home}/tiny/{name}.jsonl"}], "max_length": 64, **more}


def recipes(home) -> dict[str, dict]:
    """Every stage, each of its paths in full, by the names of the artifacts."""
    tiny, run, held_out = home / "tiny", home / "runs" / "x", {"eval": {"holdout": 0.1}}
    model, messages = str(tiny / "model"), rows(home, "rows", **held_out)
    pairs = rows(home, "pairs", **held_out)
    items = [{"path": f"{tiny}/rows.jsonl", "limit": 8}]
    known = {
        "lora": {
            "model": model,
            "adapter": {**ADAPTER, "merge": True},
            "data": {**messages, "template": f"{home}/plain.jinja"},
            "samples": {"prompts": ["What is 2 + 2?"], "max_new_tokens": 4},
        },
        "dpo": {
            "model": f"{run}/lora",
            "adapter": ADAPTER,
            "data": {**pairs, "template": f"{home}/plain.jinja"},
        },
        "sft": {"model": model, "data": messages},
        "pretrain": {
            "tokenizer": {"vocab_size": 512},
            "architecture": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2},
            "data": {"train": [{"path": f"{home}/texts/*.txt"}], "max_length": 64},
            "optim": {"learning_rate": 3e-3, "batch_tokens": 512, "steps": 2},
        },
        "again": {
            "stage": "pretrain",
            "model": f"{run}/pretrain",
            "data": {"train": [{"path": f"{home}/texts"}], "max_length": 64},
            "optim": {"learning_rate": 3e-3, "batch_tokens": 512, "steps": 2},
        },
        "tokenizer": {
            "stage": "pretrain",
            "tokenizer": model,
            "architecture": {"layers": 1, "width": 32, "heads": 4, "kv_heads": 2},
            "data": {"train": [{"path": f"{home}/texts/*.txt"}], "max_length": 64, "stream": True},
            "optim": {"learning_rate": 3e-3, "batch_tokens": 512, "steps": 2},
        },
        "qlora": {
            "model": model,
            "adapter": ADAPTER,
            "quantization": {"bits": 4},
            "data": messages,
        },
        "reward": {"model": model, "data": pairs},
        "precomputed": {"stage": "dpo", "model": model, "precompute": True, "data": pairs},
        "kto": {"model": f"{run}/sft", "data": pairs},
        "ppo": {
            "model": model,
            "adapter": ADAPTER,
            "data": rows(home, "rows"),
            "reward": [
                {"function": f"{tiny}/rewards.py:brevity"},
                {"model": f"{run}/reward"},
            ],
            "rollout": {"max_new_tokens": 8},
            "algorithm": {"epochs": 1, "minibatches": 2},
            "mixture": rows(home, "rows", batch_size=2),
        },
        "file": {"stage": "lora", "model": f"{home}/m.gguf", "adapter": ADAPTER, "data": messages},
        "eval": {
            "models": {"base": model, "v1.5": f"{run}/lora", "dpo": "artifact:dpo"},
            "tasks": [
                {"task": "perplexity", "data": items},
                {"task": "generate", "data": items, "score": ["exact_match"], "max_new_tokens": 4},
            ],
            "precision": "fp32",
            "launch": {"threads": 1, "batch_size": 8},
        },
    }
    common = {
        name: {"stage": name, "name": name, "run": str(run), **({} if name == "eval" else TRAINING)}
        for name in known
    }
    return {name: common[name] | recipe for name, recipe in known.items()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A folder as `begin` makes it, with the adapter of its recipe in it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        home = begin(tmp_path_factory.mktemp("lora"), monkeypatch)
        make(home, ["lora"])
        yield home


def of(lora, tmp_path, monkeypatch):
    """A copy of that folder, and its adapter; where it was made it is no longer."""
    home = tmp_path / NAME
    shutil.copytree(lora, home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home, Artifact(home / "runs" / "x" / "lora")


def begin(tmp_path, monkeypatch):
    """A folder with all that recipes name, and a current folder elsewhere."""
    home = tmp_path / NAME
    shutil.copytree(life.TINY, home / "tiny")
    shutil.copytree(store.texts(), home / "texts")
    shutil.copy(life.TINY / "model" / "chat_template.jinja", home / "plain.jinja")
    (home / "runs").mkdir()
    desk = tmp_path / "desk-of-mine-7f3a"
    desk.mkdir()
    monkeypatch.chdir(desk)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home


def write(home, recipe, **changes):
    path = home / "recipe.yaml"
    path.write_text(json.dumps(life.put(recipe, changes)))
    return path


def told(run: Path) -> list[str]:
    """The files of a run that tell of this machine, with what they say."""
    names = [NAME, os.getcwd(), Path.cwd().name, os.path.expanduser("~"), str(life.ROOT)]
    return [
        f"{path.relative_to(run)}: {data[max(at - 60, 0) : at + 60]!r}"
        for path in sorted(run.rglob("*"))
        if path.is_file()
        for data in contents(path)
        for name in names
        if (at := data.find(name.encode())) >= 0
    ]


def contents(path: Path) -> list[bytes]:
    """The bytes of a file, and of the members of an archive, as torch.save makes them."""
    whole = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            whole += [archive.read(name) for name in archive.namelist()]
    return whole


def make(home, names):
    known = recipes(home)
    return [life.command(write(home, known[name])) for name in names]


SOME = ["lora", "dpo"]
ALL = [
    *("lora", "dpo", "sft", "pretrain", "again", "tokenizer", "qlora", "reward", "precomputed"),
    *("kto", "ppo", "file", "eval"),
]


@pytest.mark.parametrize("names", [SOME, life.by_the_dozen(ALL)], ids=["some", "all"])
def test_a_run_tells_nothing_and_may_be_moved(tmp_path, monkeypatch, capsys, names):
    home = begin(tmp_path, monkeypatch)
    if "file" in names:
        ggufs.write(home / "tiny" / "model", home / "m.gguf")
    made = make(home, names)
    run = home / "runs" / "x"
    said = capsys.readouterr().out
    assert f"{run}/lora: adapter published" in said, "a person reads paths in full"
    write_report([run], None)
    assert told(run) == []
    assert noted(made[0].manifest().base.identity) == str(home / "tiny" / "model")

    moved = home / "elsewhere" / "y"
    moved.parent.mkdir()
    run.rename(moved)
    for artifact in made:
        Artifact(moved / artifact.name).verify()
        assert artifact.name in show_run(moved)
    write_report([moved], None)
    use = Use("chat", ("model", "adapter"))
    assert resolve(str(moved / "lora"), use, Path()).base.folder == home / "tiny" / "model"
    assert resolve("artifact:dpo", use, moved).base.folder == home / "tiny" / "model"
    for name in names:
        known = recipes(home)[name] | {"run": str(moved)}
        text = json.dumps(known).replace(str(run), str(moved))
        life.command(write(home, json.loads(text)))
        assert f"{name}: skip: finished" in capsys.readouterr().out
    if "file" in names:
        (home / "m.gguf").unlink()  # it was read already
        base = resolve("artifact:file", use, moved).base
        assert base.kind == "gguf" and base.folder is None
    again = recipes(home)["dpo"] | {"run": str(moved), "model": "artifact:lora", "name": "next"}
    next_one = life.command(write(home, again))
    assert next_one.verify().base.reference == ".../model"
    assert told(moved) == []


def test_a_base_is_found_where_it_was_beside_the_run_or_where_it_was_seen_last(
    lora, tmp_path, monkeypatch
):
    """By its content: another model in one of these places is none."""
    home, artifact = of(lora, tmp_path, monkeypatch)
    use = Use("model", ("adapter",))

    def base(run):
        return resolve("artifact:lora", use, run).base

    config = json.loads((artifact.model / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ".../model"
    assert artifact.manifest().base.folder == "../../../tiny/model"

    together = home.rename(tmp_path / "together")  # seen from the adapter it is where it was
    run = together / "runs" / "x"
    assert base(run).folder == together / "tiny" / "model"
    alone = run.rename(tmp_path / "alone")
    with pytest.raises(UserError, match=r"\.\.\./model: lies neither where it was") as refused:
        base(alone)
    assert refused.value.code == 3 and f"{tmp_path}/model" in refused.value.message
    identity = Artifact(alone / "lora").manifest().base.identity
    note(identity, together / "tiny" / "model")
    assert base(alone).folder == together / "tiny" / "model"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "model").symlink_to(together / "tiny" / "model")
    assert base(alone).folder == tmp_path / "model"
    (tmp_path / "model").unlink()
    shutil.copytree(together / "tiny" / "model", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"base \.\.\./model is not the one it was trained on"):
        base(alone)


def test_a_base_that_was_named_from_the_current_folder_is_found_from_another(tmp_path, monkeypatch):
    home = begin(tmp_path, monkeypatch)
    monkeypatch.chdir(home)
    recipe = recipes(home)["lora"] | {"model": "./tiny/model", "run": "runs/x"}
    artifact = Artifact(home / "runs" / "x" / "lora")
    life.command(write(home, recipe))
    assert artifact.manifest().base.reference == "./tiny/model"
    use = Use("chat", ("adapter",))
    monkeypatch.chdir(tmp_path)
    assert resolve(str(artifact.path), use, Path()).base.folder == home / "tiny" / "model"
    (tmp_path / "tiny").mkdir()  # another one of that name is none
    shutil.copytree(home / "tiny" / "model", tmp_path / "tiny" / "model")
    (tmp_path / "tiny" / "model" / "generation_config.json").write_text("{}")
    assert resolve(str(artifact.path), use, Path()).base.folder == home / "tiny" / "model"
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"base of lora: \./tiny/model: no such file or folder"):
        resolve(str(artifact.path), use, Path())


def test_one_that_holds_paths_in_full_is_skipped_and_started_from(
    lora, tmp_path, monkeypatch, capsys
):
    """As older code left it, and as it is still where the machine is the same."""
    home, artifact = of(lora, tmp_path, monkeypatch)
    recipe, model = recipes(home)["lora"], f"{home}/tiny/model"
    document = artifact.document()
    asked = document["asked"]["recipe"]
    asked["model"] = document["models"]["model"]["reference"] = model
    document["base"] = {**document["base"], "reference": model}
    del document["base"]["folder"]
    asked["data"]["train"][0]["path"] = recipe["data"]["train"][0]["path"]
    asked["data"]["template"] = recipe["data"]["template"]
    document["fingerprint"] = fingerprint(document)
    write_json(artifact.path / "manifest.json", document)
    life.command(write(home, recipe))
    assert "lora: skip: finished" in capsys.readouterr().out
    (made,) = make(home, ["dpo"])
    assert made.verify().base.reference == ".../model"
    assert [line for line in told(artifact.run) if not line.startswith("lora/manifest")] == []


@pytest.mark.parametrize("name", ["lora", life.by_the_dozen("ppo")])
def test_what_is_not_finished_tells_nothing_and_goes_on(tmp_path, monkeypatch, name):
    home = begin(tmp_path, monkeypatch)
    if name == "ppo":
        make(home, ["reward"])
    path = write(home, recipes(home)[name], optim__steps=4)
    hook = "ppo_kill_after_2" if name == "ppo" else "kill_in_save_2"
    assert life.Trial(path, hook=hook).wait() == -signal.SIGKILL
    run = home / "runs" / "x"
    assert (run / name / "plan.json").exists() and told(run) == []
    saved = list(run.glob("*/checkpoints/.step-2.staging/*/training_args.bin"))
    assert len(saved) == (name != "ppo"), "nothing was being saved"
    assert life.command(path).verify().training.exact_resume
    assert told(run) == []


def test_what_fails_says_where_and_keeps_no_path(tmp_path, monkeypatch):
    """The person reads the whole path; outcome.json and log.txt, which travel, do not hold it."""
    home = begin(tmp_path, monkeypatch)
    bad = home / "bad.jsonl"
    bad.write_text('{"messages": 3}\n' * 40)
    path = write(home, recipes(home)["sft"], data__train=[{"path": str(bad)}])
    with pytest.raises(UserError) as refused:
        life.command(path)
    assert f"{bad}:1" in refused.value.message
    run = home / "runs" / "x"
    assert ".../bad.jsonl:1" in (run / "sft" / "outcome.json").read_text()
    assert told(run) == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.faults
def test_a_bug_is_kept_without_paths(tmp_path, monkeypatch, processes):
    """Tracebacks of workers, and of a launcher between."""
    home = begin(tmp_path, monkeypatch)
    (home / "breaks.py").write_text(
        "def breaks(prompts, completions, **columns):\n    raise BaseException(__file__)\n"
    )
    recipe = recipes(home)["ppo"] | {"reward": [{"function": f"{home}/breaks.py:breaks"}]}
    path = write(home, recipe, launch__processes=processes, log__trackers=[])
    code, out = test_processes.run([*test_processes.PYTHON, "ppo", str(path)], Path.cwd())
    assert code not in (0, 75), out
    assert "Traceback" in (home / "runs" / "x" / "ppo" / "log.txt").read_text() + out
    assert told(home / "runs" / "x") == []
