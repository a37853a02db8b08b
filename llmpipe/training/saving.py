"""Checkpoints of a training, written at once or, `checkpoint.asynchronous`, beside the next steps.

Libraries say what a file holds, and `Saving` writes it: at once from the very tensors, or by a
thread from a copy in the host's memory. Either way each process writes its own files, flushes them
to the disk and hashes them, by the same lines, so that the bytes are the same.

Nothing in the thread speaks to another process. That all have written is agreed on by the main
threads: at the end of a step (`poll`), or, waiting for it, before the next checkpoint, at a stop
and at the end. Then the first process publishes the folder, as it does what was written at once. An
error of the thread is raised there, in all processes; and a kill at any moment leaves what it
leaves of a checkpoint that is written at once: a folder that nobody takes for one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any

from torch import Tensor

from llmpipe.errors import Say
from llmpipe.faults import writing
from llmpipe.files.tables import Table, in_bytes
from llmpipe.files.writing import staging_of
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.run import checkpoints
from llmpipe.run.machine import free_memory, local_world_size
from llmpipe.training.host_copy import File, HostMemory

USED = 0.9
"""Of the host's memory that is free, at most, by the copies of all processes of a machine."""


@dataclass(frozen=True)
class Content:
    """What a checkpoint has beside the files of its processes."""

    origin: checkpoints.Origin
    state: dict[str, Any]
    """As JSON holds it."""
    lines: Mapping[str, int]
    """Sizes of the artifact's files of lines, in bytes."""
    best: int | None = None
    """The step of a checkpoint that is kept, however old it is."""


class Saving:
    """The checkpoints of one training. Around its steps it is a context: what is still being
    written is finished on leaving.
    """

    def __init__(self, home: Path, asked: sections.Checkpoint, device: str, world: World, say: Say):
        """`home`: where checkpoints lie; `device`: what computes the steps, cpu or cuda."""
        self.home = home
        self.keep = asked.keep
        self.world = world
        self.say = say
        self.is_asynchronous = (
            device != "cpu" if asked.asynchronous == "auto" else asked.asynchronous
        )
        self.seconds = 0.0
        """That the steps stood still for checkpoints."""
        self.beside = 0
        """Checkpoints that were written while steps ran."""
        self.waited = 0
        """Times that a checkpoint was due while the one before was still being written, and steps
        were to follow."""
        self._memory = HostMemory(pinned=device == "cuda")
        self._files: list[File] = []
        self._pending: _Pending | None = None
        self._said: bool | None = None

    # --- what a checkpoint is made of ---

    @contextmanager
    def checkpoint(
        self, step: int, content: Content | None, *, below: str = "", at_once: bool = False
    ) -> Iterator[Path]:
        """Yield a folder to save into, and let what `tensors` and `pickled` are given meanwhile be
        written there; published as `step-N`, then or later. Collective.

        `content`: None where this process is not the one that publishes; `below`: of the folder
        that is published, where in it the library saves; `at_once`: no step follows.
        """
        with self._standing_still(), ExitStack() as published:
            self._wait_for_another(step, tell=at_once)
            target = checkpoints.folder(self.home, step)
            pending = _Pending(step, target, staging_of(target), below)
            if content:
                arguments = (step, content.origin, lambda: content.state, content.lines)
                whole = checkpoints.writing(self.home, *arguments, pending.hashed)
                published.enter_context(whole)
                pending.best = content.best
            pending.staging = self.world.staged(pending.staging)
            self.world.wait()
            yield pending.saved
            pending.files, self._files = self._files, []
            if content:
                checkpoints.leave_out(pending.saved)
            is_copied = not at_once and self._copy(pending)
            pending.published = published.pop_all()
            self._pending = pending
            if is_copied:
                self.beside += 1
                pending.begin()
            else:
                pending.write()
                self._finish()

    def tensors(
        self, tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Let a file of safetensors hold these, as they are when all files are known."""
        self._files.append(File(Path(path), tensors, metadata))

    def pickled(self, value: Any, path: Path) -> None:
        """Let a file hold what torch pickles: tensors in dictionaries and lists."""
        self._files.append(File(path, value, pickled=True))

    # --- what is still being written ---

    def poll(self) -> None:
        """At the end of a step: publish what all processes have written by now. Collective."""
        if self._pending and self.world.all(self._pending.is_written):
            with self._standing_still():
                self._finish()

    def __enter__(self) -> Saving:
        if self.world.is_first:  # others write only where this one has made a folder
            with writing(self.home):
                checkpoints.remove_unfinished(self.home)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        """Finish what is being written. Where the steps have failed one process alone does so, too;
        several have nothing to agree by then.
        """
        if error is None:
            with self._standing_still():
                self._finish()
            self._say_at_end()
        elif self.world.size == 1 and isinstance(error, Exception):
            with suppress(Exception):
                self._finish()
        elif self._pending:
            self._pending.give_up(wait=self.world.size == 1)
        self._memory.free()

    def _wait_for_another(self, step: int, *, tell: bool) -> None:
        """Finish the checkpoint before, which may still be being written. Collective."""
        if self._pending and not self.world.all(self._pending.is_written):
            self.waited += not tell
            if tell or self.waited == 1:
                before = f"that of step {self._pending.step}, which is still being written"
                self.say(f"checkpoint: step {step} waits for {before}")
        self._finish()

    def _finish(self) -> None:
        """Publish what is pending, once all processes have written it, and remove what is too old.
        Raises in all of them what one has met, a full disk. Collective where one is pending.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.join()
            with self.world.as_one():
                pending.check()
            for table in self.world.gather(pending.table):
                pending.hashed |= table
            self.world.collect(pending.saved, pending.hashed)
        except BaseException:
            pending.give_up(wait=self.world.size == 1)
            raise
        with pending.published:
            if self.world.is_first:
                pending.move_up()
        self.world.keep(pending.saved, pending.target)
        if self.world.is_first:
            also = set() if pending.best is None else {pending.best}
            checkpoints.rotate(self.home, self.keep, also)
        self.world.wait()

    def _copy(self, pending: _Pending) -> bool:
        """Copy what a checkpoint holds to the host's memory, if it is to be written beside the next
        steps, and there is room in all processes. Collective.
        """
        if not self.is_asynchronous:
            return False
        size = sum(file.size for file in pending.files)
        fits = self._reserve(size)
        if fits:
            pending.files = [file.copied(self._memory) for file in pending.files]
            self._memory.settle()
        return fits

    def _reserve(self, size: int) -> bool:
        """Have room for a copy of so many bytes, if all processes can; say which. Collective."""
        more = max(0, size - self._memory.size)
        told = self.world.gather((more, free_memory(), local_world_size()))
        sizes, free, together = zip(*told, strict=True)
        needed = max(sizes) * min(max(together), sum(each > 0 for each in sizes))
        is_free = needed <= USED * min(free)
        fits = self.world.all(is_free and self._memory.reserve(size))
        if self._said is not fits:
            self._said = fits
            copies = f"of {in_bytes(size)} in the host's memory"
            how = f"while the next steps run, from a copy {copies}"
            if not fits:
                how = f"at once: for a copy {copies} {in_bytes(min(free))} are free"
            self.say(f"checkpoints: written {how}")
        return fits

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    def _say_at_end(self) -> None:
        if self.beside:
            line = f"checkpoints: {self.beside} written beside steps, which stood still for "
            line += f"{self.seconds:.1f} s"
            if self.waited:
                line += f"; {self.waited} waited for the one before: raise checkpoint.every"
            self.say(line)


@dataclass
class _Pending:
    """A checkpoint that is not published yet, as one process sees it."""

    step: int
    target: Path
    staging: Path
    below: str
    files: list[File] = field(default_factory=list)
    """Of this process, to be written."""
    table: Table = field(default_factory=dict)
    """Of those that it has written."""
    hashed: Table = field(default_factory=dict)
    """Of all processes, in the end."""
    best: int | None = None
    published: ExitStack = field(default_factory=ExitStack)
    """Left, it publishes; left with an error, it removes what there is. Elsewhere it is empty."""
    thread: Thread | None = None
    error: Exception | None = None
    given_up: bool = False

    @property
    def saved(self) -> Path:
        """Where the library saves."""
        return self.staging / self.below

    @property
    def is_written(self) -> bool:
        """Whether this process has written all that it is to write, or failed to."""
        return self.thread is None or not self.thread.is_alive()

    def begin(self) -> None:
        """Write beside what comes."""
        if self.files:
            thread = Thread(target=self.write, name=f"checkpoint {self.step}")
            try:
                thread.start()
            except RuntimeError as error:  # none can be had: what is not written is not published
                self.error = error
                raise
            self.thread = thread

    def write(self) -> None:
        """Write this process's files. What goes wrong is raised by `check`."""
        try:
            with writing(self.target, self.staging):
                while self.files and not self.given_up:
                    file = self.files.pop(0)
                    self.table[file.path.relative_to(self.saved).as_posix()] = file.write()
        except Exception as error:
            self.error = error

    def join(self) -> None:
        if self.thread:
            self.thread.join()

    def check(self) -> None:
        if self.error:
            raise self.error

    def give_up(self, *, wait: bool) -> None:
        """Leave nothing of it, once the file that is being written is. Without `wait`: others, in
        a collective, hear first why this process fails, and what is written by then may stay, as of
        a kill. The thread is none that Python drops at its end: libraries abort the process then.
        """
        self.given_up = True
        if wait:
            self.join()
        with suppress(_GivenUp), self.published:
            raise _GivenUp

    def move_up(self) -> None:
        """Let what the library has saved be what is published."""
        if self.below:
            for path in self.saved.iterdir():
                path.rename(self.staging / path.name)
            self.saved.rmdir()


class _GivenUp(BaseException):
    """Leaves what would publish: nobody's error, which is raised as it is."""
