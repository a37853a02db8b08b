"""How processes become one group."""

from __future__ import annotations

import os

import pytest
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState

from llmpipe.parallel import group


def test_no_stage_takes_over_what_accelerate_knew_in_the_one_before():
    """Under one launch both are made in one process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    assert group.accelerator("cpu").distributed_type == DistributedType.NO
    assert "ACCELERATE_USE_DEEPSPEED" not in os.environ


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
    assert group.backend(device, offload) == backend


def test_the_interface_by_which_a_host_is_reached():
    assert group.address_toward("127.0.0.1") == "127.0.0.1"
    assert group.interface_of("127.0.0.1") == "lo"
    assert group.address_toward("no such host") is None
    assert group.interface_of("192.0.2.1") is None  # of no machine, by RFC 5737


def test_a_machine_that_is_127_0_1_1_to_itself_takes_the_way_to_another_one(monkeypatch):
    """As Debian's /etc/hosts has it on the first machine, whose address that one says to all."""
    ways = {"node1": "127.0.1.1", "127.0.1.1": "127.0.0.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(group, "address_toward", ways.get)
    monkeypatch.setattr(group, "interface_of", {"127.0.1.1": "lo", "10.0.0.1": "eth1"}.get)
    assert group.outward(["node1", "127.0.1.1", "", "10.0.0.2"]) == "eth1"
    assert group.outward(["node1", "127.0.1.1"]) is None
    assert group.outward(["10.0.0.2", "node1"]) == "eth1"
