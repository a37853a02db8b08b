"""What two processes tell each other, and one alone."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from transformers import TrainingArguments

from llmpipe import parallel
from llmpipe.errors import UserError
from llmpipe.front.launch import free_port
from llmpipe.parallel import World, join, patient
from tests import life


def world(rank: int, size: int) -> World:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        process_index=rank,
        num_processes=size,
        wait_for_everyone=lambda: None,
    )
    return World(accelerator)


def test_no_stage_takes_over_what_accelerate_knew_in_the_one_before():
    """Under one launch both are made in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    assert parallel.accelerator("cpu").distributed_type == DistributedType.NO
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


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


@pytest.mark.parametrize(
    ("device", "offload", "backend"),
    [
        ("cpu", False, "gloo"),
        ("cpu", True, "gloo"),
        ("cuda", False, "nccl"),
        ("cuda", True, "cpu:gloo,cuda:nccl"),
    ],
)
def test_tensors_in_the_hosts_memory_have_a_backend(device, offload, backend):
    assert parallel.backend(device, offload) == backend


def test_one_process_raises_its_own_error():
    with pytest.raises(UserError, match="mine"):
        world(0, 1).agree(UserError("mine"))


def test_the_interface_by_which_a_host_is_reached():
    assert parallel.address_toward("127.0.0.1") == "127.0.0.1"
    assert parallel.interface_of("127.0.0.1") == "lo"
    assert parallel.address_toward("no such host") is None
    assert parallel.interface_of("192.0.2.1") is None  # of no machine, by RFC 5737


def test_a_machine_that_is_127_0_1_1_to_itself_takes_the_way_to_another_one(monkeypatch):
    """As Debian's /etc/hosts has it on the first machine, whose address that one says to all."""
    ways = {"node1": "127.0.1.1", "127.0.1.1": "127.0.0.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(parallel, "address_toward", ways.get)
    monkeypatch.setattr(parallel, "interface_of", {"127.0.1.1": "lo", "10.0.0.1": "eth1"}.get)
    assert parallel.outward(["node1", "127.0.1.1", "", "10.0.0.2"]) == "eth1"
    assert parallel.outward(["node1", "127.0.1.1"]) is None
    assert parallel.outward(["10.0.0.2", "node1"]) == "eth1"
