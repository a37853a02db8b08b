"""The run directory: what lies where, when a thing counts as finished, and who may write.

    runs/alpaca/                a run
      sft/                      an artifact: finished when, and only when, manifest.json is there
        recipe.yaml  manifest.json  model/  checkpoints/  metrics.jsonl  samples.jsonl  rejected.jsonl  log.txt
      .prepared/                tokenized rows, by content
      .locks/                   who is writing

Publishing a folder: everything is written into a sibling whose name starts with a dot, hashed, flushed to the disk and
renamed. A reader sees the old state or the new one. Verifying is the reverse: every file has the recorded size and
sha256, and there is no other file.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.files import differences, digest, files_below, fsync, read_json, table, write_json

MANIFEST = "manifest.json"

PLAN = "plan.json"

SUMS = "sums.json"  # the file table of a checkpoint

SCRATCH = {
    PLAN,
    "prepared.json",
    "outcome.json",
    "log.txt",
    MANIFEST,
}  # in an artifact, but not part of it


@dataclass(frozen=True)
class Artifact:
    """One folder of a run, finished or not."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def run(self) -> Path:
        return self.path.parent

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / MANIFEST).exists()

    def manifest(self) -> dict:
        """The manifest, checked against its own fingerprint. Raises UserError (3) when it is damaged."""
        path = self.path / MANIFEST
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("fingerprint") != fingerprint(manifest):
            raise UserError(
                f"{path}: the manifest was changed or damaged",
                f"restore it from a copy, or make the artifact again: llmpipe ... --fresh moves {self.path} aside",
                INTEGRITY,
            )
        return manifest

    def verify(self) -> dict:
        """The manifest, after every file of the artifact was hashed. Raises UserError (3) naming each difference."""
        manifest = self.manifest()
        problems = differences(self.path, manifest["files"], SCRATCH | {"checkpoints"})
        if problems:
            raise UserError(
                "\n".join(f"{self.path}/{problem}" for problem in problems),
                "the artifact is not what was published; restore it, or make it again with --fresh",
                INTEGRITY,
            )
        return manifest

    def commit(self, manifest: dict) -> dict:
        """Hash every file, write the manifest last: from then on the artifact is finished."""
        for leftover in self.path.glob(".*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for path in files_below(self.path):
            fsync(path)
        manifest = {**manifest, "files": table(self.path, SCRATCH | {"checkpoints"})}
        manifest["fingerprint"] = fingerprint(manifest)
        write_json(self.path / MANIFEST, manifest)
        for name in (PLAN, "prepared.json"):
            (self.path / name).unlink(missing_ok=True)
        return manifest

    def move_aside(self) -> Path | None:
        """Rename the folder to NAME.old-1, -2, ...; nothing is deleted."""
        if not self.path.exists():
            return None
        taken = [
            int(m[1])
            for p in self.run.iterdir()
            if (m := re.fullmatch(re.escape(self.name) + r"\.old-(\d+)", p.name))
        ]
        aside = self.path.with_name(f"{self.name}.old-{max(taken, default=0) + 1}")
        self.path.rename(aside)
        merged = Artifact(self.run / f"{self.name}-merged")  # what came of it goes along
        if (read_json(merged.path / MANIFEST) or {}).get("merged_from") == self.name:
            merged.move_aside()
        tracker = (
            self.run / ".trackers" / self.name
        )  # a new start is a new run for the trackers, too
        if tracker.exists():
            tracker.rename(tracker.with_name(aside.name))
        fsync(self.run)
        return aside


def fingerprint(manifest: dict) -> str:
    """sha256 over everything in a manifest but the fingerprint itself."""
    return digest({key: value for key, value in manifest.items() if key != "fingerprint"})


def artifacts(run: Path) -> list[Artifact]:
    """The artifacts of a run, finished or begun, oldest first."""
    if not run.is_dir():
        raise UserError(
            f"{run}: no such run directory", "give the folder that `run:` of the recipe names"
        )
    found = [
        Artifact(p)
        for p in run.iterdir()
        if p.is_dir()
        and not p.name.startswith(".")
        and not re.search(r"\.old-\d+$", p.name)
        and (p / "recipe.yaml").exists()
    ]
    return sorted(found, key=lambda a: (a.path / "recipe.yaml").stat().st_mtime)


def template_kwargs(model: Path) -> dict[str, Any]:
    """`data.chat_template_kwargs` that a published model was trained with; nothing for any other folder."""
    manifest = read_json(model.parent / MANIFEST) or {}
    return (
        manifest.get("asked", {}).get("recipe", {}).get("data", {}).get("chat_template_kwargs", {})
    )


def is_reward_model(folder: Path) -> bool:
    """Whether a folder holds a reward model, or an adapter that makes one. Raises UserError (3) for a classifier."""
    adapter = read_json(folder / "adapter_config.json")
    if adapter:
        return adapter.get("task_type") == "SEQ_CLS"
    config = read_json(folder / "config.json") or {}
    classifies = (config.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    if classifies and len(config.get("id2label", {0: ""})) != 1:
        raise UserError(
            f"{folder}: a classifier of several labels, not a reward model", code=INTEGRITY
        )
    return classifies


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / "recipe.yaml").is_file()
