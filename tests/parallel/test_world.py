"""What two processes tell each other, and one alone."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import TrainingArguments

from llmpipe.errors import UserError
from llmpipe.front.launch import free_port
from llmpipe.parallel.group import join, patient
from llmpipe.parallel.world import World
from tests import life


def world(rank: int, size: int) -> World:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=size,
        wait_for_everyone=lambda: None,
    )
    return World(accelerator)


def talk(world: World) -> dict:
    """Everything that a process can say, and what it hears."""
    rank = world.rank
    value = torch.tensor([1.0, 10.0 * rank])
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad = torch.full((2,), rank + 1.0)
    world.sum_gradients(parameters)
    problem = UserError("rank 1 has met it", "mend it", 5) if rank == 1 else None
    try:
        world.agree(problem)
        refused = None
    except UserError as error:
        refused = (error.message, error.hint, error.code)
    return {
        "sum": world.sum(value).tolist(),
        "unchanged": value.tolist(),
        "greatest": world.greatest(rank),
        "totals": world.totals({"a": 2**24 + 1.0, "b": torch.tensor(rank)}),
        "gradients": [parameter.grad.tolist() for parameter in parameters],
        "gathered": world.gather({"rank": rank}),
        "stop": world.stop_code(SimpleNamespace(code=143 if rank == 1 else None)),
        "refused": refused,
    }


def run(rank: int, port: int, queue: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    join("cpu")
    heard = talk(world(rank, 2))
    # which would have made a group with a timeout of its own
    TrainingArguments("nowhere", use_cpu=True, report_to="none").device  # noqa: B018
    heard["timeouts"] = [timeout_of(group) for group in (dist.group.WORLD, patient())]
    queue.put((rank, heard))
    World.of("cpu").wait()
    dist.destroy_process_group()


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout


def test_one_process_hears_itself():
    heard = talk(world(0, 1))
    assert heard["sum"] == heard["unchanged"] == [1, 0]
    assert heard["greatest"] == 0 and heard["stop"] == 0 and heard["refused"] is None
    assert heard["gathered"] == [{"rank": 0}]
    assert heard["gradients"] == [[1, 1], [0, 0]]
    assert world(0, 1).is_first and not world(1, 2).is_first


def test_two_processes_hear_the_same():
    queue = multiprocessing.get_context("forkserver").Queue()
    port = free_port()
    processes = [life.forked(run, rank, port, queue) for rank in range(2)]
    heard = dict(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [heard[rank].pop("unchanged") for rank in range(2)] == [[1, 0], [1, 10]]
    assert heard[0] == heard[1]
    assert heard[0] == {
        "sum": [2, 10],
        "greatest": 1,
        "totals": {"a": 2**25 + 2.0, "b": 1},  # more than float32 holds
        "gradients": [[3, 3], [0, 0]],
        "gathered": [{"rank": 0}, {"rank": 1}],
        "stop": 143,
        "refused": ("rank 1 has met it", "mend it", 5),
        "timeouts": [timedelta(minutes=30), timedelta(days=7)],
    }


def test_one_process_raises_its_own_error():
    with pytest.raises(UserError, match="mine"):
        world(0, 1).agree(UserError("mine"))


def test_tensors_are_sent_together(monkeypatch):
    """As many as have one type and so many numbers; sums come back where they were."""
    sent = []
    monkeypatch.setattr("llmpipe.parallel.world.TOGETHER", 10)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: (sent.append(len(flat)), flat.mul_(2)))
    world = object.__new__(World)
    world.size = 2
    shapes = [(2, 3), (4,), (1,), (20,), (), (3,)]
    tensors = [torch.arange(float(torch.Size(shape).numel())).reshape(shape) for shape in shapes]
    tensors[-1] = tensors[-1].double()
    expected = [tensor * 2 for tensor in tensors]
    world.add_up(tensors)
    assert sent == [10, 1, 20, 1, 3]
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))
    world.size = 1
    world.add_up(tensors)
    assert len(sent) == 5
