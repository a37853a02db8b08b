"""GGUF files, the one other input format."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from llmpipe import noise, upstream
from llmpipe.errors import DATA
from llmpipe.faults import reading
from llmpipe.files.tables import in_bytes
from llmpipe.files.writing import publishing
from llmpipe.models.pretrained import PACKED, SLACK
from llmpipe.run.gguf import check_gguf
from llmpipe.run.progress import duration
from llmpipe.sums import seal
from llmpipe.upstream.gguf import reading_gguf


def convert_gguf(file: Path, folder: Path, show: Callable[[str], None]) -> None:
    """Write a GGUF file as safetensors in fp32, with its tokenizer, to `folder`: dequantized once,
    it is a model folder like any other, with a table of its files.

    `show` is told in words how far it is. Raises UserError (2) when the file is not whole, or
    transformers cannot read it.
    """
    header = check_gguf(file)
    noise.silence()
    source = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
        "trust_remote_code": False,
    }
    most = header.numbers * PACKED * torch.float32.itemsize + SLACK
    show(f"reading the vocabulary of {file.name}")
    with (
        reading(file, "GGUF", Exception, code=DATA),
        upstream.of_size(PreTrainedModel, most),
        reading_gguf(_Pace(file, show)),
    ):
        tokenizer = AutoTokenizer.from_pretrained(**source)  # first: it takes a moment
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    with publishing(folder) as staging:
        show(f"writing {file.name} as safetensors")
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        show(f"hashing what was written of {file.name}")
        seal(staging, folder.name)


class _Pace:
    """Says how far a file is read, at which rate, and how long it will take."""

    def __init__(self, file: Path, show: Callable[[str], None]):
        self.name = file.name
        self.size = file.stat().st_size
        self.show = show
        self.begun: float | None = None

    def __call__(self, share: float) -> None:
        """`share` of the file's weights is read."""
        now = time.monotonic()
        if self.begun is None:  # of the first tensor it is not known when it was begun
            self.begun = now
            self.first = share
        text = f"reading {self.name}  {share:4.0%}"
        if (seconds := now - self.begun) > 0 and share > self.first:
            rate = (share - self.first) / seconds
            left = duration((1 - share) / rate)
            text += f"  {in_bytes(int(rate * self.size))}/s  ETA {left}"
        self.show(text)
