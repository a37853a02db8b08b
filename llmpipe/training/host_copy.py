"""Files of a checkpoint, and copies in the host's memory of what they are to hold.

A copy is written as the tensors would be that it is of, byte by byte: where torch pickles them it
has the same storages, each as large as it was and shared by the same tensors.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmpipe.files.tables import FileEntry, sha256_file
from llmpipe.files.writing import fsync

ALIGNED = 64
"""Bytes that a copy begins at a multiple of."""


class HostMemory:
    """Memory that copies of tensors lie in, the same from one checkpoint to the next.

    For the tensors of a GPU it is pinned, so that the device copies by itself. PyTorch's own pinned
    memory would take twice as much, of a size just above a power of two.
    """

    def __init__(self, *, pinned: bool):
        self.pinned = pinned
        self.size = 0
        """Bytes."""
        self._block: mmap.mmap | None = None
        self._pinned_at = 0
        self._taken = 0

    def reserve(self, size: int) -> bool:
        """Have room for so many bytes, from the beginning; whether the system gives them. Copies
        that were made before are lost.
        """
        self._taken = 0
        if size <= self.size:
            return True
        self.free()
        try:
            self._block = mmap.mmap(-1, size)
        except OSError:
            return False
        self.size = size
        if self.pinned:
            address = torch.frombuffer(self._block, dtype=torch.uint8).data_ptr()
            runtime = torch.cuda.cudart()
            # where it fails the copies are right, and slower
            if int(runtime.cudaHostRegister(address, size, 0)) == 0:
                self._pinned_at = address
        return True

    def copied(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor, in a storage of its own; a GPU's is there after `settle`."""
        count, begin = tensor.numel(), self._taken
        self._taken += aligned(tensor.nbytes)
        if not count:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        assert self._block is not None and self._taken <= self.size
        flat = torch.frombuffer(self._block, dtype=tensor.dtype, count=count, offset=begin)
        return flat.view(tensor.shape).copy_(tensor, non_blocking=self.pinned)

    def settle(self) -> None:
        """Wait until all copies are there."""
        if self.pinned:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give it back. Nothing holds a copy any more."""
        if self._pinned_at:
            torch.cuda.cudart().cudaHostUnregister(self._pinned_at)
        self._block, self.size, self._pinned_at = None, 0, 0


def aligned(size: int) -> int:
    """Bytes that a copy of so many takes."""
    return -(-size // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, and what it is to hold."""

    path: Path
    content: Any
    """Tensors by their names, for safetensors; or what torch pickles."""
    metadata: Mapping[str, str] | None = None
    pickled: bool = False

    def write(self) -> FileEntry:
        """Write it to the disk; its size and hash."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.pickled:
            torch.save(self.content, self.path)
        else:
            words = dict(self.metadata) if self.metadata else None
            save_file(_unshared(self.content), self.path, words)
        fsync(self.path)
        return FileEntry(self.path.stat().st_size, sha256_file(self.path))

    @property
    def size(self) -> int:
        """Bytes that a copy of what it holds takes."""
        if not self.pickled:
            return sum(aligned(tensor.nbytes) for tensor in self.content.values())
        return sum(aligned(storage.nbytes) for storage in _storages(self.content).values())

    def copied(self, memory: HostMemory) -> File:
        """The same file, of what there is now."""
        if self.pickled:
            return replace(self, content=_copied(self.content, memory))
        content = {name: memory.copied(tensor.detach()) for name, tensor in self.content.items()}
        return replace(self, content=content)


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: where two share memory, as tied weights do and what
    bitsandbytes keeps for all, one is copied.
    """
    seen: set[int] = set()
    copies: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        alone = tensor.detach().contiguous()
        copies[name] = alone.clone() if memory in seen else alone
        seen.add(memory)
    return copies


def _copied(value: Any, memory: HostMemory) -> Any:
    """A copy of what torch pickles."""
    storages = {key: memory.copied(each) for key, each in _storages(value).items()}
    copies: dict[int, Any] = {}
    for tensor in _tensors(value):
        storage = storages[_storage_of(tensor)].untyped_storage()
        place = (tensor.storage_offset(), tensor.size(), tensor.stride())
        each = torch.empty(0, dtype=tensor.dtype).set_(storage, *place)
        vars(each).update(vars(tensor))  # bitsandbytes notes there what is paged
        copies[id(tensor)] = each
    return copy.deepcopy(value, copies)


def _storages(value: Any) -> dict[int, Tensor]:
    """The memory of all tensors in a nested value, each once, as bytes."""
    return {
        _storage_of(tensor): torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
        for tensor in _tensors(value)
    }


def _storage_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nested value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
