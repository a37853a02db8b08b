"""Which device is a process's own, and by what name a manifest knows it."""

from __future__ import annotations

import os

import pytest

from llmpipe.errors import UserError
from llmpipe.models.device import device_name, take_device


@pytest.mark.parametrize(
    ("gpus", "task", "device"),
    [
        (8, None, 3),
        (8, "11", 3),
        (1, "11", 0),  # srun --gpus-per-task 1: each task sees one, and it is its own
        (1, "0", None),  # torchrun within a task, or on a machine with one GPU
        (1, None, None),
        (2, "11", None),
    ],
)
def test_a_process_has_a_gpu_of_its_own_or_is_refused(monkeypatch, gpus, task, device):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    monkeypatch.setenv("RANK", "11")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    if task:
        monkeypatch.setenv("SLURM_PROCID", task)
    if device is None:
        with pytest.raises(UserError, match=rf"than GPUs that they see \({gpus}\)"):
            take_device()
        return
    take_device()
    assert taken == [device]
    assert os.environ["LOCAL_RANK"] == str(device), "by which libraries take one"


def test_a_card_is_called_by_its_own_name(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    assert device_name("cuda") == "NVIDIA H100"
    assert device_name("cpu") != device_name("cuda")
