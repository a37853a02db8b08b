"""Pretraining: every token of every document in a block, a tokenizer of its own, exact resume, a
first loss by luck."""

import json
import math
import os
import signal
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

from llmpipe.data.kinds.blocks import BLOCKS
from llmpipe.data.write import Writer
from llmpipe.errors import UserError
from llmpipe.files.tables import table
from llmpipe.recipe.check import load
from llmpipe.recipe.sections import Preparation
from llmpipe.stages import schema
from tests import life, store


@pytest.fixture(scope="module")
def texts():
    return store.texts()


def write(run, texts, **changes):
    values = {
        "stage": "pretrain",
        "run": str(run),
        "tokenizer": {"vocab_size": 512},
        "architecture": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2},
        "data": {"train": [{"path": f"{texts}/*.txt"}], "eval": {"holdout": 0.1}, "max_length": 64},
        "optim": {"learning_rate": 3e-3, "batch_tokens": 512, "steps": 12, "precision": "fp32"},
        "checkpoint": {"every": 3},
        "log": {"every": 2},
        "launch": {"processes": 1, "threads": 1, "micro_batch_size": 4},
    }
    life.put(values, changes)
    path = run.parent / f"{run.name}.yaml"
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return path


@pytest.fixture(scope="module")
def straight(texts, tmp_path_factory):
    return store.made(write(tmp_path_factory.mktemp("pretrain") / "run", texts))


def test_the_model(straight):
    """Begins at chance, learns, moves every weight, loads with plain transformers and answers in
    its template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = straight.verify()
    assert manifest.kind == "model" and manifest.models == {} and manifest.parents == []
    assert abs(manifest.final["eval_loss_before"] - math.log(512)) < 0.25
    assert manifest.final["eval_loss"] < manifest.final["eval_loss_before"] - 0.2
    tokens, size = manifest.data.tokens.eval, manifest.data.tokens.eval_bytes
    expected = manifest.final["eval_loss"] / math.log(2) * tokens / size
    assert manifest.final["bits_per_byte"] == pytest.approx(expected)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(straight.model),
        AutoTokenizer.from_pretrained(straight.model),
    )
    assert len(tokenizer) == model.config.vocab_size == 512
    for text in ("plain", "naïve 你好 \U0001f642\n\ttabs  and   spaces", "\x7f\u2028"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(turn, tokenize=False)
    assert (
        float(model.get_input_embeddings().weight[tokenizer.pad_token_id].detach().abs().sum()) > 0
    )
    assert (
        model.config.max_position_embeddings == 64
        and torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()
    )


def test_show_knows_a_model_from_random_weights(straight):
    from llmpipe.report.terminal import show_run

    shown = show_run(straight.run)
    assert "from       random weights" in shown and "finished" in shown


def test_every_token_is_in_a_block(straight, texts):
    """The blocks hold the documents' tokens in their order, each document with its end, and
    nothing else."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    manifest = straight.manifest()
    (folder,) = (p.parent for p in (straight.run / ".prepared").glob("*/train.arrow"))
    tokenizer = AutoTokenizer.from_pretrained(straight.model)
    blocks = {
        name: Dataset.from_file(str(folder / f"{name}.arrow"))["input_ids"]
        for name in ("train", "eval")
    }
    for name, rows in blocks.items():
        lengths = [len(row) for row in rows]
        assert set(lengths[:-1]) == {64} and 0 < lengths[-1] <= 64
        assert sum(lengths) == getattr(manifest.data.tokens, name)
    found = [token for rows in blocks.values() for row in rows for token in row]
    ends = manifest.data.rows.kept
    whole = sum(
        len(tokenizer(path.read_text().strip("\n"))["input_ids"]) for path in texts.glob("*.txt")
    )
    assert found.count(tokenizer.eos_token_id) == ends and abs(len(found) - ends - whole) <= ends


def streamed(texts, **more):
    """Changes to the recipe that stream the documents; one row of the last source cannot be
    used."""
    rows = texts.parent / f"{texts.name}.jsonl"
    whole = rows.with_suffix(f".{os.getpid()}")  # other processes of the suite may be reading it
    whole.write_text('{"text": "A short document."}\n{"text": ""}\n{"text": "Another one."}\n')
    whole.replace(rows)
    held_out = {"sources": [{"path": f"{texts}/assert.txt"}]}
    return {
        "data__stream": True,
        "data__eval": held_out,
        "data__max_rejected": 0.05,
        "data__train": [{"path": f"{texts}/*.txt"}, {"path": str(rows)}],
        **more,
    }


@pytest.mark.parametrize("how", ["plain", life.by_the_dozen("isolate"), "stream"])
def test_resume_is_bitwise_the_straight_run(texts, tmp_path, how):
    """R1, R5: with the tokenizer, blocks and model made anew by every start."""
    changes = streamed(texts) if how == "stream" else {"data__isolate": how == "isolate"}
    whole = life.command(write(tmp_path / "whole", texts, **changes))
    path = write(tmp_path / "run", texts, **changes)
    for hook, code in (
        ("kill_after_checkpoint_3", -signal.SIGKILL),
        ("term_in_step_5", 143),
        ("term_in_save_9", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


def test_a_stream_is_every_block_in_order(texts, tmp_path):
    """The blocks that `prepare` would write, then the documents again without a seam; from any
    block on; counted."""
    from datasets import Dataset

    from llmpipe.data.stream import Position, Stream, counted

    plain = write(
        tmp_path / "plain", texts, **streamed(texts, data__stream=False, data__isolate=True)
    )
    artifact = life.command(plain)
    pinned = artifact.manifest().asked.content
    recipe = load(
        write(tmp_path / "run", texts, **streamed(texts, data__isolate=True)), schema("pretrain")
    )
    (folder,) = (p.parent for p in (artifact.run / ".prepared").glob("*/train.arrow"))
    kept = Dataset.from_file(str(folder / "train.arrow")).to_list()

    def stream(rejected=None):
        made = Stream(recipe.data, folder, 3 * len(kept), 4, seed=42, pinned=pinned, processes=1)
        made.rejected = rejected
        return made

    whole = stream(tmp_path / "rejected.jsonl")
    blocks = [whole[i] for i in range(len(whole))]
    assert blocks[: len(kept) - 1] == kept[:-1]
    tokens = [token for block in kept for token in block["input_ids"]]
    assert [t for block in blocks for t in block["input_ids"]] == (4 * tokens)[: len(blocks) * 64]
    assert all(sum(block["seq_lengths"]) == 64 for block in blocks)
    none = {
        "rejected_by_reason": {"null": 1},
        "read": 9,
        "kept": 8,
        "truncated": 0,
        "split": 1,
        "pieces": 2,
    }
    rows = counted(whole.position(len(whole) // 4 * 4).rows, none)
    of_train = artifact.manifest().data.sources[:-1]
    for name in ("read", "kept", "truncated", "split", "pieces"):
        assert rows[name] == sum(source[name] for source in of_train) + none[name]
    assert rows["rejected_by_reason"] == {"empty text": 1, "null": 1} and rows["rejected"] == 2
    assert [
        json.loads(x)["row"] for x in (tmp_path / "rejected.jsonl").read_text().splitlines()
    ] == [
        2,
        2,
    ]  # prepared, read
    ahead = stream(tmp_path / "again.jsonl")
    for i in range(0, len(blocks) // 4 * 4, 20):
        again = stream(tmp_path / "again.jsonl")
        again.go(i, Position(**json.loads(json.dumps(asdict(ahead.position(i))))))
        assert [again[j] for j in range(i, min(i + 30, len(blocks)))] == blocks[i : i + 30]
        assert again.position(i + 28) == stream(tmp_path / "again.jsonl").position(i + 28)


def test_a_stream_with_too_many_bad_rows_stops(texts, tmp_path):
    with pytest.raises(UserError) as stopped:
        life.command(
            write(
                tmp_path / "run",
                texts,
                **streamed(texts, data__max_rejected=0.001, optim__steps=200),
            )
        )
    assert stopped.value.code == 2 and "1 empty text" in stopped.value.message
    lines = (tmp_path / "run" / "pretrain" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["empty text"]


def test_isolated_documents_do_not_see_one_another(tmp_path):
    """`seq_lengths` of a block add up to it and begin anew where a document does."""
    from datasets import Dataset

    rows = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate((5, 20, 1, 7, 16, 3))]
    out = Writer(tmp_path / "x.arrow", BLOCKS, Preparation(8, packing=True))
    for row in rows:
        for i in range(0, len(row), 8):
            out.add((row[i : i + 8], row[i : i + 8]))
    out.close()
    made = Dataset.from_file(str(tmp_path / "x.arrow"))
    assert [x for row in made["input_ids"] for x in row] == np.concatenate(rows).tolist()
    assert [len(row) for row in made["input_ids"]] == [8] * 6 + [4]
    assert all(
        sum(parts) == len(row)
        for parts, row in zip(made["seq_lengths"], made["input_ids"], strict=True)
    )
    assert (out.rows, out.tokens, out.sequences) == (9, 52, 7)


def test_continued_pretraining_and_sft_on_top(straight, texts, tmp_path):
    """artifact:pretrain goes on, and into sft, with its own tokenizer and template."""
    more = life.command(
        write(
            straight.run,
            texts,
            name="more",
            model="artifact:pretrain",
            architecture=None,
            tokenizer=None,
            optim__steps=4,
        )
    )
    assert more.manifest().final["eval_loss_before"] == pytest.approx(
        straight.manifest().final["eval_loss"], abs=2e-5
    )
    assert more.manifest().parents[0].name == "pretrain"
    child = life.command(
        life.write(
            straight.run,
            model="artifact:more",
            optim__steps=3,
            data__max_length=64,
            data__max_rejected=1.0,
        )
    )
    manifest = child.verify()
    assert manifest.tokenizer.template == straight.manifest().tokenizer.template
    assert [p.name for p in manifest.parents] == ["more"] and manifest.data.rows.kept > 20


@pytest.mark.parametrize(
    ("scheduler", "shape"),
    [("wsd", [1, 1, 1]), ("cosine", [1, 0.8, 0.4]), ("linear", [1, 0.8, 0.4])],
)
def test_schedules_end_where_they_should(texts, tmp_path, scheduler, shape):
    path = write(
        tmp_path / "run",
        texts,
        optim__steps=None,
        optim__tokens=10 * 512,
        optim__scheduler=scheduler,
        optim__warmup=1,
        log__every=1,
    )
    artifact = life.command(path)
    lines = [
        json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()
    ]
    rates = [line["learning_rate"] / 3e-3 for line in lines if "learning_rate" in line]
    assert len(rates) == 10 == artifact.manifest().training.steps
    assert max(rates) == pytest.approx(1.0) and rates[1] == pytest.approx(shape[0], abs=0.05)
    if scheduler == "wsd":
        assert rates[6] == pytest.approx(1.0) and rates[-1] < 0.7
    else:
        assert rates[4] < rates[1] and rates[-1] < 0.3


def test_gpt2_small_has_124_million_weights():
    """The recipe's architecture, counted without allocating it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    recipe = load(life.ROOT / "recipes" / "gpt2-124m.yaml", schema("pretrain"))
    wanted = recipe.architecture
    assert (wanted.kind, wanted.layers, wanted.width, wanted.heads) == ("gpt2", 12, 768, 12)
    assert (
        recipe.optim.batch_tokens == 524_288
        and recipe.steps == 19_073
        and recipe.optim.warmup == 715
    )


class Vocabulary:
    """As much of GPT-2's tokenizer as `build` asks for."""

    bos_token_id = eos_token_id = pad_token_id = 50256

    def __len__(self):
        return 50257

    def get_vocab(self):
        return {"<|endoftext|>": 50256}

    def convert_tokens_to_ids(self, tokens):
        return [50256 for _ in tokens]


def test_gpt2_small_begins_at_chance():
    """Its first loss is ln(vocabulary) and half the variance of random logits, which is some
    0.55 squared."""
    import torch

    from llmpipe.models.hardware import Hardware
    from llmpipe.models.load import Setup, load_new

    recipe = load(life.ROOT / "recipes" / "gpt2-124m.yaml", schema("pretrain"))
    job = SimpleNamespace(recipe=recipe, say=lambda line: None)
    prepared = SimpleNamespace(stop_tokens=["<|endoftext|>"])
    hardware = Hardware("cpu", 1, 1, 1, 1, False, "sdpa")
    model = load_new(Setup(job, prepared, hardware, Vocabulary()), recipe.architecture)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
    torch.manual_seed(1)
    ids = torch.randint(0, 50257, (1, 512))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert math.log(50257) + 0.05 < loss < math.log(50257) + 0.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "./x"}, "either model"),
        ({"tokenizer": None}, "needs a tokenizer"),
        ({"optim__batch_tokens": 500}, "multiple of data.max_length"),
        ({"optim__scheduler": "wsd", "optim__steps": None}, "to know when to decay"),
        ({"architecture__heads": 3}, "must be a multiple of heads"),
        ({"adapter": {"rank": 4}}, "random weights cannot stay frozen"),
        ({"data__stream": True}, "use data.eval.sources"),
        ({"data__stream": True, "optim__steps": None}, "to know when to end"),
        ({"data__template": "chatml"}, "data.template: unknown key"),
        ({"architecture__widht": 3}, "did you mean 'width'?"),
    ],
)
def test_recipes(texts, tmp_path, changes, message):
    with pytest.raises(UserError) as refused:
        load(write(tmp_path / "run", texts, **changes), schema("pretrain"))
    assert message in str(refused.value)


def test_a_folder_with_nothing_but_a_tokenizer(straight, texts, tmp_path):
    (tmp_path / "alone").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "alone" / name).write_bytes((straight.model / name).read_bytes())
    made = life.command(
        write(tmp_path / "run", texts, tokenizer=str(tmp_path / "alone"), optim__steps=1)
    )
    assert table(made.model)["tokenizer.json"] == table(straight.model)["tokenizer.json"]
    (tmp_path / "alone" / "modeling.py").write_text("")
    with pytest.raises(UserError, match="code in a model folder"):
        life.command(
            write(tmp_path / "other", texts, tokenizer=str(tmp_path / "alone"), optim__steps=1)
        )


def test_equal_documents_give_the_same_tokenizer(straight, texts, tmp_path):
    again = life.command(write(tmp_path / "run", texts, optim__steps=1, seed=7))
    files = table(again.model), table(straight.model)
    assert files[0]["tokenizer.json"] == files[1]["tokenizer.json"]
