"""A small byte-level tokenizer and rows to feed it.

It has a beginning-of-text token where a test asks for one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers

from llmpipe.data.kinds.rows import ROWS
from llmpipe.data.prepare import prepare
from llmpipe.recipe.sections import Data

# SmolLM2's own: no generation markers, a default system turn, a newline after the end of turn.
SMOL = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = (
    "Hello there, how are you today? The answer is 42. "
    "### Instruction: system user assistant\nDas ist schön 你好"
)


def make_model(
    folder: Path, *, special=("<|endoftext|>",), template=None, bos: str | None = None, **config
) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(
        trim_offsets=True
    )  # as GPT-2, Llama 3
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *([bos] if bos else [])],
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        config["bos_token"] = bos
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config.setdefault("eos_token", special[0] if special else None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    folder.joinpath("tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    if template is not None:
        folder.joinpath("chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base model's tokenizer: no chat template, no pad token."""
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def smol(tmp_path_factory) -> Path:
    """SmolLM2's: its template, and pad == eos == end of turn."""
    return make_model(
        tmp_path_factory.mktemp("model") / "smol",
        special=("<|im_end|>", "<|im_start|>"),
        template=SMOL,
        pad_token="<|im_end|>",
    )


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def make(
    model: Path,
    *train: str | dict,
    cache: str = "cache",
    said: list | None = None,
    seed: int = 0,
    **fields,
):
    """Prepare; the folder's record, train rows and eval rows (lists of column -> list)."""
    sources = [{"path": source} if isinstance(source, str) else source for source in train]
    data = Data.model_validate({"train": sources, "max_rejected": 1.0, **fields})
    said = [] if said is None else said
    ready = prepare(data, ROWS, model, Path(cache), seed=seed, say=said.append)
    return load(ready.folder(Path(cache)))


def load(folder: Path):
    import pyarrow as pa

    def rows(name: str) -> list[dict]:
        path = folder / name
        if not path.exists():
            return []
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
            return reader.read_all().to_pylist()

    record = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    return record, rows("train.arrow"), rows("eval.arrow")


def learned(tokenizer: tokenizers.Tokenizer, row: dict) -> list[str]:
    """The stretches of text that a row learns from."""
    parts: list[list[int]] = []
    before = -100
    for label in row["labels"]:
        if label != -100:
            if before == -100:
                parts.append([])
            parts[-1].append(label)
        before = label
    return [tokenizer.decode(part, skip_special_tokens=False) for part in parts]


def saved(cache: Path = Path("cache")) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(next(Path(cache).glob("*/tokenizer/tokenizer.json"))))


def talk(*contents: str, system: str | None = None) -> dict:
    messages = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {
        "messages": messages
        + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }
