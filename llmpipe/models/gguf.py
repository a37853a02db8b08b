"""GGUF files, the one other input format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from llmpipe import upstream
from llmpipe.errors import UserError, first_line
from llmpipe.files import publishing


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as safetensors in fp32, with its tokenizer, to `folder`: dequantized once,
    it is a model folder like any other. Raises UserError (2) when transformers cannot read the
    file.
    """
    upstream.silence()
    source = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UserError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    with publishing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
