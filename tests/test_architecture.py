"""The rooms of the package and who may import whom, held by reading the source."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llmpipe"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

# A room may import its own floor and the floors below.
FLOORS = [
    {"__init__"},
    {"errors", "noise", "screen", "secrets", "ties"},
    {"faults"},
    {"files", "scores", "recipe"},
    {"record", "typed"},
    {"sums"},
    {"data"},
    {"run"},
    {"kernels", "mirror", "parallel", "peers", "report", "upstream"},
    {"models"},
    {"evaluation"},
    {"export"},
    {"training"},
    {"rl"},
    {"stages"},
    {"front"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH = {
    "kernels",
    "mirror",
    "parallel",
    "peers",
    "upstream",
    "models",
    "evaluation",
    "export",
    "training",
    "rl",
}  # rooms that import it
LIGHT = {
    ("evaluation", "book"),
    ("evaluation", "task"),
    ("evaluation", "tasks"),
}  # and what in them does not: recipes are checked with it
CHAT = PACKAGE / "front" / "chat.py"  # and the one file of the front that talks to a model
NARROWS = {"lora": "sft", "qlora": "lora", "pretrain": "sft", "grpo": "ppo", "sample": "ppo"}
SPREAD = ("torch.distributed", "transformers.distributed", "deepspeed")
"""What spreads a model over processes. Only one room knows of it."""
MEETING = {f"torch.distributed.{name}" for name in ("PrefixStore", "Store", "rendezvous")}
"""What is not of a model: the store by which processes find one another."""
HEAVY = {"accelerate", "bitsandbytes", "datasets", "peft", "torch", "transformers", "trl"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and dotted(node.test) in (
        "TYPE_CHECKING",
        "typing.TYPE_CHECKING",
    )


def imports(tree: ast.AST, path: Path, depth: int = 0) -> Iterator[tuple[str, int, int]]:
    """(module, line, depth) of every import; depth 0 runs when the file is imported. Imports for
    types do not count."""
    package = ["llmpipe", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.iter_child_nodes(tree):
        if for_types_only(node):
            continue
        inside = depth + isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, depth) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((f"{module}.{alias.name}", node.lineno, depth) for alias in node.names)
        yield from imports(node, path, inside)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> list[tuple[str, int, int]]:
    """Those of a file, which four tests ask for."""
    return list(imports(parsed(path), path))


def own_rooms(path: Path) -> Iterator[tuple[str, list[str], int, int]]:
    """(room, parts of the module, line, depth) of every import from llmpipe."""
    for module, line, depth in imports_of(path):
        parts = module.split(".")
        if parts[0] == "llmpipe" and len(parts) > 1:
            room = parts[1] if parts[1] in FLOOR else "__init__"  # from llmpipe import __version__
            yield room, parts, line, depth


def test_every_file_has_a_floor():
    assert {room_of(path) for path in FILES} <= set(FLOOR)


def test_contributing_tells_of_every_room():
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("\nllmpipe/\n")[2].partition("```")[0]
    heads = re.findall(r"^  ((?:[\w.]+/? )+) ", tree, re.M)
    rooms = {name.strip("/").removesuffix(".py") for head in heads for name in head.split()}
    assert rooms == FLOOR.keys() - {"__init__"}
    (words,) = re.findall(r"^(`kernels`.*) import torch;", text, re.M)
    assert set(re.findall(r"`(\w+)`", words)) == TORCH


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_down(path):
    room = room_of(path)
    for other, _, line, _ in own_rooms(path):
        assert FLOOR[other] <= FLOOR[room], (
            f"{path.name}:{line}: {room} imports {other}, which is above it"
        )


def test_modules_form_no_ring():
    """Not even one that an import inside a function hides."""
    needs: dict[str, set[str]] = {module_of(path): set() for path in FILES}
    for path in FILES:
        for name, *_ in imports_of(path):
            known = next((m for m in (name, name.rpartition(".")[0]) if m in needs), None)
            needs[module_of(path)] |= {known} - {None, module_of(path)}
    done: set[str] = set()
    while ready := {module for module in needs.keys() - done if needs[module] <= done}:
        done |= ready
    assert {module: sorted(needs[module] - done) for module in needs.keys() - done} == {}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_heavy_libraries_stay_in_their_rooms(path):
    room = room_of(path)
    is_light = room not in TORCH or tuple(module_of(path).split(".")[1:3]) in LIGHT
    for module, line, depth in imports_of(path):
        name = module.split(".")[0]
        if is_light and path != CHAT and name in HEAVY:
            assert depth, (
                f"{path.name}:{line}: {name} at module level; import it inside the function"
            )
            assert name != "torch", f"{path.name}:{line}: torch is imported in {sorted(TORCH)} only"
    for other, parts, line, depth in own_rooms(path):
        if is_light and path != CHAT and other in TORCH and tuple(parts[1:3]) not in LIGHT:
            assert depth, (
                f"{path.name}:{line}: {other} is reached inside a function: the rest stays light"
            )


def test_one_room_knows_how_a_model_is_spread():
    for path in FILES:
        if room_of(path) != "parallel":
            for module, line, _ in imports_of(path):
                is_meeting = module in MEETING and room_of(path) in ("peers", "mirror")
                assert is_meeting or not module.startswith(SPREAD), (
                    f"{path.name}:{line}: {module}: only llmpipe/parallel/ spreads a model"
                )


def test_stages_do_not_import_each_other():
    for path in sorted((PACKAGE / "stages").glob("*.py")):
        for room, parts, line, _ in own_rooms(path):
            if (
                room == "stages"
                and len(parts) > 2
                and (PACKAGE / "stages" / f"{parts[2]}.py").exists()
            ):
                assert NARROWS.get(path.stem) == parts[2], (
                    f"{path.name}:{line}: imports the stage {parts[2]}"
                )


def test_every_stage_is_in_the_table():
    from llmpipe.stages import STAGES

    files = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__"}
    assert files == set(STAGES)


@pytest.mark.parametrize(
    "module",
    [
        "llmpipe.front.cli",
        "llmpipe.front.worker",
        "llmpipe.run.plan",
        "llmpipe.stages.sft",
        "llmpipe.stages.eval",
        "llmpipe.data.prepare",
    ],
)
def test_importing_leaves_the_heavy_libraries_out(module):
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "starts a shell",
    "os.popen": "starts a shell",
    "subprocess.getoutput": "starts a shell",
    "subprocess.getstatusoutput": "starts a shell",
    "torch.load": "unpickles",
    "yaml.load": "builds objects; parse with llmpipe.recipe.yaml",
    "yaml.unsafe_load": "builds objects",
    "yaml.full_load": "builds objects",
    "numpy.load": "may unpickle; read safetensors or Arrow",
    "np.load": "may unpickle; read safetensors or Arrow",
}
RUNS_ANSWERS = PACKAGE / "scores" / "confined" / "child.py"
"""The one file that runs text as code, where the kernel lets it do nothing else."""
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_source_holds_nothing_that_runs_what_it_reads(path):
    for node in ast.walk(parsed(path)):
        at = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            may = {"exec"} if path == RUNS_ANSWERS else set()
            assert name not in set(CALLS) - may, f"{at}: {name} {CALLS.get(name)}"
            for keyword in node.keywords:
                literal = (
                    keyword.value.value
                    if isinstance(keyword.value, ast.Constant)
                    else "not a literal"
                )
                if keyword.arg == "shell":
                    assert literal is False, f"{at}: shell={literal}; give an argument list"
                if keyword.arg == "trust_remote_code":
                    assert literal is False, f"{at}: trust_remote_code only as a literal False"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "trust_remote_code"
                    and isinstance(value, ast.Constant)
                ):
                    assert value.value is not True, (
                        f"{at}: trust_remote_code only as a literal False"
                    )
        elif isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & MODULES, at
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, at
            imported = {f"{node.module}.{alias.name}" for alias in node.names}
            assert not imported & set(CALLS), f"{at}: {imported & set(CALLS)}"


def test_the_rules_see_what_they_forbid():
    """The tests above would pass on anything if the reader of imports were blind."""
    source = (
        "import torch\nfrom llmpipe.front import cli\ndef f():\n    from trl import SFTTrainer\n"
    )
    source += "if TYPE_CHECKING:\n    import peft\n"
    found = list(imports(ast.parse(source), PACKAGE / "run" / "plan.py"))
    assert found == [("torch", 1, 0), ("llmpipe.front.cli", 2, 0), ("trl.SFTTrainer", 4, 1)]
    assert list(
        imports(
            ast.parse("from . import cli\nfrom ..models import x"), PACKAGE / "stages" / "sft.py"
        )
    ) == [
        ("llmpipe.stages.cli", 1, 0),
        ("llmpipe.models.x", 2, 0),
    ]


READS = {
    *("load_file", "safe_open", "from_pretrained", "load_from_json", "load_dataset"),
    *("open_stream", "open_file", "memory_map", "ParquetFile", "from_str"),
    *("Tokenizer.from_file", "Dataset.from_file"),
}
"""Calls of libraries that read somebody's file, by how their names end."""


def reads(node: ast.AST, held: bool = False) -> Iterator[tuple[str, int, bool]]:
    """(call, line, whether its failure is turned into a line) of every call in READS."""
    if isinstance(node, ast.Call):
        name = dotted(node.func)
        if any(name == read or name.endswith(f".{read}") for read in READS):
            yield name, node.lineno, held
    calls = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
    if isinstance(node, ast.Try):
        calls = [call for handler in node.handlers for call in ast.walk(handler)]
    names = {dotted(call.func) for call in calls if isinstance(call, ast.Call)}
    held = held or bool(names & {"reading", "misread"})
    for inner in ast.iter_child_nodes(node):
        yield from reads(inner, held)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_libraries_read_where_their_errors_become_lines(path):
    for name, line, held in reads(parsed(path)):
        assert held, f"{path.name}:{line}: {name} outside of `with faults.reading(...)`"


def test_calls_that_read_are_seen():
    source = "with reading(p, 'x'):\n    load_file(p)\nM.from_pretrained(p)\n"
    source += "try:\n    pa.ipc.open_stream(p)\nexcept OSError as e:\n    raise misread(e, p)\n"
    seen = [(name, held) for name, _, held in reads(ast.parse(source))]
    assert seen == [("load_file", True), ("M.from_pretrained", False), ("pa.ipc.open_stream", True)]
