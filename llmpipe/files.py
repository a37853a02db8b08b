"""Files that are whole or not there: hashes, atomic writes, folders published at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmpipe.errors import INTEGRITY, RESOURCES, UserError


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
    return {
        k: v
        for key, inner in value.items()
        for k, v in flat(inner, f"{path} {key}".strip()).items()
    }


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
        for name in sorted(
            [*names, *(f for f in folders if os.path.islink(os.path.join(root, f)))]
        ):
            path = Path(root, name)
            if path.is_symlink():
                raise UserError(
                    f"{path}: a link inside an artifact", "copy the file in its place", INTEGRITY
                )
            yield path


def table(folder: Path, skip: set[str] | frozenset[str] = frozenset()) -> dict[str, dict[str, Any]]:
    """{relative path: {size, sha256}} of a folder; top-level names in `skip` are left out."""
    out = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in skip:
            out[name] = {"size": path.stat().st_size, "sha256": sha256_file(path)}
    return out


def differences(
    folder: Path, expected: dict[str, dict[str, Any]], skip: set[str] | frozenset[str] = frozenset()
) -> list[str]:
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
    leftover = re.compile(
        r"\.(outcome|plan|prepared|manifest)\.json\.\d+"
    )  # of a write_json that was killed
    added = [
        name for name in found if name.split("/")[0] not in skip and not leftover.fullmatch(name)
    ]
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
    if full or (
        isinstance(error, Exception) and "No space left on device" in str(error)
    ):  # safetensors' own error
        return UserError(
            f"{target}: cannot be written: {getattr(error, 'strerror', None) or 'No space left on device'}",
            "make room and run the same command again: it goes on from the last checkpoint",
            RESOURCES,
        )
    return error
