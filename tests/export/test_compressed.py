"""compressed-tensors: llm-compressor is asked in its own Python, and what it wrote is read back."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from llmpipe.errors import DATA, INTEGRITY, UserError
from llmpipe.evaluation.tasks.perplexity import Passage
from llmpipe.export import compressed
from llmpipe.export.calibration import LONGEST, rows_to_look_at
from llmpipe.export.compressed import group_of, linear_layers
from llmpipe.export.formats import export_one, formats_of
from llmpipe.export.measure import of_probe, yardstick
from llmpipe.export.readers.of_transformers import predictions
from llmpipe.export.source import load_source
from llmpipe.export.tensors import same_weights, unscaled
from llmpipe.recipe.sections import Rows
from llmpipe.run.configs import check_model
from llmpipe.run.interpreters import LLM_COMPRESSOR, python_of
from llmpipe.stages.export import Accept, Formats, Schema
from tests import life
from tests.export.stand_in_compressor import compress
from tests.life import TINY

IS_HERE = find_spec("compressed_tensors") and python_of(LLM_COMPRESSOR)
REAL = pytest.mark.skipif(not IS_HERE, reason="llm-compressor in an environment of its own")
ROWS = [[5, 9, 100, 200], [7, 8, 9, 10, 300]]


@pytest.fixture(scope="module")
def source():
    return load_source(TINY / "model", None, lambda line: None)


@pytest.fixture(scope="module")
def standard(source):
    return yardstick(of_probe(source.probe), lambda ids: predictions(source.model, ids))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A Python that "has" llm-compressor, by the command beside it on PATH."""
    there = tmp_path / "bin"
    there.mkdir()
    for name, text in (("python", f'exec {sys.executable} "$2"'), (LLM_COMPRESSOR, "exit 1")):
        (there / name).write_text(f"#!/bin/sh\n{text}\n")
        (there / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{there}")
    script = Path(__file__).with_name("stand_in_compressor.py")
    monkeypatch.setattr(compressed, "SCRIPT", script)
    monkeypatch.setattr(compressed, "named", lambda package: package)
    return there


@pytest.fixture
def at_once(monkeypatch):
    """The stand-in without a process of its own."""
    monkeypatch.setattr(compressed, "_by_llm_compressor", compress)
    monkeypatch.setattr(compressed, "named", lambda package: package)


def exported(source, standard, home: Path, scheme: str, rows=()):
    asked = Schema.model_construct(formats=Formats(compressed_tensors=[scheme]))
    [form] = formats_of(asked, rows)
    near = Accept(mean_kl=1, perplexity_ratio=5)
    return export_one(form, source, standard, home, near, lambda line: None)


# --- with llm-compressor itself -------------------------------------------------------------------


@REAL
@pytest.mark.faults
@pytest.mark.parametrize("scheme", ["fp8", "w4a16", "w4a16_gptq", "w4a16_awq"])
def test_llm_compressor_writes_and_transformers_reads(source, standard, tmp_path, scheme):
    export = exported(source, standard, tmp_path, scheme, ROWS if "_" in scheme else ())
    assert 0 < export.measured.mean_kl < 0.5 and export.tensors == 20
    assert "14 layers" in export.notes[0]
    tensors = load_file(tmp_path / export.format / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not any(name.startswith("lm_head") for name in tensors)


# --- with a stand-in ------------------------------------------------------------------------------


def test_what_another_python_wrote_is_read_back(source, standard, stand_in, tmp_path):
    export = exported(source, standard, tmp_path / "home", "w4a16_gptq", ROWS)
    assert export.format == "compressed-tensors-w4a16_gptq" and not export.lossless
    assert 0 < export.measured.mean_kl < 0.5 and export.tensors == 20
    assert export.notes == [
        "llm-compressor a stand-in, 2 rows, gptq: 14 layers in groups of 64, all else in bf16",
        "gptq has looked at 2 rows, 9 tokens",
    ]
    folder = tmp_path / "home" / export.format
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "tokenizer.json"}
    assert not any(path.is_dir() for path in folder.iterdir())


def test_its_last_words_are_said(source, standard, stand_in, tmp_path):
    with pytest.raises(UserError) as failed:
        exported(source, standard, tmp_path / "home", "w4a16_gptq")
    assert failed.value.code == INTEGRITY and str(stand_in) in failed.value.hint
    lines = "  Traceback ...\n  ValueError: GPTQ looks at rows"
    assert failed.value.message == f"llm-compressor ended with 1:\n{lines}"
    assert not list((tmp_path / "home").iterdir())


def test_layers_that_were_passed_over_are_refused(source, standard, at_once, tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "linear_layers", lambda source: {"one": 64})
    with pytest.raises(UserError, match="llm-compressor quantized 14 of 1 layers"):
        exported(source, standard, tmp_path / "home", "w4a16")


def test_a_weight_of_another_model_is_refused(source, standard, at_once, tmp_path, monkeypatch):
    name = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(
        "tests.export.stand_in_compressor.rounded",
        lambda weight, group: torch.randn_like(weight) * weight.float().std(),
    )
    with pytest.raises(UserError, match=f"{name[:14]}.* is not the weight that was published"):
        exported(source, standard, tmp_path / "home", "w4a16_awq", ROWS)
    assert not list((tmp_path / "home").iterdir())


# --- what can be quantized ------------------------------------------------------------------------


def test_groups_fit_every_layer():
    assert group_of({"a": 256, "b": 1024}) == 128
    assert group_of({"a": 576, "b": 1536}) == 64
    assert group_of({"a": 96, "b": 128}) == 32
    with pytest.raises(UserError, match="b is 100 wide, which no group of 32") as refused:
        group_of({"a": 128, "b": 100})
    assert refused.value.code == DATA


def test_a_model_without_linear_layers_is_refused(source, monkeypatch):
    assert len(linear_layers(source)) == 14 and set(linear_layers(source).values()) == {64, 128}
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64))
    monkeypatch.setattr(source, "model", gpt2)
    with pytest.raises(UserError, match="no layer of gpt2 is a linear one") as refused:
        linear_layers(source)
    assert refused.value.code == DATA


def test_scales_that_moved_from_layer_to_layer_explain_what_differs():
    torch.manual_seed(0)
    weight, rows, columns = torch.randn(8, 6), torch.rand(8, 1) + 0.5, torch.rand(1, 6) + 0.5
    moved = weight * rows * columns
    assert float((unscaled(weight, moved) - weight).norm()) < 0.02 * float(weight.norm())
    norm = torch.rand(6) + 0.1
    how = {"updates": {}, "moves_scales": True}
    assert same_weights({"w": weight, "n": norm}, {"w": moved, "n": norm * 9}, None, **how)
    for other in ({"w": torch.randn(8, 6), "n": norm}, {"w": moved, "n": -norm}):
        with pytest.raises(UserError, match="is not the weight that was published"):
            same_weights({"w": weight, "n": norm}, other, None, **how)


# --- calibration ----------------------------------------------------------------------------------


def passage(text: str) -> Passage:
    return Passage(id=0, at="rows:1", asks=0, text=text)


def test_rows_that_are_held_out_are_not_looked_at():
    said = []
    rows = [passage(text) for text in ("a", "held", "b" * 2000)]
    looked_at = rows_to_look_at(
        rows, [passage("held")], lambda row: [1] * len(row.text), said.append
    )
    assert [len(ids) for ids in looked_at] == [1, LONGEST]
    assert said == [
        "calibration: 2 of 3 rows, 1,025 tokens; 1 that are held out as well are left out; "
        "of 1 the first 1,024 tokens"
    ]
    with pytest.raises(UserError, match="every row of it is held out"):
        rows_to_look_at(rows, rows, lambda row: [1], said.append)


def recipe(formats: dict, **fields) -> Schema:
    return Schema.model_validate(
        {"run": "runs/x", "model": "artifact:a", "formats": formats} | fields
    )


def test_rows_are_asked_of_those_that_look_at_them():
    rows = [{"path": "./a.jsonl"}]
    with pytest.raises(ValueError, match="calibration: name rows: w4a16_gptq, w4a16_awq look"):
        recipe({"compressed_tensors": ["w4a16_awq"]})
    with pytest.raises(ValueError, match="nobody looks at these rows"):
        recipe({"compressed_tensors": ["w4a16"]}, calibration=rows)
    gptq = {"compressed_tensors": ["w4a16_gptq"]}
    with pytest.raises(ValueError, match="names rows that are held out"):
        recipe(gptq, calibration=rows, held_out=rows)
    asked = recipe(gptq, calibration=rows, held_out=[{"path": "./b.jsonl"}])
    assert asked.rows() == {
        "held_out.0": Rows(path="./b.jsonl"),
        "calibration.0": Rows(path="./a.jsonl"),
    }
    assert asked.packages() == [("formats.compressed_tensors.0", "compressed_tensors")]


def test_what_is_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    values = {
        "stage": "export",
        "run": str(tmp_path / "run"),
        "model": str(TINY / "model"),
        "formats": {"compressed_tensors": ["fp8"]},
    }
    path = tmp_path / "export.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as refused:
        life.command(path)
    assert refused.value.code == DATA and not (tmp_path / "run").exists()
    compressor, packages = refused.value.message.splitlines()
    assert "pip install 'llmpipe[compressed-tensors]'" in packages
    assert "llm-compressor is not installed: no llmcompressor.trace on PATH" in compressor


# --- who takes it ---------------------------------------------------------------------------------

OF_TORCHAO = {
    "quant_method": "torchao",
    "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}},
    "modules_to_not_convert": None,
}
OF_LLM_COMPRESSOR = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    "ignore": ["lm_head"],
    "transform_config": {},
}


OF_TORCHAO_IN_4 = OF_TORCHAO | {
    "quant_type": {"default": {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {}}}
}


@pytest.mark.parametrize(
    ("quantization", "change"),
    [
        (OF_TORCHAO_IN_4, {"more": 1}),
        (OF_TORCHAO, {"quant_type": {"default": {"_type": "Other", "_data": {}}}}),
        (OF_TORCHAO, {"more": 1}),
        (OF_LLM_COMPRESSOR, {"ignore": ["re:(a+)+$"]}),
        (OF_LLM_COMPRESSOR, {"transform_config": {"config_groups": {}}}),
        (OF_LLM_COMPRESSOR, {"config_groups": {"group_0": {"targets": ["re:.*"]}}}),
    ],
)
def test_few_bits_are_taken_as_export_writes_them_and_to_answer_alone(quantization, change):
    path = Path("config.json")
    config = {"model_type": "llama", "quantization_config": quantization}
    check_model(path, config, few_bits=True)
    other = config | {"quantization_config": quantization | change}
    for refused, few_bits in ((config, False), (other, True)):
        with pytest.raises(UserError, match="and llmpipe reads bitsandbytes and mxfp4") as why:
            check_model(path, refused, few_bits=few_bits)
        assert why.value.code == INTEGRITY
