"""`keep_best` and `patience` do what they are asked for, or it is said that they cannot."""

import re
from types import SimpleNamespace

import pytest
import torch

from llmpipe.recipe.sections import Evaluation
from llmpipe.training.heldout import Best, HeldOut, overfitting, without_effect
from tests import life


@pytest.mark.parametrize(
    ("every", "keep_best", "patience", "steps", "said"),
    [
        (None, False, None, 40, []),
        (100, True, None, 40, ["keep_best"]),
        (40, True, None, 40, ["keep_best"]),
        (39, True, None, 40, []),
        (100, True, 3, 40, ["keep_best", "patience"]),
        (10, False, 1, 20, ["patience"]),
        (10, False, 1, 21, []),  # evaluated at 10 and at 20, which may be the worse one
        (10, False, 2, 31, []),
        (10, False, 2, 30, ["patience"]),
        (10, False, None, 5, []),
    ],
)
def test_what_cannot_happen_is_said(every, keep_best, patience, steps, said):
    asked = Evaluation(every=every, keep_best=keep_best, patience=patience)
    lines = without_effect(asked, steps)
    assert len(lines) == len(said)
    for line, field in zip(lines, said, strict=True):
        assert f"evaluation.{field}" in line and f"{steps} steps" in line


def test_a_recipe_that_evaluates_too_late_is_told(tmp_path, capsys):
    evaluation = {"every": 50, "keep_best": True}
    life.command(life.write(tmp_path / "run", optim__steps=2, evaluation=evaluation))
    assert "evaluation.keep_best has the last step alone" in capsys.readouterr().out


def test_a_gpu_is_not_waited_for_while_it_is_given_a_batch():
    """A copy from memory that is not pinned waits for what the device has to do before it."""

    class Noted(torch.Tensor):
        pinned = False

        def pin_memory(self):
            self.pinned = True
            return self

        def to(self, device, non_blocking=False):
            assert self.pinned and non_blocking
            return str(device)

    trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device("cuda", 0)))
    held_out = HeldOut(trainer, None, None, None, None)
    batch = {"input_ids": torch.ones(2).as_subclass(Noted), "max_length_q": 7}
    assert held_out._moved(batch) == {"input_ids": "cuda:0", "max_length_q": 7}


@pytest.mark.parametrize(
    ("best", "before", "after", "said"),
    [
        (Best(3.6, 40), 6.5, 6.37, "was 3.6000 at step 40 and is 6.3700 .*keep_best: true"),
        (Best(2.0, 60), 6.5, 2.0, None),
        (Best(2.0, 60), 6.5, 2.03, None),
        (Best(1.3, 5), 1.2, 1.4, "was 1.2000 before the first step .*lower optim.learning_rate"),
        (None, 1.2, 1.2, None),
    ],
)
def test_a_model_that_was_better_before_is_not_published_unsaid(best, before, after, said):
    line = overfitting(best, before, after)
    assert re.search(said, line) if said else line is None
