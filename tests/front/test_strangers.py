"""Hostile folders, configurations, weights, tokenizers, templates, GGUFs, adapters and manifests
(tests/strangers.py) through the command: each is refused with a line, soon, in little memory, and
nothing of it runs or is written elsewhere.
"""

import json
import os
import resource
import shutil
import subprocess
import time
import traceback
from pathlib import Path

import pytest

from llmpipe.errors import Stopped, UserError
from tests import life, store, strangers
from tests.models.test_adapters import write

SECONDS = 10
"""Within which an attack is refused, on a machine that is not loaded."""

MEMORY = 2 << 20
"""KB by which a process may grow."""

FEW = 25
"""Attacks of every change; `make faults` makes all of them."""

ATTACKS = strangers.every()

OWN = ("recipe.yaml", "recipe.out", "recipe.json")


def try_it(path: str, home: str) -> None:
    """The command of a recipe, in this process; what came of it is left beside it."""
    out = os.open(Path(path).with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(home)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        life.command(Path(path))
        code = 0
    except UserError as error:
        os.write(1, f"error: {error}".encode(errors="replace"))
        code = error.code
    except Stopped as stop:
        code = stop.code
    except BaseException:
        os.write(1, traceback.format_exc().encode(errors="replace"))
        code = 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    seconds = time.process_time() - begun
    values = {"code": code, "grown": grown, "seconds": seconds}
    Path(path).with_suffix(".json").write_text(json.dumps(values))
    os._exit(0)


@pytest.fixture
def home(tmp_path):
    """A scratch folder; what is nested too deep for Python to remove goes first."""
    yield tmp_path
    subprocess.run(["rm", "-rf", str(tmp_path / "work")], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model, and a run with a model and an adapter on it."""
    home = tmp_path_factory.mktemp("strangers")
    for folder in ("model", "recipes/tiny/model"):  # which the adapter's manifest names
        shutil.copytree(life.TINY / "model", home / folder)
    run = home / "run"
    # those that tests/training/test_life.py and tests/models/test_adapters.py start from
    store.made(life.write(run))
    store.made(write(run))
    return home


def listing(home: Path) -> set[str]:
    """Everything below a folder but what the command may write: the artifact it makes, its rows
    and its locks."""
    # Python's own way down is recursive
    found = subprocess.run(["find", "."], cwd=home, capture_output=True, check=True).stdout
    places = {place.removeprefix("./") for place in found.decode().split("\n")}
    ours = ("work/run/next", "work/run/.prepared", "work/run/.locks", "work/run/sft-")
    return {place for place in places if not place.startswith(ours) and place not in OWN}


def tried(whole: Path, home: Path, name: str, attack: strangers.Attack) -> tuple[dict, str]:
    """How the command ends on a folder after an attack, and what it says."""
    work = home / "work"
    shutil.copytree(whole, work, copy_function=os.link)
    for path in work.rglob("*"):  # no attack may reach what the others start from
        if path.is_file():
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    changes = {"model": str(work / "model"), "name": "next", "optim__steps": 1, "samples": {}}
    changes |= attack(work) or {}
    path = home / "recipe.yaml"
    path.write_text(json.dumps(life.recipe(work / "run", **changes)))
    before = listing(home)
    process = life.forked(try_it, str(path), str(work))
    process.join(60)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"{name}: hangs\n{path.with_suffix('.out').read_text()[-2000:]}")
    text = path.with_suffix(".out").read_text(errors="replace")
    assert path.with_suffix(".json").exists(), f"{name}: died: {process.exitcode}\n{text[-2000:]}"
    assert listing(home) == before, f"{name}: {sorted(listing(home) ^ before)}"
    return json.loads(path.with_suffix(".json").read_text()), text


def refused(whole: Path, home: Path, name: str) -> str:
    """What the command says of an attack."""
    end, text = tried(whole, home, name, ATTACKS[name])
    assert end["code"] in (2, 3), f"{name}: code {end['code']}\n{text[-3000:]}"
    assert "a bug" not in text and "Traceback" not in text, f"{name}:\n{text[-3000:]}"
    assert end["seconds"] < SECONDS, f"{name}: {end}"
    assert end["grown"] < MEMORY, f"{name}: {end}"
    last = text[text.rindex("error: ") :]
    print(f"{name} -> {last}")
    return last


def some(names: list[str]) -> list[str]:
    """Attacks of every kind."""
    return names[:: len(names) // FEW][:FEW]


@pytest.mark.parametrize("changes", [{}, strangers.LORA], ids=["model", "adapter"])
def test_what_nobody_attacked_is_taken(whole, home, changes):
    """Else the attacks might be refused for another reason."""
    end, text = tried(whole, home, "nothing", lambda _: changes)
    assert end["code"] == 0, text[-3000:]


@pytest.mark.parametrize("name", some(list(ATTACKS)))
def test_a_stranger_is_refused(whole, home, name):
    refused(whole, home, name)


@pytest.mark.faults
@pytest.mark.parametrize("name", sorted(set(ATTACKS) - set(some(list(ATTACKS)))))
def test_strangers_are_refused(whole, home, name):
    refused(whole, home, name)
