"""What this machine has, and how a batch is cut on it; without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from llmpipe.errors import UserError
from llmpipe.faults import GO_ON, MEMORY
from llmpipe.recipe.sections import Machine, Recipe, Training

IN_RUN = "LLMPIPE_MODELS_IN_RUN"
"""Tells a worker by 1 that other machines have to see the folders of models that it makes."""


def gpus() -> int:
    """GPUs that a worker will see, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        return len([name for name in names if name not in ("", "-1")])
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def process_count(recipe: Recipe) -> int:
    """Processes that do a stage's work: as the outside launcher or the recipe has it; else one per
    GPU, of those that train as many as divide the batch, so that the machine never decides what a
    step is."""
    if outside():
        return world_size()
    if isinstance(recipe.launch.processes, int):
        return recipe.launch.processes
    if not isinstance(recipe, Training):
        return max(1, gpus())
    divide = (count for count in range(gpus(), 1, -1) if _divides(recipe, count))
    return 1 if recipe.is_whole else next(divide, 1)


def _divides(recipe: Training, processes: int) -> bool:
    """Whether so many processes cut a step into equal shares, and these into micro-batches."""
    share, rest = divmod(recipe.batch_size, processes)
    size = recipe.launch.micro_batch_size
    return not rest and (size == "auto" or share % size == 0)


def idle_gpus(recipe: Recipe) -> str | None:
    """What to say of GPUs that `processes: auto` leaves alone; None where there are none."""
    if not isinstance(recipe, Training) or recipe.launch.processes != "auto" or outside():
        return None
    count = process_count(recipe)
    if count >= gpus():
        return None
    size = recipe.launch.micro_batch_size
    micro = "" if size == "auto" else f" and launch.micro_batch_size ({size})"
    why = f"the most that fit optim.batch_size ({recipe.batch_size}){micro}"
    if recipe.is_whole:
        why = "since the objective takes a step whole"
    return f"launch.processes: auto is {count} of {gpus()} GPUs, {why}"


def memory(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process and its neighbours may take: the machine's, or what the control
    groups that they are in allow (cgroups of version 2).
    """
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _groups_of(groups, root):
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            most = min(most, int(text))
    return most


def free_memory(
    groups: Path = Path("/proc/self/cgroup"),
    root: Path = Path("/sys/fs/cgroup"),
    system: Path = Path("/proc/meminfo"),
) -> int:
    """Bytes of it that nobody has taken, or the system gives back when they are asked for, as pages
    of files; all of it where the system does not say.
    """
    free = memory(groups, root)
    if not system.is_file():
        return free
    lines = [line.split() for line in system.read_text().splitlines()]
    kilobytes = {words[0]: int(words[1]) for words in lines}
    free = min(free, 1024 * kilobytes.get("MemAvailable:", free // 1024))
    for folder in _groups_of(groups, root):
        limit, used, kinds = (folder / f"memory.{name}" for name in ("max", "current", "stat"))
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            sizes = dict(line.split() for line in kinds.read_text().splitlines())
            files = int(sizes["active_file"]) + int(sizes["inactive_file"])
            free = min(free, int(text) - int(used.read_text()) + files)
    return max(0, free)


def _groups_of(groups: Path, root: Path) -> Iterator[Path]:
    """The control groups that this process is in (of version 2), the innermost first."""
    lines = groups.read_text().splitlines() if groups.is_file() else []
    for line in lines:
        version, _, name = line.partition("::/")
        if version == "0":
            yield from (root / name, *(root / name).parents)


def file_system(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """The kind of file system that a folder is on, or is to be made on; empty where nobody says."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    device = there.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    for fields in (line.split() for line in lines):  # proc_pid_mountinfo(5)
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""


def thread_count(launch: Machine, processes: int) -> int:
    """CPU threads of each of so many processes."""
    if isinstance(launch.threads, int):
        return launch.threads
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // processes)


def micro_batch_size(recipe: Training, processes: int, on_gpu: bool) -> int:
    """Sequences per process and forward pass.

    Raises UserError when `optim.batch_size` does not divide.
    """
    total = recipe.batch_size
    if total % processes:
        raise UserError(
            f"optim.batch_size ({total}) must be a multiple of launch.processes ({processes})",
            f"set optim.batch_size to {total - total % processes or processes}",
        )
    share = total // processes
    size = recipe.launch.micro_batch_size
    if size == "auto":
        return _fitting_micro_batch(recipe, share, on_gpu)
    if share % size:
        raise UserError(
            f"optim.batch_size ({total}) must be a multiple of launch.micro_batch_size ({size}) "
            f"x launch.processes ({processes})",
            "change one of them; accumulation makes up the rest",
        )
    return size


def _fitting_micro_batch(recipe: Training, share: int, on_gpu: bool) -> int:
    """The largest divisor of a process's share whose tokens keep the hardware busy, and no more."""
    least = 1 if recipe.packs else 4  # unpacked rows are mostly short
    most = max(least, full_pass(on_gpu) // recipe.longest)
    return max(size for size in range(1, min(share, most) + 1) if share % size == 0)


def micro_batch_sizes(recipe: Training, processes: int) -> list[int]:
    """Sizes that a micro-batch may have without another optimizer step, the smallest first."""
    share = recipe.batch_size // processes
    least = share if recipe.is_whole else min(recipe.least_micro_batch, share)
    return [size for size in range(least, share + 1) if share % size == 0]


def for_memory(action: str, recipe: Recipe) -> str:
    """What to do where a worker's action had not enough memory."""
    if action == "prepare":
        return "set data.processes to a smaller number, or data.stream: true in pretrain"
    if action == "convert":
        return "it takes the whole model in fp32, once: do it on a machine with more memory"
    if not isinstance(recipe, Training):
        alone = ", or set launch.processes: 1, which has all GPUs" * (recipe.stage == "eval")
        return f"lower launch.batch_size{alone}; the same command goes on from what is scored"
    return f"{MEMORY}; {GO_ON}"


def full_pass(on_gpu: bool) -> int:
    """Tokens of a forward pass that keep the hardware busy."""
    return 8192 if on_gpu else 1024


def outside() -> bool:
    """Whether accelerate or torchrun started this very command. RANK is unset with one process.

    Raises UserError where the launcher would hold the model in a way that llmpipe has not.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("true", "1"):
            problem = f"accelerate: llmpipe trains no model by a launcher's {name}"
            remedy = "launch with --multi_gpu, and set launch.strategy: fsdp where one GPU is small"
            if name == "DEEPSPEED":
                remedy = "launch with --multi_gpu, and set launch.strategy: zero2, zero3 or fsdp"
            raise UserError(problem, remedy)
    if "RANK" not in os.environ and _is_one_of_several_cpus():
        problem = "accelerate launch --cpu does not tell its processes of one another"
        raise UserError(problem, "launch with --multi_gpu, which runs on CPUs, too, or torchrun")
    return "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def rank() -> int:
    """Which of the processes this is; 0 speaks for all."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def on_several_machines() -> bool:
    """Whether an outside launcher has started processes on other machines, too."""
    return local_world_size() != world_size()


def machine_rank() -> str:
    """Which of the machines this is, as its launcher, or else Slurm, counts them from 0."""
    return os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID", "0")


def local_rank() -> int:
    """Which of the processes on this machine this is."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_task() -> bool:
    """Whether srun started this process itself, with no launcher between."""
    return os.environ.get("SLURM_PROCID") == os.environ.get("RANK", "no rank")


def _is_one_of_several_cpus() -> bool:
    """Whether `accelerate launch --cpu` has several processes, which all would be the first one."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    return on_cpu and "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
