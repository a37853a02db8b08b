"""Which causal language models of transformers keep texts of one row apart, as their miniatures
tell, and what was told before of a whole model by one threshold.

    python benchmarks/apart.py                 every class, a row each
    python benchmarks/apart.py llama opt       some of them

Each class is taken with its default configuration, without weights. Columns: what the texts before
it change of a text, as a share of what they do where they are one text with it, in a miniature in
fp32 (at most 1e-4: apart); weights and layers of the miniature, and seconds until the verdict;
then the same share in a model of 12 such layers in bf16, with weights as the class draws them (at
most 0.15: apart, until 0.18).
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmpipe import upstream
from llmpipe.models import apart, miniature

ROW = 1024  # tokens
BEFORE = 0.15
DEPTH = 12


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print("| kind | share | verdict | weights, layers | s | share before | verdict before |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    counts: dict[str, int] = {}
    for kind in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        verdict, line = row(kind)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"| {kind} | {line} |", flush=True)
    print("\n" + ", ".join(f"{verdict}: {count}" for verdict, count in sorted(counts.items())))


def row(kind: str) -> tuple[str, str]:
    """The verdict on a class, and its line."""
    try:
        model = skeleton(kind)
    except Exception as error:
        return (
            "no model",
            f"no model of the default configuration ({type(error).__name__}) | | | | |",
        )
    began = time.perf_counter()
    try:
        small, share = ask(model)
    except Exception as error:
        return "not told", f"not told ({type(error).__name__}) | | | | |"
    seconds = time.perf_counter() - began
    if small is None or share is None:
        return "not told", f"no miniature | asked of itself | | {seconds:.1f} | |"
    verdict = "apart" if share <= apart.TOLERANCE else "mixed"
    weights = f"{small.num_parameters() / 1e6:.1f} M, {len(miniature._layers(small))}"
    shown = f"{share:.1e} | {verdict} | {weights} | {seconds:.2f}"
    before = as_before(small)
    if before is None:
        return verdict, f"{shown} | |"
    return verdict, f"{shown} | {before:.1e} | {'apart' if before <= BEFORE else 'mixed'}"


def skeleton(kind: str) -> Any:
    """A model without weights, with the attention that it is trained with on a CPU."""
    config = AutoConfig.for_model(kind)
    known = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = known._from_config(config, dtype=torch.float32)
    model.set_attn_implementation(upstream.supported_attention(known, "sdpa"))
    upstream.speed_up(model, device_type="cpu")
    return model


def ask(model: Any) -> tuple[Any, float | None]:
    """The first miniature that computes, and its share."""
    with torch.no_grad():
        for small in miniature.miniatures(model, ROW, torch.device("cpu")):
            torch.manual_seed(0)
            share = apart.mixed_share(small, ROAD)
            if share is not None:
                return small, share
    return None, None


def as_before(small: Any) -> float | None:
    """The share in a deeper model with weights as its class draws them, in bf16; None where there
    is none."""
    config = copy.deepcopy(small.config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    times = max(DEPTH // max(depth, 1), 1)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value * times)
    text.num_hidden_layers = depth * times
    try:
        torch.manual_seed(0)
        model = type(small)._from_config(config, dtype=torch.float32).eval()
        model.set_attn_implementation(small.config._attn_implementation)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return apart.mixed_share(model, ROAD)
    except Exception:
        return None


def packed(model: Any, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    lengths = [len(text) for text in texts]
    ids = torch.tensor([[i for text in texts for i in text]])
    places = torch.tensor([[i for length in lengths for i in range(length)]])
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    said = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
    said |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    logits = model(input_ids=ids, position_ids=places, use_cache=False, **said).logits[0]
    return list(logits.float().split(lengths))


def alone(model: Any, text: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([text]), use_cache=False).logits[0]
    return logits.float()


ROAD = apart.Road(packed, alone, ROW)

if __name__ == "__main__":
    main()
