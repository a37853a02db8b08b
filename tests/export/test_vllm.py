"""vLLM reads what is exported, and what is not the model is refused by name.

Each test is run with a double for the package, in a Python of its own as vLLM is, and with vLLM
itself where it is installed (`PATH=$PATH:./vllm-env/bin`).
"""

import shutil
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.evaluation.tasks.perplexity import Passage
from llmpipe.export import formats
from llmpipe.export.formats import _yardstick, export_one, formats_of, read_by_vllm
from llmpipe.export.source import load_source
from llmpipe.models.adapters import WEIGHTS
from llmpipe.models.rng import isolated_rng
from llmpipe.run.interpreters import VLLM, python_of
from llmpipe.run.probe import agreement_of
from llmpipe.stages.export import Accept
from tests.export.test_export import change, edit, recipe
from tests.life import TINY

DOUBLE = Path(__file__).parent / "double"
REAL = pytest.mark.skipif(python_of(VLLM) is None, reason="no command vllm on PATH")
PYTHONS = ["double", pytest.param("vLLM", marks=[REAL, pytest.mark.faults])]


@pytest.fixture(scope="module", params=PYTHONS)
def python(request, tmp_path_factory):
    """A Python that has vLLM, or the double."""
    if request.param == "vLLM":
        return python_of(VLLM)
    file = tmp_path_factory.mktemp("python") / "python"
    file.write_text(f'#!/bin/sh\nPYTHONPATH="{DOUBLE}" exec "{sys.executable}" "$@"\n')
    file.chmod(stat.S_IRWXU)
    return str(file)


def wide_heads(folder: Path, **options) -> Path:
    """The tiny model with heads as wide as vLLM's CPU takes them: 32."""
    config = LlamaConfig.from_pretrained(TINY / "model")
    config.head_dim = 32
    config.update(options)
    with isolated_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = config.eos_token_id
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return wide_heads(tmp_path_factory.mktemp("vllm") / "base")


@pytest.fixture(scope="module")
def source(base):
    return load_source(base, None, print)


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory):
    return adapter(tmp_path_factory.mktemp("vllm") / "adapter", base, dora=False)


def adapter(folder: Path, base: Path, *, dora: bool):
    """A random adapter of all linear layers, as PEFT names its tensors."""
    shapes = {
        name.removesuffix(".weight"): weight.shape
        for name, weight in load_file(base / "model.safetensors").items()
        if "_proj" in name
    }
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        if dora:
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(
                rows, generator=draw
            )
        for part, shape in (("A", (4, columns)), ("B", (rows, 4))):
            tensor = torch.randn(shape, generator=draw) * 0.1
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = tensor
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    modules = sorted({name.rpartition(".")[2] for name in shapes})
    LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=modules,
        task_type="CAUSAL_LM",
        use_dora=dora,
        base_model_name_or_path="base",
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    return load_source(folder, base, print)


def read(python, source, home: Path, monkeypatch, damage=None, passages=(), **formats_):
    """What vLLM makes of one format, and what is said; `damage` is done to its folder before."""
    monkeypatch.setattr(formats, "python_of", lambda command: python)
    standard = _yardstick(source, list(passages), not passages, print)
    [form] = formats_of(recipe(**formats_))
    form.write(source, home)
    if damage:
        damage(home)
    lines: list[str] = []
    readings, notes = read_by_vllm(form, source, standard, home, lines.append)
    assert notes == ([] if readings else ["vLLM did not take it"])
    return readings, "\n".join(lines)


def refused(python, source, home, monkeypatch, damage, problem, **formats_):
    with pytest.raises(UserError, match=problem) as caught:
        read(python, source, home, monkeypatch, damage, **formats_)
    assert caught.value.code == INTEGRITY


def test_it_reads_a_model(python, source, tmp_path, monkeypatch):
    [reading], said = read(python, source, tmp_path, monkeypatch, merged=["bf16"])
    assert reading.reader.startswith("vLLM 0.") and not said
    assert reading.measured.tokens > 100 and 0 < reading.measured.mean_kl < 1e-3
    assert reading.agreement.answers == 16 and reading.agreement.equal_answers >= 12


def test_it_applies_an_adapter_whole(python, adapted, tmp_path, monkeypatch):
    [reading], said = read(python, adapted, tmp_path, monkeypatch, adapter=True)
    assert 0 <= reading.measured.mean_kl < 1e-6 and reading.agreement.equal_answers == 16
    assert "all of 28 tensors are in its layers; the base alone is" in said
    assert "rounding may be as well" not in said


def test_an_adapter_that_it_does_not_take_is_no_failure(python, base, tmp_path, monkeypatch):
    """vLLM says so at the first request, unless it is asked before."""
    source = adapter(tmp_path / "dora", base, dora=True)
    home = tmp_path / "written"
    home.mkdir()
    readings, said = read(python, source, home, monkeypatch, adapter=True)
    assert readings == [] and "adapter: vLLM does not read it: " in said and "DoRA" in said


def test_what_fills_the_context_is_cut_or_not_asked(python, source, tmp_path, monkeypatch):
    """vLLM wants room for a token behind all that it reads."""
    sizes = [len(one.tokens) + max(len(one.continuation), 8) for one in source.probe.said]
    context = sorted(sizes)[len(sizes) // 2]
    short = wide_heads(tmp_path / "short", max_position_embeddings=context)
    small = load_source(short, None, print)
    home = tmp_path / "written"
    home.mkdir()
    text = "The answer is simple, and nothing else. " * 40
    row = Passage(id=0, at="rows:1", asks=0, text=text)
    [reading], said = read(python, small, home, monkeypatch, passages=[row], merged=["fp32"])
    filled = sizes.count(context)
    assert reading.agreement.answers == len(small.probe.asked) - filled > 0 < filled
    assert f"vLLM is not asked {filled} of the questions: they fill the context" in said
    tokens = len(small.tokenizer(text)["input_ids"])
    assert tokens > 2 * context and reading.measured.tokens >= tokens - 1
    of_questions = _yardstick(small, [], True, print)
    assert max(len(passage.ids) for passage in of_questions.passages) < context


def test_what_it_takes_and_then_fails_at_is_refused(source, tmp_path, monkeypatch):
    """A process that loads, and ends at the first question."""
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\nread order; echo \'{"name": "vLLM 0.0"}\'; echo Broken. >&2; exit 9\n'
    )
    script.chmod(stat.S_IRWXU)
    problem = r"merged-fp32, vLLM 0.0: it took the folder, and then failed: .* 9: Broken\."
    home = tmp_path / "written"
    home.mkdir()
    refused(str(script), source, home, monkeypatch, None, problem, merged=["fp32"])


OF_A_KILLED_EXPORT = """
import sys
from pathlib import Path
from types import SimpleNamespace
from llmpipe.export.readers.of_vllm import VLLM
said = SimpleNamespace(tokens=[1], continuation=[2])
config = SimpleNamespace(to_dict=dict)
source = SimpleNamespace(
    base=None, probe=SimpleNamespace(said=[said]), model=SimpleNamespace(config=config)
)
VLLM(sys.argv[1], Path("x"), source, None)
"""


@pytest.mark.faults
@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_export_leaves_no_vllm_behind(tmp_path):
    script, pid = tmp_path / "python", tmp_path / "pid"
    script.write_text(f'#!/bin/sh\necho $$ > "{pid}.new"; mv "{pid}.new" "{pid}"; exec sleep 100\n')
    script.chmod(stat.S_IRWXU)
    export = subprocess.Popen([sys.executable, "-c", OF_A_KILLED_EXPORT, str(script)])
    try:
        wait_until(pid.exists, 60)
        loading = Path("/proc", pid.read_text().strip())
        assert loading.exists()
    finally:
        export.kill()
        export.wait()
    wait_until(lambda: not loading.exists() or " Z " in (loading / "stat").read_text(), 10)


def wait_until(done, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.faults
def test_renamed_keys_of_an_adapter_are_refused(python, adapted, tmp_path, monkeypatch):
    """vLLM itself loads them, and answers as the base does."""

    def renamed(tensors):
        return {name.replace(".layers.1.", ".layers.7."): one for name, one in tensors.items()}

    damage = partial(change, name=WEIGHTS, work=renamed)
    problem = "log-probabilities differ by|applied .* of .* numbers of the adapter"
    refused(python, adapted, tmp_path, monkeypatch, damage, problem, adapter=True)


@pytest.mark.faults
def test_an_update_that_the_questions_do_not_show_is_missed_all_the_same(
    python, adapted, tmp_path, monkeypatch
):
    monkeypatch.setattr(formats, "compare", lambda expected, seen, *_: agreement_of(expected, seen))

    def renamed(tensors):
        return {name.replace(".layers.1.", ".layers.7."): one for name, one in tensors.items()}

    damage = partial(change, name=WEIGHTS, work=renamed)
    problem = r"vLLM .* applied .* of .* numbers of the adapter"
    refused(python, adapted, tmp_path, monkeypatch, damage, problem, adapter=True)


@pytest.mark.faults
def test_another_template_is_refused(python, source, tmp_path, monkeypatch):
    def damage(folder):
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))

    problem = r"merged-fp32, vLLM .* writes the question 'one turn' otherwise: from character"
    refused(python, source, tmp_path, monkeypatch, damage, problem, merged=["fp32"])


@pytest.mark.faults
def test_a_lost_end_is_refused(python, source, tmp_path, monkeypatch):
    def damage(folder):
        edit(folder, "generation_config.json", eos_token_id=7)
        edit(folder, "config.json", eos_token_id=7)
        edit(folder, "tokenizer_config.json", eos_token="<|endoftext|>")

    problem = "merged-fp32, vLLM .* does not stop at token 2, which ends an answer"
    refused(python, source, tmp_path, monkeypatch, damage, problem, merged=["fp32"])


@pytest.mark.faults
def test_a_model_that_it_does_not_take_is_no_failure(python, tmp_path, monkeypatch):
    """It is published, with a note that names no place of this machine."""
    monkeypatch.setattr(formats, "python_of", lambda command: python)
    source = load_source(TINY / "model", None, print)
    standard = _yardstick(source, [], True, print)
    [form] = formats_of(recipe(merged=["fp32"]))
    lines: list[str] = []
    export = export_one(form, source, standard, tmp_path, Accept(), lines.append)
    assert export.also == [] and export.notes[-1] == "vLLM did not take it"
    assert (tmp_path / "merged-fp32" / "model.safetensors").exists()
    [said] = [line for line in lines if line.startswith("merged-fp32: vLLM does not read it: ")]
    assert "16" in said and "head" in said.lower()
