"""The parts that time a stage: llmpipe by its command, then bare TRL in the same run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from onecard import commands
from onecard.bench import WARM_UP, Bench, beside
from onecard.commands import ROOT, Seen
from onecard.table import Row

RANK = 16
PROMPT = 384  # tokens of the longest prompt of ppo; rows ask with a quarter of their words
REWARD = {"function": f"{ROOT}/recipes/tiny/rewards.py:brevity"}
UPDATES = 3
"""Of ppo that are counted, after one that is not; after two of the peer's."""
PASSES = {"epochs": 2, "minibatches": 2}


@dataclass(frozen=True)
class Part:
    name: str
    shows: str
    seconds: int
    """That it takes about, on an H100."""
    run: Callable[[Bench], Iterator[Row]]
    """Gives a row as soon as it is known, and again when more of it is."""


def row_of(bench: Bench, name: str, seen: Seen) -> Row:
    """llmpipe's part of a row that counts tokens."""
    warm_up = bench.scale.warm_up
    steps = [line["tokens_per_second"] for line in seen.lines]
    return Row(
        name,
        "tok/s",
        own=seen.tokens_per_second(warm_up),
        mfu=seen.share_of_peak(warm_up),
        gib=seen.gib,
        details={
            "tokens_per_second_by_step": steps,
            "first_step": seen.first_step,
            "last_line": seen.lines[-1],
        },
    )


def supervised(bench: Bench, name: str, stage: str, packing: bool, **more: Any) -> Iterator[Row]:
    """A stage that learns from conversations, every token of them on both sides."""
    scale, model = bench.scale, bench.model("large")
    batch = scale.batch if packing else scale.unpacked_batch
    micro_batch = scale.micro_batch if packing else batch // 4  # of both, for their memory
    data = {"train": [{"path": bench.rows()}], "max_length": scale.length}
    recipe = bench.recipe(
        name,
        stage,
        model=model,
        data=data | {"packing": packing, "loss": "all"},
        optim=bench.optim(batch_size=batch),
        launch={"micro_batch_size": micro_batch},
        **more,
    )
    row = row_of(bench, name, bench.watch(recipe))
    yield row
    told = {
        "packing": packing,
        "batch": batch,
        "micro_batch": micro_batch,
        "rank": more.get("adapter", {}).get("rank"),
        "bits": more.get("quantization", {}).get("bits"),
    }
    yield beside(row, lambda: bench.peer("sft", model, bench.rows(), **told))


def sft(bench: Bench) -> Iterator[Row]:
    for row in supervised(bench, "sft", "sft", packing=True):
        yield row
    start = Row("start", "s", own=row.details["first_step"], note="command to first step")
    if "peer" in row.details:
        start = replace(start, peer=row.details["peer"]["ends"][0])
    yield start


def sft_unpacked(bench: Bench) -> Iterator[Row]:
    yield from supervised(bench, "sft_unpacked", "sft", packing=False)


def lora(bench: Bench) -> Iterator[Row]:
    yield from supervised(bench, "lora", "lora", packing=True, adapter=adapter())


def qlora(bench: Bench) -> Iterator[Row]:
    four = {"bits": 4}
    yield from supervised(
        bench, "qlora", "qlora", packing=True, adapter=adapter(), quantization=four
    )


def adapter() -> dict[str, Any]:
    return {"rank": RANK, "alpha": 2 * RANK}


def pretrain(bench: Bench) -> Iterator[Row]:
    """From random weights; no peer: TRL does not pretrain."""
    scale = bench.scale
    shape = scale.shapes["large"]
    optim = bench.optim(3e-4, batch_tokens=scale.batch * scale.length)
    del optim["batch_size"]
    recipe = bench.recipe(
        "pretrain",
        "pretrain",
        tokenizer=bench.model("large"),
        architecture={
            "kind": "llama",
            "layers": shape.num_hidden_layers,
            "width": shape.hidden_size,
            "heads": shape.num_attention_heads,
            "kv_heads": shape.num_key_value_heads,
            "ffn": shape.intermediate_size,
        },
        data={"train": [{"path": bench.rows("texts")}], "max_length": scale.length},
        optim=optim,
        launch={"micro_batch_size": scale.micro_batch},
    )
    row = row_of(bench, "pretrain", bench.watch(recipe))
    if bench.peak_flops:
        mfu = shape.flops_per_token(scale.length) * row.own / bench.peak_flops
        by_llmpipe = row.details | {"share_of_peak": row.mfu}
        row = replace(row, mfu=mfu, details=by_llmpipe)
    yield row


def dpo(bench: Bench) -> Iterator[Row]:
    scale, model, pairs = bench.scale, bench.model("large"), bench.rows("pairs")
    recipe = bench.recipe(
        "dpo",
        "dpo",
        model=model,
        adapter=adapter(),
        data={"train": [{"path": pairs}], "max_length": scale.length},
        optim=bench.optim(),
    )
    seen = bench.watch(recipe)
    pace = seen.steps_per_second(scale.warm_up)
    row = Row(
        "dpo",
        "pairs/s",
        own=pace * scale.batch,
        mfu=seen.share_of_peak(scale.warm_up),
        gib=seen.gib,
        details={
            "tokens_per_second": seen.tokens_per_second(scale.warm_up),
            "last_line": seen.lines[-1],
        },
    )
    yield row
    row = beside(row, lambda: bench.peer("dpo", model, pairs, rank=RANK), "steps_per_second")
    yield row if row.peer is None else replace(row, peer=row.peer * scale.batch)


def updates(bench: Bench, name: str, model: str, reward: dict, **more: Any) -> Iterator[Row]:
    """Updates of ppo, and what it takes to draw a token for all answers at once."""
    scale = bench.scale
    recipe = bench.recipe(
        name,
        "ppo",
        model=model,
        reward=[reward],
        data={"train": [{"path": bench.rows()}], "max_length": PROMPT},
        rollout={"max_new_tokens": scale.answer_tokens},
        algorithm=PASSES,
        optim=bench.optim(batch_size=scale.answers),
        **more,
    )
    seen = commands.measured(recipe, 1 + UPDATES)
    lines = seen.lines[1:]
    seconds = [scale.answers / line["episodes_per_second"] for line in lines]
    drawn = [line["rollout_share"] * s for line, s in zip(lines, seconds, strict=True)]
    yield Row(
        f"{name}: draw",
        "ms/token",
        own=1_000 * mean(drawn) / scale.answer_tokens,
        note=f"for {scale.answers} answers, with their scores",
        details={"first_update": seen.first_step, "lines": lines},
    )
    yield Row(
        name,
        "episodes/s",
        own=scale.answers * len(seconds) / sum(seconds),
        gib=seen.gib,
        details={"seconds_by_update": seconds},
    )


def ppo(bench: Bench) -> Iterator[Row]:
    yield from updates(bench, "ppo", bench.model("large"), REWARD, adapter=adapter())


def ppo_rm(bench: Bench) -> Iterator[Row]:
    ranker = {"model": bench.model("large-ranks")}
    yield from updates(bench, "ppo_rm", bench.model("large"), ranker, adapter=adapter())


def ppo_trl(bench: Bench) -> Iterator[Row]:
    """All weights of the small shape, reward model and critic of the same."""
    scale, model, ranker = bench.scale, bench.model("small"), bench.model("small-ranks")
    for row in updates(bench, "ppo_trl", model, {"model": ranker}):
        yield row
    if bench.trl112 is None:
        yield replace(row, note="no peer: --trl112 DIR says where trl 1.12 is")
        return
    told = PASSES | {
        "ranker": ranker,
        "batch": scale.answers,
        "micro_batch": min(16, scale.answers // PASSES["minibatches"]),
        "answer_tokens": scale.answer_tokens,
        "steps": WARM_UP + UPDATES,
    }
    yield beside(row, lambda: bench.peer("ppo", model, bench.rows(), **told))
