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

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmpipe.errors import BUSY, INTEGRITY, RESOURCES, UserError

MANIFEST = "manifest.json"
SUMS = "sums.json"  # the file table of a checkpoint
SCRATCH = {"plan.json", "prepared.json", "outcome.json", "log.txt", MANIFEST}  # in an artifact, but not part of it


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file's or a folder's entry to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync(path.parent)


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """{path: value} of a nested document; the keys of a path stand with spaces between them."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in flat(inner, f"{path} {key}".strip()).items()}


def read_json(path: Path) -> Any:
    """Parsed JSON, or None when the file is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below `folder`, sorted; a link is refused, since it could point outside."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted([*names, *(f for f in folders if os.path.islink(os.path.join(root, f)))]):
            path = Path(root, name)
            if path.is_symlink():
                raise UserError(f"{path}: a link inside an artifact", "copy the file in its place", INTEGRITY)
            yield path


def table(folder: Path, skip: set[str] | frozenset[str] = frozenset()) -> dict[str, dict]:
    """{relative path: {size, sha256}} of a folder; top-level names in `skip` are left out."""
    out = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in skip:
            out[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    return out


def differences(folder: Path, expected: dict[str, dict], skip: set[str] | frozenset[str] = frozenset()) -> list[str]:
    """What in `folder` is not as recorded: one line per missing, added, cut or changed file."""
    found = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    problems = []
    for name, entry in expected.items():
        path = found.pop(name, None)
        if path is None:
            problems.append(f"{name}: missing")
        elif (size := path.stat().st_size) != entry["size"]:
            problems.append(f"{name}: {size} bytes, recorded {entry['size']}")
        elif (actual := sha256_file(path)) != entry["sha256"]:
            problems.append(f"{name}: sha256 {actual[:12]}, recorded {entry['sha256'][:12]}")
    leftover = re.compile(r"\.(outcome|plan|prepared|manifest)\.json\.\d+")  # of a write_json that was killed
    added = [name for name in found if name.split("/")[0] not in skip and not leftover.fullmatch(name)]
    return problems + [f"{name}: not in the manifest" for name in added]


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """Yield an empty staging folder; on leaving without an error flush it and rename it to `target`.

    A target that exists is replaced: it is moved aside first, so that no moment shows a mixture. Raises UserError
    with code 5 when the disk is full; nothing of the target is lost then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.staging")
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        for path in files_below(staging):
            path.chmod(0o666 & ~umask)  # safetensors makes its files private
            fsync(path)
        for root, _, _ in os.walk(staging):
            fsync(Path(root))
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise disk_full(error, target) from (error if isinstance(error, Exception) else None)
    if target.exists():
        old = target.with_name(f".{target.name}.old")
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)
    fsync(target.parent)


def disk_full(error: BaseException, target: Path) -> BaseException:
    """A full disk or a failing one as a UserError; any other error as it is."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    if full or (isinstance(error, Exception) and "No space left on device" in str(error)):  # safetensors' own error
        return UserError(
            f"{target}: cannot be written: {getattr(error, 'strerror', None) or 'No space left on device'}",
            "make room and run the same command again: it goes on from the last checkpoint",
            RESOURCES,
        )
    return error


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
        for name in ("plan.json", "prepared.json"):
            (self.path / name).unlink(missing_ok=True)
        return manifest

    def move_aside(self) -> Path | None:
        """Rename the folder to NAME.old-1, -2, ...; nothing is deleted."""
        if not self.path.exists():
            return None
        taken = [
            int(m[1]) for p in self.run.iterdir() if (m := re.fullmatch(re.escape(self.name) + r"\.old-(\d+)", p.name))
        ]
        aside = self.path.with_name(f"{self.name}.old-{max(taken, default=0) + 1}")
        self.path.rename(aside)
        merged = Artifact(self.run / f"{self.name}-merged")  # what came of it goes along
        if (read_json(merged.path / MANIFEST) or {}).get("merged_from") == self.name:
            merged.move_aside()
        tracker = self.run / ".trackers" / self.name  # a new start is a new run for the trackers, too
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
        raise UserError(f"{run}: no such run directory", "give the folder that `run:` of the recipe names")
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
    return manifest.get("asked", {}).get("recipe", {}).get("data", {}).get("chat_template_kwargs", {})


def ranks(folder: Path) -> bool:
    """Whether a folder holds a reward model, or an adapter that makes one. Raises UserError (3) for a classifier."""
    adapter = read_json(folder / "adapter_config.json")
    if adapter:
        return adapter.get("task_type") == "SEQ_CLS"
    config = read_json(folder / "config.json") or {}
    classifies = (config.get("architectures") or [""])[0].endswith("ForSequenceClassification")
    if classifies and len(config.get("id2label", {0: ""})) != 1:
        raise UserError(f"{folder}: a classifier of several labels, not a reward model", code=INTEGRITY)
    return classifies


def is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / "recipe.yaml").is_file()


class Lock:
    """An flock on a file of the run; it is gone with the process that holds it, however that ends.

    Two locks guard an artifact. `start` is held by the command, from planning to the end; `write` by the process that
    trains, so that a command started after its predecessor was killed cannot admit a second writer. A parent artifact
    is held shared while it is read.
    """

    def __init__(self, artifact: Artifact, role: str = "start", shared: bool = False):
        self.path = artifact.run / ".locks" / f"{artifact.name}.{role}"
        self.artifact = artifact
        self.shared = shared
        self.fd: int | None = None

    def acquire(self, wait: float = 0) -> Lock:
        """Take the lock or raise UserError (75) naming the holder's pid and host; try for `wait` seconds."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(fd)
                    raise
                if time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue
                time.sleep(0.05)  # the holder may be about to write its name
                holder = os.pread(fd, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(fd)
                raise UserError(
                    f"{self.artifact.path}: busy: {holder} is at work on it",
                    "wait for it to end, or stop it; nothing was changed",
                    BUSY,
                ) from None
        if not self.shared:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        self.fd = fd
        return self

    def release(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> Lock:
        return self if self.fd is not None else self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
