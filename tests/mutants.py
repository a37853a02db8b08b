"""Recipes that are wrong, made of right ones by a seed: a mutation is what a person mistypes, what
a script writes, or what no person would.

Three kinds: values of another type or size in the right place, which are mostly refused by name and
sometimes valid; keys that are gone, moved or misspelt; and text that is hurt.
"""

import copy
import json
import random
import string
from typing import Any

import yaml

from llmpipe.recipe.sections import Training
from llmpipe.stages import STAGES, schema
from tests import life
from tests.attempts import Case

ROWS = (life.TINY / "rows.jsonl").read_bytes().splitlines(keepends=True)[:14]
PAIRS = (life.TINY / "pairs.jsonl").read_bytes().splitlines(keepends=True)[:14]
FILES = {
    "rows.jsonl": b"".join(ROWS),
    "pairs.jsonl": b"".join(PAIRS),
    "rewards.py": (life.TINY / "rewards.py").read_bytes(),
    "template.jinja": (life.TINY / "model" / "chat_template.jinja").read_bytes(),
    "text.txt": b"Once upon a time.\nThere was a file.\n" * 40,
    "latin1.csv": "prompt,completion\nsch\u00f6n,ja\n".encode("latin-1"),
    "empty.jsonl": b"",
    "folder/readme.md": b"# nothing here\n",
    "folder.jsonl/x": b"",
}
MODEL = str(life.TINY / "model")
ODD: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        " ",
        "no",
        "auto",
        "x" * 3000,
        "\u00e9\u4f60\U0001f642",
        "\u202e",
        "-",
    ),
    *("a\0b", "\x7f", "../../..", "~nobody/x", "./rows.jsonl", "./folder", "./folder.jsonl"),
    *("./nowhere.jsonl", "./empty.jsonl", "./latin1.csv", "artifact:sft", "artifact:nobody@3", "."),
    *("/", "*", "./*", "./**", "/dev/null", "/dev/zero", "org/name", "org/name@main", "1e5", "08"),
    *("0x10", "2026-11-26", "1:30", "{{", "{% if", "[", "${HOME}", "%s", "./rewards.py:nobody"),
    *("./rewards.py:brevity", "./rewards.py", MODEL, "./template.jinja", "./text.txt", "<<", "="),
    *(0, 1, -1, 2, 3, 7, 8, 31, 64, 1000, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, -(10**20)),
    *(0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-300, 1e-40, 1e10, 1e30, 1e300, 1e-8, 0.999999, 2.5),
    *(float("inf"), float("-inf"), float("nan")),
    *([], {}, [[]], [{}], {"": 1}, {"a": None}, ["a", "a"], [None], {"a": {"b": {"c": []}}}),
    *(
        [1, "a", None, {}],
        [0.1] * 50,
        {"0": 0},
        {"path": "./rows.jsonl"},
        [{"path": "./rows.jsonl"}],
    ),
]


def _rows(name: str = "rows.jsonl", **more: Any) -> dict[str, Any]:
    return {"train": [{"path": f"./{name}"}], "max_length": 64, "max_rejected": 0.2, **more}


def valid(stage: str, rng: random.Random) -> dict[str, Any]:
    """A small valid recipe of a stage that starts from the tiny model."""
    values: dict[str, Any] = {"stage": stage, "run": "runs/a", "launch": {"threads": 1}}
    if stage == "eval":
        task = {"data": [{"path": "./rows.jsonl", "limit": 4}]}
        generate = {"task": "generate", "max_new_tokens": 4, "score": ["exact_match"], **task}
        tasks = [{"task": "perplexity", "window": 64, "stride": 32, **task}, generate]
        gate = {"perplexity": {"max": 1e9}}
        return values | {"models": {"base": MODEL}, "tasks": tasks, "gate": gate}
    if stage == "sample":
        reward = [{"function": "./rewards.py:brevity"}]
        rollout = {"group": 2, "max_new_tokens": 4}
        return values | {"model": MODEL, "data": _rows(), "reward": reward, "rollout": rollout}
    if stage == "export":
        held_out = [{"path": "./rows.jsonl", "limit": 4}]
        formats = {"merged": ["bf16"], "gguf": ["f16"]}
        return values | {"model": MODEL, "formats": formats, "held_out": held_out}
    optim = {"learning_rate": 1e-3, "batch_size": 4, "steps": 1, "precision": "fp32"}
    values |= {"model": MODEL, "optim": optim, "checkpoint": {"every": 5}, "log": {"every": 1}}
    pairs = stage in ("reward", "dpo", "kto")
    values["data"] = _rows("pairs.jsonl" if pairs else "rows.jsonl", eval={"holdout": 0.1})
    if stage in ("lora", "qlora"):
        values["adapter"] = {"rank": 4, "alpha": 8}
    if stage == "qlora":
        values["quantization"] = {"bits": 4}
    if stage == "pretrain":
        values["data"] = {"train": [{"path": "./text.txt"}], "max_length": 32}
        optim["batch_tokens"] = 64
        del optim["batch_size"]
    if stage in ("ppo", "grpo"):
        values["reward"] = [{"function": "./rewards.py:brevity"}]
        values["rollout"] = {"max_new_tokens": 4} | ({"group": 2} if stage == "grpo" else {})
        values["algorithm"] = {"epochs": 1, "minibatches": 1}
    if rng.random() < 0.5 and stage not in ("reward", "pretrain"):
        values["samples"] = {"prompts": ["What is 2 + 2?"], "max_new_tokens": 2}
    return values


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe with every default written out, so that each field is there to be mutated."""
    return schema(values["stage"]).model_validate(values).model_dump(by_alias=True)


def odd_value(odd: list[Any], rng: random.Random) -> Any:
    """One of these, which belongs to the mutant alone: what is mutated next may be inside it."""
    return copy.deepcopy(rng.choice(odd))


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value below one."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    places = []
    for key, inner in items:
        places.append((*path, key))
        if isinstance(inner, dict | list):
            places += paths(inner, (*path, key))
    return places


def parent_of(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values


def near_value(value: Any, rng: random.Random) -> Any:
    """Another value of the same type, most often a valid one that nobody would choose."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([0, 1, 2, 3, 5, 7, 8, 9, 13, 63, 97, value + 1, value * 2, 10**6, 10**9])
    if isinstance(value, float):
        odd = [0.0, 1e-12, 1e-3, 0.1, 0.5, 0.999, 1.0, 1.5, 3.7, 1e3, 1e6, 1e20, value * 10]
        return rng.choice(odd)
    if isinstance(value, str):
        return rng.choice(
            [value + "x", value.upper(), value[:-1], value + " ", f"./{value}", value * 2]
        )
    if isinstance(value, list):
        return rng.choice([value * 2, value[:-1], [*value, *value[-1:]], value[::-1]])
    return value


def mutate(values: Any, rng: random.Random) -> str:
    """Change one thing, and say what."""
    places = paths(values)
    if not places:
        return "nothing"
    path = rng.choice(places)
    parent, key = parent_of(values, path), path[-1]
    where = ".".join(map(str, path))
    match rng.choice(
        ["odd", "odd", "near", "near", "near", "drop", "rename", "copy", "key", "add"]
    ):
        case "odd":
            parent[key] = odd = odd_value(ODD, rng)
            return f"{where} = {odd!r:.40}"
        case "near":
            parent[key] = near = near_value(parent[key], rng)
            return f"{where} ~ {near!r:.40}"
        case "drop":
            del parent[key]
            return f"{where} dropped"
        case "rename" if isinstance(parent, dict):
            name = str(
                rng.choice([f"{key}s", str(key)[::-1], str(key)[:-1], "", "\u00e9", "1", "a.b"])
            )
            parent[name] = parent.pop(key)
            return f"{where} renamed to {name!r}"
        case "copy":
            other = rng.choice(places)
            parent[key] = json.loads(json.dumps(parent_of(values, other)[other[-1]]))
            return f"{where} = what {'.'.join(map(str, other))} is"
        case "add" if isinstance(parent, dict):
            odd = odd_value(ODD, rng)
            name = rng.choice(["trainer", "seed", "name", "format", "columns", "weight", "x"])
            parent[name] = odd
            return f"beside {where}: {odd!r:.40}"
        case _:
            fields = {key: odd_value(ODD, rng) for key in ("trainer", "seed", "name", "adapter")}
            name = rng.choice(list(fields))
            if isinstance(values, dict):
                values[name] = fields[name]
            return f"{name} = {fields[name]!r:.40}"


def hurt(data: bytes, rng: random.Random) -> bytes:
    """Bytes that are not what they were."""
    hurt = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(hurt) + 1)
        match rng.randrange(9):
            case 0 if at < len(hurt):
                hurt[at] ^= 1 << rng.randrange(8)
            case 1:
                del hurt[at : at + rng.randint(1, 40)]
            case 2:
                hurt[at:at] = "".join(rng.choices(string.printable, k=5)).encode()
            case 3:
                del hurt[at:]
            case 4:
                hurt[at:at] = rng.randbytes(rng.randint(1, 6))
            case 5:
                lines = bytes(hurt).split(b"\n")
                rng.shuffle(lines)
                hurt = bytearray(b"\n".join(lines))
            case 6:
                hurt[at:at] = bytes(hurt[at : at + 60])
            case 7:
                hurt[at:at] = rng.choice(
                    [b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\r", b"\t", b"\xe2\x80\xa8"]
                )
            case _:
                odd = [
                    b"[" * 300,
                    b"{" * 300,
                    b"&a ",
                    b"*a",
                    b"!!x ",
                    b"---\n",
                    b"%",
                    b"? ",
                    b"- " * 50,
                ]
                hurt[at:at] = rng.choice(odd)
    return bytes(hurt)


def written(values: Any, rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return json.dumps(values).encode()  # which is YAML, as people write it from scripts
    flow = rng.choice([True, False, None])
    text = yaml.dump(
        values, allow_unicode=rng.random() < 0.5, default_flow_style=flow, sort_keys=False
    )
    return text.encode("utf-8", "surrogatepass")


def recipe(seed: str) -> Case:
    """A mutated recipe, or pipeline, and the command that takes it."""
    rng = random.Random(seed)
    stage = rng.choice(list(STAGES))
    values: Any = valid(stage, rng)
    if rng.random() < 0.4:
        values = resolved(values)
    command = [rng.choice([stage, stage, "prepare"]), "recipe.yaml"]
    if rng.random() < 0.2:
        stages = [values, valid(rng.choice(list(STAGES)), rng)]
        rng.shuffle(stages)
        values = {"run": "runs/a", "stages": stages}
        command[0] = "run"
    said = [mutate(values, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    text = written(values, rng)
    if rng.random() < 0.2:
        text = hurt(text, rng)
        said.append("hurt")
    if rng.random() < 0.1:
        command += ["--set", _setting(values, rng)]
    name = f"{seed}: {' '.join(command)}: {'; '.join(said)}"
    return Case(name, command, {**FILES, "recipe.yaml": text})


def _setting(values: Any, rng: random.Random) -> str:
    places = paths(values) or [("x",)]
    path = ".".join(map(str, rng.choice(places)))
    odd = [
        f"{path}.0",
        f"{path}.\u00b2",
        path,
        path,
        path,
        f"{path}.{'9' * 5000}",
        "",
        ".",
        f"{path}.",
    ]
    value = rng.choice(ODD)
    shown = json.dumps(value) if rng.random() < 0.5 else str(value).replace("\0", "")
    return f"{rng.choice(odd)}={shown}".encode("utf-8", "replace").decode()


def trained(seed: str) -> Case:
    """A recipe with one or two odd values, mostly valid ones, that is trained for one step."""
    rng = random.Random(seed)
    stage = rng.choice(list(STAGES))
    values = resolved(valid(stage, rng))
    said = []
    for _ in range(rng.choice([1, 1, 2])):
        path = rng.choice(paths(values))
        parent, key = parent_of(values, path), path[-1]
        parent[key] = odd = near_value(parent[key], rng)
        said.append(f"{'.'.join(map(str, path))} ~ {odd!r:.40}")
    command = [stage, "recipe.yaml"]
    if issubclass(schema(stage), Training):
        command += ["--set", "optim.steps=1"]
    files = {**FILES, "recipe.yaml": written(values, rng)}
    return Case(f"{seed}: {' '.join(command)}: {'; '.join(said)}", command, files, until="")
