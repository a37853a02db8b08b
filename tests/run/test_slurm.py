"""Tasks of srun as processes of a launch."""

import os

import pytest

from llmpipe.errors import UserError
from llmpipe.run import machine
from llmpipe.run.slurm import _first_of, _tasks_on, under_srun

TASK = {
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07,09]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
OURS = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK MASTER_ADDR MASTER_PORT".split()


@pytest.fixture
def task(monkeypatch):
    for name in (*OURS, "ACCELERATE_MIXED_PRECISION"):
        # set first, so that what is set under test is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, text in TASK.items():
        monkeypatch.setenv(name, text)


def test_a_task_of_several_is_a_process_of_a_launch(task):
    under_srun()
    assert [os.environ.get(name) for name in OURS[:-1]] == ["9", "12", "1", "4", "1", "gpu07"]
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 30_000
    assert machine.outside() and machine.on_several_machines()


@pytest.mark.parametrize(
    ("name", "text"),
    [("RANK", "3"), ("SLURM_STEP_NUM_TASKS", "1"), ("ACCELERATE_MIXED_PRECISION", "no")],
)
def test_a_launcher_within_a_task_and_a_task_alone_are_what_they_were(
    task, monkeypatch, name, text
):
    monkeypatch.setenv(name, text)
    under_srun()
    assert "WORLD_SIZE" not in os.environ


def test_lists_as_slurm_writes_them():
    hosts = ["gpu07", "gpu[07-09,12],login", "rack[0-1]node[3,5]", "a,b", "n[001-004]-ib"]
    assert [_first_of(each) for each in hosts] == ["gpu07", "gpu07", "rack0node3", "a", "n001-ib"]
    assert [_tasks_on(node, "8(x2),4") for node in range(3)] == ["8", "8", "4"]


def test_a_launcher_that_tells_its_processes_nothing_is_refused(monkeypatch):
    """`accelerate launch --cpu` of several: each would be the first one."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert machine.outside()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match="does not tell its processes") as refused:
        machine.outside()
    assert refused.value.code == 2
