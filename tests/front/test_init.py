"""`llmpipe init`: a recipe for rows, and for what another tool was told."""

import json
from pathlib import Path

import pytest
import yaml

from llmpipe.recipe.check import load
from llmpipe.stages import schema
from tests import life

MODEL = str(life.TINY / "model")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name):
    """A recipe that was written, valid."""
    values = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    return load(Path(name), schema(values["stage"]))


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


TURNS = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
ROWS = {
    "faq.csv": ("question,answer\nWas?,Das.\n", "lora", "alpaca"),
    "frage.csv": ("frage,antwort\nWas?,Das.\n", "lora", "alpaca"),
    "many.csv": ("frage,antwort\n" + "Was?,Das.\n" * 100, "sft", "alpaca"),
    "chat.jsonl": (lines({"messages": TURNS}), "lora", "messages"),
    "pairs.jsonl": (lines({"prompt": "p", "chosen": "c", "rejected": "r"}), "dpo", "preference"),
    "judged.jsonl": (
        lines({"prompt": "p", "completion": "c", "label": True}),
        "kto",
        "prompt-completion",
    ),
    "notes.txt": ("All of this is text.\n", "sft", "text"),
    "one column.csv": ("notiz\nEin Satz.\n", "sft", "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_the_format_and_the_stage_are_seen_in_the_rows(llmpipe, here, name):
    text, stage, format = ROWS[name]
    (here / name).write_text(text, encoding="utf-8")
    code, out, err = llmpipe("init", name, "--model", MODEL)
    assert code == 0, err
    target = name.rpartition(".")[0].replace(" ", "-") + ".yaml"
    recipe = read(target)
    assert (recipe.stage, recipe.data.train[0].format) == (stage, format)
    assert f"wrote {target}, for `llmpipe {stage}`" in out and f"llmpipe {stage} {target}" in out
    assert recipe.model == MODEL
    code, _, err = llmpipe("init", name, "--model", MODEL)
    assert code == 2 and f"{target}: is there already" in err


def test_what_is_written_can_be_prepared_and_names_what_was_guessed(llmpipe, here):
    rows = [f"Was ist {number}?,Ein Ding.\n" for number in range(40)]
    (here / "mine.csv").write_text("frage,antwort\n" + "".join(rows))
    code, out, _ = llmpipe("init", "mine.csv", "--model", MODEL)
    assert code == 0 and "40 rows, read as alpaca: frage -> instruction, antwort -> output" in out
    assert "their order had to do" in out
    recipe = read("mine.yaml")
    assert recipe.samples.prompts == ["Was ist 0?"]
    assert recipe.adapter.rank == 16 and recipe.optim.epochs == 12  # few rows, by heart
    assert recipe.data.eval.holdout == 0
    assert recipe.data.max_length == 128
    code, out, err = llmpipe("prepare", "mine.yaml", "--show-rows", 1)
    assert code == 0 and "[[Ein Ding.<|im_end|>]]" in out, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.csv"], "nowhere.csv: no such file"),
        (["abc.jsonl"], "such as {a: instruction, b: output}"),
        (["asks.jsonl"], "ask, and say no answer to learn"),
        (["faq.csv", "--model", "./nowhere"], "--model ./nowhere: no such file or folder"),
        (["faq.csv", "--from", "faq.csv"], "--from says it all"),
        ([], "llmpipe init ROWS --model MODEL"),
        (["--from", "own.yaml"], "no config of Axolotl or LLaMA-Factory"),
    ],
)
def test_what_no_recipe_can_be_written_for(llmpipe, here, arguments, said):
    (here / "abc.jsonl").write_text(lines({"a": "x", "b": "y", "c": "z"}))
    (here / "asks.jsonl").write_text(lines({"prompt": "p"}))
    (here / "faq.csv").write_text("question,answer\nWas?,Das.\n")
    (here / "own.yaml").write_text("stage: sft\n")
    before = set(here.iterdir())
    code, _, err = llmpipe("init", *arguments)
    assert code == 2 and said in err and set(here.iterdir()) == before


AXOLOTL = {
    "base_model": MODEL,
    "datasets": [{"path": "rows.jsonl", "type": "chat_template", "split": "train"}],
    "adapter": "qlora",
    "load_in_4bit": True,
    "val_set_size": 0.1,
    "output_dir": "./outputs/it",
    "sequence_len": 64,
    "sample_packing": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 3,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "one_cycle",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "flash_attention": True,
    "deepspeed": "zero3.json",
}
FACTORY = {
    "model_name_or_path": MODEL,
    "stage": "dpo",
    "finetuning_type": "lora",
    "lora_rank": 4,
    "dataset": "ours, theirs",
    "template": "qwen",
    "cutoff_len": 64,
    "pref_beta": 0.2,
    "pref_loss": "orpo",
    "learning_rate": 5e-6,
    "output_dir": "saves/it",
}


def test_an_axolotl_config_becomes_a_recipe(llmpipe, here):
    (here / "rows.jsonl").write_bytes((life.TINY / "rows.jsonl").read_bytes())
    (here / "ax.yaml").write_text(yaml.safe_dump(AXOLOTL, sort_keys=False))
    for command in (["sft", "ax.yaml"], ["run", "ax.yaml"], ["prepare", "ax.yaml"]):
        code, _, err = llmpipe(*command)
        assert code == 2 and "ax.yaml:1: this is a config of Axolotl, and no recipe" in err
        assert "llmpipe init --from ax.yaml" in err and len(err.splitlines()) == 2
    code, out, err = llmpipe("init", "--from", "ax.yaml")
    assert code == 0, err
    recipe = read("ax-llmpipe.yaml")
    assert (recipe.stage, recipe.quantization.bits, recipe.run) == ("qlora", 4, "./outputs/it")
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (4, 8)
    assert (recipe.data.max_length, recipe.data.packing, recipe.data.eval.holdout) == (
        64,
        True,
        0.1,
    )
    assert (recipe.optim.batch_size, recipe.launch.micro_batch_size) == (6, 2)
    assert (recipe.optim.learning_rate, recipe.optim.optimizer) == (2e-4, "adamw_8bit")
    [source] = recipe.data.train
    assert (source.path, source.format, source.split) == ("./rows.jsonl", "messages", "train")
    assert (
        "  lora_r -> adapter.rank: 4\n" in out and "  sequence_len -> data.max_length: 64\n" in out
    )
    for left in ("lr_scheduler: 'one_cycle': optim.scheduler is left", "deepspeed: how a model is"):
        assert left in out and left in (here / "ax-llmpipe.yaml").read_text()
    code, out, err = llmpipe("prepare", "ax-llmpipe.yaml")
    assert code == 0, err


def test_an_objective_of_axolotls_is_one_of_dpo(llmpipe, here):
    """With its own numbers: ORPO's weight, SimPO's margin."""
    pairs = {"path": "pairs.jsonl", "split": "train"}
    (here / "pairs.jsonl").write_bytes((life.TINY / "pairs.jsonl").read_bytes())
    theirs = {"orpo": {"orpo_alpha": 0.2}, "simpo": {"rl_beta": 2.0, "simpo_gamma": 1.0}}
    made = {}
    for name, numbers in theirs.items():
        config = AXOLOTL | numbers | {"rl": name, "datasets": [pairs]}
        (here / f"{name}.yaml").write_text(yaml.safe_dump(config | {"sample_packing": False}))
        code, _, err = llmpipe("init", "--from", f"{name}.yaml")
        assert code == 0, err
        made[name] = read(f"{name}-llmpipe.yaml")
    assert (made["orpo"].stage, made["orpo"].objective, made["orpo"].beta) == ("dpo", "orpo", 0.2)
    assert (made["simpo"].objective, made["simpo"].beta, made["simpo"].gamma) == ("simpo", 2.0, 1.0)


def test_a_llama_factory_config_becomes_a_recipe(llmpipe, here):
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht"}
    info = {"ours": {"file_name": "ours.json", "columns": columns}, "theirs": {"hf_hub_url": "a/b"}}
    (here / "data").mkdir()
    (here / "data" / "dataset_info.json").write_text(json.dumps(info))
    (here / "data" / "ours.json").write_text("[]")
    (here / "lf.yaml").write_text(yaml.safe_dump(FACTORY))
    code, out, err = llmpipe("init", "--from", "lf.yaml")
    assert code == 0, err
    recipe = read("lf-llmpipe.yaml")
    assert (recipe.stage, recipe.beta, recipe.adapter.alpha) == ("dpo", 0.2, 8)
    assert recipe.objective == "orpo"
    assert (recipe.optim.epochs, recipe.optim.scheduler) == (3, "linear")  # as theirs, unsaid
    assert "not set -> optim.scheduler: linear (as LLaMA-Factory has it)" in out
    ours, theirs = recipe.data.train
    assert (ours.path, theirs.path) == ("./data/ours.json", "a/b")
    assert ours.columns == {"frage": "instruction", "gut": "chosen", "schlecht": "rejected"}
    assert "template: 'qwen': data.template is left to its default" in out


def test_what_another_tool_says_and_nobody_can_is_refused(llmpipe, here):
    (here / "lf.yaml").write_text(yaml.safe_dump(FACTORY | {"stage": "ppo"}))
    code, _, err = llmpipe("init", "--from", "lf.yaml")
    assert code == 2 and "lf.yaml:10: ppo: is not translated" in err
    (here / "lf.yaml").write_text(yaml.safe_dump(FACTORY | {"lora_rank": -1}))
    code, _, err = llmpipe("init", "--from", "lf.yaml")
    assert code == 2 and "lf-llmpipe.yaml:" in err and "adapter.rank" in err


def test_the_model_that_was_fetched_is_taken(llmpipe, here):
    (here / "mine.csv").write_text("question,answer\nWas?,Das.\n")
    assert llmpipe("init", "mine.csv")[0] == 0
    assert read("mine.yaml").model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    (here / "mine.yaml").unlink()
    (here / "models").mkdir()
    (here / "models" / "SmolLM2-135M-Instruct.gguf").touch()
    assert llmpipe("init", "mine.csv")[0] == 0
    assert read("mine.yaml").model == "./models/SmolLM2-135M-Instruct.gguf"
