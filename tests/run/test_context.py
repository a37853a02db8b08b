"""How long a text a model takes, by its files alone, and what a recipe for longer ones is told."""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmpipe.errors import UserError
from llmpipe.run.context import Context, of_folder, tokens_of
from tests import life

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
WIDE = SMALL | {"intermediate_size": 16, "max_position_embeddings": 16}
SHORT = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
FAMILIES = {
    "gpt2": SHORT,
    "gpt_bigcode": SHORT,
    "openai-gpt": SHORT,
    "gptj": SHORT | {"rotary_dim": 4},
    "codegen": SHORT | {"n_head": 4, "rotary_dim": 4, "n_ctx": 16},
    "ctrl": SHORT | {"dff": 16},
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 1,
        "num_heads": 2,
        "attention_types": [[["global"], 1]],
        "max_position_embeddings": 16,
    },
    "opt": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 16},
    "biogpt": WIDE,
    "bert": WIDE | {"is_decoder": True},
    "roberta": WIDE | {"is_decoder": True},
    "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 16},
    "llama": WIDE,
    "gpt_neox": WIDE,
    "xglm": {
        "d_model": 16,
        "num_layers": 1,
        "attention_heads": 2,
        "ffn_dim": 16,
        "max_position_embeddings": 16,
    },
}
UNLIMITED = {
    "bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "falcon": SMALL | {"alibi": True, "max_position_embeddings": 16},
}


def saved(folder, kind, shape, **options):
    """A model of random weights in a folder, and the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = AutoConfig.for_model(kind, vocab_size=100, **shape)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.save_pretrained(folder, **options)
    return model


def computes(model, tokens):
    try:
        with torch.no_grad():
            model(torch.randint(3, 90, (1, tokens)), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_table_of_positions_ends_where_it_is_said_to(tmp_path, kind):
    """The model itself is asked: it computes so many tokens, and one more where nothing ends."""
    model = saved(tmp_path, kind, FAMILIES[kind])
    context = of_folder(tmp_path)
    assert context and context.tokens in (14, 16)
    assert computes(model, context.tokens)
    assert computes(model, context.tokens + 1) is not context.ends
    assert tokens_of(model.config.to_dict()) == context.tokens


@pytest.mark.parametrize("kind", UNLIMITED)
def test_where_there_are_no_positions_nothing_ends(tmp_path, kind):
    assert computes(saved(tmp_path, kind, UNLIMITED[kind]), 100)
    assert of_folder(tmp_path) is None


def test_tables_are_seen_in_models_of_several_files(tmp_path):
    saved(tmp_path, "gpt2", SHORT, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert of_folder(tmp_path) == Context(16, True)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 100, "rope_parameters": {"rope_type": "default"}}, 100),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 2}}, 4096),
        (
            {
                "max_position_embeddings": 1000,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            8000,
        ),
    ],
)
def test_scaled_positions(config, tokens):
    assert tokens_of(config) == tokens


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"sliding_window": 64}, 64),
        ({"sliding_window": None}, None),
        ({"sliding_window": 64, "use_sliding_window": False}, None),
        ({"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"sliding_window": 64, "layer_types": ["sliding_attention"] * 2}, 64),
    ],
)
def test_a_window_counts_where_every_layer_slides(tmp_path, config, window):
    config = {"max_position_embeddings": 512, **config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert of_folder(tmp_path) == Context(512, False, window)


# --- what a command says --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A model with 48 learned positions and the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("short") / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    shape = SHORT | {"n_positions": 48, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("gpt2", vocab_size=len(tokenizer), **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(run, stage, model, **changes):
    rows = {"reward": "pairs", "dpo": "pairs"}.get(stage, "rows")
    values = {
        "stage": stage,
        "run": str(run),
        "model": str(model),
        "data": {"train": [{"path": str(life.TINY / f"{rows}.jsonl")}], "max_length": 48},
        "optim": {"learning_rate": 1e-3, "batch_size": 4, "steps": 1, "precision": "fp32"},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 2},
    }
    if stage == "kto":
        values["data"]["train"] = [{"path": str(judged(run.parent))}]
    if stage == "pretrain":
        values["data"]["train"] = [{"path": str(documents(run.parent))}]
        values["optim"] = {"learning_rate": 1e-3, "batch_tokens": 192, "steps": 1}
    if stage == "ppo":
        values["reward"] = [{"function": f"{life.TINY}/rewards.py:brevity"}]
        values["algorithm"] = {"epochs": 1, "minibatches": 2}
        values["rollout"] = {"max_new_tokens": 4}
    path = run.parent / f"{stage}.yaml"
    path.write_text(json.dumps(life.put(values, changes)))
    return path


def judged(folder):
    lines = [{"prompt": f"q {i}", "completion": f"a {i}", "label": i % 2 == 0} for i in range(16)]
    path = folder / "judged.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def documents(folder):
    path = folder / "documents.txt"
    path.write_text("word and word again, " * 100)
    return path


@pytest.mark.parametrize("stage", ["sft", "pretrain", "reward", "dpo", "kto", "ppo"])
def test_more_tokens_than_positions_are_refused(tmp_path, gpt2, stage):
    """Before the rows are tokenized, with both numbers."""
    length = 96 if stage == "pretrain" else 49
    with pytest.raises(UserError, match=rf"data\.max_length: {length} tokens.*48 pos") as refused:
        life.command(recipe(tmp_path / "run", stage, gpt2, data__max_length=length))
    assert refused.value.code == 2 and "set data.max_length: 48" in str(refused.value)
    assert not list((tmp_path / "run" / ".prepared").glob("*/train.arrow"))


@pytest.mark.parametrize("stage", ["sft", life.by_the_dozen("dpo"), life.by_the_dozen("pretrain")])
def test_as_many_tokens_as_positions_are_trained_on(tmp_path, gpt2, stage, capsys):
    changes = {"data__max_rejected": 0.99}
    made = life.command(recipe(tmp_path / "run", stage, gpt2, **changes))
    assert made.finished and "max_length" not in capsys.readouterr().out


def test_an_adapter_has_the_positions_of_its_base(tmp_path, gpt2):
    loose = {"data__max_rejected": 0.5}
    life.command(recipe(tmp_path / "run", "sft", gpt2, name="lora", adapter={"rank": 2}, **loose))
    more = {"adapter": {"rank": 2}, "data__max_length": 64}
    with pytest.raises(UserError, match=r"artifact:lora has 48 positions"):
        life.command(recipe(tmp_path / "run", "sft", "artifact:lora", name="two", **more))


@pytest.mark.parametrize(
    ("stage", "changes", "said"),
    [
        ("ppo", {"rollout__max_new_tokens": 48}, r"rollout\.max_new_tokens: 48 tokens.*takes 48"),
        ("ppo", {"rollout__max_new_tokens": 40}, r"a prompt of \d+ tokens and an answer of 40"),
        ("ppo", {"mixture": {"train": [], "max_length": 64}}, r"mixture\.max_length: 64 tokens"),
        (
            "sft",
            {"samples": {"prompts": ["What?"], "max_new_tokens": 50}},
            r"samples\.max_new_tokens: 50 tokens.*takes 48",
        ),
    ],
)
def test_answers_that_leave_no_room_are_refused(tmp_path, gpt2, stage, changes, said):
    changes = changes | {"data__max_rejected": 0.5}
    if "mixture" in changes:
        changes["mixture"]["train"] = [{"path": str(life.TINY / "rows.jsonl")}]
    with pytest.raises(UserError, match=said) as refused:
        life.command(recipe(tmp_path / "run", stage, gpt2, **changes))
    assert refused.value.code == 2


def test_answers_of_an_evaluation_leave_room_for_a_prompt(tmp_path, gpt2):
    task = {"task": "generate", "data": [{"path": str(life.TINY / "rows.jsonl"), "limit": 2}]}
    values = {
        "stage": "eval",
        "run": str(tmp_path / "run"),
        "models": {"short": str(gpt2)},
        "tasks": [task | {"score": ["exact_match"], "max_new_tokens": 48}],
        "launch": {"threads": 1},
    }
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"tasks\.0\.max_new_tokens: 48 tokens, and models\.short"):
        life.command(path)


def test_rotary_positions_beyond_those_it_was_made_for_are_said(tmp_path, capsys):
    changes = {"data__max_length": 1024}
    made = life.command(recipe(tmp_path / "run", "sft", life.TINY / "model", **changes))
    said = capsys.readouterr().out
    assert made.finished and said.count("data.max_length: 1,024 tokens") == 1
    assert "was made for 512" in said


def test_a_model_that_sees_a_window_alone_is_said(tmp_path, capsys):
    folder = tmp_path / "mistral"
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    shape = WIDE | {"max_position_embeddings": 512, "sliding_window": 16}
    shape |= {"num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("mistral", vocab_size=len(tokenizer), **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    life.command(recipe(tmp_path / "run", "sft", folder))
    assert "each attends to the last 16 in every layer" in capsys.readouterr().out


def test_a_later_stage_is_held_against_the_model_of_the_first(tmp_path, gpt2):
    """Before anything is made, with the line."""
    stages = [
        {
            "stage": stage,
            "model": model,
            "data": {"train": [{"path": str(life.TINY / rows)}], "max_length": length},
            "optim": {"learning_rate": 1e-3, "batch_size": 4, "steps": 1},
        }
        for stage, model, rows, length in (
            ("sft", str(gpt2), "rows.jsonl", 48),
            ("dpo", "artifact:sft", "pairs.jsonl", 64),
        )
    ]
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), "stages": stages}))
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", "run", str(path)],
        cwd=life.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    told = done.stdout + done.stderr
    assert "data.max_length: 64 tokens, and artifact:sft has 48 positions" in told
    assert re.search(r"pipeline\.yaml:\d+: ", told)
    assert not (tmp_path / "run").exists()
