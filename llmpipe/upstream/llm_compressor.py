"""llm-compressor, in the Python that has it: a model folder becomes one of fewer bits.

Run by its path, isolated (`-I`): nothing of llmpipe is imported here. A line of JSON comes by
standard input, the order, and one goes out by standard output; all that libraries print goes to
standard error.

    {"model": FOLDER, "into": FOLDER, "scheme": "w4a16", "algorithm": "gptq", "group": 128,
     "ignored": ["lm_head"], "rows": FILE or null}

`rows`: lines of token ids, for algorithms that look at what goes through the layers. Tested with
llm-compressor 0.14.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOOKS_AT_ROWS = ("gptq", "awq")


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    layers = compress(order)
    said = {"version": version("llmcompressor"), "layers": layers}
    os.write(answer, json.dumps(said).encode())


def compress(order: dict[str, Any]) -> int:
    """Write the folder; how many layers have fewer bits in it."""
    from llmcompressor import oneshot

    _pin_nothing_on_a_cpu()
    looks = order["algorithm"] in LOOKS_AT_ROWS
    by = {"dataset": _rows(Path(order["rows"]))} if looks else {"pipeline": "datafree"}
    model = oneshot(model=order["model"], recipe=_modifiers(order), **by)
    model.save_pretrained(order["into"], save_compressed=True)
    (Path(order["into"]) / "recipe.yaml").unlink(missing_ok=True)  # as artifacts have one
    return sum(hasattr(module, "quantization_scheme") for module in model.modules())


def _modifiers(order: dict[str, Any]) -> list[Any]:
    """What is done to the layers, in llm-compressor's words."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    ignored = order["ignored"]
    if order["scheme"] == "fp8":  # a scale for each row of a weight, and for each token
        return [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=ignored)]
    weights = QuantizationArgs(
        num_bits=4, type="int", strategy="group", group_size=order["group"], symmetric=True
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if order["algorithm"] == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=ignored)]
    rounding = QuantizationModifier(config_groups=groups, ignore=ignored)
    return [AWQModifier(), rounding] if order["algorithm"] == "awq" else [rounding]


def _rows(file: Path) -> Any:
    """Rows to look at, each a batch of its own, in their order."""
    import torch
    from torch.utils.data import DataLoader

    batches = []
    for line in file.read_text().splitlines():
        ids = torch.tensor([json.loads(line)])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return DataLoader(batches, batch_size=None)


def _pin_nothing_on_a_cpu() -> None:
    """AWQ pins its cache for copies to a GPU, and where there is none that ends it."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None


if __name__ == "__main__":
    main()
