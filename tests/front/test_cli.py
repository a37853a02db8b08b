"""The front door: commands as a user types them, what they print, and the exit code."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import yaml

from llmpipe.front import cli
from llmpipe.run.artifact import Artifact
from tests import life, store, test_secrets


def shell(*arguments, cwd=life.ROOT, **environment):
    """`python -m llmpipe ARGS` as a process of its own."""
    command = [sys.executable, "-m", "llmpipe", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(life.ROOT), **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )


def test_help_names_every_command(llmpipe):
    code, out, _ = llmpipe("--help")
    assert code == 0
    for name in ("sft", "run", "prepare", "show", "schema", "init"):
        assert f"\n  {name} " in out


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["sft", "bad.yaml"], 2),
        (["show", "nowhere"], 2),
        (["verify", str(life.ROOT / "tests" / "fixtures" / "run-0.1" / "run")], 0),
    ],
)
def test_no_torch_in_the_front_door(tmp_path, arguments, code):
    (tmp_path / "bad.yaml").write_text(
        "stage: sft\nrun: r\nmodel: m\noptim: {learning_rte: 1e-5}\n"
    )
    probe = (
        "import sys; sys.argv = ['llmpipe', *sys.argv[1:]]\n"
        "from llmpipe.front.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code or 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(life.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_usage_errors(llmpipe):
    assert llmpipe("sfft")[0] == 2
    assert llmpipe("sft", "--nope")[0] == 2
    code, _, err = llmpipe("sft", "no/such.yaml")
    assert code == 2 and "no/such.yaml: no such recipe" in err
    code, _, err = llmpipe("schema", "stf")
    assert code == 2 and "did you mean 'sft'?" in err


def test_no_recipe_named(llmpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "there is no recipes/sft.yaml here" in llmpipe("sft")[2]
    (tmp_path / "recipes").mkdir()
    life.write(tmp_path / "run", optim__steps=1).rename(tmp_path / "recipes" / "sft.yaml")
    code, out, _ = llmpipe("sft", "--run", "elsewhere")
    assert code == 0 and "no recipe named: using recipes/sft.yaml" in out
    assert Artifact(tmp_path / "elsewhere" / "sft").finished


def test_schema_documents_every_field(llmpipe):
    schema = json.loads(llmpipe("schema", "sft")[1])
    for section in [schema, *schema["$defs"].values()]:
        for name, field in section["properties"].items():
            assert field.get("description"), name


def test_init_writes_a_recipe_that_validates_and_never_overwrites(llmpipe, tmp_path, monkeypatch):
    code, out, _ = llmpipe("init", tmp_path / "first")
    assert code == 0 and "sft.yaml" in out
    monkeypatch.chdir(tmp_path / "first")
    code, out, err = llmpipe(
        "sft", "sft.yaml", "--set", f"model={life.TINY / 'model'}", "--set", "optim.steps=1"
    )
    assert code == 0, err
    code, _, err = llmpipe("init", tmp_path / "first")
    assert code == 2 and "is there already" in err


def pipeline(tmp_path):
    """Two stages, the second on top of the first."""
    first, second = (life.recipe(tmp_path / "run", optim__steps=n, samples={}) for n in (3, 2))
    second |= {"name": "again", "model": "artifact:sft"}
    for stage in (first, second):
        del stage["run"]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "stages": [first, second]}))
    return path


def test_a_pipeline_skips_what_is_finished_and_makes_the_rest(llmpipe, tmp_path):
    path = pipeline(tmp_path)
    code, out, err = llmpipe("run", path)
    assert code == 0, err
    first, again = (
        Artifact(tmp_path / "run" / "sft").verify(),
        Artifact(tmp_path / "run" / "again").verify(),
    )
    assert again.parents[0].fingerprint == first.fingerprint
    assert again.final["eval_loss_before"] == pytest.approx(first.final["eval_loss"], abs=1e-6)
    code, out, _ = llmpipe("run", path)
    assert code == 0 and out.count("skip: finished") == 2
    code, out, err = llmpipe("run", path, "--set", "stages.1.optim.epochs=3")
    assert code == 3 and "optim.epochs: 1.0 there, 3.0 now" in err

    code, out, _ = llmpipe("show", tmp_path / "run")
    assert code == 0 and out.index("run/sft\n") < out.index("run/again\n")
    assert (
        "rows       72 read; 65 to train on, 7 held out" in out
        and "from       sft (" in out
        and "held out" in out
    )


def test_show_says_what_is_not_finished_or_damaged(llmpipe, tmp_path):
    path = life.write(tmp_path / "run", optim__steps=2, samples={})
    assert llmpipe("prepare", path)[0] == 0
    assert "not finished, no checkpoint yet" in llmpipe("show", tmp_path / "run")[1]
    assert llmpipe("sft", path)[0] == 0
    manifest = tmp_path / "run" / "sft" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"kind": "model"', '"kind": "muddle"'))
    assert "DAMAGED" in llmpipe("show", tmp_path / "run")[1]
    code, _, err = llmpipe("sft", path)
    assert code == 3 and "manifest.json: the manifest was changed or damaged" in err


def test_prepare_makes_the_rows_and_nothing_else(llmpipe, tmp_path):
    path = life.write(tmp_path / "run")
    code, _, err = llmpipe("prepare", path)
    assert code == 0, err
    artifact = Artifact(tmp_path / "run" / "sft")
    assert json.loads((artifact.path / "prepared.json").read_text())["rows"]["read"] == 72
    assert not artifact.checkpoints.exists() and not artifact.model.exists()
    assert "cached" in llmpipe("sft", path, "--set", "optim.steps=1")[1]


def test_offline_a_missing_model_fails_at_once(tmp_path):
    """R14: exit 2 in under two seconds, in one line and a hint."""
    path = life.write(tmp_path / "run", model="nobody/nothing-at-all")
    begun = time.monotonic()
    done = shell("sft", path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    assert time.monotonic() - begun < 4  # the bound is two; a loaded machine gets twice that
    assert done.returncode == 2, done.stderr
    assert "the Hub cannot be reached and the model is not in the local cache" in done.stderr
    assert "Traceback" not in done.stderr and "run.yaml:17: model: " in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}', "auto_map"),
        (
            "config.json",
            '{"model_type": "llama", "_attn_implementation": "evil/repo"}',
            "attention implementation",
        ),
        (
            "model.safetensors.index.json",
            '{"weight_map": {"a": "../secret.safetensors"}}',
            "outside the folder",
        ),
        ("modeling.py", "print('hello')", "code in a model folder"),
        ("model.safetensors", None, "no safetensors weights"),
        ("config.json", "not json", "no readable config.json"),
    ],
)
def test_hostile_model_folders_are_refused(llmpipe, tmp_path, file, content, message):
    """R16, what can be told before any library opens the folder."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(life.TINY / "model", folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    code, _, err = llmpipe("sft", life.write(tmp_path / "run", model=str(folder)))
    assert code in (2, 3) and message in err, err


def test_a_mistake_does_not_say_what_was_typed(llmpipe, tmp_path):
    path, looks = life.write(tmp_path / "run"), test_secrets.LOOK
    for item in (
        f"optim.steps={looks['hf']}",
        f"trainer.api_key={test_secrets.RANDOM}",
        f"model={looks['query']}",
    ):
        for flags in ((), ("--debug",)):
            code, out, err = llmpipe("sft", path, "--set", item, *flags)
            assert code == 2 and test_secrets.RANDOM not in out + err and "[redacted]" in err, err


def test_no_secret_reaches_the_run_directory(tmp_path, monkeypatch):
    """R15: canaries in the environment, no byte of them in any file."""
    canaries = {
        name: f"canary-{name}-8f3a"
        for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    }
    for name, value in canaries.items():
        monkeypatch.setenv(name, value)
    artifact = life.command(life.write(tmp_path / "run", optim__steps=1))
    for path in artifact.run.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not any(value.encode() in data for value in canaries.values()), path
    published = {p.suffix for p in artifact.model.iterdir()}
    assert published <= {".json", ".safetensors", ".jinja"}  # R17


def test_batch_that_does_not_divide_is_refused_with_both_numbers(llmpipe, tmp_path):
    path = life.write(tmp_path / "run", optim__batch_size=6, launch__micro_batch_size=4)
    code, _, err = llmpipe("sft", path)
    assert (
        code == 2
        and "optim.batch_size (6) must be a multiple of launch.micro_batch_size (4)" in err
    )


def test_a_hub_snapshot_is_made_of_links(tmp_path):
    """The Hub's cache links into its blobs: these links are followed, others are not."""
    from llmpipe.errors import UserError
    from llmpipe.run.folders import check_folder

    home = tmp_path / "models--me--tiny"
    blobs, snapshot = home / "blobs", home / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (life.TINY / "model").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_folder(snapshot, home)
    with pytest.raises(UserError, match="a link in a model folder"):
        check_folder(snapshot)
    (tmp_path / "secret").write_text("s")
    (snapshot / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="a link in a model folder"):
        check_folder(snapshot, home)


def test_question_and_answer_in_a_csv_become_turns_of_the_template(llmpipe, tmp_path):
    rows = tmp_path / "capitals.csv"
    rows.write_text(
        "question,answer\n"
        "What is the capital of Peru?,Lima.\n"
        "What is the capital of Ghana?,Accra.\n"
    )
    data = {"train": [{"path": str(rows)}], "max_length": 64}
    path = life.write(tmp_path / "run", data=data, evaluation={})
    assert llmpipe("prepare", path)[0] == 0
    from datasets import Dataset
    from tokenizers import Tokenizer

    folder = next((tmp_path / "run" / ".prepared").glob("*/prepared.json")).parent
    [packed] = Dataset.from_file(str(folder / "train.arrow"))
    text = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).decode(
        packed["input_ids"], False
    )
    asked = "<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n"
    assert f"{asked}<|im_start|>assistant\nLima.<|im_end|>" in text


def test_a_changed_template_file_is_another_recipe(llmpipe, tmp_path):
    template = tmp_path / "mine.j2"
    template.write_text((life.TINY / "model" / "chat_template.jinja").read_text())
    path = life.write(tmp_path / "run", data__template=str(template), optim__steps=1, samples={})
    assert llmpipe("sft", path)[0] == 0
    template.write_text(template.read_text() + "{# changed #}")
    code, _, err = llmpipe("sft", path)
    assert code == 3 and "mine.j2" in err


def test_fresh_refuses_before_it_moves_anything(llmpipe, tmp_path):
    path = life.write(tmp_path / "run", optim__steps=1, samples={})
    assert llmpipe("sft", path)[0] == 0
    assert llmpipe("sft", path, "--fresh", "--set", "model=./nowhere")[0] == 2
    assert Artifact(tmp_path / "run" / "sft").finished


@pytest.mark.parametrize("where", ["/proc/run", "/sys/run", "file/run", "file", "n" * 300])
def test_a_run_that_cannot_be_made_is_said_by_every_command(llmpipe, tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    path = life.write(tmp_path / "run")
    for command in ("sft", "prepare", "run"):
        asked = pipeline(tmp_path) if command == "run" else path
        code, out, err = llmpipe(command, asked, "--run", where)
        assert code == 5 and out == "", err
        assert err.startswith(f"error: {where}: cannot be made: ") and len(err.splitlines()) == 2
    code, _, err = llmpipe("init", f"{where}/new")
    assert code == 5 and err.startswith("error: ") and len(err.splitlines()) == 2


def test_a_home_in_the_name_of_a_run(llmpipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = life.write(tmp_path / "run", optim__steps=1, evaluation={}, samples={})
    assert llmpipe("sft", path, "--set", "run=~/runs/x")[0] == 0
    assert Artifact(tmp_path / "home" / "runs" / "x" / "sft").finished


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("a/b/c", "is no Hub id"),
        ("https://huggingface.co/a/b", "write a/b"),
        ("my model", "is no Hub id"),
        ("artifact:sft", "give its path, such as runs/NAME/sft"),
        ("run", "is a run, not a model\n  name an artifact of it: "),
        ("run/sft", "is not finished"),
        ("n" * 300, "is no Hub id"),
    ],
)
def test_chat_says_what_is_no_model(llmpipe, tmp_path, monkeypatch, reference, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "sft" / "model").mkdir(parents=True)
    (tmp_path / "run" / "sft" / "recipe.yaml").write_text("stage: sft")
    code, _, err = llmpipe("chat", reference)
    assert code == 2 and err.startswith("error: chat: ") and words in err
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("command", ["sft", "run", "prepare"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such recipe"),
        (b"", "the file is empty"),
        (b"stage: caf\xe9", "not UTF-8"),
        (bytes(range(256)), "not UTF-8"),
        (b"- 1", "a recipe is a mapping|a pipeline has"),
        ("folder", "cannot be read: Is a directory"),
        (b"run: x", "required, but missing|a pipeline has"),
        (b"stage: sfft\nrun: x", "did you mean 'sft'|a pipeline has"),
    ],
)
def test_a_recipe_that_is_none(llmpipe, tmp_path, command, content, words):
    path = tmp_path / "r.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    code, out, err = llmpipe(command, path)
    assert (code, out) == (2, "") and "r.yaml:" in err.splitlines()[0]
    assert re.search(words, err), err


@pytest.mark.parametrize("command", ["show", "report"])
@pytest.mark.parametrize("what", ["nowhere", "file", "folder", "n" * 300])
def test_what_is_no_run(llmpipe, tmp_path, monkeypatch, command, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    code, out, err = llmpipe(command, what)
    assert (code, out) == (2, "") and err.startswith(f"error: {what}: ")
    assert len(err.splitlines()) == 2


PIPE = "run: runs/a\nstages:\n- {stage: sft, model: ./m, optim: {learning_rate: 1}, data: "
PIPE += "{train: [{path: ./d.jsonl}]}}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "launch.threads=1"], "say of which one: --set sft.launch.threads=1"),
        (["--set", "sft.data.train.\u00b2.path=x"], "data.train.0 to"),
        (["--set", "stages.\u00b2.run=x"], "stages.0 to stages.0"),
        (["--set", f"sft.data.train.{'9' * 5000}.path=x"], "is a list"),
        (["--set", f"sft.name=a:{'9' * 5000}"], "name: String should"),
        (["--set", "sft.\udcff=x"], "argument 4 is not UTF-8 text"),
        (["--run", "runs/\udcff"], "argument 4 is not UTF-8 text"),
        (["--run", "runs/\ud83d"], "argument 4 is not UTF-8 text"),
        (["--set", "sft.model=artifact:sft@" + "1" * 5000], "is not artifact:NAME"),
        (["--set", 'sft.name="\\ud83d"'], "half a surrogate pair"),
        (["--run", "runs/\U0001f642"], "no such file"),
        (["--run", "runs/\x7f"], "."),
    ],
)
def test_arguments_that_are_wrong(llmpipe, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.yaml").write_text(PIPE)
    code, out, err = llmpipe("run", "p.yaml", *arguments)
    assert (code, out) == (2, "")
    assert re.search(words, err), err


def test_a_name_that_the_terminals_encoding_cannot_hold(tmp_path):
    (tmp_path / "食谱.yaml").write_text("stage: sft")
    code = "from llmpipe.front.cli import main; main()"
    command = [sys.executable, "-c", code, "sft", "食谱.yaml"]
    plain = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for encoding, said in (("0", "PYTHONUTF8=1 llmpipe"), ("1", "required, but missing")):
        ended = subprocess.run(
            command,
            cwd=tmp_path,
            env=plain | {"PYTHONUTF8": encoding},
            capture_output=True,
            check=False,
        )
        assert ended.returncode == 2
        assert said in ended.stderr.decode(errors="replace")


def test_a_recipe_whose_name_is_no_text(llmpipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r\udcff.yaml").write_text(PIPE)
    code, _, err = llmpipe("run", "r\udcff.yaml")
    assert code == 2 and "argument 2 is not UTF-8 text: 'r\\udcff.yaml'" in err


def test_verify(llmpipe, capsys, tmp_path):
    """What differs is printed; how much of it, and what to do, is the error."""
    run = store.made(life.write(tmp_path / "run")).run
    capsys.readouterr()  # what was said while it was made
    code, out, err = llmpipe("verify", run)
    assert code == 0 and "all as recorded" in out and not err
    (run / "sft" / "recipe.yaml").write_text("x")
    code, out, err = llmpipe("verify", run)
    assert code == 3
    assert f"{run}/sft/recipe.yaml: 1 bytes, recorded" in out
    assert err.startswith(f"error: {run}: 1 difference in ")
    assert llmpipe("verify", run / "nothing")[0] == 2


def test_ctrl_c_before_any_work_is_told_by_the_code(llmpipe, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make", interrupted)
    assert llmpipe("sft", life.write(tmp_path / "run"))[0] == 130
