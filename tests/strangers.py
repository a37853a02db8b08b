"""What strangers hand over: model folders, configurations, weights, tokenizers, templates, GGUFs,
adapters and manifests, each damaged or forged in one way.

An attack is a function of a folder that holds what is whole: `model/`, a run `run/` with `sft` and
`lora`, and `model.gguf`. It changes one thing, and returns what the recipe asks for beside the
ordinary, or nothing.
"""

import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmpipe.files.json import write_json
from llmpipe.files.tables import table
from llmpipe.run.artifact import MANIFEST, SCRATCH, fingerprint

Attack = Callable[[Path], dict[str, Any] | None]

CANARY = "open('CANARY', 'w').write('it ran')"

DEEP = "[" * 100_000 + "]" * 100_000

DIGITS = "1" * 5_000


def edited(name: str, **changes: Any) -> Attack:
    """Other values in a JSON file of the model."""

    def attack(folder: Path) -> None:
        path = folder / "model" / name
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(values | changes))

    return attack


def written(name: str, content: str | bytes) -> Attack:
    """Something else in the place of a file of the model."""

    def attack(folder: Path) -> None:
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return attack


def placed(name: str, place: Callable[[Path], Any]) -> Attack:
    """What is no file in the place of one of the model."""

    def attack(folder: Path) -> None:
        path = folder / "model" / name
        path.unlink(missing_ok=True)
        place(path)

    return attack


def _socket(path: Path) -> None:
    # an address has to be short
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


def _spaces(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"model_type": "llama"')
        file.truncate(1 << 30)


def _deep_folders(path: Path) -> None:
    here = Path.cwd()
    path.mkdir()
    os.chdir(path)
    try:
        for _ in range(1_500):
            os.mkdir("d")
            os.chdir("d")
        os.mkfifo("pipe")
    finally:
        os.chdir(here)


def configurations() -> Iterator[tuple[str, Attack]]:
    """config.json: keys that load code, values of other types, sizes out of proportion."""
    keys: dict[str, list[Any]] = {
        "auto_map": [["evil.Evil", None], "evil.Evil", {"AutoConfig": 3}, {"AutoConfig": [""]}],
        "custom_generate": ["other/repo"],
        "configuration_files": [["config.1.0.0.json"], ["config.../../x.json"]],
        "transformers_weights": ["../other.safetensors", "other.safetensors"],
        "attn_implementation": ["kernels-community/flash-attn3", "other/kernel:f", {"": "a/b"}, 3],
        "_attn_implementation": ["other/kernel@main"],
        "_attn_implementation_internal": ["other/kernel"],
        "experts_implementation": ["other/kernel"],
        "use_kernels": [True],
        "kernel_config": [{"RMSNorm": "other/kernel"}],
        "fusion_config": [{"patch_embeddings": True}],
        "quantization_config": [
            {"quant_method": "gptq", "bits": 4},
            {"quant_method": "unknown"},
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "x"},
            {"quant_method": "bitsandbytes", "hub": "other/repo"},
            {"quant_method": ["bitsandbytes"]},
            {},
            [],
            "bitsandbytes",
        ],
        "dtype": ["load", "float9", 3, ["float32"], {"": "load"}, "Tensor"],
        "torch_dtype": ["save", {"a": 1}],
        "id2label": [[], "x", {"a": "b"}, {"0": 1}, {"0": {"a": 1}}],
        "label2id": [[1], "x"],
        "architectures": ["LlamaForCausalLM", [1], [{}], [["x"]]],
        "model_type": ["", "no_such_model", 3, ["llama"], {"a": 1}, "../llama", None],
        "num_hidden_layers": [0, -1, 10**9, 10**30, "2", 2.5, [2, 2], {"a": 1}, True],
        "num_attention_heads": [0, -4, 3, 10**12, "4", [], None],
        "num_key_value_heads": [0, 3, 10**9, "x"],
        "hidden_size": [0, -64, 10**6, 10**12, 63, "64", None],
        "intermediate_size": [0, -1, 10**10, "128"],
        "vocab_size": [0, -1, 10**9, 10**12, "512", None, 10**40],
        "head_dim": [0, -16, 10**9, "x"],
        "max_position_embeddings": ["x", -5, {}, [512]],
        "rope_parameters": [[], "x", {"rope_type": 3}, {"factor": "x"}, {"rope_type": "none such"}],
        "rope_scaling": [3, {"type": "linear", "factor": [2]}],
        "hidden_act": ["no such", 3, None, {"a": 1}],
        "eos_token_id": ["x", {"a": 1}, [[1]], 10**20],
        "pad_token_id": ["x", 10**9, [1]],
        "bos_token_id": ["x", {}],
        "layer_types": [["no such"], "x", 3, [["a"]]],
        "text_config": [{"auto_map": {"AutoConfig": "evil.Evil"}}, {"num_hidden_layers": 10**9}],
        "to_dict": [1],
        "get_text_config": ["x"],
        "from_pretrained": [None],
        "__class__": ["x"],
        "rms_norm_eps": ["x", None, [1]],
        "initializer_range": ["x"],
        "tie_word_embeddings": ["x"],
        "attention_bias": [{"a": 1}],
        "use_pretrained_backbone": [True],
        "sub_configs": [3],
    }
    harmless = {("tie_word_embeddings", "x"), ("initializer_range", "x")}
    for key, values in keys.items():
        for value in values:
            if (key, str(value)) not in harmless:
                yield f"config {key} {str(value)[:30]}", edited("config.json", **{key: value})
    for classes in ({"AutoConfig": "evil.Evil"}, {"AutoModelForCausalLM": "other/repo--evil.Evil"}):
        for key, value in {"model_type": "evil", "architectures": ["EvilForCausalLM"]}.items():
            attack = edited("config.json", **{"auto_map": classes, key: value})
            yield f"config auto_map {min(classes)} {key}", attack
    for name, text in {
        "deep": DEEP,
        "deep inside": f'{{"model_type": "llama", "x": {DEEP}}}',
        "deep enough": '{"model_type": "llama", "x": ' + "[" * 200 + "]" * 200 + "}",
        "digits": f'{{"model_type": "llama", "x": {DIGITS}}}',
        "surrogate": '{"model_type": "\\ud800"}',
        "twice": '{"model_type": "llama", "model_type": "gpt2"}',
        "list": "[]",
        "null": "null",
        "empty": "",
        "cut": '{"model_type": "lla',
        "nan": "NaN",
    }.items():
        yield f"config.json {name}", written("config.json", text)
    yield "config.json latin-1", written("config.json", b'{"model_type": "\xe4"}')


def folders() -> Iterator[tuple[str, Attack]]:
    """What lies in a model's folder."""
    yield "code", written("modeling_evil.py", CANARY)
    yield "code below", written("a/b/evil.py", CANARY)
    yield "custom generate", written("custom_generate/generate.py", CANARY)
    shard = "shard-00000-model-00001-of-00001.safetensors"
    yield "spread weights", written(shard, b"\0" * 64)
    names = ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json")
    for name in (*names, "tokenizer_config.json", "extra.json", "README.md"):
        yield f"pipe {name}", placed(name, os.mkfifo)
    yield "socket", placed("extra.json", _socket)
    yield "link", placed("config.json", lambda path: path.symlink_to("/etc/passwd"))
    yield "link of a folder", placed("more", lambda path: path.symlink_to("/etc"))
    yield "link in a circle", placed("more", lambda path: path.symlink_to("more"))
    for name in (*names, "tokenizer_config.json", "special_tokens_map.json"):
        yield f"folder {name}", placed(name, os.mkdir)
        yield f"spaces {name}", placed(name, _spaces)
    yield "spaces template", placed("chat_template.jinja", _spaces)
    yield "pipe deep down", placed("deep", _deep_folders)
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        for what, text in {"deep": DEEP, "digits": f'{{"a": {DIGITS}}}', "list": "[1]"}.items():
            yield f"{name} {what}", written(name, text)
    yield "tokens latin-1", written("added_tokens.json", b'{"\xe4": 3}')
    for key, value in {
        "auto_map": {"AutoTokenizer": "evil.Evil"},
        "init_inputs": ["/etc/passwd"],
        "fast_tokenizer_files": ["tokenizer.../../x.json"],
        "tokenizer_class": "../evil",
        "vocab_file": "/etc/passwd",
        "merges_file": "../../secret",
        "added_tokens_decoder": [1],
        "model_max_length": "x",
    }.items():
        yield f"tokenizer_config {key}", edited("tokenizer_config.json", **{key: value})
    evil = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "EvilTokenizer"}
    yield "tokenizer_config auto_map unknown", edited("tokenizer_config.json", **evil)
    yield (
        "generation_config auto_map",
        edited("generation_config.json", auto_map={"a": "evil.Evil"}),
    )
    for key, value in {
        "custom_generate": "other/repo",
        "compile_config": {"mode": "max-autotune"},
        "eos_token_id": {"a": 1},
        "max_new_tokens": "x",
        "temperature": [],
        "prompt_lookup_num_tokens": 5,
        "penalty_alpha": 0.6,
        "watermarking_config": {"greenlist_ratio": "x"},
        "bad_words_ids": [["x"]],
        "forced_eos_token_id": "x",
        "num_beams": "x",
    }.items():
        yield f"generation_config {key}", edited("generation_config.json", **{key: value})
    for what, index in {
        "list": [],
        "null": {"weight_map": None, "metadata": {}},
        "names list": {"weight_map": ["model.safetensors"], "metadata": {}},
        "numbers": {"weight_map": {"a": 3}, "metadata": {}},
        "outside": {"weight_map": {"a": "../x.safetensors"}, "metadata": {}},
        "absolute": {"weight_map": {"a": "/etc/x.safetensors"}, "metadata": {}},
        "pickle": {"weight_map": {"a": "model.bin"}, "metadata": {}},
        "missing": {"weight_map": {"a": "none.safetensors"}, "metadata": {}},
        "no metadata": {"weight_map": {"a": "model.safetensors"}},
    }.items():
        yield f"index {what}", _indexed(index)


def _indexed(index: Any) -> Attack:
    def attack(folder: Path) -> None:
        (folder / "model" / "model.safetensors").rename(folder / "model" / "part.safetensors")
        name = "model.safetensors.index.json"
        (folder / "model" / name).write_text(json.dumps(index))

    return attack


def headers() -> Iterator[tuple[str, Attack]]:
    """model.safetensors: what its header says."""

    def forged(change: Callable[[dict[str, Any]], Any]) -> Attack:
        def attack(folder: Path) -> None:
            path = folder / "model" / "model.safetensors"
            data = path.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header = change(header) or header
            text = (header if isinstance(header, str) else json.dumps(header)).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

        return attack

    def first(header: dict[str, Any]) -> dict[str, Any]:
        return header[min(name for name in header if name != "__metadata__")]

    def put(**values: Any) -> Callable[[dict[str, Any]], None]:
        return lambda header: first(header).update(values)

    def swapped(header: dict[str, Any]) -> None:
        names = sorted(name for name in header if name != "__metadata__")
        one, two = header[names[0]], header[names[-1]]
        one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]

    yield "weights huge header", written("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}")
    yield "weights long header", written("model.safetensors", struct.pack("<Q", 90_000_000) + b"{}")
    yield "weights empty", written("model.safetensors", b"")
    yield "weights short", written("model.safetensors", b"\3\0\0")
    yield "weights no tensors", written("model.safetensors", struct.pack("<Q", 2) + b"{}")
    yield "weights of zeros", written("model.safetensors", b"\0" * 4096)
    yield "weights deep", forged(lambda header: DEEP)
    yield "weights list", forged(lambda header: "[1, 2]")
    yield "weights digits", forged(lambda header: f'{{"a": {DIGITS}}}')
    yield "weights twice", forged(lambda header: json.dumps(header)[:-1] + ', "a": 1, "a": 2}')
    yield "weights offsets outside", forged(put(data_offsets=[0, 1 << 50]))
    yield "weights offsets negative", forged(put(data_offsets=[-4, 4]))
    yield "weights offsets text", forged(put(data_offsets="0"))
    yield "weights overlapping", forged(put(data_offsets=[0, 4]))
    yield "weights swapped", forged(swapped)
    yield "weights shape huge", forged(put(shape=[1 << 40, 1 << 40]))
    yield "weights shape negative", forged(put(shape=[-1, -64]))
    yield "weights shape text", forged(put(shape="x"))
    yield "weights dtype", forged(put(dtype="PICKLE"))
    yield "weights dtype list", forged(put(dtype=["F32"]))
    yield "weights other dtype", forged(put(dtype="F64"))
    yield "weights missing", forged(lambda header: {"x": first(header)})

    def cut(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        os.truncate(path, path.stat().st_size // 2)

    yield "weights cut", cut


def tokenizers() -> Iterator[tuple[str, Attack]]:
    """tokenizer.json: what grows, never ends or cannot be."""

    def part(name: str, value: Any) -> Attack:
        def attack(folder: Path) -> None:
            path = folder / "model" / "tokenizer.json"
            values = json.loads(path.read_text())
            values[name] = value
            path.write_text(json.dumps(values))

        return attack

    def model(change: Callable[[dict[str, Any]], Any]) -> Attack:
        def attack(folder: Path) -> None:
            path = folder / "model" / "tokenizer.json"
            values = json.loads(path.read_text())
            change(values["model"])
            path.write_text(json.dumps(values))

        return attack

    def replaces(pattern: dict[str, str], content: str, count: int = 1) -> dict[str, Any]:
        step = {"type": "Replace", "pattern": pattern, "content": content}
        return {"type": "Sequence", "normalizers": [step] * count}

    def split(pattern: str) -> dict[str, Any]:
        step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        return {"type": "Sequence", "pretokenizers": [step | {"invert": False}]}

    yield "tokenizer bomb", part("normalizer", replaces({"String": "a"}, "a" * 1000, 3))
    yield "tokenizer doubling", part("normalizer", replaces({"String": "e"}, "ee", 32))
    yield "tokenizer long", part("normalizer", replaces({"String": "e"}, "x" * 50_000_000))
    yield "tokenizer empty matches", part("normalizer", replaces({"Regex": "x*"}, "yyyyyyyyy", 12))
    prepend = {"type": "Prepend", "prepend": "x" * 10_000_000}
    yield "tokenizer prepend", part("normalizer", prepend)
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 9}
    yield "tokenizer charsmap", part("normalizer", charsmap)
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "////fwAA"}
    yield "tokenizer charsmap length", part("normalizer", charsmap)
    for name, pattern in {
        "exponential": "(a+)+$",
        "exponential words": r"(\w+\s?)*$",
        "exponential choice": "(a|a)*$",
        "backreference": r"(\w*)\1{20}",
        "repeated": "((a{1,500}){1,500}){1,500}",
        "large": "x" * 1_000_000,
        "broken": "(((",
        "nested": "(" * 50_000 + ")" * 50_000,
    }.items():
        yield f"tokenizer pattern {name}", part("pre_tokenizer", split(pattern))
    yield "tokenizer normalizer pattern", part("normalizer", replaces({"Regex": "(e+)+!"}, "e"))
    nested: Any = {"type": "NFC"}
    for _ in range(5_000):
        nested = {"type": "Sequence", "normalizers": [nested]}
    yield "tokenizer unknown part", part("normalizer", {"type": "Evil"})
    yield "tokenizer decoder", part("decoder", {"type": "Replace", "content": 3})
    yield "tokenizer truncation", part("truncation", {"max_length": -1})
    for name, value in {"list": [], "text": "x", "number": 3}.items():
        yield f"tokenizer model {name}", part("model", value)
        yield f"tokenizer added {name}", part("added_tokens", value or [value])
    token = {"content": "<x>", "single_word": False, "lstrip": False, "rstrip": False}
    token |= {"normalized": False, "special": True}
    yield "tokenizer far token", part("added_tokens", [token | {"id": 4_000_000_000}])
    yield "tokenizer negative token", part("added_tokens", [token | {"id": -5}])
    yield "tokenizer empty token", part("added_tokens", [token | {"id": 0, "content": ""}])
    yield "tokenizer far id", model(lambda it: it["vocab"].update({"zzz": 4_000_000_000}))
    yield "tokenizer negative id", model(lambda it: it["vocab"].update({"zzz": -1}))
    yield "tokenizer huge id", model(lambda it: it["vocab"].update({"zzz": 10**30}))
    yield "tokenizer merges", model(lambda it: it.update(merges=[["no", "such"]]))
    yield "tokenizer no vocabulary", model(lambda it: it.update(vocab={}, merges=[]))
    yield "tokenizer kind", model(lambda it: it.update(type="Evil"))
    for name, text in {
        "deep": DEEP,
        "digits": f'{{"a": {DIGITS}}}',
        "empty": "",
        "null": "null",
    }.items():
        yield f"tokenizer.json {name}", written("tokenizer.json", text)
    yield "tokenizer.json latin-1", written("tokenizer.json", b'{"a": "\xe4"}')
    for key, value in {
        "eos_token": {"content": {"a": 1}},
        "added_tokens_decoder": {"x": {"content": "<x>"}},
        "extra_special_tokens": "x",
    }.items():
        yield f"tokenizer_config odd {key}", edited("tokenizer_config.json", **{key: value})


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
)


def templates() -> Iterator[tuple[str, Attack]]:
    """chat_template.jinja: what reaches out, or never ends."""
    reach = {
        "import": "{% import '/etc/passwd' as x %}",
        "include": "{% include '/etc/passwd' %}",
        "extends": "{% extends '/etc/passwd' %}",
        "from": "{% from 'os' import system %}",
        "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": "{{ raise_exception.__globals__['os'].system('touch CANARY') }}",
        "init": "{{ namespace.__init__.__globals__ }}",
        "builtins": "{{ lipsum.__globals__.__builtins__.open('CANARY', 'w') }}",
        "cycler": "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
        "format": "{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}",
        "attr": "{{ (''|attr('__class__')).x.y }}",
        "undefined function": "{{ open('/etc/passwd').read() }}",
        "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "string": "{{ 'x' * 9999999999 }}",
        "doubling": "{% set n = namespace(x='xx') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}",
        "power": "{{ 9 ** (9 ** 9) }}",
        "digits": "{{ 9 ** 99999 }}",
        "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "centre": "{{ 'x'|center(99999999999) }}",
        "join": "{{ range(99999)|map('string')|join('x' * 999999) }}",
        "sort": "{{ (range(99999)|list * 999999)|sort }}",
        "filter": "{{ 1|nosuchfilter }}",
        "syntax": "{% for %}",
        "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "ifs": "{% if 1 %}" * 2000 + "{% endif %}" * 2000,
        "nothing": "",
        "raises": "{{ raise_exception('no') }}",
        "endless text": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    }
    for name, text in reach.items():
        template = text + (TURNS if name not in ("nothing",) else "constant")
        yield f"template {name}", written("chat_template.jinja", template)
    yield "template latin-1", written("chat_template.jinja", b"\xe4" + TURNS.encode())


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(
    metadata: dict[str, tuple[int, bytes]],
    tensors: list[tuple[str, list[int], int, int]],
    **head: int,
) -> bytes:
    """A GGUF file: metadata as type and bytes by name; tensors as name, shape, type, offset."""
    counts = {"version": 3, "count": len(tensors), "values": len(metadata)} | head
    parts = [b"GGUF", struct.pack("<IQQ", counts["version"], counts["count"], counts["values"])]
    parts += [_text(name) + struct.pack("<I", kind) + raw for name, (kind, raw) in metadata.items()]
    for name, shape, kind, offset in tensors:
        parts += [
            _text(name),
            struct.pack("<I", len(shape)),
            struct.pack(f"<{len(shape)}Q", *shape),
        ]
        parts.append(struct.pack("<IQ", kind, offset))
    text = b"".join(parts)
    return text + b"\0" * (-len(text) % 32 + 4096)


LLAMA = {
    "general.architecture": (8, _text("llama")),
    "llama.block_count": (4, struct.pack("<I", 1)),
    "llama.context_length": (4, struct.pack("<I", 64)),
    "llama.embedding_length": (4, struct.pack("<I", 32)),
    "llama.feed_forward_length": (4, struct.pack("<I", 32)),
    "llama.attention.head_count": (4, struct.pack("<I", 2)),
    "llama.attention.layer_norm_rms_epsilon": (6, struct.pack("<f", 1e-6)),
}
TABLE = ("token_embd.weight", [32, 32], 0, 0)


def ggufs() -> Iterator[tuple[str, Attack]]:
    """GGUF files."""

    def file(content: bytes) -> Attack:
        def attack(folder: Path) -> dict[str, Any]:
            (folder / "bad.gguf").write_bytes(content)
            return {"model": str(folder / "bad.gguf")}

        return attack

    whole = gguf(LLAMA, [TABLE])
    yield "gguf empty", file(b"")
    yield "gguf magic", file(b"GGML" + whole[4:])
    yield "gguf magic alone", file(b"GGUF")
    yield "gguf version", file(gguf(LLAMA, [TABLE], version=9))
    yield "gguf big-endian", file(gguf(LLAMA, [TABLE], version=3 << 24))
    yield "gguf tensors", file(gguf(LLAMA, [TABLE], count=1 << 62))
    yield "gguf values", file(gguf(LLAMA, [TABLE], values=1 << 62))
    yield "gguf values a little", file(gguf(LLAMA, [TABLE], values=90))
    for share in (20, 60, 200, len(whole) - 100):
        yield f"gguf cut {share}", file(whole[:share])
    yield "gguf zeros", file(b"GGUF" + b"\0" * 4096)
    yield "gguf ones", file(b"GGUF\3\0\0\0" + b"\xff" * 4096)
    odd = {
        "text length": (8, struct.pack("<Q", 1 << 63)),
        "type": (99, b""),
        "array length": (9, struct.pack("<IQ", 4, 1 << 60)),
        "array of texts": (9, struct.pack("<IQ", 8, 1 << 40)),
        "array type": (9, struct.pack("<IQ", 77, 3)),
        "latin-1": (8, struct.pack("<Q", 1) + b"\xe4"),
        "nested arrays": (9, struct.pack("<IQ", 9, 1) * 5000),
    }
    for name, value in odd.items():
        yield f"gguf {name}", file(gguf(LLAMA | {"x.odd": value}, [TABLE]))
    yield (
        "gguf architecture",
        file(gguf(LLAMA | {"general.architecture": (8, _text("evil"))}, [TABLE])),
    )
    number = (4, struct.pack("<I", 3))
    yield "gguf architecture number", file(gguf(LLAMA | {"general.architecture": number}, [TABLE]))
    without = {name: value for name, value in LLAMA.items() if name != "general.architecture"}
    yield "gguf no architecture", file(gguf(without, [TABLE]))
    yield "gguf nothing", file(gguf({}, []))
    for name in ("block_count", "embedding_length", "attention.head_count", "feed_forward_length"):
        for count in (0, 4_000_000_000):
            value = (4, struct.pack("<I", count))
            yield f"gguf {name} {count}", file(gguf(LLAMA | {f"llama.{name}": value}, [TABLE]))
        text = (8, _text("x"))
        yield f"gguf {name} text", file(gguf(LLAMA | {f"llama.{name}": text}, [TABLE]))
    yield "gguf alignment", file(gguf(LLAMA | {"general.alignment": (4, b"\0" * 4)}, [TABLE]))
    yield "gguf no tokenizer", file(whole)
    for name, tensor in {
        "type": ("token_embd.weight", [32, 32], 99, 0),
        "offset": ("token_embd.weight", [32, 32], 0, 1 << 60),
        "shape": ("token_embd.weight", [1 << 40, 1 << 40], 0, 0),
        "shape zero": ("token_embd.weight", [0, 32], 0, 0),
        "dimensions": ("token_embd.weight", [1] * 200, 0, 0),
        "name": ("x" * 60_000, [32, 32], 0, 0),
    }.items():
        yield f"gguf tensor {name}", file(gguf(LLAMA, [tensor]))
    yield "gguf overlapping", file(gguf(LLAMA, [TABLE, ("output.weight", [32, 32], 0, 32)]))
    yield "gguf same tensor", file(gguf(LLAMA, [TABLE, TABLE]))


def resealed(artifact: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest, and give it the fingerprint that fits."""
    document = json.loads((artifact / MANIFEST).read_text())
    document["files"] = {
        name: {"size": entry.size, "sha256": entry.sha256}
        for name, entry in table(artifact, SCRATCH | {"checkpoints"}).items()
    }
    changed = change(document)
    document = document if changed is None else changed
    if isinstance(document, dict):
        document["fingerprint"] = fingerprint(document)
    write_json(artifact / MANIFEST, document)


def put(document: dict[str, Any], path: str, value: Any) -> None:
    """Set what lies at a dotted path; ... takes it away."""
    *parts, last = path.split("/")
    for part in parts:
        document = document[part]
    if value is ...:
        del document[last]
    else:
        document[last] = value


LORA = {"stage": "lora", "name": "next", "model": "artifact:lora", "adapter__rank": 4}
LORA |= {"adapter__alpha": 8}


def adapters() -> Iterator[tuple[str, Attack]]:
    """adapter_config.json of an adapter whose manifest was sealed anew."""

    def config(**changes: Any) -> Attack:
        def attack(folder: Path) -> dict[str, Any]:
            path = folder / "run" / "lora" / "model" / "adapter_config.json"
            values = json.loads(path.read_text()) | changes
            values = {name: value for name, value in values.items() if value is not ...}
            path.write_text(json.dumps(values))
            resealed(folder / "run" / "lora", lambda _: None)
            return LORA

        return attack

    keys: dict[str, list[Any]] = {
        "peft_type": ["XLORA", "PROMPT_TUNING", "no such", 3, None, ["LORA"], ...],
        "auto_mapping": [{"base_model_class": "X", "parent_library": "evil"}],
        "megatron_config": [{"a": 1}],
        "megatron_core": ["evil"],
        "corda_config": [{"cache_file": "/etc/passwd"}],
        "eva_config": [{"rho": 2}],
        "lora_ga_config": [{"cache_file": "x"}],
        "arrow_config": [{"a": 1}],
        "loftq_config": [{"loftq_bits": 4}],
        "layer_replication": [[[0, 1]]],
        "target_modules": ["(a+)+$", ["(a+)+$"], 3, [3], [], {"a": 1}],
        "modules_to_save": [["no such"], "x", [3]],
        "rank_pattern": [{"(a+)+$": 3}, {"q_proj": 10**9}, {"q_proj": "x"}, [1]],
        "alpha_pattern": [{"(.*)*x": 3}],
        "r": [0, -1, 10**9, "2", None, 2.5, 3],
        "lora_alpha": ["x", None, [1]],
        "lora_dropout": [2, -1, "x"],
        "task_type": ["EVIL", 3],
        "bias": ["all", "x"],
        "init_lora_weights": ["eva", "loftq", "pissa_niter_999999999"],
        "trainable_token_indices": [[10**9], ["x"], "x", [0]],
        "layers_pattern": ["(a+)+$"],
        "target_parameters": [["(a+)+$"]],
        "fan_in_fan_out": ["x"],
        "use_dora": [True, "x"],
        "unknown_key": ["x"],
    }
    for key, values in keys.items():
        for value in values:
            yield f"adapter {key} {str(value)[:30]}", config(**{key: value})

    def weights(content: bytes) -> Attack:
        def attack(folder: Path) -> dict[str, Any]:
            path = folder / "run" / "lora" / "model" / "adapter_model.safetensors"
            path.write_bytes(content)
            resealed(folder / "run" / "lora", lambda _: None)
            return LORA

        return attack

    yield "adapter weights empty", weights(b"")
    yield "adapter weights header", weights(struct.pack("<Q", 1 << 60))
    yield "adapter weights none", weights(struct.pack("<Q", 2) + b"{}")


def manifests() -> Iterator[tuple[str, Attack]]:
    """Forged manifests, sealed anew."""

    def forged(artifact: str, change: Callable[[dict[str, Any]], Any]) -> Attack:
        def attack(folder: Path) -> dict[str, Any] | None:
            resealed(folder / "run" / artifact, change)
            if artifact == "lora":
                return LORA
            return {"name": "next", "model": f"artifact:{artifact}"}

        return attack

    def at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda document: put(document, path, value)

    fields: dict[str, list[Any]] = {
        "version": ["x", None, [1]],
        "kind": ["evil", 3, None, ...],
        "stage": [3, None, ...],
        "name": ["../x", "", 3, None],
        "identity": [3, None],
        "asked": [None, [], "x", ...],
        "asked/recipe": [None, [], "x"],
        "asked/recipe/stage": [3, {"a": 1}],
        "asked/recipe/data": ["x", [1], {"chat_template_kwargs": "x"}],
        "asked/models": [[], "x", {"model": 3}],
        "asked/content": [[], {"a": 3}],
        "parents": [None, "x", [3], [{"name": "../../x", "fingerprint": "x"}], [{"name": "x"}]],
        "models": [[], None, {"model": 3}, {"model": {"reference": 3}}, {"model": {}}],
        "models/model/reference": ["artifact:../../x", "artifact:", "", None],
        "data": [[], 3, {}],
        "data/rows": [None, {"read": "x"}],
        "data/tokens": [[]],
        "tokenizer": [3, {}, []],
        "training": [[], {"steps": "x"}],
        "files": [[], None, {"a": 3}, {"../x": {"size": 1, "sha256": "x"}}, {}],
        "final": [None, []],
        "hardware": ["x"],
        "versions": [[], {"torch": 3}],
        "seconds": ["x", None],
        "merged_from": ["../x", 3],
        "verified": [3],
    }
    for path, values in fields.items():
        for value in values:
            shown = "absent" if value is ... else str(value)[:40]
            yield f"manifest {path} {shown}", forged("sft", at(path, value))
    outside = "artifact:../../outside/x"
    references = [
        outside,
        "artifact:x/../../y",
        "artifact:.locks",
        "artifact:lora@../x",
        "artifact:",
    ]
    references += ["artifact:none", "artifact:lora", 3, None, [], {}, "", "\0", "/dev/zero", "/etc"]
    references += ["https://evil.example/model", f"artifact:lora@{DIGITS}", "./x.gguf"]
    for reference in references:
        name = f"base.reference {str(reference)[:30]!r}"
        yield name, forged("lora", at("base/reference", reference))
    for path, values in {
        "base": [None, [], "x", ...],
        "base/kind": ["evil", 3],
        "base/identity": [3, [], {}, {"files": "../../x"}, {"revision": "../../x"}],
        "base/folder": [3],
        "kind": ["model", "evaluation"],
    }.items():
        for value in values:
            shown = "absent" if value is ... else str(value)[:40]
            yield f"manifest of an adapter {path} {shown}", forged("lora", at(path, value))
    for name, content in {"list": [], "null": None, "number": 3, "text": "x"}.items():
        yield f"manifest {name}", _sealed_text(json.dumps(content))
    for name, text in {"deep": DEEP, "digits": f'{{"a": {DIGITS}}}', "empty": ""}.items():
        yield f"manifest {name}", _sealed_text(text)
    yield "manifest surrogate", _sealed_text('{"fingerprint": "\\ud800"}')
    yield "adapters in a circle", circle
    yield "adapters without end", chain


def _sealed_text(text: str) -> Attack:
    def attack(folder: Path) -> dict[str, Any]:
        (folder / "run" / "sft" / MANIFEST).write_text(text)
        return {"name": "next", "model": "artifact:sft"}

    return attack


def _based_on(name: str) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        document["base"] |= {"kind": "merged", "reference": f"artifact:{name}"}

    return change


def circle(folder: Path) -> dict[str, Any]:
    """Two adapters, each on the other."""
    import shutil

    shutil.copytree(folder / "run" / "lora", folder / "run" / "other")
    resealed(folder / "run" / "lora", _based_on("other"))
    resealed(folder / "run" / "other", _based_on("lora"))
    return LORA


def chain(folder: Path) -> dict[str, Any]:
    """A thousand adapters, each on the next."""
    import shutil

    for i in range(1_000):
        home = folder / "run" / f"lora{i}"
        home.mkdir()
        (home / "model").mkdir()
        for name in ("recipe.yaml", MANIFEST):
            shutil.copy(folder / "run" / "lora" / name, home / name)
        for path in (folder / "run" / "lora" / "model").iterdir():
            os.link(path, home / "model" / path.name)
        resealed(home, _based_on(f"lora{i + 1}"))
    resealed(folder / "run" / "lora", _based_on("lora0"))
    return LORA


def every() -> dict[str, Attack]:
    """All of them, by their names."""
    kinds = (configurations, folders, headers, tokenizers, templates, ggufs, adapters, manifests)
    return {name: attack for kind in kinds for name, attack in kind()}
