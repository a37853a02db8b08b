# python recipes/tiny/make.py
"""Renews recipes/tiny/model: a Llama of 107,000 random weights, a byte-level BPE of 512 tokens made
from rows.jsonl; and pairs.jsonl, every question of it with its own answer, which is chosen, and
another one's.

It knows nothing and learns seventy short answers in seconds. Same versions, same bytes: run it
again after a change of rows.jsonl, and commit what it wrote.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
]  # ids 0, 1, 2: padding, start of turn, end of turn
CHATML = """\
{% for message in messages %}\
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
    )


def main() -> None:
    lines = (HERE / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line)["messages"] for line in lines if line]
    tok = tokenizer(
        [message["content"] for row in rows for message in row]
        + ["system\n", "user\n", "assistant\n"]
    )
    assert len(tok) == 512, len(tok)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(HERE / "model")
    tok.save_pretrained(HERE / "model")
    write_pairs(rows)
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {len(tok)} tokens, {len(rows)} rows")


def write_pairs(rows: list[list[dict]]) -> None:
    asked = [next(i for i, turn in enumerate(row) if turn["role"] == "assistant") for row in rows]
    answers = [row[first:] for row, first in zip(rows, asked, strict=True)]
    with (HERE / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for i, (row, first) in enumerate(zip(rows, asked, strict=True)):
            others = (answers[(i + j) % len(rows)] for j in range(7, len(rows)))
            rejected = next(answer for answer in others if answer != answers[i])
            pair = {"prompt": row[:first], "chosen": answers[i], "rejected": rejected}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
