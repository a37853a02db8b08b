"""SimPO and ORPO: the equations, one trajectory however a step is cut, no reference anywhere."""

import math
import shutil
import signal

import numpy as np
import pytest
import torch

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.stages import schema
from llmpipe.training import reference_free
from llmpipe.training.reference_free import ORPO, Decline, SimPO, decline, per_token
from tests import life, store
from tests.training.test_preference import losses, metrics, probed, write

SIMPO = {"objective": "simpo", "beta": 2.0, "gamma": 1.0}
OBJECTIVES = {"simpo": SIMPO, "orpo": {"objective": "orpo", "beta": 0.25}}
ADAPTER = {"adapter": {"rank": 4, "alpha": 8}}


# --- the equations --------------------------------------------------------------------------------


def by_hand(changes, chosen, rejected):
    """One pair's loss, number by number, of what log-probabilities its tokens have."""
    w, l = (sum(answer) / len(answer) for answer in (chosen, rejected))  # noqa: E741
    beta = changes["beta"]
    if changes["objective"] == "simpo":
        return math.log1p(math.exp(-(beta * w - beta * l - changes["gamma"])))
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (w, l)]
    ratio = odds[0] / odds[1]
    return -w + beta * -math.log(ratio / (1 + ratio))


def slopes_by_hand(changes, chosen, rejected):
    """Of that loss, by the log-probability of a chosen token and by that of a rejected one."""
    w, l = (sum(answer) / len(answer) for answer in (chosen, rejected))  # noqa: E741
    beta = changes["beta"]
    if changes["objective"] == "simpo":
        missing = 1 / (1 + math.exp(beta * w - beta * l - changes["gamma"]))
        return -missing * beta / len(chosen), missing * beta / len(rejected)
    odds = [math.exp(mean) / (1 - math.exp(mean)) for mean in (w, l)]
    missing = 1 / (1 + odds[0] / odds[1])
    of_chosen = -1 - beta * missing / (1 - math.exp(w))
    return of_chosen / len(chosen), beta * missing / (1 - math.exp(l)) / len(rejected)


def objective_of(changes):
    if changes["objective"] == "simpo":
        return SimPO(changes["beta"], changes["gamma"])
    return ORPO(changes["beta"])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_slopes_are_the_equations(name):
    """In float64, of answers of all lengths with gaps in what is learned; a likely one, too."""
    changes, pairs, width = OBJECTIVES[name], 6, 9
    generator = np.random.default_rng(7)
    mask = generator.random((2 * pairs, width)) < 0.5
    mask[:, 3] = True
    mask[:, 0] = False  # of a prompt
    values = -generator.exponential(2.0, (2 * pairs, width - 1)) * mask[:, 1:]
    values[0] *= 1e-4
    log_probs = torch.tensor(values, requires_grad=True)
    made = objective_of(changes).losses(per_token(log_probs, torch.tensor(mask).long()))
    made.sum().backward()
    for pair in range(pairs):
        rows = (pair, pairs + pair)
        answers = [values[row][mask[row, 1:]].tolist() for row in rows]
        assert made[pair].item() == pytest.approx(by_hand(changes, *answers), rel=1e-10)
        for row, slope in zip(rows, slopes_by_hand(changes, *answers), strict=True):
            assert log_probs.grad[row][mask[row, 1:]].numpy() == pytest.approx(slope, rel=1e-8)


def test_answers_that_are_certain_have_odds_that_are_numbers():
    """A probability that rounds to 1 has no finite odds."""
    certain = torch.tensor([0.0, -1e-9, 1e-7], requires_grad=True)
    odds = reference_free.log_odds(certain)
    assert odds.isfinite().all() and (odds > 10).all()
    odds.sum().backward()
    assert certain.grad.isfinite().all()
    assert reference_free.log_odds(torch.tensor(-math.log(2))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_learned_and_said_is_the_equation_of_the_models_logits(tmp_path, monkeypatch, name):
    """Of eight ragged pairs, on a policy that has moved; the gradients of all weights as well, cut
    into micro-batches of 8, 2 and 1."""
    changes, compared = OBJECTIVES[name], []
    trained = reference_free.ReferenceFreeTrainer.fit

    def fit(trainer):
        final = trained(trainer)
        trainer.model.train()
        rows = [trainer.train_dataset[i] for i in range(8)]
        objective = objective_of(changes)
        expected = plainly(trainer.model, rows, objective)
        for size in (8, 2, 1):
            assert gradients_of(trainer, rows, size) == pytest.approx(expected, abs=1e-6)
        by_number = [by_hand(changes, *answers) for answers in token_log_probs(trainer, rows)]
        batch = trainer.data_collator(rows)
        with torch.no_grad():
            value, count = reference_free.separation(trainer, batch)["loss"]
        compared.append((float(value) / count, float(np.mean(by_number))))
        trainer.model.zero_grad()
        return final

    monkeypatch.setattr(reference_free.ReferenceFreeTrainer, "fit", fit)
    life.command(write(tmp_path / "run", "dpo", **changes, optim__steps=2, evaluation={}))
    ((said, by_number),) = compared
    assert said == pytest.approx(by_number, abs=1e-6)


def token_log_probs(trainer, rows):
    """By transformers alone, a pair's answers after one another: their learned tokens'."""
    for row in rows:
        answers = []
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            assert not row[f"{side}_context"] or len(answer) > len(row[f"{side}_context"])
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logits = trainer.model(ids).logits[0, :-1].double()
            spoken = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            others = set(row[f"{side}_context"])
            answers.append([p for i, p in enumerate(spoken.tolist()) if i not in others])
        yield answers


def plainly(model, rows, objective):
    """Gradients of the mean loss of these pairs, from logits, one by one."""
    model.zero_grad()
    for row in rows:
        means = []
        for side in ("chosen", "rejected"):
            prompt, answer = row["prompt_ids"], row[f"{side}_ids"]
            ids = torch.tensor([prompt + answer])
            spoken = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            learned = [i for i in range(len(answer)) if i not in row[f"{side}_context"]]
            means.append(spoken[len(prompt) - 1 :, 0][learned].mean()[None])
        (objective.losses(reference_free.Likelihoods(*means)).sum() / len(rows)).backward()
    return gradients(model)


def gradients_of(trainer, rows, size):
    """Of a step over these pairs, cut into micro-batches of `size`."""
    trainer.model.zero_grad()
    for start in range(0, len(rows), size):
        batch = trainer.data_collator(rows[start : start + size])
        batch["weight"] = batch.pop("examples") * (len(rows) / size) / len(rows)
        (trainer.compute_loss(trainer.model, batch) * size / len(rows)).backward()
    return gradients(trainer.model)


def gradients(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters()]).numpy()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.faults  # `make test` has the gradients of steps that are cut
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_cut_any_way_is_one_trajectory(tmp_path, name):
    """8 = 1 pair at a time = two processes; the last batch of an epoch is not whole."""
    settings = {"optim__batch_size": 8, "optim__steps": 10, "log__every": 1, "evaluation": {}}
    settings |= OBJECTIVES[name]
    made = [
        life.command(
            write(tmp_path / f"run{micro}", "dpo", **settings, launch__micro_batch_size=micro)
        )
        for micro in (8, 1)
    ]
    made.append(life.pair(write(tmp_path / "two", "dpo", **settings, launch__micro_batch_size=2)))
    assert made[0].manifest().data.rows.train % 8
    for artifact in made[1:]:
        assert losses(artifact) == pytest.approx(losses(made[0]), abs=1e-5)
        first, last = (a.manifest().final for a in (made[0], artifact))
        for metric in ("eval_loss", "eval_rewards/margins", "eval_logps_per_token/chosen"):
            assert last[metric] == pytest.approx(first[metric], abs=1e-5)
        assert probed(artifact) == pytest.approx(probed(made[0]), abs=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_artifact(tmp_path, monkeypatch, name):
    """It learns, every weight moves, and no other model is loaded or asked."""
    from safetensors.torch import load_file

    monkeypatch.setattr("llmpipe.training.reference.load_copy", None)
    monkeypatch.setattr("trl.trainer.dpo_trainer.create_model_from_path", None)
    made = life.command(write(tmp_path / "run", "dpo", **OBJECTIVES[name], optim__steps=30))
    first, *_, last = [line for line in metrics(made) if "eval_loss" in line]
    assert losses(made)[-1] < losses(made)[0]
    noted = [line for line in metrics(made) if "rewards/margins" in line]
    margins = [line["rewards/margins"] for line in noted]
    assert sum(margins[-5:]) > sum(margins[:5])
    assert 0 < first["eval_rewards/accuracies"] < 1 and "eval_rewards/chosen" not in last
    assert "entropy" in noted[0] and noted[0]["logps/chosen"] < noted[0]["logps_per_token/chosen"]
    manifest = made.verify()
    assert manifest.kind == "model" and "reference" not in manifest.final
    assert "reference: none" in (made.path / "log.txt").read_text()
    assert not list((made.run / ".prepared").glob("*/reference-*"))
    parent = load_file(life.TINY / "model" / "model.safetensors")
    trained = load_file(made.model / "model.safetensors")
    assert all(not torch.equal(trained[key], parent[key]) for key in parent)


def test_an_adapter_goes_on_without_a_copy_and_resumes_to_the_bit(tmp_path):
    """TRL puts a second adapter beside it, of which nothing is left."""
    run = tmp_path / "run"
    sft = {"stage": "lora", "name": "lora", "optim__learning_rate": 2e-2, "evaluation": {}}
    store.made(life.write(run, **sft, **ADAPTER, optim__steps=4))
    shutil.copytree(run, tmp_path / "whole")
    changes = {"model": "artifact:lora", **ADAPTER, **SIMPO}
    whole = life.command(write(tmp_path / "whole", "dpo", **changes))
    path = write(run, "dpo", **changes)
    trial = life.Trial(path, hook="kill_after_checkpoint_3")
    assert trial.wait() == -signal.SIGKILL, trial.text()
    made = life.command(path)
    assert life.essence(made) == life.essence(whole)
    from safetensors.torch import load_file

    before = load_file(run / "lora" / "model" / "adapter_model.safetensors")
    after = load_file(made.model / "adapter_model.safetensors")
    assert before.keys() == after.keys() and not any("ref" in key.split(".") for key in after)
    assert all(not torch.equal(before[key], after[key]) for key in before)


def test_a_decline_is_told():
    name = "logps_per_token/chosen"
    trained = [{name: -1.0}, {"loss": 0.5}, {name: -1.6}]
    assert decline(trained) == Decline(-1.0, -1.6)
    held_out = [{f"eval_{name}": -1.0}, {f"eval_{name}": -1.4}]
    assert decline(trained + held_out) is None, "held-out pairs say it where there are any"
    assert decline([]) is None


def test_it_needs_no_room_for_a_second_model(tmp_path):
    from llmpipe.run import footprint

    shape = type("Shape", (), {"weights": 1000, "outside": 100})()
    sizes = {}
    for name, changes in {"dpo": {}, **OBJECTIVES}.items():
        recipe = load(write(tmp_path / name, "dpo", **changes), schema("dpo"))
        sizes[name] = footprint._frozen(shape, recipe, 4, 1)
    assert sizes == {"dpo": 4000, "simpo": 0, "orpo": 0}


def test_recipes(tmp_path):
    for changes, message in [
        ({"objective": "simpo"}, "objective: simpo needs beta and gamma, such as 2.0 and 1.0"),
        ({"objective": "simpo", "gamma": 1.0}, "the default of beta, 0.1, is made for a reference"),
        ({"objective": "simpo", "beta": 2.0}, "simpo needs beta and gamma"),
        ({"gamma": 1.0}, "gamma: sigmoid does not read it; simpo does"),
        ({"objective": "orpo", "gamma": 1.0}, "gamma: orpo does not read it"),
        (SIMPO | {"gamma": -1.0}, "greater than or equal to 0"),
        ({"objective": "orpo", "precompute": True}, "precompute: orpo has no reference to compute"),
        ({"objective": {"sigmoid": 1.0, "orpo": 0.2}}, "orpo has no reference and is mixed with"),
        (SIMPO | {"objective": {"simpo": 1.0}}, "write `objective: simpo`"),
        (SIMPO | {"label_smoothing": 0.1}, "simpo does not read it"),
        ({"objective": "orpo", "adapter": {"rank": 4, "init": "pissa"}}, "would do twice"),
    ]:
        with pytest.raises(UserError) as refused:
            load(write(tmp_path / "run", "dpo", **changes), schema("dpo"))
        assert message in str(refused.value), str(refused.value)
