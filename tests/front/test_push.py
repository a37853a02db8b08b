"""Push: to a stand-in of the Hub's interface, with a card whose numbers are the manifests'."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import gguf
import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from llmpipe.errors import UserError
from llmpipe.files.json import digest, write_json
from llmpipe.files.tables import sha256_file, table
from llmpipe.front.push import hub as sending
from llmpipe.front.push.refusals import asking
from llmpipe.run.artifact import SCRATCH, Artifact
from llmpipe.sums import fingerprint
from tests import life, store
from tests.stand_in import TOKEN, Answer, Hub, environment, git_sha1
from tests.training import test_preference

OLD = life.ROOT / "tests" / "fixtures" / "run-0.1" / "run"
LICENCES = ("--license", "mit", "--data-license", "cc-by-4.0")
MODEL = "me/tiny"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a tiny model and its evaluation."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(OLD, tmp_path / "run", ignore=shutil.ignore_patterns("ppo", "lora"))
    return Path("run")


def reseal(artifact: Artifact, **changes) -> str:
    """Give an artifact a manifest that says what lies there, with `changes`; its fingerprint."""
    document = json.loads((artifact.path / "manifest.json").read_text(encoding="utf-8"))
    skip = SCRATCH | {"checkpoints"}
    files = {name: asdict(entry) for name, entry in table(artifact.path, skip).items()}
    document |= {"files": files} | changes
    document["fingerprint"] = fingerprint(document)
    write_json(artifact.path / "manifest.json", document)
    return document["fingerprint"]


def remeasure(run: Path, **models) -> dict:
    """Other numbers for the evaluation, and other models; its results."""
    evaluation = Artifact(run / "eval")
    path = evaluation.path / "results.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    task = results["tasks"]["generate"]
    cells, differences = task["metrics"]["exact_match"], task["differences"]["exact_match"]
    cells["sft"] |= {"value": 0.4166666666666667, "low": 0.19332550321467, "high": 0.6804931123}
    differences["sft - base"] |= {"value": 0.4166666666666667, "low": 0.1377, "high": 0.695611}
    write_json(path, results)
    document = json.loads((evaluation.path / "manifest.json").read_text(encoding="utf-8"))
    reseal(evaluation, models=document["models"] | models)
    return results


def make_adapter(run: Path, name: str, base: dict, named: str) -> Artifact:
    """An adapter of the run, as far as its files and its manifest go."""
    artifact = Artifact(run / name)
    shutil.copytree(run / "sft", artifact.path)
    (artifact.model / "model.safetensors").rename(artifact.model / "adapter_model.safetensors")
    config = {"base_model_name_or_path": named, "revision": None, "r": 32, "peft_type": "LORA"}
    write_json(artifact.model / "adapter_config.json", config)
    reseal(artifact, name=name, kind="adapter", stage="lora", base=base)
    return artifact


def metadata(card: bytes | str) -> ModelCard:
    text = card if isinstance(card, str) else card.decode()
    return ModelCard(text)


# --- what is pushed -------------------------------------------------------------------------------


def test_files_and_card_are_what_the_manifest_says(hub, run, llmpipe):
    code, out, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0, err
    manifest = Artifact(run / "sft").manifest()
    repo = hub.repos[MODEL]
    pushed = {name: hashlib.sha256(content).hexdigest() for name, content in repo.files.items()}
    of_model = {
        name.removeprefix("model/"): entry.sha256
        for name, entry in manifest.files.items()
        if name.startswith("model/")
    }
    records = {
        f"llmpipe/{artifact}/{name}": hashlib.sha256(
            (run / artifact / name).read_bytes()
        ).hexdigest()
        for artifact, names in {
            "sft": ("manifest.json", "recipe.yaml"),
            "eval": ("manifest.json", "recipe.yaml", "results.json"),
        }.items()
        for name in names
    }
    assert pushed.items() >= (of_model | records).items()
    assert pushed.keys() == {*of_model, *records, "README.md", ".gitattributes"}
    assert repo.large == {"model.safetensors"} and len(repo.commits) == 2
    card = repo.files["README.md"].decode()
    for name, sha256 in of_model.items():
        assert f"| `{name}` | {manifest.files[f'model/{name}'].size:,} | `{sha256}` |" in card
    (source,) = manifest.data.sources
    assert source["files"][0]["sha256"] in card
    assert f"| `{source['path']}` | `sft` | 72 | 72 | 0 | 0 | cc-by-4.0 (said by" in card
    assert f"`{manifest.base.identity['files']}`" in card and manifest.tokenizer.template in card
    assert f"{manifest.seconds:,.4g}" in card and "Energy was not measured" in card
    assert "seen by you" in out


def test_private_unless_it_is_said(hub, run, llmpipe):
    assert llmpipe("push", run / "sft", MODEL, *LICENCES)[0] == 0
    assert hub.repos[MODEL].private
    code, out, _ = llmpipe("push", run / "sft", MODEL, *LICENCES, "--public")
    assert code == 0 and "nothing to do" in out and "everybody" in out
    assert not hub.repos[MODEL].private
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 2 and "is there already, and public" in err and "--public" in err
    assert llmpipe("push", run / "sft", "me/open", *LICENCES, "--public")[0] == 0
    assert not hub.repos["me/open"].private


def test_the_numbers_are_the_evaluations(hub, run, llmpipe):
    results = remeasure(run)["tasks"]["generate"]
    assert llmpipe("push", run / "sft", MODEL, *LICENCES)[0] == 0
    text = hub.repos[MODEL].files["README.md"].decode()
    data = metadata(text).data
    (result,) = data.eval_results
    cell = results["metrics"]["exact_match"]["sft"]
    assert (result.metric_type, result.metric_value) == ("exact_match", cell["value"])
    bounds = {name: cell[name] for name in ("low", "high", "n")}
    assert result.metric_args == bounds | {"asked_in_training": 11}
    assert data.license == "mit" and data.pipeline_tag == "text-generation"
    assert "| **sft** | 0.4167 | 0.1933 to 0.6805 | 12 |" in text
    assert "| base | 0 | 0 to 0.2425 | 12 |" in text
    assert "| sft − base | +0.4167 | +0.1377 to +0.6956 | 12 | better |" in text
    assert "Asked in training, too, were 11 of 12 items of `generate`." in text


def test_two_evaluations_keep_their_numbers_apart(run, llmpipe):
    shutil.copytree(run / "eval", run / "again")
    reseal(Artifact(run / "again"), name="again")
    remeasure(run)
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    results = {one.metric_name: one for one in metadata(text).data.eval_results}
    measured = {name: (one.dataset_type, one.metric_value) for name, one in results.items()}
    assert measured == {
        "exact match (eval)": ("llmpipe-eval-generate", 0.4166666666666667),
        "exact match (again)": ("llmpipe-again-generate", 0.0),
    }
    assert "### eval" in text and "### again" in text
    assert Path("shown/llmpipe/again/results.json").exists()


def test_an_evaluation_of_what_it_was_before_is_left_out(hub, run, llmpipe):
    reseal(Artifact(run / "sft"), seed=43)
    code, out, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0, err
    assert "measured sft as it was before; not on the card" in out
    card = hub.repos[MODEL].files["README.md"].decode()
    assert "No evaluation of the run measured it." in card and "model-index" not in card


def test_the_card_reads_the_same_tomorrow_and_whatever_files_are_called(run, llmpipe):
    """A date in the template, and a name of rows that holds marks, HTML and bars of a table."""
    sft = Artifact(run / "sft")
    template = "{{ strftime_now('%d %b') }}\r\n{{ messages[0].content }}```<|end|>"
    (sft.model / "chat_template.jinja").write_bytes(template.encode())
    manifest = json.loads((sft.path / "manifest.json").read_text(encoding="utf-8"))
    hostile = "./a|b`c\r\n<b>ü 数据*.jsonl"
    manifest["data"]["sources"][0]["path"] = hostile
    manifest["data"]["sources"][0]["files"][0]["name"] = hostile
    reseal(sft, data=manifest["data"])
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "first")
    assert code == 0, err
    text = Path("first/README.md").read_text(encoding="utf-8")
    assert "%d %b" in text and "\r" not in text and "````text\n" in text
    (row,) = re.findall(r"^\| ``\./a.*$", text, re.M)
    assert len(re.findall(r"(?<!\\)\|", row)) == 8 and "a\\|b`c <b>ü 数据*.jsonl``" in row
    ModelCard(text)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (
            "{{ raise_exception('a system prompt, please') }}",
            "refuses a question that stands alone",
        ),
        ("", "It has none: it goes on with a text."),
    ],
)
def test_a_template_that_writes_no_question(run, llmpipe, template, said):
    sft = Artifact(run / "sft")
    (sft.model / "chat_template.jinja").write_text(template, encoding="utf-8")
    reseal(sft)
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert said in text and ("apply_chat_template" in text) == bool(template)


@pytest.mark.parametrize("thinks", [False, True])
def test_variables_and_thoughts_are_in_every_command(run, llmpipe, thinks):
    """A model is asked as it was trained: with the template's variables, and room to think."""
    sft = Artifact(run / "sft")
    opening = "<think>\n" if thinks else ""
    template = f"{{{{ messages[0].content }}}}<|end|>{opening}"
    (sft.model / "chat_template.jinja").write_text(template, encoding="utf-8")
    asked = json.loads((sft.path / "manifest.json").read_text(encoding="utf-8"))["asked"]
    asked["recipe"]["data"] |= {"chat_template_kwargs": {"enable_thinking": thinks, "name": "it's"}}
    reseal(sft, asked=asked)
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert f'return_dict=True, enable_thinking={thinks}, name="it\'s"\n' in text
    for command in ("vllm serve me/tiny --default-", "llama-cli -m model.gguf --jinja --"):
        (line,) = [line for line in text.splitlines() if line.startswith(command)]
        given = shlex.split(line)[-1]
        assert json.loads(given) == {"enable_thinking": thinks, "name": "it's"}
    assert ('.partition("</think>")' in text) == thinks
    assert f"max_new_tokens={1024 if thinks else 64})" in text
    assert ("begins with a thought" in text) == thinks


def test_no_variable_is_code(run, llmpipe):
    sft = Artifact(run / "sft")
    asked = json.loads((sft.path / "manifest.json").read_text(encoding="utf-8"))["asked"]
    asked["recipe"]["data"] |= {"chat_template_kwargs": {"x=exit(), y": 1}}
    reseal(sft, asked=asked)
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert "return_dict=True, **{'x=exit(), y': 1}\n" in text


def test_the_example_on_the_card_runs(run, llmpipe, capsys):
    """As it stands there, where the repository lies under its name."""
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", MODEL)
    assert code == 0, err
    run_example(Path(MODEL))
    assert capsys.readouterr().out, "an answer, which may be none of twelve steps' learning"


@pytest.mark.faults
def test_the_examples_of_adapters_and_reward_models_run(
    hub, llmpipe, tmp_path, monkeypatch, capsys
):
    """Of an adapter on its base and of a reward model, where each lies under its name."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    store.made(life.write(run))
    adapter = {"adapter": {"rank": 4}, "model": "artifact:sft"}
    store.made(life.write(run, stage="lora", **adapter))
    store.made(test_preference.write(run, "reward"))
    assert llmpipe("push", run / "sft", "me/base", *LICENCES)[0] == 0
    assert llmpipe("push", run / "sft", "me/base", *LICENCES, "--dry-run", "me/base")[0] == 0
    on_base = ("--base", "me/base", "--dry-run", "me/lora")
    assert llmpipe("push", run / "lora", "me/lora", *LICENCES, *on_base)[0] == 0
    dry = ("--dry-run", "me/reward")
    assert llmpipe("push", run / "reward", "me/reward", *LICENCES, *dry)[0] == 0
    run_example(Path("me/lora"))
    assert capsys.readouterr().out
    assert Path("merged/model.safetensors").exists() and Path("merged/tokenizer.json").exists()
    run_example(Path("me/reward"))
    assert float(capsys.readouterr().out)


def run_example(folder: Path) -> None:
    """The Python on a card."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    assert programs
    names: dict = {}
    for program in programs:
        exec(program, names)


# --- again ----------------------------------------------------------------------------------------


def test_twice_is_nothing_to_do(hub, run, llmpipe):
    llmpipe("push", run / "sft", MODEL, *LICENCES)
    hub.requests.clear()
    code, out, _ = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0 and f"{MODEL}: nothing to do: the Hub has all" in out
    assert not hub.asked("PUT|commit|preupload") and len(hub.repos[MODEL].commits) == 2


def test_only_what_changed_is_sent(hub, run, llmpipe):
    llmpipe("push", run / "sft", MODEL, *LICENCES)
    hub.repos[MODEL].files |= {"LICENSE": b"theirs", "llmpipe/old/manifest.json": b"{}"}
    hub.requests.clear()
    code, out, _ = llmpipe("push", run / "sft", MODEL, "--license", "mit", "--data-license", "mit")
    assert code == 0 and "1 file to send" in out, out
    files = hub.repos[MODEL].files
    assert "LICENSE" in files and "llmpipe/old/manifest.json" not in files
    assert b"mit (said by whoever" in files["README.md"] and not hub.asked("PUT /storage")


def test_two_models_are_not_mixed(hub, run, llmpipe):
    llmpipe("push", run / "sft", MODEL, *LICENCES)
    hub.repos[MODEL].files["model-00001-of-00002.safetensors"] = b"another's"
    reseal(Artifact(run / "sft"), seed=43)
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 2 and "files of another model: model-00001-of-00002.safetensors" in err
    assert len(hub.repos[MODEL].commits) == 2


def shell(hub: Hub, run: Path, *arguments, **more) -> subprocess.Popen:
    """`llmpipe push` of sft as a process of its own."""
    command = [sys.executable, "-m", "llmpipe", "push", str(run / "sft"), MODEL, *LICENCES]
    given = os.environ | environment(hub) | {"PYTHONPATH": str(life.ROOT)} | more
    return subprocess.Popen(
        [*command, *arguments],
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("in_parts", [False, life.by_the_dozen(True)])
def test_a_killed_push_goes_on(hub, run, llmpipe, in_parts):
    """Killed once the first of two large files has arrived and the second is under way."""
    second = run / "sft" / "model" / "second.safetensors"
    second.write_bytes(bytes(400_000))
    reseal(Artifact(run / "sft"))
    hub.in_parts = in_parts
    of_second = hashlib.sha256(second.read_bytes()).hexdigest()
    sent, held = threading.Event(), threading.Event()

    def refuse(request):
        last = f"/storage/{of_second}" + ("/3" if in_parts else "")
        if request.path == last and not held.is_set():
            held.wait(30)
            return Answer(500, "nobody is there any more")
        if request.path.endswith("/verify") and of_second not in request.path:
            sent.set()
        return None

    hub.refuse = refuse
    process = shell(hub, run)
    assert sent.wait(30), process.communicate()
    while not hub.asked(f"PUT /storage/{of_second}"):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    held.set()
    (first,) = hub.objects
    assert len(hub.repos[MODEL].commits) == 1, "half of it looks finished"
    hub.requests.clear()
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0, err
    assert not hub.asked(f"PUT /storage/{first}") and hub.asked(f"PUT /storage/{of_second}")
    assert hub.repos[MODEL].files["second.safetensors"] == second.read_bytes()
    assert len(hub.repos[MODEL].commits) == 2


@pytest.mark.faults
def test_killed_anywhere_it_goes_on(hub, run, llmpipe):
    """Whenever it is killed, the repository has nothing of a model or all of it."""
    hub.refuse = lambda request: time.sleep(0.1)
    whole = time.monotonic()
    shell(hub, run).communicate()
    whole = time.monotonic() - whole
    finished = hub.repos.pop(MODEL).files
    dice = random.Random(7)
    for _ in range(20 if life.FULL else 4):
        hub.objects.clear()
        process = shell(hub, run)
        time.sleep(dice.uniform(0.3, 1) * whole)
        process.kill()
        process.communicate()
        time.sleep(0.3)  # what the server was at
        files = hub.repos[MODEL].files if MODEL in hub.repos else {}
        assert len(files) <= 1 or files == finished
        code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
        assert code == 0, err
        assert hub.repos.pop(MODEL).files == finished


def test_two_at_a_time_make_no_mixture(hub, run, llmpipe):
    def refuse(request):
        if "preupload" in request.path and len(hub.repos[MODEL].commits) == 1:
            hub.repos[MODEL].commits.append("Somebody else's")

    hub.refuse = refuse
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 75 and "somebody else writes there meanwhile (HTTP 412)" in err
    assert llmpipe("push", run / "sft", MODEL, *LICENCES)[0] == 0
    assert len(hub.repos[MODEL].commits) == 3


# --- what is refused ------------------------------------------------------------------------------


def test_what_is_damaged_is_refused_before_anything_is_asked(hub, run, llmpipe):
    path = run / "sft" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 3 and "model.safetensors: sha256" in err
    assert not hub.requests


def test_a_damaged_evaluation_is_refused(hub, run, llmpipe):
    (run / "eval" / "results.json").write_text("{}")
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 3 and "eval/results.json" in err and not hub.requests


def test_what_changes_while_it_is_sent_is_not_committed(hub, run, llmpipe):
    def refuse(request):
        if "storage" in request.path:
            (run / "sft" / "model" / "config.json").write_text("{}")

    hub.refuse = refuse
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 3 and "was changed since it was verified; nothing was committed" in err
    assert len(hub.repos[MODEL].commits) == 1


def test_an_unfinished_one_and_others_that_are_none(hub, run, llmpipe, tmp_path):
    code, _, err = llmpipe("push", run / "eval", MODEL, *LICENCES)
    assert code == 2 and "of kind 'evaluation'" in err and "its numbers are on that card" in err
    code, _, err = llmpipe("push", run, MODEL)
    assert code == 2 and "is a run" in err and "run/sft" in err
    code, _, err = llmpipe("push", run / "sft" / "model", MODEL)
    assert code == 2 and "push run/sft instead" in err
    for name, said in {
        "artifact:sft": "such as runs/NAME/sft",
        "nowhere": "no such artifact",
    }.items():
        code, _, err = llmpipe("push", name, MODEL)
        assert code == 2 and said in err
    reseal(Artifact(run / "sft"), kind="dataset")
    code, _, err = llmpipe("push", run / "sft", MODEL)
    assert code == 2 and "of kind 'dataset'" in err
    (run / "sft" / "manifest.json").unlink()
    code, _, err = llmpipe("push", run / "sft", MODEL)
    assert code == 3 and "is not finished" in err
    assert not hub.requests


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("tiny", ""),
        ("me/you/tiny", ""),
        ("https://x.y/z", ""),
        ("me/ti ny", "alphanumeric"),
        ("me/..", "alphanumeric"),
        ("me/ti--ny", "--"),
        ("me/tiny.git", ".git"),
        ("me/" + "tiny" * 25, "maximum length"),
    ],
)
def test_names_that_are_none(hub, run, llmpipe, name, why):
    code, _, err = llmpipe("push", run / "sft", name)
    assert code == 2 and "is no NAMESPACE/NAME" in err and why in err and not hub.requests


def test_a_parent_that_is_not_there_is_missed(hub, run, llmpipe):
    """By its fingerprint: one that was moved aside is found, one that was made anew is not it."""
    parent = Artifact(run / "sft").manifest()
    dpo = Artifact(run / "dpo")
    shutil.copytree(run / "sft", dpo.path)
    models = {"model": {"reference": "artifact:sft", "artifact": "sft"}}
    models["model"]["fingerprint"] = parent.fingerprint
    reseal(dpo, name="dpo", stage="dpo", models=models)
    (run / "sft").rename(run / "sft.old-1")
    code, _, err = llmpipe("push", dpo.path, MODEL, *LICENCES)
    assert code == 0, err
    card = hub.repos[MODEL].files["README.md"].decode()
    assert "made from model by `sft` and `dpo`" in card
    assert "llmpipe/sft/manifest.json" in hub.repos[MODEL].files
    reseal(Artifact(run / "sft.old-1"), seed=43)
    shutil.copytree(run / "sft.old-1", run / "sft")
    code, _, err = llmpipe("push", dpo.path, MODEL, *LICENCES)
    assert code == 3 and f"was made from sft ({parent.fingerprint[:12]})" in err


def test_rows_that_the_run_has_made_need_no_licence(run, llmpipe):
    """They are known by their sum, and what they were made from is asked for as everything is."""
    sample, dpo = Artifact(run / "sample"), Artifact(run / "dpo")
    shutil.copytree(run / "sft", sample.path)
    (sample.path / "rows.jsonl").write_text('{"prompt": "?"}\n', encoding="utf-8")
    fingerprint_of_rows = reseal(sample, name="sample", kind="dataset", stage="sample")
    shutil.copytree(run / "sft", dpo.path)
    rows = {"reference": "artifact:sample", "artifact": "sample"}
    models = {"data.train.0.path": rows | {"fingerprint": fingerprint_of_rows}}
    data = json.loads((dpo.path / "manifest.json").read_text(encoding="utf-8"))["data"]
    sums = sample.manifest().files["rows.jsonl"]
    files = [{"name": "rows.jsonl", "sha256": sums.sha256, "rows": 1}]
    data["sources"][0] |= {"path": "rows.jsonl", "files": files}
    reseal(dpo, name="dpo", stage="dpo", models=models, data=data)
    code, _, err = llmpipe("push", dpo.path, MODEL, "--license", "mit", "--dry-run", "shown")
    assert code == 2 and "of the rows ./recipes/tiny/rows.jsonl, so" in err
    code, _, err = llmpipe("push", dpo.path, MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert "| `artifact:sample` | `dpo` | 72 | 72 | 0 | 0 | made by `sample` from" in text
    assert "| `dpo` | `dpo` | `sample` (data) |" in text


# --- licences -------------------------------------------------------------------------------------


def test_licences_are_asked_for_and_never_invented(hub, run, llmpipe):
    code, _, err = llmpipe("push", run / "sft", MODEL)
    assert code == 2 and not hub.repos
    assert "no licence is recorded of ./recipes/tiny/model, the base, so say it: --license" in err
    assert "rows ./recipes/tiny/rows.jsonl, so say it: --data-license ID" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, "--license", "Apache 2.0")
    assert code == 2 and "did you mean 'apache-2.0'?" in err
    meant = {"cc-by4": "cc-by-4.0", "apache2": "apache-2.0", "llama-3": "llama3"}
    for typo, licence in meant.items():
        code, _, err = llmpipe("push", run / "nowhere", MODEL, "--license", typo)
        assert code == 2 and f"no licence of the Hub's; did you mean '{licence}'?" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--data-license", "rows=mit")
    assert code == 2 and "no rows of that name" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--data-license", "mit")
    assert code == 2 and "of which rows?" in err


def of_hub(run: Path, name: str = "org/base@main") -> str:
    """Let sft be made from a model and rows of the Hub; the base's commit."""
    identity = {"hub": name, "revision": "a" * 40}
    sft = Artifact(run / "sft")
    data = json.loads((sft.path / "manifest.json").read_text(encoding="utf-8"))["data"]
    data["sources"][0] |= {"path": "org/rows", "revision": "b" * 40}
    models = {"model": {"reference": name} | identity}
    reseal(
        sft, models=models, base={"kind": "hub", "reference": name, "identity": identity}, data=data
    )
    return identity["revision"]


def test_what_the_hub_records_is_taken_over(hub, run, llmpipe):
    of_hub(run)
    link = {"license_name": "base-1", "license_link": "https://x.y/z"}
    hub.cards |= {"model:org/base": {"license": "other"} | link, "dataset:org/rows": {}}
    code, _, err = llmpipe("push", run / "sft", MODEL)
    assert code == 2 and "rows org/rows, so say it" in err and "--license" not in err
    hub.cards["dataset:org/rows"] = {"license": ["cc-by-sa-4.0", "mit"]}
    code, out, err = llmpipe("push", run / "sft", MODEL)
    assert code == 0, err
    assert hub.asked("revision/a{40}") and hub.asked("revision/b{40}")
    data = metadata(hub.repos[MODEL].files["README.md"]).data
    assert (data.license, data.license_name, data.license_link) == (
        "other",
        "base-1",
        "https://x.y/z",
    )
    assert (data.base_model, data.datasets) == ("org/base", ["org/rows"])
    assert b"cc-by-sa-4.0 (its card on the Hub)" in hub.repos[MODEL].files["README.md"]
    both = ("--license", "mit", "--data-license", "org/rows=cc0-1.0")
    code, out, _ = llmpipe("push", run / "sft", "me/other", *both)
    assert code == 0 and "warning: the base is under base-1" in out
    said = b"cc0-1.0 (said by whoever pushed it; its card on the Hub says cc-by-sa-4.0)"
    assert said in hub.repos["me/other"].files["README.md"]


def test_a_licence_that_the_hub_does_not_list_is_another_one(hub, run, llmpipe):
    """By its name, as the Hub wants it; and beside one that it lists stands no name."""
    of_hub(run)
    hub.cards |= {"model:org/base": {"license": "qwen"}, "dataset:org/rows": {"license": "mit"}}
    code, out, err = llmpipe("push", run / "sft", MODEL)
    assert code == 0, err
    assert "licence: qwen (its base" in out and "qwen is not on the Hub's list: there it is" in out
    data = metadata(hub.repos[MODEL].files["README.md"]).data
    assert (data.license, data.license_name) == ("other", "qwen")
    hub.cards["model:org/base"] = {"license": "mit", "license_name": "MIT License"}
    assert llmpipe("push", run / "sft", MODEL)[0] == 0
    data = metadata(hub.repos[MODEL].files["README.md"]).data
    assert (data.license, data.license_name) == ("mit", None)


def test_a_card_that_the_hub_refuses_is_refused_before_anything_is_made(hub, run, llmpipe):
    hub.licences -= {"mit"}
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 2 and f'{MODEL}: the Hub refuses the card: "license" must be one of' in err
    assert not hub.repos and not hub.objects and "Traceback" not in err
    assert [one.path for one in hub.requests] == ["/api/validate-yaml"]


def test_a_gguf_file_and_a_folder_say_their_licence(run, llmpipe):
    """Where they are the ones that were trained on."""
    writer = gguf.GGUFWriter(Path("base.gguf"), "llama")
    writer.add_license("other")
    writer.add_license_name("base-1")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    Path("folder").mkdir()
    Path("folder/README.md").write_text("---\r\nlicense: MIT\r\n---\r\n# A model\r\n", newline="")
    of_file, of_folder = Path("base.gguf"), Path("folder")
    kinds = {
        "gguf": ("./base.gguf", sha256_file(of_file), "base-1 (its base: the header of its GGUF"),
        "files": ("./folder", digest(table(of_folder)), "mit (its base: the card in its folder)"),
    }
    for kind, (reference, sha256, said) in kinds.items():
        base = {"kind": "gguf" if kind == "gguf" else "folder", "reference": reference}
        base["identity"] = {kind: sha256}
        models = {"model": {"reference": reference, kind: sha256}}
        reseal(Artifact(run / "sft"), base=base, models=models)
        code, out, err = llmpipe("push", run / "sft", MODEL, *LICENCES[2:], "--dry-run", kind)
        assert code == 0 and f"licence: {said}" in out, err
    of_folder.joinpath("README.md").write_text("---\nlicense: apache-2.0\n---\n")
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES[2:], "--dry-run", "other")
    assert code == 2 and "no licence is recorded of ./folder, the base, so say it" in err
    assert "./folder lies not where it was, so that nothing was read of it" in err


def test_drawn_weights_have_no_base(run, llmpipe):
    reseal(Artifact(run / "sft"), base=None, models={}, stage="pretrain")
    code, _, err = llmpipe("push", run / "sft", MODEL, "--dry-run", "shown")
    assert code == 2 and "of a model whose weights were drawn, so say it: --license" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert "A model, made from weights that were drawn by `pretrain`." in text
    assert "| `sft` | `pretrain` | drawn weights |" in text and "its base" not in text


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_names_a_base_that_others_find(hub, run, llmpipe):
    commit = of_hub(run)
    base = {"kind": "hub", "reference": "org/base@main"}
    base["identity"] = {"hub": "org/base@main", "revision": commit}
    adapter = make_adapter(run, "lora", base, "org/base@main")
    code, out, err = llmpipe("push", adapter.path, MODEL, *LICENCES)
    assert code == 0, err
    assert "adapter_config.json: the base org/base@main is called org/base at aaaaaaaaaaaa" in out
    files = hub.repos[MODEL].files
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert config["r"] == 32
    card = files["README.md"].decode()
    data = metadata(card).data
    assert (data.library_name, data.base_model) == ("peft", "org/base")
    assert data.base_model_relation == "adapter"
    assert hashlib.sha256(files["adapter_config.json"]).hexdigest() in card
    assert f"vllm serve org/base --revision {commit}" in card and "--max-lora-rank 32" in card


def test_a_base_of_this_machine_is_refused_or_proven(hub, run, llmpipe):
    """The Hub's is taken where its weights have the sums of those that it was trained on."""
    sft = Artifact(run / "sft").manifest()
    identity = {"artifact": "sft", "fingerprint": sft.fingerprint}
    base = {"kind": "artifact", "reference": "artifact:sft", "identity": identity}
    adapter = make_adapter(run, "lora", base, "artifact:sft")
    code, _, err = llmpipe("push", adapter.path, MODEL, *LICENCES)
    assert code == 2 and "its base artifact:sft is of this machine" in err and "--base" in err
    assert not hub.requests
    push = ("push", adapter.path, MODEL, *LICENCES, "--base", "me/base")
    code, _, err = llmpipe(*push)
    assert code == 2 and "me/base: not on the Hub" in err
    assert llmpipe("push", run / "sft", "me/base", *LICENCES)[0] == 0
    code, _, err = llmpipe(*push)
    assert code == 0, err
    config = json.loads(hub.repos[MODEL].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/base"
    assert config["revision"] == hub.repos["me/base"].head
    hub.repos["me/base"].files["model.safetensors"] = b"another"
    code, _, err = llmpipe(*push)
    assert code == 3 and "has other weights than artifact:sft" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--base", "me/base")
    assert code == 2 and "is of an adapter, and this is none" in err


def test_a_merged_one_has_the_numbers_of_its_adapter(hub, run, llmpipe):
    base = {"kind": "folder", "reference": "./recipes/tiny/model", "identity": {"files": "0" * 64}}
    adapter = make_adapter(run, "lora", base, "./recipes/tiny/model")
    merged = Artifact(run / "lora-merged")
    shutil.copytree(run / "sft", merged.path)
    reseal(merged, name="lora-merged", stage="lora", base=base, merged_from="lora")
    measured = {"reference": "artifact:lora", "artifact": "lora"}
    measured["fingerprint"] = adapter.manifest().fingerprint
    remeasure(run, **{"models.sft": measured})
    code, _, err = llmpipe("push", adapter.path, MODEL, *LICENCES)
    assert code == 2 and "push run/lora-merged, which holds both" in err
    code, _, err = llmpipe("push", merged.path, MODEL, *LICENCES)
    assert code == 0, err
    card = hub.repos[MODEL].files["README.md"].decode()
    assert "Measured as the adapter `lora`, before it was merged." in card and "0.4167" in card


def test_a_reward_model_scores(run, llmpipe):
    reseal(Artifact(run / "sft"), kind="reward-model", stage="reward")
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert metadata(text).data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification" in text and "vllm serve" not in text


# --- dry run --------------------------------------------------------------------------------------


def test_a_dry_run_writes_what_would_be_pushed(hub, run, llmpipe):
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 0 and not hub.requests, err
    assert llmpipe("push", run / "sft", MODEL, *LICENCES)[0] == 0
    shown = {path: (Path("shown") / path).read_bytes() for path in table(Path("shown"))}
    assert shown == {k: v for k, v in hub.repos[MODEL].files.items() if k != ".gitattributes"}
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 2 and "is there already" in err
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", run / "sft" / "x")
    assert code == 2 and "is in the artifact" in err
    assert Artifact(run / "sft").verify()


# --- the Hub refuses ------------------------------------------------------------------------------

SAID = "me is no friend of yours"


@pytest.mark.parametrize(
    ("path", "status", "code", "hint"),
    [
        ("create", 401, 2, "hf auth login"),
        ("create", 403, 2, "a namespace of your own"),
        ("create", 404, 2, "is me spelled right"),
        life.by_the_dozen("commit", 403, 2, "a namespace of your own"),
        ("commit", 409, 75, "the same command goes on"),
        life.by_the_dozen("commit", 412, 75, "the same command goes on"),
        ("commit", 413, 5, "the storage of your account"),
        ("commit", 429, 75, "wait 120 s"),
        ("storage", 403, 2, "a namespace of your own"),
        ("commit", 500, 75, "the same command goes on"),
        life.by_the_dozen("tree", 400, 2, SAID),
    ],
)
def test_what_the_hub_answers_is_a_line(hub, run, llmpipe, path, status, code, hint):
    """The line has no token, though the answer repeats it."""

    def refuse(request):
        if path in request.path:
            return Answer(status, f"{SAID}, {TOKEN}", (("Retry-After", "120"),))

    hub.refuse = refuse
    ended, out, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert ended == code, err
    assert f"HTTP {status}" in err and SAID in err and hint in err
    assert TOKEN not in out + err and "Traceback" not in err


def test_what_xet_is_answered_is_said_as_well():
    """It knows no responses: the number stands in the text of its errors."""
    told = "Request error: HTTP status client error (403 Forbidden), domain: https://x.y"
    with pytest.raises(UserError) as caught, asking(MODEL, TOKEN):
        raise RuntimeError(told)
    assert caught.value.code == 2 and "may not write there (HTTP 403)" in caught.value.message
    with pytest.raises(RuntimeError, match="a bug"), asking(MODEL, TOKEN):
        raise RuntimeError("a bug of ours")


def test_what_passes_is_waited_for(hub, run, llmpipe, monkeypatch):
    """As the Hub asks; the address of a storage, which is signed, is not said."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    busy = [Answer(503, "slow down"), Answer(429, "later", (("Retry-After", "7"),))]

    def refuse(request):
        return busy.pop() if "storage" in request.path and busy else None

    hub.refuse = refuse
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0 and 8 in slept, err
    assert "the Hub: HTTP Error 429" in err and "s1gned" not in err and "storage" not in err


def test_no_network_and_no_token(hub, run, llmpipe, monkeypatch):
    push = ("push", run / "sft", MODEL, *LICENCES)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Wr0ngToken" * 3)
    code, out, err = llmpipe(*push)
    assert code == 2 and "the Hub does not take the token (HTTP 401)" in err
    assert "Wr0ng" not in out + err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = llmpipe(*push)
    assert code == 2 and "no token of the Hub" in err and "hf auth login" in err
    Path("no-login").write_text(TOKEN)
    code, out, err = llmpipe(*push)
    assert code == 0 and TOKEN not in out + err, err
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = llmpipe(*push)
    assert code == 2 and "HF_HUB_OFFLINE is set" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(sending, "is_reachable", lambda: False)
    code, _, err = llmpipe(*push)
    assert code == 75 and "the Hub cannot be reached" in err
    monkeypatch.setattr(sending, "is_reachable", lambda: True)  # and gone a moment later
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = llmpipe(*push)
    assert code == 75 and "the Hub cannot be reached: [Errno 111]" in err, err


def test_the_token_is_in_nothing(hub, run, llmpipe):
    """Neither in a file of the run or of the repository, nor in what is printed; and the storage,
    which is somebody else's, is not told it."""
    code, out, err = llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert code == 0 and TOKEN not in out + err and not err
    assert not any(TOKEN.encode() in content for content in hub.repos[MODEL].files.values())
    for path in Path().rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert all(one.token is None for one in hub.asked("PUT /storage"))
    assert all(one.token == TOKEN for one in hub.asked("commit|create|batch|preupload"))


def test_the_stand_in_takes_no_other_bytes(hub, run, llmpipe):
    """Or the tests above would prove nothing."""
    llmpipe("push", run / "sft", MODEL, *LICENCES)
    assert git_sha1(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    put = huggingface_hub.get_session().put
    assert put(f"{hub.url}/storage/{'0' * 64}", content=b"other").status_code == 400
    assert put(f"{hub.url}/api/models/{MODEL}/settings", json={}).status_code == 401


# --- from strangers -------------------------------------------------------------------------------


NO_NAME = {"reference": "artifact:x", "artifact": "../x", "fingerprint": "0"}
NO_BASE = {"kind": "hub", "reference": "a b; rm", "identity": {"revision": "a" * 40}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"models": {"model": {"reference": "artifact:x", "artifact": 7}}}, "models: artifact"),
        ({"models": {"model": NO_NAME}}, "was made from ../x"),
        ({"data": {"sources": [{"path": 1}]}}, "data.sources[0].path"),
        ({"base": NO_BASE}, "a b; rm is none of the Hub's"),
    ],
)
def test_what_a_forged_manifest_says_is_held_against_its_type(run, llmpipe, changes, said):
    adapter = make_adapter(run, "lora", {"kind": "gguf", "reference": "x.gguf", "identity": {}}, "")
    document = json.loads((adapter.path / "manifest.json").read_text(encoding="utf-8"))
    if "data" in changes:
        changes = {"data": document["data"] | changes["data"]}
        changes["base"] = {"kind": "hub", "reference": "a/b", "identity": {"revision": "a" * 40}}
    reseal(adapter, **changes)
    code, _, err = llmpipe("push", adapter.path, MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 3 and said in err and "Traceback" not in err, err


def test_an_evaluation_without_results_is_no_evaluation(run, llmpipe):
    (run / "eval" / "results.json").unlink()
    reseal(Artifact(run / "eval"))
    code, _, err = llmpipe("push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 3 and "has no results of sft" in err


def test_a_ring_of_parents_is_refused(run, llmpipe):
    """By a checkpoint, whose sums a forger can write first."""
    sft = Artifact(run / "sft")
    step = sft.checkpoints / "step-12"
    step.mkdir(parents=True)
    sums = {"step": 12, "identity": "0" * 64, "machine": {}, "exact": True, "legs": [], "files": {}}
    write_json(step / "sums.json", sums | {"fingerprint": fingerprint(sums)})
    model = {"reference": "artifact:sft@12", "artifact": "sft", "checkpoint": 12}
    model["fingerprint"] = digest({})
    reseal(sft, models={"model": model})
    code, _, err = llmpipe("push", sft.path, MODEL, *LICENCES, "--dry-run", "shown")
    assert code == 3 and "was made from itself" in err, err


def test_no_torch_to_push(run):
    """Nor any other library that takes seconds, with a card made and a folder written."""
    probe = (
        "import sys; from llmpipe.front.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code or 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets'}\n"
        "print(code, sorted(heavy & set(sys.modules)))\n"
    )
    arguments = ["push", run / "sft", MODEL, *LICENCES, "--dry-run", "shown"]
    given = os.environ | {"PYTHONPATH": str(life.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", probe, *map(str, arguments)],
        env=given,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
