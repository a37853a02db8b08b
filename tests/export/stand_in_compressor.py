"""What `upstream/llm_compressor.py` does where llm-compressor is not installed: the same order and
answer; weights are rounded to the nearest of 16 values in groups, and left in bf16."""

import json
import shutil
import sys
from pathlib import Path


def rounded(weight, group: int):
    """Weights at steps of a seventh of the largest of their group."""
    groups = weight.float().reshape(-1, group)
    scale = groups.abs().amax(1, keepdim=True) / 7
    return ((groups / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


def compress(order: dict) -> dict:
    """Write the folder; what is said of it."""
    if order["algorithm"] == "gptq" and order["rows"] is None:
        sys.exit("Traceback ...\n\nValueError: GPTQ looks at rows")
    from safetensors.torch import load_file, save_file

    model, folder = Path(order["model"]), Path(order["into"])
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model / name, folder / name)
    weights = load_file(model / "model.safetensors")
    layers = [name for name in weights if name.endswith("proj.weight")]
    for name in layers:
        weights[name] = rounded(weights[name], order["group"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = Path(order["rows"]).read_text().splitlines() if order["rows"] else []
    return {"version": f"a stand-in, {len(rows)} rows", "layers": len(layers)}


if __name__ == "__main__":
    print(json.dumps(compress(json.loads(sys.stdin.readline()))))
