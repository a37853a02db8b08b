"""PPO's optimizer against that of transformers' Trainer, its rates against the other stages'."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from llmpipe.recipe.check import load
from llmpipe.rl.actors import Actors, Cast, Distribution, Role
from llmpipe.rl.optimizer import Schedule, make_optimizer
from llmpipe.stages import schema
from llmpipe.training.schedule import make_scheduler
from tests import life


def recipe(tmp_path, **optim):
    """A recipe of ppo with these fields of `optim`."""
    values = {
        "stage": "ppo",
        "run": str(tmp_path / "run"),
        "model": str(life.TINY / "model"),
        "data": {"train": [{"path": str(life.TINY / "rows.jsonl")}]},
        "reward": [{"verifier": "number"}],
        "optim": {"learning_rate": 1e-3, "weight_decay": 0.1, **optim},
        "critic": {"learning_rate": 5e-3},
    }
    path = tmp_path / "ppo.yaml"
    path.write_text(json.dumps(values))
    return load(path, schema("ppo"))


def actors():
    """A policy and a critic with weights of their own."""
    policy, critic = (AutoModelForCausalLM.from_pretrained(life.TINY / "model") for _ in range(2))
    critic.requires_grad_(False)
    critic.base_model.requires_grad_(True)
    value = torch.nn.Linear(policy.config.hidden_size, 1)
    cast = Cast(policy, Role(policy), Role(critic), Role(policy), value)
    return Actors(cast, Distribution(1.0, learns_entropy=False))


def trainer(tmp_path, model, **arguments):
    """transformers' own, of the same optimizer."""
    arguments = TrainingArguments(
        str(tmp_path / "out"), report_to="none", learning_rate=1e-3, weight_decay=0.1, **arguments
    )
    return Trainer(model=model, args=arguments)


def test_the_same_weights_decay_as_in_the_other_stages(tmp_path):
    made = actors()
    optimizer = make_optimizer(made, recipe(tmp_path))
    decays = {
        id(weight): group["weight_decay"]
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    policy = made.cast.published
    for group in trainer(tmp_path, policy).create_optimizer().param_groups:
        for weight in group["params"]:
            assert decays[id(weight)] == group["weight_decay"]
    named = {name: decays[id(weight)] for name, weight in made.learned().items()}
    still = [name for name, decay in named.items() if not decay]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in still} >= {"norm", "value"}
    assert named["value.weight"] == 0.1 and named["value.bias"] == 0.0
    assert len(decays) == len(named) == len(made.learned())
    rates = {
        name: group["lr"]
        for group in optimizer.param_groups
        for name, weight in made.learned().items()
        if any(weight is other for other in group["params"])
    }
    assert rates["value.bias"] == 5e-3 and rates["policy.model.norm.weight"] == 1e-3


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.03, 0.25, 1, 3])
def test_the_rate_is_that_of_the_other_stages(tmp_path, scheduler, warmup):
    """Of every step, in any order, for policy and critic."""
    steps, made = 13, actors()
    asked = recipe(tmp_path, scheduler=scheduler, warmup=warmup)
    optimizer = make_optimizer(made, asked)
    schedule = Schedule.of(optimizer, asked, steps)
    theirs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = make_scheduler(asked, theirs, steps)
    expected = []
    for _ in range(steps):
        expected.append(scheduler.get_last_lr()[0])
        theirs.step()
        scheduler.step()
    for step in [*range(steps), 7, 0]:
        assert schedule.set_rate(step) == expected[step] > 0
        rates = [group["lr"] for group in optimizer.param_groups]
        policy, critic = expected[step], pytest.approx(5 * expected[step])
        assert rates == [policy, policy, critic, critic]
