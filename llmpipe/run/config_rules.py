"""What each JSON file of a model's folder may say: rules by its keys, and keys that load code.

Above, what a rule is made of; below, the rules, file by file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

CODE = {
    "auto_map": "asks to run code that comes with the model",
    "auto_mapping": "asks to import a library",
    "custom_generate": "asks to run code that comes with the model",
    "custom_pipelines": "asks to run code that comes with the model",
    "trust_remote_code": "asks to run code that comes with the model",
    "use_kernels": "asks for native code of the Hub",
    "allow_all_kernels": "asks for native code of the Hub",
    "kernel_config": "asks for native code of the Hub",
    "fusion_config": "asks for other code than the model's own",
    "distributed_config": "asks for a layout over processes, which is the recipe's",
    "use_pretrained_backbone": "asks for weights of another model",
    "transformers_weights": "names other weights than the folder's",
    "configuration_files": "names other configurations than config.json",
    "fast_tokenizer_files": "names other tokenizers than tokenizer.json",
    "init_inputs": "calls a class with arguments of its own",
    "compile_config": "asks for compilation, which is the recipe's",
}
"""Keys of transformers and PEFT that load code, fetch or open something, and what they do; of no
effect, and so allowed, where they hold nothing."""

DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Each of them has a tensor at least."""

LABELS = 100_000

MOST_STOPS = 1_000
"""Texts at which an answer ends."""

WORD = re.compile(r"[\w.-]{0,200}")

MODULE = re.compile(r"[\w.]{1,200}")


class Rule(NamedTuple):
    """What a key may hold."""

    holds: Callable[[Any], bool]
    words: str


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def is_count(value: Any) -> bool:
    """Whether it is a number of things: an integer above 0 that fits a machine's word."""
    return type(value) is int and 0 < value < 1 << 48


def _is_id(value: Any) -> bool:
    return type(value) is int and -1 <= value < 1 << 32


def is_word(value: Any) -> bool:
    return isinstance(value, str) and WORD.fullmatch(value) is not None


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and MODULE.fullmatch(value) is not None


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def or_null(*rules: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Any of these, or null."""
    return lambda value: value is None or any(rule(value) for rule in rules)


def lists(each: Callable[[Any], bool], most: int = LABELS) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(each, value))


def _one_of(words: tuple[str, ...]) -> Rule:
    return Rule(lambda value: value is None or value in words, f"one of {', '.join(words)}")


def _is_dtype(value: Any) -> bool:
    names = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(name, str) and name in DTYPES for name in names)


def _is_labels(value: Any) -> bool:
    """{0: "LABEL_0"}: numbers, which JSON has as texts, and their names."""
    return (
        isinstance(value, dict)
        and len(value) <= LABELS
        and all(key.isdecimal() and len(key) < 9 for key in value)
        and all(map(is_text, value.values()))
    )


def _is_rope(value: Any) -> bool:
    """Scaled positions: one set of numbers, or one a kind of layer."""
    if not isinstance(value, dict):
        return False
    sets = [inner for inner in value.values() if isinstance(inner, dict)] or [value]
    return all(
        or_null(is_number)(inner.get("factor", 1.0))
        and or_null(is_count)(inner.get("original_max_position_embeddings"))
        and all(or_null(is_text)(inner.get(name)) for name in ("type", "rope_type"))
        for inner in sets
    )


def _is_pattern(value: Any) -> bool:
    """Numbers by module: PEFT takes the names for regular expressions, of which only names are
    allowed here."""
    return isinstance(value, dict) and all(
        _is_module(name) and is_number(number) for name, number in value.items()
    )


def _is_rows(value: Any) -> bool:
    of_each = value.values() if isinstance(value, dict) else [value]
    return all(lists(_is_id, 1 << 24)(rows) for rows in of_each)


def _is_token(value: Any) -> bool:
    return is_text(value.get("content") if isinstance(value, dict) else value)


def _is_tokens(value: Any) -> bool:
    tokens = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and len(value) <= LABELS and all(map(_is_token, tokens))


COUNT = Rule(or_null(is_count, lists(or_null(is_count))), "a whole number above 0")

POSITIONS = Rule(or_null(_is_id), "a whole number")

TOKENS = Rule(or_null(_is_id, lists(_is_id)), "a token's number, or a list of such")

MODEL: Mapping[str, Rule] = {
    **dict.fromkeys(LAYERS, COUNT),
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "d_model"), COUNT),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "head_dim"), COUNT),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), COUNT),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), COUNT),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    **dict.fromkeys(("max_seq_len", "n_ctx", "sliding_window"), POSITIONS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(
        ("dtype", "torch_dtype"), Rule(or_null(_is_dtype), f"one of {', '.join(DTYPES)}")
    ),
    **dict.fromkeys(
        ("rope_parameters", "rope_scaling"), Rule(or_null(_is_rope), "numbers by name")
    ),
    "model_type": Rule(is_word, "the name of a kind of models"),
    "architectures": Rule(or_null(lists(is_word)), "a list of names"),
    "layer_types": Rule(or_null(lists(is_word)), "a list of names"),
    "id2label": Rule(or_null(_is_labels), "the names of labels by their numbers"),
    "label2id": Rule(or_null(_is_map), "the numbers of labels by their names"),
    "num_labels": Rule(
        or_null(lambda value: is_count(value) and value <= LABELS), "a whole number"
    ),
    "tokenizer_class": Rule(or_null(is_word), "the name of a class"),
}
"""Of a model's configuration, and of those that it is made of."""

BITSANDBYTES: Mapping[str, Rule] = {
    "quant_method": Rule(is_text, "a name"),
    "bnb_4bit_quant_type": _one_of(("fp4", "nf4")),
    "bnb_4bit_compute_dtype": _one_of(DTYPES),
    "bnb_4bit_quant_storage": _one_of((*DTYPES, "uint8")),
    "llm_int8_skip_modules": Rule(or_null(lists(is_word)), "a list of names"),
    "modules_to_not_convert": Rule(or_null(lists(is_word)), "a list of names"),
    "llm_int8_threshold": Rule(or_null(is_number), "a number"),
}
"""Of `quantization_config`, beside switches."""

ADAPTER: Mapping[str, Rule] = {
    "peft_type": Rule(lambda value: value == "LORA", "LORA, the one kind that llmpipe makes"),
    "task_type": _one_of(("CAUSAL_LM", "SEQ_CLS")),
    "peft_version": Rule(or_null(is_text), "a version"),
    "base_model_name_or_path": Rule(or_null(is_text), "a text, which is not used"),
    "revision": Rule(or_null(is_text), "a text, which is not used"),
    "inference_mode": Rule(is_switch, "true or false"),
    "r": Rule(is_count, "a whole number above 0"),
    "lora_alpha": Rule(is_number, "a number"),
    "lora_dropout": Rule(lambda value: is_number(value) and 0 <= value < 1, "a share below 1"),
    "target_modules": Rule(or_null(lists(_is_module)), "a list of names"),
    "target_parameters": Rule(or_null(lists(_is_module)), "a list of names"),
    "modules_to_save": Rule(or_null(lists(_is_module)), "a list of names"),
    "trainable_token_indices": Rule(or_null(_is_rows), "lists of tokens' numbers"),
    "rank_pattern": Rule(or_null(_is_pattern), "numbers by the names of modules"),
    "alpha_pattern": Rule(or_null(_is_pattern), "numbers by the names of modules"),
    "bias": Rule(lambda value: value == "none", "none"),
    "init_lora_weights": Rule(
        lambda value: is_switch(value) or value in ("gaussian", "pissa", "pissa_niter_16"),
        "true or false",
    ),
    "fan_in_fan_out": Rule(is_switch, "true or false"),
    "use_rslora": Rule(is_switch, "true or false"),
    "use_dora": Rule(is_switch, "true or false"),
    "megatron_core": Rule(lambda value: value in (None, "megatron.core"), "what PEFT writes there"),
    "qalora_group_size": Rule(or_null(is_count), "a whole number"),
}
"""Of adapter_config.json. Every other key has to hold nothing: it is of a kind of adapters that
llmpipe does not make."""

ANOTHER_WAY = (
    "assistant_early_exit cache_config constraints continuous_batching_config dola_layers "
    "exponential_decay_length_penalty force_words_ids is_assistant max_time penalty_alpha "
    "prompt_lookup_num_tokens sequence_bias speculation_type token_healing use_mtp "
    "watermarking_config"
).split()
"""Of a generation configuration: ways to an answer that are code of the Hub, another package's, or
not the model's alone."""

NUMBERS = (
    "temperature top_p top_k min_p top_h typical_p repetition_penalty length_penalty "
    "guidance_scale no_repeat_ngram_size num_beams num_return_sequences max_length max_new_tokens "
    "min_length min_new_tokens"
).split()

GENERATION: Mapping[str, Rule] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), TOKENS),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), TOKENS),
    **dict.fromkeys(NUMBERS, Rule(or_null(is_number), "a number")),
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"),
        Rule(or_null(is_switch), "true or false"),
    ),
    "bad_words_ids": Rule(or_null(lists(lists(_is_id))), "lists of tokens' numbers"),
    "stop_strings": Rule(or_null(is_text, lists(is_text, MOST_STOPS)), "a text, or a list of such"),
    **dict.fromkeys(
        ANOTHER_WAY, Rule(lambda value: not value, "null: answers are drawn one token by one")
    ),
}

TOKENIZER: Mapping[str, Rule] = {
    **dict.fromkeys(
        [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")],
        Rule(or_null(_is_token), "a token"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"), Rule(or_null(_is_tokens), "tokens")
    ),
    "tokenizer_class": Rule(or_null(is_word), "the name of a class"),
    "backend": Rule(or_null(is_word), "a name"),
    "added_tokens_decoder": Rule(or_null(_is_map), "tokens by their numbers"),
    "model_max_length": Rule(or_null(lambda value: type(value) in (int, float)), "a number"),
    **dict.fromkeys(
        ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm", "target_spm"),
        Rule(or_null(is_word), "the name of a file of the folder"),
    ),
}

INDEX: Mapping[str, Rule] = {
    "metadata": Rule(_is_map, "numbers by name"),
    "weight_map": Rule(
        lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
        "the file of every tensor",
    ),
}
