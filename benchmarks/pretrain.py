"""Bits per byte of a pretrained artifact's held-out documents, beside gzip and a smoothed token
bigram.

    python benchmarks/pretrain.py runs/pretrain/pretrain

All three see the same documents, split whole from those trained on. gzip -9 gets the held-out
documents in one piece, the bigram is counted on the training tokens of the artifact's own tokenizer
(Kneser-Ney, discount 0.75), the model's figure is recomputed here from the published files with
plain transformers, block by block as it was trained.
"""

import argparse
import gzip
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer


def bigram_nats(train: list[int], held_out: list[int]) -> float:
    """Negative log-likelihood of `held_out` under an interpolated Kneser-Ney bigram of `train`."""
    pairs = Counter(pairwise(train))
    first = Counter(a for a, _ in pairs.elements())
    follows, precedes = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    size, kinds, discount = max(*train, *held_out) + 1, len(pairs), 0.75
    nats = 0.0
    for a, b in pairwise(held_out):
        lower = 0.999 * precedes[b] / kinds + 0.001 / size
        seen = first[a]
        share = (
            (max(pairs[a, b] - discount, 0) + discount * follows[a] * lower) / seen
            if seen
            else lower
        )
        nats -= math.log(share)
    return nats


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    args = parser.parse_args()
    manifest = json.loads((args.artifact / "manifest.json").read_text())
    size, count = manifest["data"]["tokens"]["eval_bytes"], manifest["data"]["tokens"]["eval"]
    model = AutoModelForCausalLM.from_pretrained(
        args.artifact / "model", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.artifact / "model")
    for folder in args.artifact.parent.joinpath(".prepared").iterdir():
        record = folder / "prepared.json"
        if (
            record.exists()
            and json.loads(record.read_text())["content_digest"]
            == manifest["data"]["content_digest"]
        ):
            break
    blocks = {
        name: Dataset.from_file(str(folder / f"{name}.arrow"))["input_ids"]
        for name in ("train", "eval")
    }
    flat = {name: [token for block in rows for token in block] for name, rows in blocks.items()}
    text = tokenizer.decode(flat["eval"], skip_special_tokens=True).encode()
    nats = scored = 0.0
    with torch.no_grad():
        for block in blocks["eval"]:
            ids = torch.tensor([block])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
            scored += len(block) - 1
    per_token = count / size / math.log(2)
    print(f"held out: {size:,} bytes, {count:,} tokens; trained on {len(flat['train']):,} tokens")
    print(
        f"gzip -9:                 {8 * len(gzip.compress(text, 9)) / len(text):.3f} bits per byte"
    )
    of_bigram = bigram_nats(flat["train"], flat["eval"]) / (count - 1)
    print(f"bigram, Kneser-Ney:      {of_bigram * per_token:.3f}")
    told = manifest["final"]["bits_per_byte"]
    print(f"{args.artifact.name}: {nats / scored * per_token:>20.3f}   (manifest: {told:.3f})")


if __name__ == "__main__":
    main()
