"""What GRPO has that PPO has not: optima without a critic, groups, what is skipped and drawn anew,
and no reference where nothing holds to it. What both share is tried in test_ppo.py, the equations
in test_conformance.py."""

import json

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life
from tests.rl import test_ppo
from tests.rl.test_ppo import BETA, GRPO, apart, learned_bandit, metrics, updates


def write(run, **changes):
    return test_ppo.write(run, **(GRPO | changes))


# --- optima ---


def of_reverse_kl(reference, rewards, beta):
    """argmax E[r] - beta KL(pi || q) is q exp(r / beta) (Rafailov 2023, eq. 4)."""
    return (reference + rewards / beta).softmax(-1)


def of_forward_kl(reference, rewards, beta):
    """argmax E[r] - beta KL(q || pi): its gradient in the logit of a, pi (r - E r) + beta (q - pi),
    vanishes at pi = beta q / (c - r), where c is what makes that a distribution."""
    q, low, high = reference.exp(), float(rewards.max()), float(rewards.max()) + 50 * beta
    for _ in range(60):
        c = (low + high) / 2
        low, high = (c, high) if (beta * q / (c - rewards)).sum() > 1 else (low, c)
    return beta * q / (high - rewards)


OPTIMA = {
    "reward": ({"reference__place": "reward"}, of_reverse_kl, BETA),
    "reward, leave-one-out": (
        {"reference__place": "reward", "algorithm__baseline": "leave-one-out"},
        of_reverse_kl,
        BETA,
    ),
    # a mean that an answer is part of leaves 7/8 of what it is above the others, and all of the KL
    "loss": ({}, of_forward_kl, BETA * 8 / 7),
    "loss, leave-one-out": ({"algorithm__baseline": "leave-one-out"}, of_forward_kl, BETA),
}
QUICK = {
    "stage": "grpo",
    "algorithm": {"epochs": 1, "minibatches": 2, "normalize": "none"},
    "optim__learning_rate": 2e-2,
    "optim__steps": 80,
}
SEEDS = [("reward", 0), ("loss", 0)]
OTHER_SEEDS = [(how, seed) for how in OPTIMA for seed in range(5) if (how, seed) not in SEEDS]


@pytest.mark.parametrize(
    ("how", "seed"), [*SEEDS, *(life.by_the_dozen(*case) for case in OTHER_SEEDS)]
)
def test_one_step_bandits_converge_to_the_closed_form(tmp_path, how, seed):
    """KL in the reward: that of PPO. As k3 in the loss it is the other KL's gradient, and there is
    another optimum."""
    changes, optimum, beta = OPTIMA[how]
    reference, rewards, policy, _ = learned_bandit(tmp_path, seed, **QUICK | changes)
    target = optimum(reference, rewards, beta)
    assert apart(reference.exp(), target) > 0.2, "there is something to learn"
    assert apart(policy, target) < 0.03
    assert apart(of_reverse_kl(reference, rewards, beta), target) > 0.15 or optimum is of_reverse_kl


def test_a_groups_deviation_takes_the_place_of_the_rewards_size(tmp_path):
    """So that `normalize: std` has not the optimum of any KL in the loss: rewards of a quarter are
    learned as if they were whole."""
    quarter = {"reward": [{"function": f"{tmp_path}/rewards.py:look", "weight": 0.25}]}
    how = QUICK | quarter | {"algorithm__normalize": "std", "optim__steps": 40}
    reference, rewards, policy, _ = learned_bandit(tmp_path, 0, **how)
    target = of_forward_kl(reference, rewards / 4, BETA * 8 / 7)
    assert apart(reference.exp(), target) < 0.2 and apart(policy, target) > 0.3


# --- without a reference, without a critic ---


@pytest.mark.parametrize("how", [{}, {"adapter": {"rank": 4, "alpha": 8}}], ids=["full", "lora"])
def test_what_holds_to_no_parent_loads_none(tmp_path, monkeypatch, how):
    """With KL in no place there is no reference, and nobody says how far it is; a critic there is
    never."""
    from llmpipe.rl import loop

    parts, build = [], loop.build

    def spied(setup):
        actors = build(setup)
        parts.append((actors.cast.reference, actors.cast.critic, set(actors.modules.keys())))
        return actors

    monkeypatch.setattr(loop, "build", spied)
    lines, finals = [], []
    for coefficient in (0.0, 0.1):
        changes = how | {"reference__coefficient": coefficient, "optim__steps": 2}
        made = life.command(write(tmp_path / f"run{coefficient}", **changes))
        lines.append(updates(made)[-1])
        finals.append(made.verify().final)
    (none, critic, alone), (reference, other_critic, both) = parts
    assert none is critic is other_critic is None and alone == {"policy"}
    assert reference is not None and both == ({"policy"} if how else {"policy", "reference"})
    assert not {"objective/kl", "loss/kl"} & {*lines[0], *finals[0]}
    assert lines[1]["objective/kl"] == finals[1]["objective/kl"] != 0 < lines[1]["loss/kl"]


# --- groups ---


def test_every_answer_of_a_group_is_to_one_prompt(tmp_path):
    """And each is drawn with numbers of its own; the next update asks the next prompts."""
    made = life.command(write(tmp_path / "run", optim__batch_size=4, optim__steps=3))
    shown = [json.loads(line) for line in (made.path / "rollouts.jsonl").read_text().splitlines()]
    groups = [[line for line in shown if line["step"] == step] for step in (1, 2, 3)]
    assert all(len({json.dumps(line["prompt"]) for line in group}) == 1 for group in groups)
    assert len({json.dumps(group[0]["prompt"]) for group in groups}) == 3
    assert all(len({line["answer"] for line in group}) == 4 for group in groups)


RIGHT = {"reward": [{"verifier": "regex", "pattern": "w"}], "rollout__group": 2}


def drawn(monkeypatch):
    """(worth of every answer that is drawn, places that are learned from), of each update."""
    from llmpipe.rl.grpo import GRPO
    from llmpipe.rl.learner import Learner

    seen, rollout, learn = [], GRPO.rollout, Learner.learn

    def rolled(self, draw):
        batch = rollout(self, draw)
        seen.append({"drawn": batch.drawn, "answers": batch.answers})
        return batch

    def learned(self, step, experiences):
        seen[step]["learned"] = set(experiences)
        return learn(self, step, experiences)

    monkeypatch.setattr(GRPO, "rollout", rolled)
    monkeypatch.setattr(Learner, "learn", learned)
    return seen


def groups_of(answers, size=2):
    """Scores by group, in the order in which they were drawn."""
    scores = [answer.score for answer in answers]
    return [scores[i : i + size] for i in range(0, len(scores), size)]


@pytest.mark.parametrize("what", ["keep", "skip", "resample"])
def test_groups_without_spread(tmp_path, monkeypatch, what):
    """Kept, skipped, or drawn anew, and counted either way."""
    seen = drawn(monkeypatch)
    path = write(tmp_path / "run", **RIGHT, rollout__without_spread=what)
    made = life.command(path)
    asked, skipped = [], 0
    for update, line in zip(seen, updates(made), strict=True):
        groups = groups_of(update["drawn"])
        mixed = [len(set(group)) > 1 for group in groups]
        answers = {answer.place: answer for answer in update["answers"]}
        assert sorted(answers) == list(range(8))
        spread = {p for p in answers if answers[p].score != answers[p ^ 1].score}
        assert update["learned"] == (set(answers) if what == "keep" else spread)
        assert line["groups/drawn"] == len(groups) and line["groups/mixed"] == pytest.approx(
            sum(mixed) / len(groups)
        )
        shares = {"all_right": [1, 1], "none_right": [0, 0]}
        for name, scores in shares.items():
            assert line[f"groups/{name}"] == pytest.approx(groups.count(scores) / len(groups))
        assert line["objective/scores"] == pytest.approx(sum(map(sum, groups)) / 2 / len(groups))
        assert line["groups/skipped"] == (0 if what == "keep" else (8 - len(spread)) / 2)
        assert what != "resample" or len(spread) == 8
        asked += [json.dumps(answer.row["prompt"]) for answer in update["drawn"][::2]]
        skipped += int(line["groups/skipped"])
    assert (len(asked) > 24) == (what == "resample")
    assert len(set(asked[:60])) == len(asked[:60]), "the next prompts, one after the other"
    said = f"{skipped} of 24 groups were skipped" in (made.path / "log.txt").read_text()
    assert said == bool(skipped) == (what == "skip")


def test_an_update_without_any_spread(tmp_path, capsys):
    """There is no optimizer step; it is said after ten, and in the end it is no success."""
    changes = {"reward": [{"function": f"{tmp_path}/rewards.py:none"}], "optim__steps": 11}
    path = write(tmp_path / "run", rollout__without_spread="skip", **changes)
    with pytest.raises(UserError, match="every answer of 11 updates scored 0: nothing") as refused:
        life.command(path)
    assert refused.value.code == 4
    lines = metrics(Artifact(tmp_path / "run" / "grpo"))
    assert {line["optimizer_steps"] for line in lines} == {0} == {line["loss"] for line in lines}
    assert "every answer of 10 updates scored 0: there is nothing" in capsys.readouterr().out


def test_it_learns_what_scores(tmp_path):
    """Held out as well, without a critic; every weight of the policy moved."""
    from safetensors.torch import load_file

    made = life.command(
        write(
            tmp_path / "run",
            optim__steps=25,
            optim__batch_size=32,
            optim__learning_rate=4e-3,
            rollout__group=8,
            data__eval={"holdout": 0.1},
            reference__coefficient=0.01,
        )
    )
    final = made.verify().final
    assert final["eval_score"] > final["eval_score_before"] + 0.3
    before = load_file(life.TINY / "model" / "model.safetensors")
    after = load_file(made.model / "model.safetensors")
    assert all((after[name] != tensor).any() for name, tensor in before.items() if name in after)


def test_recipes(tmp_path):
    for changes, message in [
        ({"optim__batch_size": 6}, r"counts answers, and must be a multiple of rollout.group (4)"),
        ({"algorithm__minibatches": 3}, "must be a multiple of algorithm.minibatches"),
        ({"rollout__group": 1}, "greater than or equal to 2"),
        ({"rollout__overlong": 13}, "overlong (13) is more than max_new_tokens (12)"),
        ({"reference": {"coefficient": 0, "target": 1.0}}, "steers a coefficient, which is 0"),
        ({"critic": {"start": "trunk"}}, "unknown key"),
        ({"quantization": {"bits": 8}, "adapter": {"rank": 4}}, "grpo takes 4"),
        ({"adapter": {"rank": 4, "embeddings": "all"}}, "grpo trains no embeddings"),
        ({"evaluation": {"keep_best": True, "every": 1}, "data__eval": {"holdout": 0.1}}, "rises"),
    ]:
        with pytest.raises(UserError) as refused:
            load(write(tmp_path / "run", **changes), schema("grpo"))
        assert message in str(refused.value)
