"""Push of exports: formats of a model as the Hub's users expect them, with a card that has the
numbers of exports.jsonl."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from llmpipe.files.tables import sha256_file, table
from llmpipe.run.artifact import Artifact
from llmpipe.run.exports import EXPORTS, read_exports, write_exports
from tests import life, store
from tests.front.test_push import LICENCES, reseal, run_example
from tests.life import TINY
from tests.stand_in import Answer

GGUF = "me/tiny-GGUF"
QUICK = {"optim__steps": 4, "evaluation": {}, "samples": {}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and an adapter, with an export of each."""
    run = tmp_path_factory.mktemp("push-exports") / "run"
    store.made(life.write(run, **QUICK))
    adapter = {"rank": 4, "embeddings": "none"}
    store.made(life.write(run, name="low-rank", adapter=adapter, **QUICK))
    formats = {"merged": ["bf16"], "gguf": ["f16", "q8_0"]}
    rows = [{"path": str(TINY / "rows.jsonl"), "limit": 20}]
    export(run, "export", "artifact:sft", formats, held_out=rows)
    export(run, "small", "artifact:low-rank", {"merged": ["fp32"], "adapter": True})
    return run


def export(run: Path, name: str, model: str, formats: dict, **more) -> Artifact:
    values = {"stage": "export", "run": str(run), "name": name, "model": model, "formats": formats}
    path = run.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | more), encoding="utf-8")
    return store.made(path)


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy to spoil."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, "run")
    return Path("run")


def card(files: dict[str, bytes]) -> tuple[str, ModelCard]:
    text = files["README.md"].decode()
    return text, ModelCard(text)


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading of a card."""
    _, _, section = text.partition(f"\n## {heading}\n")
    table = re.search(r"(?:^\|.*\n)+", section, re.M)[0]
    lines = table.splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# --- GGUF -----------------------------------------------------------------------------------------


def test_gguf_files_go_together_and_the_card_has_the_numbers_of_the_export(hub, run, llmpipe):
    home = run / "export"
    code, out, err = llmpipe("push", home / "gguf-f16", home / "gguf-q8_0", GGUF, *LICENCES)
    assert code == 0, err
    assert "gguf-q8_0: verified, 2 files as in exports.jsonl" in out
    repo = hub.repos[GGUF]
    exports = {one.format: one for one in read_exports(home)}
    for name, numbers in (("gguf-f16", "F16"), ("gguf-q8_0", "Q8_0")):
        content = repo.files[f"tiny-{numbers}.gguf"]
        assert content == (home / name / f"model-{numbers.lower()}.gguf").read_bytes()
    assert repo.large == {"tiny-F16.gguf", "tiny-Q8_0.gguf"} and len(repo.commits) == 2
    records = {f"llmpipe/export/{name}" for name in ("manifest.json", "recipe.yaml", EXPORTS)}
    records |= {f"llmpipe/sft/{name}" for name in ("manifest.json", "recipe.yaml")}
    ollama = {"Modelfile", "template", "params"}
    assert repo.files.keys() == {*records, *ollama, *repo.large, "README.md", ".gitattributes"}
    text, read = card(repo.files)
    assert rows_of(text, "Formats") == [
        [
            f"`{name}`",
            f"`tiny-{tag}.gguf`",
            f"`{tag}`",
            f"{exports[name].size / 1e6:.1f} MB",
            exports[name].reader,
            f"{exports[name].measured.mean_kl:.4g}".replace("-", "−"),
            f"× {exports[name].measured.perplexity_ratio:.4g}",
            f"{exports[name].agreement.equal_answers} of 16",
        ]
        for name, tag in (("gguf-f16", "F16"), ("gguf-q8_0", "Q8_0"))
    ]
    tokens = exports["gguf-f16"].measured.tokens
    assert f"on {tokens:,} tokens of 20 rows of `rows.jsonl`" in text
    assert "Modelfile: " not in text  # nothing to say: the model's own template knows no tools
    data = read.data
    assert (data.library_name, data.pipeline_tag) == ("llama.cpp", "text-generation")
    assert {"gguf", "conversational"} <= set(data.tags) and data.base_model is None
    assert f"llama-cli -hf {GGUF}:Q8_0 --jinja\n" in text
    assert f"ollama run hf.co/{GGUF}:Q8_0\n" in text
    assert "GGUF files of a model, made from model by `sft` and `export`." in text


def test_ollama_gets_what_the_modelfile_says(run, llmpipe):
    home = run / "export"
    code, _, err = llmpipe("push", home / "gguf-q8_0", GGUF, *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    ours = (home / "gguf-q8_0" / "Modelfile").read_text(encoding="utf-8")
    there = Path("shown/Modelfile").read_text(encoding="utf-8")
    assert there == ours.replace("./model-q8_0.gguf", "./tiny-Q8_0.gguf") != ours
    assert f'TEMPLATE """{Path("shown/template").read_text(encoding="utf-8")}"""' in ours
    stops = json.loads(Path("shown/params").read_text(encoding="utf-8"))["stop"]
    assert stops == [json.loads(stop) for stop in re.findall(r"^PARAMETER stop (.*)$", ours, re.M)]
    assert stops == ["<|im_end|>"] and not Path("shown/system").exists()


def test_a_whole_export_of_one_kind_is_pushed_by_its_name(hub, run, llmpipe):
    code, _, err = llmpipe("push", run / "export", GGUF, *LICENCES)
    assert code == 2 and "merged-bf16, gguf-f16, gguf-q8_0: are no one repository" in err
    ways = "push one of: run/export/gguf-f16 run/export/gguf-q8_0; run/export/merged-bf16"
    assert ways in err and not hub.requests
    shutil.rmtree(run / "export" / "merged-bf16")
    write_exports(run / "export", read_exports(run / "export")[1:])
    reseal(Artifact(run / "export"))
    assert llmpipe("push", run / "export", GGUF, *LICENCES)[0] == 0
    assert hub.repos[GGUF].large == {"tiny-F16.gguf", "tiny-Q8_0.gguf"}


def test_a_file_of_another_push_is_named_and_not_mixed(hub, run, llmpipe):
    home = run / "export"
    assert llmpipe("push", home / "gguf-f16", GGUF, *LICENCES)[0] == 0
    code, _, err = llmpipe("push", home / "gguf-q8_0", GGUF, *LICENCES)
    assert code == 2 and "holds files of another model: tiny-F16.gguf" in err
    assert "of one export name every GGUF format at once" in err
    hub.requests.clear()
    assert llmpipe("push", home / "gguf-f16", home / "gguf-q8_0", GGUF, *LICENCES)[0] == 0
    assert len(hub.asked("PUT /storage")) == 1, "f16 was there"
    assert llmpipe("push", home / "merged-bf16", GGUF, *LICENCES)[0] == 2


def test_what_has_arrived_is_not_sent_again(hub, run, llmpipe):
    """Of two large files the second one was refused; no commit names the first."""
    formats = (run / "export" / "gguf-f16", run / "export" / "gguf-q8_0")
    second = sha256_file(formats[1] / "model-q8_0.gguf")
    hub.refuse = lambda it: Answer(403) if it.path.endswith(second) else None
    code, _, err = llmpipe("push", *formats, GGUF, *LICENCES)
    assert code == 2 and "may not write there (HTTP 403)" in err
    assert len(hub.repos[GGUF].commits) == 1 and second not in hub.objects
    hub.refuse = lambda it: None
    arrived = set(hub.objects)
    hub.requests.clear()
    assert llmpipe("push", *formats, GGUF, *LICENCES)[0] == 0
    sent = {one.path.rpartition("/")[2] for one in hub.asked("PUT /storage")}
    assert second in sent and not sent & arrived
    hub.requests.clear()
    code, out, _ = llmpipe("push", *formats, GGUF, *LICENCES)
    assert code == 0 and "nothing to do" in out and not hub.asked("PUT|commit")


def test_what_is_further_away_than_was_accepted_says_so(run, llmpipe):
    """And examples name another one."""
    exports = read_exports(run / "export")
    far = "gguf-q8_0 has a mean KL of 0.3 nats per token, not at most 0.1"
    lines = [json.loads(line) for line in (run / "export" / EXPORTS).read_text().splitlines()]
    assert exports[-1].format == "gguf-q8_0" and not exports[-1].warning
    lines[-1] |= {"warning": far}
    (run / "export" / EXPORTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    reseal(Artifact(run / "export"))
    formats = (run / "export" / "gguf-f16", run / "export" / "gguf-q8_0")
    code, out, err = llmpipe("push", *formats, GGUF, *LICENCES, "--dry-run", "shown")
    assert code == 0 and f"warning: {far}, which the card says" in out, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    shown = far.replace("_", r"\_")
    assert (
        f"- **Further from the model than its recipe accepts**: {shown}." in text
        and "hf.co/me/tiny-GGUF:F16" in text
    )
    assert "FROM ./tiny-F16.gguf" in Path("shown/Modelfile").read_text(encoding="utf-8")


def test_the_example_of_a_gguf_file_runs(run, llmpipe, monkeypatch, capsys):
    pytest.importorskip("llama_cpp", reason="pip install 'llmpipe[gguf]'")
    formats = (run / "export" / "gguf-f16", run / "export" / "gguf-q8_0")
    assert llmpipe("push", *formats, GGUF, *LICENCES, "--dry-run", "shown")[0] == 0
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: f"shown/{name}")
    capsys.readouterr()
    run_example(Path("shown"))
    assert capsys.readouterr().out


# --- folders --------------------------------------------------------------------------------------


def test_a_merged_format_is_a_model_like_any_other(hub, run, llmpipe, capsys):
    """Its example runs; with the repository of what it was made of, the Hub is told of that."""
    assert llmpipe("push", run / "sft", "me/sft", *LICENCES)[0] == 0
    merged = run / "export" / "merged-bf16"
    base = ("--base", "me/sft")
    code, _, err = llmpipe("push", merged, "me/bf16", *LICENCES, *base)
    assert code == 0, err
    files = hub.repos["me/bf16"].files
    text, read = card(files)
    assert (read.data.base_model, read.data.base_model_relation) == ("me/sft", "quantized")
    assert read.data.library_name == "transformers"
    for name, entry in read_exports(run / "export")[0].files.items():
        assert files[name] == (merged / name).read_bytes()
        assert f"| `{name}` | {entry.size:,} | `{entry.sha256}` |" in text
    hub.repos["me/sft"].files["model.safetensors"] = b"another"
    code, _, err = llmpipe("push", merged, "me/bf16", *LICENCES, *base)
    assert code == 3 and "me/sft: has other weights than artifact:sft" in err
    assert llmpipe("push", merged, "me/bf16", *LICENCES, "--dry-run", "me/bf16")[0] == 0
    capsys.readouterr()
    run_example(Path("me/bf16"))
    assert capsys.readouterr().out


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes", "compressed-tensors"])
def test_what_another_package_has_packed_says_who_reads_it(run, llmpipe, method):
    """By config.json, which is all that a loader goes by."""
    home = run / "export"
    path = home / "merged-bf16" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}
    path.write_text(json.dumps(config))
    first, *others = read_exports(home)
    write_exports(home, [replace(first, files=table(path.parent)), *others])
    reseal(Artifact(home))
    code, _, err = llmpipe("push", path.parent, "me/small", *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert f"With transformers and {method}:" in text and method in ModelCard(text).data.tags
    assert "convert_hf_to_gguf" not in text
    is_read = method == "compressed-tensors"
    assert ("vllm serve me/small" in text) == is_read
    assert (f"{method}'s, which llama.cpp does not read; vLLM has not" in text) != is_read


def test_what_vllm_has_read_of_torchao_is_said(run, llmpipe):
    home = run / "export"
    path = home / "merged-bf16" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "torchao"}}
    path.write_text(json.dumps(config))
    first, *others = read_exports(home)
    also = [replace(first.reading, reader="vLLM 0.32.0")]
    write_exports(home, [replace(first, files=table(path.parent), also=also), *others])
    reseal(Artifact(home))
    code, _, err = llmpipe("push", path.parent, "me/small", *LICENCES, "--dry-run", "shown")
    assert code == 0, err
    text = Path("shown/README.md").read_text(encoding="utf-8")
    assert "With vLLM and torchao, which answers" in text and "vllm serve me/small" in text
    assert "has not read" not in text


def test_an_adapter_and_its_sum_name_what_they_were_made_of(hub, run, llmpipe):
    """The base is a model of the Hub, which the adapter names; a sum has two, once the adapter is
    there."""
    commit = "a" * 40
    reference, identity = "org/base@main", {"hub": "org/base@main", "revision": "a" * 40}
    base = {"kind": "hub", "reference": reference, "identity": identity}
    lora = Artifact(run / "low-rank")
    models = {"model": {"reference": reference} | identity}
    fingerprint = reseal(lora, base=base, models=models)
    made_of = {"reference": "artifact:low-rank", "artifact": "low-rank", "merged": True}
    models = {"model": made_of | {"fingerprint": fingerprint}}
    reseal(Artifact(run / "small"), models=models, base=base)
    assert llmpipe("push", run / "small" / "adapter", "me/lora", *LICENCES)[0] == 0
    files = hub.repos["me/lora"].files
    config = json.loads(files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    assert (
        sha256_file(run / "low-rank" / "model" / "adapter_model.safetensors")
        in files["README.md"].decode()
    )
    text, read = card(files)
    assert (read.data.base_model, read.data.base_model_relation) == ("org/base", "adapter")
    assert read.data.library_name == "peft" and "--tokenizer me/lora" in text
    merged = run / "small" / "merged-fp32"
    assert llmpipe("push", merged, "me/sum", *LICENCES)[0] == 0
    _, read = card(hub.repos["me/sum"].files)
    assert (read.data.base_model, read.data.base_model_relation) == ("org/base", "finetune")
    assert llmpipe("push", merged, "me/sum", *LICENCES, "--base", "me/lora")[0] == 0
    _, read = card(hub.repos["me/sum"].files)
    assert read.data.base_model == ["org/base", "me/lora"]
    assert read.data.base_model_relation == "merge"


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gguf-q8_0/model-q8_0.gguf", "gguf-q8_0/Modelfile", EXPORTS])
def test_what_is_damaged_is_refused_before_anything_is_asked(hub, run, llmpipe, name):
    path = run / "export" / name
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    code, _, err = llmpipe("push", run / "export" / "gguf-q8_0", GGUF, *LICENCES)
    assert code == 3 and f"{name}: sha256" in err and not hub.requests


def test_what_is_not_finished_and_what_is_no_format(hub, run, llmpipe):
    home = run / "export"
    code, _, err = llmpipe("push", home / "gguf-q8_0", run / "sft", GGUF, *LICENCES)
    assert code == 2 and "run/sft: is no format of an export" in err
    both = (home / "merged-bf16", run / "small" / "merged-fp32")
    code, _, err = llmpipe("push", *both, GGUF, *LICENCES)
    assert code == 2 and "formats of several exports" in err
    (home / "notes").mkdir()
    code, _, err = llmpipe("push", home / "notes", GGUF, *LICENCES)
    assert code == 2 and "is no format of" in err and "gguf-q8_0" in err
    (home / "manifest.json").unlink()
    for name in (home, home / "gguf-q8_0"):
        code, _, err = llmpipe("push", name, GGUF, *LICENCES)
        assert code == 3 and "not finished" in err
    assert not hub.requests


def test_what_changes_while_it_is_sent_is_not_committed(hub, run, llmpipe):
    def refuse(request):
        if "storage" in request.path:
            (run / "export" / "gguf-q8_0" / "Modelfile").write_text("FROM ./model-q8_0.gguf\n")

    hub.refuse = refuse
    code, _, err = llmpipe("push", run / "export" / "gguf-q8_0", GGUF, *LICENCES)
    assert code == 3 and "gguf-q8_0: was changed since it was verified" in err
    assert len(hub.repos[GGUF].commits) == 1
