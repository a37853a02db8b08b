"""Durable checkpoints as plain functions: write, pick, restore. Shared by every trainer.

A checkpoint is `checkpoints/step-N`, published whole (publishing) with `sums.json`: the step, the identity of
the recipe, the machine's settings and the sha256 of every file. The newest one that verifies wins; a damaged one is
passed over and named.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import differences, publishing, read_json, table, write_json
from llmpipe.run.artifact import SUMS, fingerprint

STATE = "llmpipe.json"  # what the trainer underneath does not keep


def folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step}"


def steps(checkpoints: Path) -> list[int]:
    """Steps of the published checkpoints, oldest first."""
    return sorted(int(p.name[5:]) for p in checkpoints.glob("step-*") if p.name[5:].isdigit())


@contextmanager
def writing(
    checkpoints: Path, step: int, about: dict[str, Any], state: Callable[[], dict[str, Any]]
) -> Iterator[Path]:
    """Yield a staging folder to save into; on leaving add STATE and sums.json and publish it as `step-N`."""
    with publishing(folder(checkpoints, step)) as staging:
        yield staging
        # pickled arguments hold tokens in clear, and nothing reads them; the card is made for the model, not for this
        for name in ("training_args.bin", "README.md"):
            (staging / name).unlink(missing_ok=True)
        write_json(staging / STATE, state())
        sums = {"step": step, **about, "files": table(staging)}
        write_json(staging / SUMS, {**sums, "fingerprint": fingerprint(sums)})


def verify(path: Path) -> list[str]:
    """What is wrong with a checkpoint, nothing when it is whole."""
    sums = read_json(path / SUMS)
    if not isinstance(sums, dict) or sums.get("fingerprint") != fingerprint(sums):
        return [f"{SUMS}: damaged or missing"]
    return differences(path, sums["files"], {SUMS})


def rotate(checkpoints: Path, keep: int, also: set[int]) -> None:
    """Remove all but the newest `keep` checkpoints and those in `also`."""
    for step in steps(checkpoints)[:-keep]:
        if step not in also:
            path = folder(checkpoints, step)
            doomed = path.with_name(
                f".{path.name}.old"
            )  # renamed first: half a checkpoint is never seen
            path.rename(doomed)
            shutil.rmtree(doomed)


def pick(
    checkpoints: Path,
    identity: str,
    machine: dict[str, Any],
    say: Callable[[str], None],
    *,
    inexact: bool = False,
) -> tuple[Path, bool] | None:
    """The newest checkpoint that verifies, and whether resuming from it is exact; None when there is none.

    Raises UserError (3) when the checkpoint is of another recipe or, unless `inexact`, of other machine settings.
    """
    for step in reversed(steps(checkpoints)):
        path = folder(checkpoints, step)
        if problems := verify(path):
            say(f"checkpoint {path.name} is damaged ({problems[0]}); looking for an older one")
            continue
        sums = read_json(path / SUMS)
        if sums["identity"] != identity:
            raise UserError(f"{path}: is of another recipe", "--fresh starts anew", INTEGRITY)
        other = {
            k: (sums["machine"].get(k), v)
            for k, v in machine.items()
            if sums["machine"].get(k) != v
        }
        if other and not inexact:
            lines = ", ".join(f"{k} {old} there, {new} now" for k, (old, new) in other.items())
            raise UserError(
                f"{path}: was written with other settings of the machine: {lines}",
                "set them back under `launch:`, or accept a result that is not bitwise the same: --inexact-resume",
                INTEGRITY,
            )
        return path, not other and bool(sums.get("exact", True))
    return None
