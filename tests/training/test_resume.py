"""What lies beside the library's state in a checkpoint: old checkpoints rely on its shape."""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmpipe.errors import UserError
from llmpipe.models.hardware import Hardware
from llmpipe.run import checkpoints
from llmpipe.training.heldout import Best
from llmpipe.training.resume import (
    RankState,
    State,
    counted,
    put_back,
    refuse_another_strategy,
)

OLD = Path(__file__).parent.parent / "fixtures/run-0.1/run/lora/checkpoints/step-9/llmpipe.json"


def test_the_state_of_an_old_checkpoint_is_written_as_it_was_read():
    old = json.loads(OLD.read_text())
    again = json.dumps(State.from_file(OLD).model_dump())
    assert again == json.dumps(old)  # the same numbers, integers as integers, in the same order


def test_the_best_step_is_written_as_a_list():
    old = json.loads(OLD.read_text())
    state = State(**old | {"best": Best(*old["best"])})
    assert json.dumps(state.model_dump()) == json.dumps(old)


def test_what_the_library_counted_is_put_back():
    def trainer(**counted):
        metrics = {"train": defaultdict(list, counted.pop("averages", {}))}
        return SimpleNamespace(_metrics=metrics, **counted)

    stopped = trainer(
        _tr_loss=torch.tensor(1.5),
        _globalstep_last_logged=8,
        _total_train_tokens=70,
        averages={"entropy": [0.25, 0.5], "num_tokens": [70]},
    )
    state = counted(stopped, tokens=64, seconds=2.0)
    assert state == RankState(
        loss_sum=1.5,
        last_logged=8,
        averages={"entropy": [0.25, 0.5], "num_tokens": [70]},
        train_tokens=70,
        tokens=64,
        seconds=2.0,
    )
    resumed = trainer(_tr_loss=torch.tensor(0.0), _globalstep_last_logged=0, _total_train_tokens=0)
    put_back(resumed, state)
    assert counted(resumed, tokens=64, seconds=2.0) == state
    resumed._metrics["train"]["accuracy"].append(1.0)  # a new metric begins as an empty list


@pytest.mark.parametrize(
    ("before", "strategy"), [({}, "ddp"), ({"sharded": True}, "fsdp"), ({"zero": 3}, "zero3")]
)
def test_another_strategy_is_called_by_its_name(tmp_path, monkeypatch, before, strategy):
    """Of an adapter, too, whose checkpoints are of one form but under ZeRO."""
    monkeypatch.setattr(checkpoints, "settings", lambda home: {"processes": 2} | before)
    hardware = Hardware("cpu", 2, 1, 1, 1, False, "sdpa", zero=0 if "zero" in before else 2)
    with pytest.raises(UserError, match=rf"launch\.strategy: {strategy}\n"):
        refuse_another_strategy(tmp_path, hardware, adapts=True)
