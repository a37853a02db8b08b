"""Answers per second: `llmpipe eval`'s batches against a one-by-one `generate` loop.

    python benchmarks/eval.py --model DIR --rows recipes/questions-test.jsonl --count 64 --pairs 5

Both sides run in one process on one loaded model, with the same prompts and precision, alternating;
what counts is the ratio within a pair. How many greedy answers are the same, text for text, is
printed. `--rows`: `messages` rows as JSON Lines.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from llmpipe import noise
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.generate import generate, render
from llmpipe.models.pretrained import load_model, load_tokenizer


def one_by_one(model, tokenizer, prompts, most: int) -> list[str]:
    """What a person writes who looks at the documentation of `generate`."""
    out = []
    for ids in prompts:
        given = torch.tensor([ids])
        done = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=most, do_sample=False
        )
        out.append(tokenizer.decode(done[0, len(ids) :], skip_special_tokens=True))
    return out


def batched(model, tokenizer, prompts, most: int, size: int) -> list[str]:
    """As `llmpipe eval` does it: prompts of a length together."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    out = [""] * len(prompts)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        for i, said in zip(
            part,
            generate(model, tokenizer, [prompts[i] for i in part], Sampling(most)),
            strict=True,
        ):
            out[i] = said.text
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=Path, default=Path("recipes/questions-test.jsonl"))
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()
    noise.silence()
    model, tokenizer = load_model(args.model).eval(), load_tokenizer(args.model)
    rows = [
        json.loads(line)["messages"][:-1]
        for line in args.rows.read_text().splitlines()[: args.count]
    ]
    prompts = [
        tokenizer(render(tokenizer, {"messages": turns}), add_special_tokens=False)["input_ids"]
        for turns in rows
    ]
    ratios = []
    for pair in range(args.pairs):
        begun = time.perf_counter()
        single = one_by_one(model, tokenizer, prompts, args.max_new_tokens)
        between = time.perf_counter()
        together = batched(model, tokenizer, prompts, args.max_new_tokens, args.batch)
        ended = time.perf_counter()
        ratios.append((between - begun) / (ended - between))
        same = sum(a == b for a, b in zip(single, together, strict=True))
        print(
            f"pair {pair + 1}: one by one {between - begun:.1f} s, "
            f"batches of {args.batch} {ended - between:.1f} s, "
            f"ratio {ratios[-1]:.2f}, {same} of {len(prompts)} answers the same",
            flush=True,
        )
    print(f"ratio: median {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}")


if __name__ == "__main__":
    main()
