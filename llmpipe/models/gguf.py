"""GGUF files, the one other input format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
)

from llmpipe import upstream
from llmpipe.errors import UserError
from llmpipe.files import publishing


def convert_gguf(file: Path, folder: Path) -> None:
    """A GGUF file as safetensors in fp32 with its tokenizer: dequantized once, then a model folder like any other."""
    upstream.silence()
    where = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UserError(
            f"{file}: cannot be read as GGUF: {str(error).strip().splitlines()[0]}"
        ) from error
    with publishing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
