"""`make faults`: every file of a run, damaged in every way, is named by `llmpipe verify`; and the
command that would use it ends with 3. (tests/front/test_verified.py: what `.prepared` holds;
test_crash_state_matrix: what a training resumes from.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.run.artifact import Artifact
from tests import life
from tests.run.test_handoff import MADE, made, recipe
from tests.run.test_verify import HURTS, hurt, verified

__all__ = ["made"]  # a fixture: an artifact of every kind

pytestmark = pytest.mark.faults

UNRECORDED = {"log.txt", "outcome.json", ".metrics.jsonl"}
"""What no table has, since it is read by nobody but people."""


@pytest.fixture(scope="module")
def road(made):
    """A run with an artifact of every kind, and with what two more that are begun keep."""
    run, texts = made
    life.command(recipe("sft", run, texts, "artifact:sft", name="begun"), only_prepare=True)
    merged = recipe("reward", run, texts, "artifact:lora", name="merges")
    life.command(merged, only_prepare=True)
    assert {path.name.partition("-")[0] for path in (run / ".prepared").glob("merged-*")}
    return run, texts


@contextmanager
def damaged(run: Path, path: Path, how: str) -> Iterator[bool]:
    """A file is hurt for a while; whether it is another one then."""
    other = other_of(path, run)
    before = {each: each.read_bytes() for each in (path, other)}
    try:
        yield hurt(path, how, other, run.parent / "aside")
    finally:
        for each, data in before.items():
            each.unlink()
            each.write_bytes(data)


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def other_of(path: Path, run: Path) -> Path:
    """The same file of another artifact, where there is another one; else any other file."""
    same = [other for other in files_of(run) if other.name == path.name and other != path]
    beside = [other for other in files_of(path.parent) if other != path]
    data = path.read_bytes()
    return next(other for other in (*same, *beside) if other.read_bytes() != data)


def test_verify_names_every_file(road):
    """Flipped, cut, emptied, swapped, a link: exit 3, and a line with the file."""
    run, _ = road
    code, lines = verified(run)
    assert code == 0, lines
    tried, missed = 0, []
    victims = [path for path in files_of(run) if ".locks" not in path.parts]
    for path in victims:
        if path.name in UNRECORDED:
            continue
        for how in HURTS:
            with damaged(run, path, how) as differs:
                if not differs:  # an empty file has nothing to cut
                    continue
                tried += 1
                code, lines = verified(run)
                if code != 3 or not any(line.startswith(f"{path}: ") for line in lines):
                    missed.append((str(path.relative_to(run)), how))
    print(f"{tried - len(missed)} of {tried}")
    assert verified(run)[0] == 0
    assert not missed and tried > 500


@pytest.mark.parametrize("name", ["plan.json", "prepared.json", "recipe.yaml"])
def test_records_of_two_that_are_begun_are_told_apart(road, name):
    """Each is whole, and was written by llmpipe."""
    run, _ = road
    one, two = (run / artifact / name for artifact in ("begun", "merges"))
    texts = one.read_bytes(), two.read_bytes()
    try:
        one.write_bytes(texts[1])
        two.write_bytes(texts[0])
        code, lines = verified(run)
    finally:
        one.write_bytes(texts[0])
        two.write_bytes(texts[1])
    assert code == 3
    for path in (one, two):
        assert any(line.startswith(f"{path}: ") for line in lines), lines


def used(run: Path, texts: Path, name: str) -> Path:
    """The recipe of a command that uses an artifact, or one of its checkpoints."""
    if MADE.get(name) == "evaluation":
        return recipe("eval", run, texts, "artifact:sft")  # it is skipped, and judged
    return recipe("eval", run, texts, f"artifact:{name}", name="child")


def victims_of(run: Path, name: str) -> list[Path]:
    """The files that a command uses which takes an artifact or a checkpoint of it."""
    artifact, _, step = name.partition("@")
    home = Artifact(run / artifact)
    if step:
        return files_of(home.checkpoints / f"step-{step}")
    inside = [path for path in files_of(home.path) if "checkpoints" not in path.parts]
    return [path for path in inside if path.name not in UNRECORDED]


@pytest.mark.parametrize("name", [*MADE, "sft@2"])
def test_no_damaged_file_is_used(road, name):
    """As a parent of the next stage; an evaluation by the same command again: exit 3."""
    run, texts = road
    path = used(run, texts, name)
    tried, silent = 0, []
    for victim in victims_of(run, name):
        for how in HURTS:
            with damaged(run, victim, how) as differs:
                if not differs:
                    continue
                tried += 1
                try:
                    life.command(path)
                except UserError as error:
                    # of two that were swapped either may be named
                    if error.code == 3 and (victim.name in str(error) or how == "swapped"):
                        continue
                    silent.append((victim.name, how, str(error)))
                else:
                    silent.append((victim.name, how, "used"))
    print(f"{name}: {tried - len(silent)} of {tried}")
    assert not silent and tried > 20


@pytest.mark.parametrize("how", HURTS)
def test_the_base_of_an_adapter_is_looked_at_too(road, how):
    run, texts = road
    victim = run / "sft" / "model" / "model.safetensors"
    with damaged(run, victim, how) as differs:
        assert differs
        with pytest.raises(UserError, match=r"model\.safetensors") as refused:
            life.command(used(run, texts, "lora"))
    assert refused.value.code == 3
