"""Models of random weights, a tokenizer and rows, all made here: no network, no download.

    python benchmarks/onecard/assets.py < told.json

`told`: `home`, the folder they go to; `data`, how many rows of how many words, or null; and
`models`, by name a config and whether it ranks. The last line printed says what computes here.
"""

import json
import math
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPREAD = 0.7  # deviation of the logarithm of a row's length, about that of Alpaca's rows


class Writer:
    """Texts of invented words, which are as often used as the words of a language are (Zipf)."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        heads, tails = "b d f g k l m n p r s t v st tr pl".split(), "a e i o u ai ou".split()
        syllables = [head + tail for head in heads for tail in tails]
        words = {"".join(self.chance.choices(syllables, k=2 + i % 2)) for i in range(4_000)}
        self.words = sorted(words)
        self.chance.shuffle(self.words)
        self.weights = [1 / (rank + 10) for rank in range(len(self.words))]

    def length(self, mean: int) -> int:
        """Words of a row: lognormal, cut at a fifth and at six times the mean."""
        drawn = self.chance.lognormvariate(math.log(mean) - SPREAD**2 / 2, SPREAD)
        return round(min(max(drawn, mean / 5), mean * 6))

    def text(self, words: int) -> str:
        drawn = self.chance.choices(self.words, self.weights, k=max(1, words))
        return " ".join(drawn).capitalize() + "."


def write_rows(home: Path, count: int, mean: int) -> None:
    """rows.jsonl, pairs.jsonl and texts.jsonl: conversations, preferences and documents."""
    writer = Writer(seed=0)
    rows, pairs, texts = [], [], []
    for _ in range(count):
        words = writer.length(mean)
        asked = {"role": "user", "content": writer.text(words // 4)}
        answers = [
            {"role": "assistant", "content": writer.text(length)}
            for length in (words - words // 4, words - words // 4, words // 2)
        ]
        rows.append({"messages": [asked, answers[0]]})
        pairs.append({"prompt": [asked], "chosen": answers[1:2], "rejected": answers[2:]})
        texts.append({"text": "\n".join(turn["content"] for turn in (asked, *answers))})
    for name, lines in {"rows": rows, "pairs": pairs, "texts": texts}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home / f"{name}.jsonl").write_text(text)


def tokenizer(home: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the documents, with so many tokens that the model's rows all have one;
    those it did not learn are never drawn from a text.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 8_192),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = (home / "texts.jsonl").read_text().splitlines()
    bpe.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    held = json.loads(bpe.to_str())
    known = held["model"]["vocab"]
    known |= {f"unused{i}": i for i in range(len(known), vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(held)),
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def write_model(folder: Path, config: dict, ranks: bool) -> None:
    """Random weights in bf16, with the tokenizer; a reward model where it `ranks`."""
    torch.manual_seed(0)
    shape = LlamaConfig(**config, num_labels=1 if ranks else 2)
    kind = LlamaForSequenceClassification if ranks else LlamaForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind._from_config(shape, dtype=torch.bfloat16)
    if not ranks:
        model.generation_config.eos_token_id = config["eos_token_id"]
        model.generation_config.pad_token_id = config["pad_token_id"]
    part = folder.with_suffix(".part")
    model.save_pretrained(part)
    tokenizer(folder.parent, config["vocab_size"]).save_pretrained(part)
    part.rename(folder)


def computing() -> dict:
    """What computes here, and the bf16 operations per second that its maker promises."""
    from llmpipe.models.flops import peak_flops

    if not torch.cuda.is_available():
        return {"card": "cpu", "gib": 0, "cuda": None, "peak_flops": None}
    properties = torch.cuda.get_device_properties(0)
    return {
        "card": properties.name,
        "gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "peak_flops": peak_flops(),
    }


def main() -> None:
    told = json.load(sys.stdin)
    home = Path(told["home"])
    if not (home / "texts.jsonl").exists():
        write_rows(home, told["rows"], told["mean_words"])
    for name, model in told["models"].items():
        if not (home / name).exists():
            write_model(home / name, model["config"], model["ranks"])
    print(json.dumps(computing()))


if __name__ == "__main__":
    main()
