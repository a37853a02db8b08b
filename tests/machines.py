"""Two machines: network namespaces of this one, with a cable between them and one file system."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager, suppress

import pytest

from llmpipe.run.artifact import Artifact
from tests import life

ADDRESSES = ("198.18.7.1", "198.18.7.2")
"""Of RFC 2544. Above 127, since of two addresses gloo lets one call the other."""
PORT = 29_713
DEADLINE = 240


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def cabled():
    """Names of two namespaces that reach each other; skips where none can be made."""
    if not shutil.which("ip"):
        pytest.skip("needs ip (iproute2) for network namespaces")
    word = uuid.uuid4().hex[:6]
    names = [f"llmpipe-{word}-{number}" for number in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ends = [f"v{word}{number}" for number in (0, 1)]
            ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
            for name, end, address in zip(names, ends, ADDRESSES, strict=True):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "link", "set", end, "name", "cable")
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "cable", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


class Machine:
    """A launcher in a namespace, and what it starts."""

    def __init__(self, name, command, out, **variables):
        self.out = out
        self.word = uuid.uuid4().hex
        environment = {**os.environ, "PYTHONPATH": str(life.ROOT), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MACHINE": self.word, "OMP_NUM_THREADS": "1"} | variables
        with open(out, "w") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=life.ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self):
        return self.out.read_text()

    def pids(self, named=""):
        """Of its processes that live, and have `named` in their command line."""
        return life.pids_of(self.word, named)

    def rank(self):
        """The process that trains here."""
        launchers = self.pids("--nnodes") + self.pids("accelerate")
        others = set(self.pids("\0llmpipe\0sft")) | set(self.pids("\0llmpipe\0ppo"))
        (pid,) = others - set(launchers)
        return pid

    def end(self, seconds=DEADLINE):
        """The exit code of the launcher; what is left of it is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"a machine does not end:\n{self.text}")
        finally:
            self.kill()

    def kill(self):
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def torchrun(number, *options):
    where = f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}"
    host = f"--rdzv_conf=is_host={1 - number}"  # one host name stands for both here
    rendezvous = ["--rdzv_backend=c10d", where, host, f"--local_addr={ADDRESSES[number]}"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    return [*command, *rendezvous, *options, "-m", "llmpipe"]


def accelerate(number, *options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_machines=2", "--num_processes=2", f"--machine_rank={number}"]
    command += [f"--main_process_ip={ADDRESSES[0]}", f"--main_process_port={PORT}"]
    return [*command, *options, "-m", "llmpipe"]


def srun(number):
    """What Slurm says to two tasks, one on each machine."""
    variables = {"PROCID": number, "LOCALID": 0, "NODEID": number, "STEP_NUM_TASKS": 2}
    variables |= {"STEP_TASKS_PER_NODE": "1(x2)", "STEP_NODELIST": "none[1-2]", "JOB_ID": 7}
    variables["STEP_ID"] = 0
    told = [f"SLURM_{name}={text}" for name, text in variables.items()]
    # no name stands for an address here
    return ["env", *told, f"MASTER_ADDR={ADDRESSES[0]}", sys.executable, "-m", "llmpipe"]


def start(names, path, launcher=torchrun, *options, stage="sft", hides=((), ())):
    """Both machines at the same recipe. `hides`: commands within which a machine starts it."""
    return [
        Machine(
            name,
            [*hides[number], *launcher(number, *options), stage, str(path)],
            out_of(path, number),
        )
        for number, name in enumerate(names)
    ]


def out_of(path, number):
    return path.with_suffix(f".machine{number}.out")


def ends(machines):
    codes = [machine.end() for machine in machines]
    return codes, [machine.text for machine in machines]


def made(names, path, launcher=torchrun, *options, stage="sft"):
    """What both machines make of a recipe, verified."""
    codes, texts = ends(start(names, path, launcher, *options, stage=stage))
    assert codes == [0, 0], "\n---\n".join(texts)
    artifact = Artifact(path.parent / "run" / stage)
    assert artifact.verify().hardware["processes"] == 2
    return artifact


def wait_until(happens, machines, seconds=DEADLINE):
    deadline = time.monotonic() + seconds
    while not happens():
        over = time.monotonic() > deadline or any(m.process.poll() is not None for m in machines)
        if over:
            texts = "\n---\n".join(machine.text for machine in machines)
            for machine in machines:
                machine.kill()
            pytest.fail(f"it never came to that:\n{texts}")
        time.sleep(0.05)
