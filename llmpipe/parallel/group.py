"""How the processes of a launch become one group, which libraries then take as it is."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed import PrefixStore

from llmpipe.peers import meet
from llmpipe.run.machine import on_several_machines, rank, world_size

STEP = timedelta(minutes=30)
"""What a collective of a step may take: then one has come that others did not come to."""
ALONE = timedelta(days=7)
"""What one process may do alone, where others wait for it: hashing, publishing, rewards."""


def join(device: str, *, offload: bool = False) -> None:
    """Make one group of the processes of this launch, where there are several. Collective.

    Libraries take a group that is there. Made by themselves it would have, on CPUs, a timeout that
    cannot be set. `offload`: whether processes on GPUs speak of what lies in the host's memory.
    """
    if world_size() == 1 or dist.is_initialized():
        return
    peers = meet()
    first = os.environ["MASTER_ADDR"]
    # here all wait for one another: some may still have verified what others had not to
    addresses = peers.gather("here", address_toward(first) or "")
    if on_several_machines() and (name := outward((first, *addresses))):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    store = PrefixStore("group", peers.store)
    dist.init_process_group(
        backend(device, offload), store=store, rank=rank(), world_size=world_size(), timeout=STEP
    )
    patient()


def backend(device: str, offload: bool) -> str:
    """What processes on such devices speak by. Norms and moments of an offloaded model are tensors
    of CPUs, which nccl does not carry.
    """
    if device == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if offload else "nccl"


@cache
def patient() -> dist.ProcessGroup:
    """All processes, on CPUs and with patience. It sees at once when one of them has died."""
    return dist.new_group(backend="gloo", timeout=ALONE)


def accelerator(device: str, **options: Any) -> Accelerator:
    """What Accelerate knows of the processes, for a stage that no trainer of TRL's makes. As these
    do, it forgets first what a stage before knew in the same process, and that may be ZeRO.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", **options)


def outward(hosts: Iterable[str]) -> str | None:
    """The network interface by which the first of some hosts is reached that is on another machine:
    gloo takes the one that this machine's own name stands for, which is often none that others
    reach. None where that is not known. Debian writes a machine's own name as 127.0.1.1 in its
    hosts, so that the first machine reaches itself by `lo`.
    """
    names = (interface_of(address) for host in hosts if (address := address_toward(host)))
    return next((name for name in names if name not in (None, "lo")), None)


SIOCGIFADDR = 0x8915  # netdevice(7): the address of an interface


def address_toward(host: str) -> str | None:
    """This machine's address on the way to a host; None where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has an address; all of 127.0.0.0/8 is that of this machine."""
    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            asked = struct.pack("256s", name.encode())
            with suppress(OSError):  # one without an address
                if fcntl.ioctl(probe, SIOCGIFADDR, asked)[20:24] == socket.inet_aton(address):
                    return name
    return None
