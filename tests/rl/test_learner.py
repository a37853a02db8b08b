"""What an optimizer step of PPO costs beside its arithmetic."""

import pytest
import torch

from tests import life
from tests.rl.reads import counted
from tests.rl.test_ppo import HOW, MIXTURE, write

CASES = {
    "full": {},
    "trunk, partial": {
        "critic": {"start": "trunk", "clip": None},
        "rollout": {"max_new_tokens": 12, "top_p": 0.8},
        "launch__micro_batch_size": "auto",
    },
    "grpo": HOW["grpo"] | {"algorithm__ratio": "sequence", "algorithm__loss": "sequence"},
    "lora, mixture": {**HOW["lora"], "mixture": MIXTURE, "algorithm__entropy": 0.01},
}


@pytest.mark.parametrize("how", CASES)
def test_an_optimizer_step_reads_one_tensor(tmp_path, monkeypatch, how):
    """Several passes, the loss, all that is watched and the norms: as on a GPU, where a read waits
    for all of them."""
    from llmpipe.rl.learner import Learner

    seen, step = [], Learner.optimizer_step

    def spied(self, *arguments):
        with counted() as reads:
            out = step(self, *arguments)
        seen.append(reads)
        return out

    monkeypatch.setattr(Learner, "optimizer_step", spied)
    life.command(write(tmp_path / "run", **CASES[how], optim__steps=2))
    assert len(seen) == 8 and all(reads == ["tolist"] for reads in seen)


def test_what_the_double_counts():
    ones = torch.ones(3)
    with counted() as reads:
        ones.sum().item()
        float(ones[0])
        bool(ones.any())
        ones.tolist()
        ones[ones > 0]
        ones.nonzero()
        ones.cpu()
        (ones * 2).sum()
    assert len(reads) == 7
