"""An export is what its reader loads: written, read back and held against the model; and what is
not the model is refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from llmpipe.data.train_tokenizer import train_tokenizer
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.export import formats, gguf_file, weight_only
from llmpipe.export.formats import TooFar, export_one, formats_of
from llmpipe.export.measure import of_probe, yardstick
from llmpipe.export.readers.of_transformers import predictions
from llmpipe.export.source import Source, _as_published, load_source
from llmpipe.models.adapters import WEIGHTS
from llmpipe.models.pretrained import load_model
from llmpipe.run.artifact import manifest_beside
from llmpipe.run.exports import EXPORTS, read_exports
from llmpipe.run.probe import agreement_of
from llmpipe.stages.export import Accept, Formats, Schema
from tests import life
from tests.life import TINY
from tests.models.test_publish import a_base

QUICK = {"optim__steps": 4, "evaluation": {}, "samples": {}}
LLAMA_CPP = pytest.mark.skipif(
    not find_spec("llama_cpp"), reason="llama-cpp-python compiles: pip install 'llmpipe[gguf]'"
)
FIRST = re.compile(r"embed|wte|wpe|norm|ln_")
TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="pip install 'llmpipe[torchao]'")


def recipe(**formats_) -> Schema:
    fields = {"run": "runs/x", "model": "artifact:sft", "formats": formats_}
    return Schema.model_validate(fields)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model and an adapter, four steps each."""
    run = tmp_path_factory.mktemp("export") / "run"
    life.command(life.write(run, **QUICK))
    adapter = {"rank": 4, "embeddings": "none"}
    life.command(life.write(run, name="low-rank", adapter=adapter, **QUICK))
    return run


@pytest.fixture(scope="module")
def source(trained):
    return load_source(trained / "sft" / "model", None, print)


@pytest.fixture(scope="module")
def adapted(trained):
    return load_source(trained / "low-rank" / "model", TINY / "model", print)


@pytest.fixture(scope="module")
def standard(source):
    return yardstick(of_probe(source.probe), lambda ids: predictions(source.model, ids))


def exported(source, standard, home: Path, damage=None, accept=None, **formats_):
    """One format; `damage` is done to its folder before it is read back."""
    [form] = formats_of(recipe(**formats_))
    if damage:

        def write(source, folder):
            notes = form.write(source, folder)
            damage(folder)
            return notes

        spoiled = replace(form, write=write)
    else:
        spoiled = form
    return export_one(spoiled, source, standard, home, accept or Accept(), lambda line: None)


# --- a whole command ------------------------------------------------------------------------------


def test_the_tiny_recipe_writes_reads_back_and_is_not_made_twice(trained, capsys):
    values = yaml.safe_load((TINY / "export.yaml").read_text())
    values |= {"run": str(trained), "held_out": [{"path": str(TINY / "rows.jsonl")}]}
    path = trained.parent / "export.yaml"
    path.write_text(yaml.safe_dump(values))
    artifact = life.command(path)
    manifest = artifact.verify()
    assert manifest.kind == "export" and [p.name for p in manifest.parents] == ["sft"]
    exports = read_exports(artifact.path)
    assert [export.format for export in exports] == ["merged-bf16", "gguf-f16", "gguf-q8_0"]
    assert manifest.final.keys() == {"merged-bf16", "gguf-f16", "gguf-q8_0"}
    for export in exports:
        assert export.tensors == 20 and export.measured.tokens > 300
        assert export.lossless == (export.format != "gguf-q8_0")
        assert export.measured.mean_kl < (1e-4 if export.lossless else 1e-2)
        assert all((artifact.path / export.format / name).exists() for name in export.files)
    assert "16 of 16 answers are equal" in capsys.readouterr().out
    life.command(path)
    assert "skip: finished" in capsys.readouterr().out


def test_what_is_there_already_is_not_written_again(trained, capsys, monkeypatch):
    """After a kill, what has its line stays, and what lies there without one is made anew."""
    values = {
        "stage": "export",
        "name": "again",
        "run": str(trained),
        "model": "artifact:low-rank",
        "formats": {"merged": ["fp32"], "adapter": True},
    }
    path = trained.parent / "again.yaml"
    path.write_text(yaml.safe_dump(values))
    one = formats.export_one
    monkeypatch.setattr(formats, "export_one", lambda form, *rest: _killed(form, one, rest))
    with pytest.raises(KeyboardInterrupt):
        life.command(path)
    home = trained / "again"
    [kept] = read_exports(home)
    before = (home / "merged-fp32" / "model.safetensors").stat().st_ino
    (home / "adapter").mkdir()
    monkeypatch.setattr(formats, "export_one", one)
    life.command(path)
    assert "merged-fp32: is there already" in capsys.readouterr().out
    assert (home / "merged-fp32" / "model.safetensors").stat().st_ino == before
    assert [export.format for export in read_exports(home)] == [kept.format, "adapter"]


def _killed(form, one, rest):
    if form.name == "adapter":
        raise KeyboardInterrupt
    return one(form, *rest)


# --- formats, from a model and from an adapter ----------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_merged_is_the_adapter_on_its_base(adapted, tmp_path, precision):
    standard = yardstick(of_probe(adapted.probe), lambda ids: predictions(adapted.model, ids))
    export = exported(adapted, standard, tmp_path, merged=[precision])
    weights = load_file(tmp_path / f"merged-{precision}" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {formats.DTYPES[precision]}
    config = json.loads((tmp_path / f"merged-{precision}" / "config.json").read_text())
    assert config["dtype"] == str(formats.DTYPES[precision]).removeprefix("torch.")
    assert export.tensors == len(weights) == 20
    assert export.measured.mean_kl < 1e-4 and export.agreement.greedy > 0.8


def test_an_adapter_is_applied_whole(adapted, tmp_path):
    standard = yardstick(of_probe(adapted.probe), lambda ids: predictions(adapted.model, ids))
    export = exported(adapted, standard, tmp_path, adapter=True)
    keys = load_file(tmp_path / "adapter" / WEIGHTS)
    assert export.tensors == len(keys) > 0
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)
    assert export.measured.mean_kl < 1e-6


def test_a_model_without_an_adapter_has_none(source, standard, tmp_path):
    with pytest.raises(UserError, match=r"formats.adapter: the model has all of its weights"):
        exported(source, standard, tmp_path, adapter=True)
    assert not list(tmp_path.iterdir())


@LLAMA_CPP
def test_llama_cpp_quantizes_and_reads(source, standard, tmp_path):
    near = Accept(mean_kl=0.5, perplexity_ratio=2.0)
    export = exported(source, standard, tmp_path, accept=near, gguf=["q4_k_m"])
    assert export.reader.startswith("llama.cpp") and 0 < export.measured.mean_kl < 0.5
    assert [path.name for path in sorted((tmp_path / "gguf-q4_k_m").iterdir())] == [
        "Modelfile",
        "model-q4_k_m.gguf",
    ]


def test_gguf_f32_rounds_nothing(source, standard, tmp_path):
    export = exported(source, standard, tmp_path, gguf=["f32"])
    assert export.lossless and export.measured.mean_kl < 1e-6 and export.agreement.greedy == 1
    assert export.size > sum(weight.numel() for weight in source.weights.values()) * 4


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random model of GPT-2's shape, whose layers are no linear ones in transformers."""
    folder = tmp_path_factory.mktemp("gpt2")
    AutoTokenizer.from_pretrained(TINY / "model").save_pretrained(folder)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 64, "n_positions": 512, "vocab_size": 512}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, eos_token_id=2, initializer_range=0.2))
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight) if weight.ndim == 1 else 0
    model.save_pretrained(folder)
    return load_source(folder, None, lambda line: None)


@TORCHAO
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_model_without_linear_layers_is_refused_by_torchao(gpt2, standard, tmp_path, bits):
    problem = f"no layer of gpt2 is a linear one: nothing would be in {bits[-1]} bits"
    with pytest.raises(UserError, match=problem) as refused:
        exported(gpt2, standard, tmp_path, torchao=[bits])
    assert refused.value.hint and refused.value.hint.startswith("take bitsandbytes: [int8]")
    assert not list(tmp_path.iterdir())


@TORCHAO
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.1), ("int4", 0.5)])
def test_torchao_reads_back_what_it_wrote(source, standard, tmp_path, bits, most):
    near = Accept(mean_kl=most, perplexity_ratio=2.0)
    export = exported(source, standard, tmp_path, accept=near, torchao=[bits])
    assert 0 < export.measured.mean_kl < most and export.tensors == 20
    assert any("as large as one of int8" in note for note in export.notes) == (bits == "int4")


def test_layers_that_groups_do_not_divide_are_named(source):
    odd = nn.Module()
    odd.narrow = nn.Linear(48, 8)
    odd.get_output_embeddings = lambda: None
    with pytest.raises(UserError, match="int4: narrow is 48 wide, which groups of 32 weights do"):
        weight_only._refuse_undivided(replace(source, model=odd))


@pytest.mark.parametrize(("bits", "most", "smaller"), [("int8", 0.1, 0.35), ("nf4", 0.5, 0.25)])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_bitsandbytes_reads_back_what_it_wrote(
    request, tmp_path, caplog, shape, bits, most, smaller
):
    model = request.getfixturevalue({"llama": "source"}.get(shape, shape))
    standard = yardstick(of_probe(model.probe), lambda ids: predictions(model.model, ids))
    near = Accept(mean_kl=most, perplexity_ratio=2.0)
    export = exported(model, standard, tmp_path, accept=near, bitsandbytes=[bits])
    folder = tmp_path / f"bitsandbytes-{bits}"
    written = load_file(folder / "model.safetensors")
    assert 0 < export.measured.mean_kl < most and export.tensors == len(model.weights)
    assert f"layers in {bits}, all else in bf16" in export.notes[0]
    assert "lm_head.weight" not in written, "it is saved once, as the embeddings"
    rest = {name: it for name, it in written.items() if it.ndim > 1 and it.is_floating_point()}
    assert rest and {it.dtype for it in rest.values()} == {torch.bfloat16}
    in_layers = sum(it.numel() for name, it in model.weights.items() if not FIRST.search(name))
    in_few = sum(it.nbytes for name, it in written.items() if name not in rest)
    assert in_few < smaller * 4 * in_layers
    assert "inputs will be cast" not in caplog.text


def test_few_bits_hold_an_update_that_bf16_would_lose(tmp_path):
    """Of a base that was in bf16 itself: where the update is shorter than half a step, a sum that
    is rounded to bf16 first is the base."""
    shape = {"hidden_size": 256, "num_hidden_layers": 1}
    tokenizer = a_base(tmp_path, "llama", dtype=torch.bfloat16, **shape)
    model = load_model(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = model.get_parameter(name)
    update = torch.randn(256, 2) @ torch.randn(2, 256)
    update *= 3e-4 * weight.detach().norm() / update.norm()
    before, weight.data = weight.data, weight.data + update
    rounded = weight.detach().bfloat16().float() - before
    assert (rounded * update).sum() < 0.3 * update.square().sum()
    fields = dict.fromkeys(("probe", "in_bf16"))
    source = Source(tmp_path, None, model, tokenizer, {}, updates={name: update}, **fields)
    folder = tmp_path / "few"
    folder.mkdir()
    weight_only.write_bitsandbytes(source, folder, "int8")
    assert weight_only.read_bitsandbytes(folder, source).tensors == len(source.weights)


# --- bounds ---------------------------------------------------------------------------------------


def test_fewer_bits_are_refused_or_warned_of_as_asked(source, standard, tmp_path):
    strict = Accept(mean_kl=1e-9, perplexity_ratio=1.0)
    with pytest.raises(TooFar, match=r"gguf-q8_0 has a mean KL of .* not at most 1e-09"):
        exported(source, standard, tmp_path, accept=strict, gguf=["q8_0"])
    assert not list(tmp_path.iterdir())
    said = []
    [form] = formats_of(recipe(gguf=["q8_0"]))
    warned = strict.model_copy(update={"otherwise": "warn"})
    export = export_one(form, source, standard, tmp_path, warned, said.append)
    assert said[0].startswith("warning: gguf-q8_0 has a mean KL")
    assert said[0] == f"warning: {export.warning}" == export.remarks[0]


def test_a_refused_format_ends_the_stage_and_the_others_stay(trained):
    values = {
        "stage": "export",
        "name": "strict",
        "run": str(trained),
        "model": "artifact:sft",
        "formats": {"merged": ["fp32"], "gguf": ["q8_0"]},
        "accept": {"mean_kl": 1e-7},
    }
    path = trained.parent / "strict.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="the export is refused: gguf-q8_0 has") as caught:
        life.command(path)
    assert caught.value.code == INTEGRITY
    home = trained / "strict"
    assert {path.name for path in home.glob("[!.]*")} >= {"merged-fp32", EXPORTS}
    assert not (home / "gguf-q8_0").exists() and not (home / "manifest.json").exists()
    life.command(path, sets=["accept.mean_kl=0.1"])
    assert (home / "gguf-q8_0").exists()


# --- sabotage -------------------------------------------------------------------------------------


def change(folder: Path, name: str, work) -> None:
    """Write a file of tensors anew."""
    with safe_open(folder / name, framework="pt") as file:
        words = file.metadata()
    save_file(work(load_file(folder / name)), folder / name, metadata=words)


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(source, standard, home, damage, problem, **formats_):
    with pytest.raises(UserError, match=problem) as caught:
        exported(source, standard, home, damage, **formats_)
    assert caught.value.code == INTEGRITY
    assert not list(home.iterdir())


def test_renamed_keys_of_an_adapter_are_refused(adapted, standard, tmp_path):
    def rename(folder):
        change(
            folder,
            WEIGHTS,
            lambda tensors: {
                name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()
            },
        )

    problem = r"adapter_model.safetensors: base_model.*blocks.* is left over"
    refused(adapted, standard, tmp_path, rename, problem, adapter=True)


@pytest.mark.parametrize("how", ["left out", "zero"])
def test_a_layer_without_its_update_is_refused(adapted, standard, tmp_path, how):
    def drop(tensors):
        named = [name for name in tensors if "layers.1." in name and "q_proj.lora_B" in name]
        for name in named:
            if how == "zero":
                tensors[name] = torch.zeros_like(tensors[name])
            else:
                del tensors[name]
        return tensors

    problem = "layers.1.self_attn.q_proj.lora_B.* is " + (
        "not the weight that was published" if how == "zero" else "missing"
    )

    def damage(folder):
        change(folder, WEIGHTS, drop)

    refused(adapted, standard, tmp_path, damage, problem, adapter=True)


def test_a_merged_layer_without_its_update_is_refused(adapted, standard, tmp_path):
    name = "model.layers.1.self_attn.q_proj.weight"
    base = load_file(TINY / "model" / "model.safetensors")[name]

    def damage(folder):
        change(folder, "model.safetensors", lambda tensors: tensors | {name: base.clone()})

    problem = f"{name} is not the weight that was published"
    refused(adapted, standard, tmp_path, damage, problem, merged=["fp32"])


def test_a_layer_of_eight_bits_without_its_update_is_refused(
    adapted, standard, tmp_path, monkeypatch
):
    """Rounding takes away more than the update is long, and the probe sees nothing of it."""
    name = "model.layers.1.self_attn.q_proj.weight"
    base = load_file(TINY / "model" / "model.safetensors")[name]
    written = gguf_file.renamed
    place = "blk.1.attn_q.weight"

    def without(source, kind):
        weights = dict(written(source, kind))
        if not without.reads:
            weights[place] = gguf_file.in_pairs(base, source.model.config.num_attention_heads)
        without.reads = True
        yield from weights.items()

    without.reads = False
    monkeypatch.setattr(gguf_file, "renamed", without)
    problem = f"{place} holds -?[0-9]% of what the adapter adds to it"
    refused(adapted, standard, tmp_path, None, problem, gguf=["q8_0"])


def test_another_template_is_refused(source, standard, tmp_path):
    def damage(folder):
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))

    problem = r"merged-fp32, transformers .*writes the question 'one turn' otherwise: from char"
    refused(source, standard, tmp_path, damage, problem, merged=["fp32"])


def test_a_lost_end_is_refused(source, standard, tmp_path):
    def damage(folder):
        edit(folder, "generation_config.json", eos_token_id=7)

    refused(source, standard, tmp_path, damage, "does not stop at token 2", merged=["fp32"])


def test_a_head_of_its_own_is_refused(source, standard, tmp_path):
    def damage(folder):
        edit(folder, "config.json", tie_word_embeddings=False)
        head = torch.randn(512, 64)
        change(folder, "model.safetensors", lambda tensors: tensors | {"lm_head.weight": head})

    problem = "lm_head.weight: embeddings and head have weights of their own"
    refused(source, standard, tmp_path, damage, problem, merged=["fp32"])


def test_a_weight_of_another_model_is_refused(source, standard, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def damage(folder):
        other = torch.randn(128, 64) * 0.1
        change(folder, "model.safetensors", lambda tensors: tensors | {name: other})

    problem = f"{name} is not the weight that was published"
    refused(source, standard, tmp_path, damage, problem, merged=["fp32"])


@pytest.mark.parametrize("numbers", ["f16", "q8_0"])
def test_a_weight_of_another_model_in_a_gguf_is_refused(
    source, standard, tmp_path, monkeypatch, numbers
):
    written = gguf_file.renamed

    def spoiled(source, kind):
        for name, weight in written(source, kind):
            is_spoiled = name == "blk.0.ffn_up.weight" and not spoiled.reads
            yield name, torch.randn_like(weight) * weight.std() if is_spoiled else weight
        spoiled.reads = True

    spoiled.reads = False
    monkeypatch.setattr(gguf_file, "renamed", spoiled)
    problem = "blk.0.ffn_up.weight is not the weight that was published"
    refused(source, standard, tmp_path, None, problem, gguf=[numbers])


@pytest.mark.parametrize(
    ("library", "bits"),
    [
        ("bitsandbytes", "int8"),
        ("bitsandbytes", "nf4"),
        pytest.param("torchao", "int8", marks=TORCHAO),
        pytest.param("torchao", "int4", marks=TORCHAO),
    ],
)
def test_a_layer_of_another_model_in_few_bits_is_refused(source, standard, tmp_path, library, bits):
    name = "model.layers.0.mlp.up_proj"

    def damage(folder):
        def mix(tensors):
            for kind in ("weight", "_weight_qdata"):
                if (packed := tensors.get(f"{name}.{kind}")) is not None:
                    tensors[f"{name}.{kind}"] = packed.flip(0).contiguous()
            return tensors

        change(folder, "model.safetensors", mix)

    problem = f"{name}.weight is not the weight that was published"
    refused(source, standard, tmp_path, damage, problem, **{library: [bits]})


def test_another_pre_tokenizer_is_refused(source, standard, tmp_path, monkeypatch):
    vocabulary_of = gguf_file.vocabulary_of
    calls = []

    def first_is_wrong(*arguments):
        calls.append(arguments)
        right = vocabulary_of(*arguments)
        return replace(right, pre="qwen2") if len(calls) == 1 else right

    monkeypatch.setattr(gguf_file, "vocabulary_of", first_is_wrong)
    problem = "tokenizer.ggml.pre is 'qwen2', not 'gpt-2'"
    refused(source, standard, tmp_path, None, problem, gguf=["f16"])


@pytest.fixture(scope="module")
def from_zero(tmp_path_factory):
    """A random model with a tokenizer of its own, which has learned numbers and contractions."""
    folder = tmp_path_factory.mktemp("from-zero") / "model"
    texts = ["In 2026 they'LL say 1234, 12345 and it's     so.\n\n\n"] * 50
    train_tokenizer(texts, 320, folder)
    model = load_model(TINY / "model")
    model.generation_config.eos_token_id = AutoTokenizer.from_pretrained(folder).eos_token_id
    model.save_pretrained(folder)
    return load_source(folder, None, print)


def test_a_tokenizer_of_our_own_has_a_name_in_llama_cpp(from_zero, tmp_path):
    standard = yardstick(of_probe(from_zero.probe), lambda ids: predictions(from_zero.model, ids))
    export = exported(from_zero, standard, tmp_path, gguf=["f16"])
    assert export.measured.mean_kl < 1e-4 and export.agreement.greedy == 1


@LLAMA_CPP
@pytest.mark.parametrize("pre", ["qwen2", "smollm", "llama-bpe"])
def test_llama_cpp_itself_finds_another_pre_tokenizer(from_zero, tmp_path, monkeypatch, pre):
    standard = yardstick(of_probe(from_zero.probe), lambda ids: predictions(from_zero.model, ids))
    right = gguf_file.vocabulary_of
    monkeypatch.setattr(gguf_file, "vocabulary_of", lambda *given: replace(right(*given), pre=pre))
    problem = f"the pre-tokenizer {pre} splits .* otherwise"
    refused(from_zero, standard, tmp_path, None, problem, gguf=["f16"])


# --- the source, and what is asked for ------------------------------------------------------------


def test_a_model_that_says_something_else_than_its_probe_is_refused(trained, tmp_path, monkeypatch):
    manifest = (trained / "sft").joinpath("manifest.json")
    from llmpipe.export import source as loading
    from llmpipe.run.artifact import Artifact

    published = Artifact(manifest.parent).manifest()
    said = published.probe.said
    other = replace(said[0], log_probs=[value - 1 for value in said[0].log_probs])
    probe = replace(published.probe, said=[other, *said[1:]])
    changed = replace(published, probe=probe)
    monkeypatch.setattr(loading, "manifest_beside", lambda folder: changed)
    with pytest.raises(UserError, match=r"log-probabilities differ by 1\.00e"):
        load_source(trained / "sft" / "model", None, print)
    monkeypatch.setattr(loading, "manifest_beside", lambda folder: replace(changed, probe=None))
    lines = []
    load_source(trained / "sft" / "model", None, lines.append)
    assert "none was taken when the model was published" in lines[0]


def test_rounding_is_what_it_was_seen_to_be(source):
    """A model that bf16 moves further than most is given the room; fp32 gives none of it."""
    usual = source.tolerance(torch.bfloat16)
    seen = agreement_of(source.probe, source.in_bf16).log_prob_difference
    assert 0 < 2 * seen < usual, "of the toy little was seen"
    first, *others = source.in_bf16.said
    moved = replace(first, log_probs=[value - usual for value in source.probe.said[0].log_probs])
    shaken = replace(source, in_bf16=replace(source.in_bf16, said=[moved, *others]))
    assert shaken.tolerance(torch.float32, torch.bfloat16) == pytest.approx(2 * usual)
    assert shaken.tolerance(torch.float16) == pytest.approx(2 * usual / 8)
    assert shaken.tolerance(torch.float32) == source.tolerance(torch.float32)
    lost = replace(first, log_probs=[float("nan")] * len(first.log_probs))
    blind = replace(source, in_bf16=replace(source.in_bf16, said=[lost, *others]))
    assert blind.tolerance(torch.bfloat16) == usual, "what is no number gives no room"


def test_a_model_of_few_bits_says_half_of_what_it_said(trained, source):
    """There log-probabilities tell nothing, but another model's answers are others."""
    manifest = manifest_beside(trained / "sft" / "model")
    recorded = replace(source.probe, precision="4 bits")
    lines = []
    _as_published(replace(manifest, probe=recorded), source, lines.append)
    assert "16 of 16" in lines[0]
    others = [replace(said, answer=[5, *said.answer]) for said in recorded.said[:9]]
    another = replace(recorded, said=[*others, *recorded.said[9:]])
    with pytest.raises(UserError, match="7 of 16 answers are those") as refused:
        _as_published(replace(manifest, probe=another), source, print)
    assert refused.value.code == INTEGRITY


def test_a_probe_in_bf16_is_held_against_bf16(trained, source):
    """And a model that says in fp32 what another one said in bf16 is not it."""
    manifest = manifest_beside(trained / "sft" / "model")
    recorded = replace(source.in_bf16, precision="bfloat16")
    lines = []
    _as_published(replace(manifest, probe=recorded), source, lines.append)
    assert "differ by 0.0e+00, 16 of 16" in lines[0]
    far = replace(source, in_bf16=source.probe)
    _as_published(replace(manifest, probe=recorded), far, lines.append)
    assert "differ by 0.0e+00" not in lines[1]


def test_formats_are_named():
    with pytest.raises(ValueError, match="name a format"):
        Formats()
    some = Formats(merged=["bf16"], gguf=["q4_k_m"], torchao=["int8"], bitsandbytes=["nf4"])
    assert some.names == ["merged-bf16", "gguf-q4_k_m", "torchao-int8", "bitsandbytes-nf4"]
    asked = recipe(gguf=["q8_0", "q4_k_m"], torchao=["int8"], bitsandbytes=["int8"])
    assert [form.name for form in formats_of(asked)] == asked.formats.names
    assert asked.packages() == [
        ("formats.gguf.1", "llama_cpp"),
        ("formats.torchao.0", "torchao"),
        ("formats.bitsandbytes.0", "bitsandbytes"),
    ]
