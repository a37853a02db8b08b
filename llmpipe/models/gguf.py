"""GGUF files, the one other input format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from llmpipe import upstream
from llmpipe.errors import DATA
from llmpipe.faults import reading
from llmpipe.files import publishing
from llmpipe.models.pretrained import PACKED, SLACK
from llmpipe.run.gguf import check_gguf


def convert_gguf(file: Path, folder: Path) -> None:
    """Write a GGUF file as safetensors in fp32, with its tokenizer, to `folder`: dequantized once,
    it is a model folder like any other. Raises UserError (2) when the file is not whole, or
    transformers cannot read it.
    """
    header = check_gguf(file)
    upstream.silence()
    source = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    most = header.numbers * PACKED * torch.float32.itemsize + SLACK
    with reading(file, "GGUF", Exception, code=DATA), upstream.of_size(PreTrainedModel, most):
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
    with publishing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
