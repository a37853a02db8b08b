"""The JSON of a model's folder, held against what it may say (`config_rules`) before any library
reads it.

A configuration comes with the model and is as untrusted as the model. transformers and PEFT obey
keys that load code, fetch from the Hub or open other files: none of them may be there. Numbers that
decide how much is built have to be numbers, and not more than the weights hold. Whatever else a
family's configuration has is the library's to judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.run.config_rules import (
    ADAPTER,
    BITSANDBYTES,
    CODE,
    LAYERS,
    MODEL,
    Rule,
    is_switch,
    is_text,
    is_word,
    lists,
    or_null,
)

LIMIT = "llmpipe loads safetensors, JSON and text only"

Config = dict[str, Any]

AUTO_MAP = "auto_map"
"""Classes that come with a model, which transformers obeys where it has none of its own or is told
to trust them. It is never told so here: trust_remote_code is False in every call."""

NO_CLASS = "convert it to a kind of models that transformers has itself, or take one of these"

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")

EXPERTS = ("eager", "batched_mm", "grouped_mm")

QUANTIZED = ("bitsandbytes", "mxfp4")
"""Weights that can be trained on as they lie there: the latter are unpacked as they are read."""

OF_TORCHAO = {
    "quant_method",
    "quant_type",
    "include_input_output_embeddings",
    "modules_to_not_convert",
    "untie_embedding_weights",
}
KINDS_OF_TORCHAO = ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig")
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

PARTS = re.compile(r"(\w*_)?(layers?|blocks?|depths?|experts?)")
"""Names of other numbers by which modules are built."""

MOST_PARTS = 1_000
"""Of such a number, where the weights have fewer tensors."""

MOST_EXPERTS = 32_768
"""Which may be all in one tensor."""


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
    return pair and all(map(or_null(is_text), value))


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
            return known and kind in KINDS_OF_TORCHAO and "_data" in only
        case {"quant_method": "compressed-tensors", "config_groups": {"group_0": dict(group)}}:
            few = quantization.keys() <= OF_COMPRESSED and len(quantization["config_groups"]) == 1
            left = quantization.get("ignore")
            plain = not any(quantization.get(name) for name in NOT_EXPORTED)
            return few and plain and group.get("targets") == ["Linear"] and lists(is_word)(left)
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
        if name not in BITSANDBYTES and value is not None and not is_switch(value):
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
