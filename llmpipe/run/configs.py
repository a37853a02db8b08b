"""What the JSON of a model's folder may say: a closed list for each file, held against it before
any library reads it.

A configuration comes with the model and is as untrusted as the model. transformers and PEFT obey
keys that load code, fetch from the Hub or open other files: none of them may be there. Numbers that
decide how much is built have to be numbers, and not more than the weights hold. Whatever else a
family's configuration has is the library's to judge.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llmpipe.errors import INTEGRITY, UserError

LIMIT = "llmpipe loads safetensors, JSON and text only"

Config = dict[str, Any]

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

AUTO_MAP = "auto_map"
"""Classes that come with a model, which transformers obeys where it has none of its own or is told
to trust them. It is never told so here: trust_remote_code is False in every call."""

NO_CLASS = "convert it to a kind of models that transformers has itself, or take one of these"

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

EXPERTS = ("eager", "batched_mm", "grouped_mm")

DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")

QUANTIZED = ("bitsandbytes", "mxfp4")
"""Weights that can be trained on as they lie there: the latter are unpacked as they are read."""

OF_TORCHAO = {
    "quant_method",
    "quant_type",
    "include_input_output_embeddings",
    "modules_to_not_convert",
    "untie_embedding_weights",
}
NOT_EXPORTED = ("kv_cache_scheme", "sparsity_config", "transform_config")
OF_COMPRESSED = {
    "quant_method",
    "config_groups",
    "format",
    "global_compression_ratio",
    "ignore",
    "quantization_status",
    "version",
    *NOT_EXPORTED,
}
"""What an export says of weights that others read and nobody trains on."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Each of them has a tensor at least."""

PARTS = re.compile(r"(\w*_)?(layers?|blocks?|depths?|experts?)")
"""Names of other numbers by which modules are built."""

MOST_PARTS = 1_000
"""Of such a number, where the weights have fewer tensors."""

MOST_EXPERTS = 32_768
"""Which may be all in one tensor."""

LABELS = 100_000

MOST_STOPS = 1_000
"""Texts at which an answer ends."""

WORD = re.compile(r"[\w.-]{0,200}")

MODULE = re.compile(r"[\w.]{1,200}")


class Rule(NamedTuple):
    """What a key may hold."""

    holds: Callable[[Any], bool]
    words: str


def _one_of(words: tuple[str, ...]) -> Rule:
    return Rule(lambda value: value is None or value in words, f"one of {', '.join(words)}")


def is_count(value: Any) -> bool:
    """Whether it is a number of things: an integer above 0 that fits a machine's word."""
    return type(value) is int and 0 < value < 1 << 48


def _is_id(value: Any) -> bool:
    return type(value) is int and -1 <= value < 1 << 32


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 63


def _lists(each: Callable[[Any], bool], most: int = LABELS) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(each, value))


def _or(*rules: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Any of these, or null."""
    return lambda value: value is None or any(rule(value) for rule in rules)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and WORD.fullmatch(value) is not None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


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
        _or(is_number)(inner.get("factor", 1.0))
        and _or(is_count)(inner.get("original_max_position_embeddings"))
        and all(_or(is_text)(inner.get(name)) for name in ("type", "rope_type"))
        for inner in sets
    )


COUNT = Rule(_or(is_count, _lists(_or(is_count))), "a whole number above 0")

POSITIONS = Rule(_or(_is_id), "a whole number")

TOKENS = Rule(_or(_is_id, _lists(_is_id)), "a token's number, or a list of such")

MODEL: Mapping[str, Rule] = {
    **dict.fromkeys(LAYERS, COUNT),
    **dict.fromkeys(("vocab_size", "hidden_size", "n_embd", "d_model"), COUNT),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "head_dim"), COUNT),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), COUNT),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), COUNT),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    **dict.fromkeys(("max_seq_len", "n_ctx", "sliding_window"), POSITIONS),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), TOKENS),
    **dict.fromkeys(("dtype", "torch_dtype"), Rule(_or(_is_dtype), f"one of {', '.join(DTYPES)}")),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), Rule(_or(_is_rope), "numbers by name")),
    "model_type": Rule(_is_word, "the name of a kind of models"),
    "architectures": Rule(_or(_lists(_is_word)), "a list of names"),
    "layer_types": Rule(_or(_lists(_is_word)), "a list of names"),
    "id2label": Rule(_or(_is_labels), "the names of labels by their numbers"),
    "label2id": Rule(_or(_is_map), "the numbers of labels by their names"),
    "num_labels": Rule(_or(lambda value: is_count(value) and value <= LABELS), "a whole number"),
    "tokenizer_class": Rule(_or(_is_word), "the name of a class"),
}
"""Of a model's configuration, and of those that it is made of."""

BITSANDBYTES: Mapping[str, Rule] = {
    "quant_method": Rule(is_text, "a name"),
    "bnb_4bit_quant_type": _one_of(("fp4", "nf4")),
    "bnb_4bit_compute_dtype": _one_of(DTYPES),
    "bnb_4bit_quant_storage": _one_of((*DTYPES, "uint8")),
    "llm_int8_skip_modules": Rule(_or(_lists(_is_word)), "a list of names"),
    "modules_to_not_convert": Rule(_or(_lists(_is_word)), "a list of names"),
    "llm_int8_threshold": Rule(_or(is_number), "a number"),
}
"""Of `quantization_config`, beside switches."""


def _is_module(value: Any) -> bool:
    return isinstance(value, str) and MODULE.fullmatch(value) is not None


def _is_pattern(value: Any) -> bool:
    """Numbers by module: PEFT takes the names for regular expressions, of which only names are
    allowed here."""
    return isinstance(value, dict) and all(
        _is_module(name) and is_number(number) for name, number in value.items()
    )


def _is_rows(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(_lists(_is_id, 1 << 24)(rows) for rows in lists)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


ADAPTER: Mapping[str, Rule] = {
    "peft_type": Rule(lambda value: value == "LORA", "LORA, the one kind that llmpipe makes"),
    "task_type": _one_of(("CAUSAL_LM", "SEQ_CLS")),
    "peft_version": Rule(_or(is_text), "a version"),
    "base_model_name_or_path": Rule(_or(is_text), "a text, which is not used"),
    "revision": Rule(_or(is_text), "a text, which is not used"),
    "inference_mode": Rule(_is_switch, "true or false"),
    "r": Rule(is_count, "a whole number above 0"),
    "lora_alpha": Rule(is_number, "a number"),
    "lora_dropout": Rule(lambda value: is_number(value) and 0 <= value < 1, "a share below 1"),
    "target_modules": Rule(_or(_lists(_is_module)), "a list of names"),
    "target_parameters": Rule(_or(_lists(_is_module)), "a list of names"),
    "modules_to_save": Rule(_or(_lists(_is_module)), "a list of names"),
    "trainable_token_indices": Rule(_or(_is_rows), "lists of tokens' numbers"),
    "rank_pattern": Rule(_or(_is_pattern), "numbers by the names of modules"),
    "alpha_pattern": Rule(_or(_is_pattern), "numbers by the names of modules"),
    "bias": Rule(lambda value: value == "none", "none"),
    "init_lora_weights": Rule(
        lambda value: _is_switch(value) or value in ("gaussian", "pissa", "pissa_niter_16"),
        "true or false",
    ),
    "fan_in_fan_out": Rule(_is_switch, "true or false"),
    "use_rslora": Rule(_is_switch, "true or false"),
    "use_dora": Rule(_is_switch, "true or false"),
    "megatron_core": Rule(lambda value: value in (None, "megatron.core"), "what PEFT writes there"),
    "qalora_group_size": Rule(_or(is_count), "a whole number"),
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
    **dict.fromkeys(NUMBERS, Rule(_or(is_number), "a number")),
    **dict.fromkeys(
        ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"),
        Rule(_or(_is_switch), "true or false"),
    ),
    "bad_words_ids": Rule(_or(_lists(_lists(_is_id))), "lists of tokens' numbers"),
    "stop_strings": Rule(_or(is_text, _lists(is_text, MOST_STOPS)), "a text, or a list of such"),
    **dict.fromkeys(
        ANOTHER_WAY, Rule(lambda value: not value, "null: answers are drawn one token by one")
    ),
}


def _is_token(value: Any) -> bool:
    return is_text(value.get("content") if isinstance(value, dict) else value)


def _is_tokens(value: Any) -> bool:
    tokens = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and len(value) <= LABELS and all(map(_is_token, tokens))


TOKENIZER: Mapping[str, Rule] = {
    **dict.fromkeys(
        [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")],
        Rule(_or(_is_token), "a token"),
    ),
    **dict.fromkeys(
        ("additional_special_tokens", "extra_special_tokens"), Rule(_or(_is_tokens), "tokens")
    ),
    "tokenizer_class": Rule(_or(_is_word), "the name of a class"),
    "backend": Rule(_or(_is_word), "a name"),
    "added_tokens_decoder": Rule(_or(_is_map), "tokens by their numbers"),
    "model_max_length": Rule(_or(lambda value: type(value) in (int, float)), "a number"),
    **dict.fromkeys(
        ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm", "target_spm"),
        Rule(_or(_is_word), "the name of a file of the folder"),
    ),
}

INDEX: Mapping[str, Rule] = {
    "metadata": Rule(_is_map, "numbers by name"),
    "weight_map": Rule(
        lambda value: isinstance(value, dict) and all(map(is_text, value.values())),
        "the file of every tensor",
    ),
}


def check_model(
    path: Path, config: Config, tensors: int | None = None, *, few_bits: bool = False
) -> None:
    """Hold a config.json against what it may say, with those that it is made of.

    `tensors`: how many the weights have, where there are weights; `few_bits`: whether these may be
    quantized as `export` has it done. Raises UserError (3) naming the key.
    """
    for name, part in _parts(config):
        check(path, part, MODEL, name)
        if not (few_bits and not name and _is_exported(config.get("quantization_config"))):
            _check_quantization(path, part, name)
        _check_sources(path, part, name)
        _check_sizes(path, part, name, tensors)


def check_adapter(path: Path, config: Config) -> None:
    """Hold an adapter_config.json against what it may say. Raises UserError (3) naming the key."""
    check(path, config, ADAPTER)
    for name in ("peft_type", "r"):
        if name not in config:
            raise refusal(path, f"lacks {name}")
    for name, value in config.items():
        if name not in ADAPTER and value not in (None, False, {}, []):
            problem = f"{name}: is of an adapter that llmpipe does not know"
            raise UserError(f"{path}: {problem}", "it uses LoRA, rsLoRA and DoRA", INTEGRITY)


def check(path: Path, config: Config, rules: Mapping[str, Rule], within: str = "") -> None:
    """Hold an object of a JSON file against what it may say. Raises UserError (3) naming the key.

    What loads code or opens files is looked for at any depth.
    """
    obeyed = {name: value for name, value in config.items() if name != AUTO_MAP}
    if config.get(AUTO_MAP):
        _check_auto_map(path, config)
    for name, value in _every(obeyed):
        if name in CODE and value not in (None, False, {}, []):
            raise refusal(path, f"{name}: {CODE[name]}")
    for name, rule in rules.items():
        if name in config and not rule.holds(config[name]):
            raise refusal(path, f"{within}{name}: {_shown(config[name])} is not {rule.words}")


def _check_auto_map(path: Path, config: Config) -> None:
    """Allow it where transformers has the classes itself, and so does not obey it."""
    value = config[AUTO_MAP]
    has_its_own = {"config.json": has_model, "tokenizer_config.json": has_tokenizer}.get(path.name)
    if has_its_own is None:
        raise refusal(path, f"{AUTO_MAP}: {CODE[AUTO_MAP]}")
    if not has_its_own(config):
        problem = f"{AUTO_MAP}: {CODE[AUTO_MAP]}, and transformers has no class of its own for it"
        raise UserError(f"{path}: {problem}", NO_CLASS, INTEGRITY)
    has_no_name = isinstance(value, list) and has_its_own is has_tokenizer
    maps = {"AutoTokenizer": value} if has_no_name else value
    if not isinstance(maps, dict) or not all(_is_class(*item) for item in maps.items()):
        raise refusal(path, f"{AUTO_MAP}: {_shown(value)} is not the names of classes")


def _is_class(name: str, value: Any) -> bool:
    """The class for a name, or the two of a tokenizer, of which one may be null."""
    if name != "AutoTokenizer":
        return is_text(value)
    pair = isinstance(value, list) and len(value) == 2 and any(value)
    return pair and all(map(_or(is_text), value))


def has_model(config: Config) -> bool:
    """Whether transformers itself has the kind of a configuration, and the classes that it
    names."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not all(map(is_text, classes)):
        return False
    # a class of another name may be another model
    kinds, names = _of_transformers()
    kind = config.get("model_type")
    return is_text(kind) and kind in kinds and all(name.casefold() in names for name in classes)


def has_tokenizer(config: Config) -> bool:
    """Whether transformers itself has the class that a tokenizer's configuration names."""
    name = config.get("tokenizer_class")
    if not isinstance(name, str):
        return False
    return name.removesuffix("Fast").casefold() in _of_transformers()[1]


@cache
def _of_transformers() -> tuple[frozenset[str], frozenset[str]]:
    """Kinds of models, and names of classes in small letters; torch is not imported for them."""
    import transformers
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    return frozenset(CONFIG_MAPPING_NAMES), frozenset(map(str.casefold, dir(transformers)))


def refusal(path: Path, why: str) -> UserError:
    return UserError(f"{path}: {why}", LIMIT, INTEGRITY)


def _parts(config: Config) -> Iterator[tuple[str, Config]]:
    """A configuration and those that it is made of, each with what its keys begin with."""
    yield "", config
    for name, inner in config.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(inner, dict):
            yield f"{name}.", inner


def _every(config: Config) -> Iterator[tuple[str, Any]]:
    """Every key and its value, at any depth."""
    below: list[Any] = [config]
    while below:
        value = below.pop()
        if isinstance(value, dict):
            yield from value.items()
            below += value.values()
        elif isinstance(value, list):
            below += [inner for inner in value if isinstance(inner, dict | list)]


def _check_sources(path: Path, config: Config, within: str) -> None:
    """Where attention and experts come from."""
    for name, value in config.items():
        bare = name.lstrip("_").removesuffix("_internal")
        implementations = value.values() if isinstance(value, dict) else [value]
        if bare == "attn_implementation" and any(
            text is not None and text not in ATTENTION for text in implementations
        ):
            raise refusal(path, f"{within}{name}: names an attention implementation to be fetched")
        if bare == "experts_implementation" and value is not None and value not in EXPERTS:
            raise refusal(path, f"{within}{name}: names an implementation to be fetched")
        if name.startswith("__"):
            raise refusal(path, f"{within}{name}: is no name of a configuration")


def _is_exported(quantization: Any) -> bool:
    """Whether weights are quantized as `export` has it done by torchao or llm-compressor."""
    match quantization:
        case {"quant_method": "torchao", "quant_type": {"default": {"_type": str(kind)} as only}}:
            known = quantization.keys() <= OF_TORCHAO and len(quantization["quant_type"]) == 1
            return known and kind == "Int8WeightOnlyConfig" and "_data" in only
        case {"quant_method": "compressed-tensors", "config_groups": {"group_0": dict(group)}}:
            few = quantization.keys() <= OF_COMPRESSED and len(quantization["config_groups"]) == 1
            left = quantization.get("ignore")
            plain = not any(quantization.get(name) for name in NOT_EXPORTED)
            return few and plain and group.get("targets") == ["Linear"] and _lists(_is_word)(left)
    return False


def _check_quantization(path: Path, config: Config, within: str) -> None:
    """How weights are quantized that can be trained on as they lie there."""
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise refusal(path, f"{within}quantization_config: {_shown(quantization)} is no object")
    method = quantization.get("quant_method")
    if method not in QUANTIZED:
        known = " and ".join(QUANTIZED)
        problem = f"weights quantized by {_shown(method)}, and llmpipe reads {known}"
        hint = "take the model's own weights; `quantization:` quantizes them"
        raise UserError(f"{path}: {within}quantization_config: {problem}", hint, INTEGRITY)
    check(path, quantization, BITSANDBYTES, f"{within}quantization_config.")
    for name, value in quantization.items():
        if name not in BITSANDBYTES and value is not None and not _is_switch(value):
            problem = f"{within}quantization_config.{name}: {_shown(value)} is not known"
            raise refusal(path, problem)


def _check_sizes(path: Path, config: Config, within: str, tensors: int | None) -> None:
    """Numbers by which modules are built, of which the weights have to hold something."""
    for name, value in config.items():
        if type(value) is int and abs(value) >= 1 << 63:
            raise refusal(path, f"{within}{name}: {_shown(value)} is no number of a model")
        if tensors is None or type(value) is not int:
            continue
        most = max(tensors, MOST_EXPERTS if "expert" in name else MOST_PARTS)
        most = tensors if name in LAYERS else most
        if value > most and (name in LAYERS or PARTS.fullmatch(name)):
            problem = f"{within}{name}: {value:,}, and the weights have {tensors:,} tensors"
            raise refusal(path, problem)


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return text if len(text) <= 60 else text[:57] + "..."
