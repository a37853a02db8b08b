"""The equations of PPO against NumPy and numbers worked out by hand; sampling against the
distribution it claims."""

import math

import numpy as np
import pytest
import torch

from llmpipe.errors import UserError
from llmpipe.rl import policy_gradient


def gae(rewards, values, discount, smoothing):
    """One episode, by the sum of Schulman 2016, eq. 16."""
    n = len(rewards)
    following = np.append(values[1:], 0.0)
    deltas = rewards + discount * following - values
    found = [
        sum((discount * smoothing) ** (j - t) * deltas[j] for j in range(t, n)) for t in range(n)
    ]
    return np.array(found)


def test_advantages_and_returns():
    rng = np.random.default_rng(0)
    lengths = [1, 7, 3, 12]
    mask = torch.zeros(4, 12)
    rewards, values = (
        torch.tensor(rng.normal(size=(4, 12)), dtype=torch.float32) for _ in range(2)
    )
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    found, returns = policy_gradient.advantages(rewards * mask, values, mask, 0.97, 0.9)
    for i, n in enumerate(lengths):
        expected = gae(rewards[i, :n].numpy(), values[i, :n].numpy(), 0.97, 0.9)
        assert found[i, :n].numpy() == pytest.approx(expected, abs=1e-6)
        assert returns[i, :n].numpy() == pytest.approx(expected + values[i, :n].numpy(), abs=1e-6)
        assert not found[i, n:].any() and not returns[i, n:].any()


def test_the_score_is_at_the_last_token():
    kl = torch.tensor([[0.5, -0.25, 9.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    found = policy_gradient.token_rewards(torch.tensor([2.0, 3.0]), kl, mask, 0.1)
    assert found.tolist() == [pytest.approx([-0.05, 2.025, 0]), pytest.approx([2.9, 0, 0])]


def test_kl_estimators():
    """Both have the KL as their mean; k3 is never negative."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 50).log_softmax(-1)
    drawn = torch.multinomial(p.exp(), 200_000, replacement=True)
    exact = float((p.exp() * (p - q)).sum())
    for estimator in ("k1", "k3"):
        found = policy_gradient.kl_penalty(p[drawn], q[drawn], estimator)
        assert float(found.mean()) == pytest.approx(exact, abs=0.02)
    assert float(found.min()) >= 0


def test_whitened():
    values, mask = (
        torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0]]),
        torch.tensor([[1.0, 1, 0], [1, 0, 0]]),
    )
    found = policy_gradient.whitened(values, mask, lambda total: total)
    deviation = math.sqrt((4 + 1 + 9) / 3)
    assert found.tolist() == [
        pytest.approx([-2 / deviation, -1 / deviation, 0]),
        pytest.approx([3 / deviation, 0, 0]),
    ]


def test_losses_by_hand():
    ratio = torch.tensor([1.0, 1.5, 0.5, 1.5, 0.5])
    advantage = torch.tensor([2.0, 1.0, 1.0, -1.0, -1.0])
    losses, seen = policy_gradient.policy_losses(ratio.log(), advantage, 0.2, 0.2)
    # free; held at 1.2; free 0.5; free 1.5; held at 0.8
    assert losses.tolist() == pytest.approx([-2, -1.2, -0.5, 1.5, 0.8])
    assert int(seen["policy/clipfrac"]) == 2 and float(seen["val/ratio"]) == pytest.approx(5)
    assert float(seen["policy/approxkl"]) == pytest.approx(
        float((ratio - 1 - ratio.log()).sum()), abs=1e-6
    )
    values, before, returns = (
        torch.tensor([1.0, 2.0]),
        torch.tensor([1.0, 1.0]),
        torch.tensor([0.0, 3.0]),
    )
    loss, seen = policy_gradient.value_loss(values, before, returns, 0.2)
    assert float(loss) == pytest.approx(0.5 * (1 + 1.8**2)) and int(seen["val/clipfrac"]) == 1
    assert float(policy_gradient.value_loss(values, before, returns, None)[0]) == pytest.approx(
        0.5 * (1 + 1)
    )


def test_the_coefficient_follows_its_target():
    steered = policy_gradient.Coefficient(0.1, 6.0, 1000)
    steered.adapt(60.0, 100)
    assert steered.value == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    steered.adapt(5.7, 100)
    assert steered.value == pytest.approx(0.102 * (1 - 0.05 * 0.1))
    fixed = policy_gradient.Coefficient(0.1, None, 1000)
    fixed.adapt(60.0, 100)
    assert fixed.value == 0.1


def test_running_moments_are_those_of_all_scores():
    rng = np.random.default_rng(1)
    scores, moments = rng.normal(3, 2, 60), policy_gradient.Moments()
    for part in np.split(scores, [7, 20, 21]):
        moments.add(len(part), part.sum(), (part**2).sum())
    assert moments.mean == pytest.approx(scores.mean()) and moments.deviation == pytest.approx(
        scores.std(ddof=1)
    )


def allowed(ids):
    """As the learner has it on its device."""
    from llmpipe.kernels.log_probs import Allowed

    counts = torch.tensor([len(each) for each in ids])
    rows = torch.repeat_interleave(counts)
    return Allowed(torch.cat(ids).int(), rows, [0, *counts.cumsum(0).tolist()])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_log_probs_tile_by_tile_are_those_of_the_fused_head(precision):
    """What other devices, limited draws and an entropy bonus take is what a CPU takes otherwise,
    with its gradients."""
    from llmpipe.kernels.log_probs import TILE, Head, log_probs

    torch.manual_seed(0)
    hidden, layer = torch.randn(2 * TILE + 3, 16), torch.nn.Linear(16, 101, bias=False)
    head = Head(layer, 1.5, None)
    targets, found = torch.randint(101, (len(hidden),)), []
    for bonus in (False, True):
        given = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            log_p, entropy = log_probs(given, head, targets, 0.7, None, bonus)
        (log_p * torch.linspace(-1, 1, len(targets))).sum().backward()
        found.append((log_p.detach(), entropy.detach(), given.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype and (one - other).abs().max() < (
            1e-5 if precision == "fp32" else 0.03
        )
    everything = allowed([torch.arange(101)] * len(hidden))
    assert (
        log_probs(hidden, head, targets, 0.7, everything, False)[0] - found[0][0]
    ).abs().max() < 0.03
    some = [torch.tensor([int(target), 7, 8]) for target in targets]
    logits = (hidden @ layer.weight.T * 1.5 / 0.7).detach()
    expected = [
        float(row[ids].log_softmax(0)[0])
        for row, ids in zip(logits, some, strict=True)
        if int(ids[0]) > 8
    ]
    given = log_probs(hidden, head, targets, 0.7, allowed(some), False)[0]
    assert given.detach()[targets > 8].tolist() == pytest.approx(expected, abs=1e-4)
    bound = (2 * (logits * 0.7 / 2).tanh() / 0.7).log_softmax(-1)
    given = log_probs(hidden, Head(layer, 1.5, 2.0), targets, 0.7, None, False)[0]
    assert (given - bound.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-5


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_the_head_says_the_same(monkeypatch, cap, bias):
    """A GPU's, by TRL, the kernel of a CPU and tiles: log-probabilities, entropies, and gradients
    through both, with a temperature, a scale, a bias and a bound."""
    from llmpipe.kernels import log_probs as tiles
    from llmpipe.rl import head as heads

    torch.manual_seed(1)
    states = torch.randn(2 * tiles.TILE + 3, 16)
    layer = torch.nn.Linear(16, 101, bias=bias)
    head = tiles.Head(layer, 1.5, cap)
    targets = torch.randint(101, (len(states),))
    monkeypatch.setattr(heads, "CHUNK", 40)  # several tiles
    forms = {
        "a GPU's": lambda hidden: heads.fused(hidden, head, targets, 0.7),
        "tiles": lambda hidden: heads.log_probs(hidden, head, targets, 0.7, None, True),
        "a CPU's": lambda hidden: heads.log_probs(hidden, head, targets, 0.7),
    }
    for entropy_weight in (0.0, 0.3):
        said = {}
        for name, form in forms.items():
            if name == "a CPU's" and entropy_weight and cap is None and not bias:
                continue  # whose entropy is only looked at
            hidden = states.clone().requires_grad_()
            layer.zero_grad()
            log_p, entropy = form(hidden)
            loss = (log_p * torch.linspace(-1, 1, len(targets))).sum()
            if entropy_weight:
                loss = loss + entropy_weight * entropy.sum()
            loss.backward()
            gradients = [weight.grad for weight in (hidden, *layer.parameters())]
            said[name] = [log_p.detach(), entropy.detach(), *gradients]
        for name, tensors in said.items():
            for one, other in zip(said["tiles"], tensors, strict=True):
                assert (one - other).abs().max() < 1e-5 * one.abs().max().clamp(min=1), name


def test_signs_of_a_gamed_reward_are_said_once():
    from llmpipe.rl.watch import warn

    said: list[str] = []
    warned: list[str] = []
    line = {"objective/kl": 1.0, "answers/tokens": 20.0, "objective/entropy": 2.0}
    warn(line, line, None, warned, said.append)
    assert not said
    for change in (
        {"objective/kl": 52.0},
        {"answers/tokens": 49.0},
        {"answers/tokens": 6.0},
        {"objective/entropy": 0.1},
    ):
        warn(line | change, line, None, warned, said.append)
        warn(line | change, line, None, warned, said.append)
    signs = ["KL ran away", "answers grow", "answers shrink", "entropy collapsed"]
    assert [text.split(": ")[1] for text in said] == signs
    for _ in range(2):
        warn(line | {"objective/kl": -0.02}, line, None, warned, said.append)
    assert [text for text in said if text.startswith("KL below zero")] == said[-1:]
    partial = line | {"objective/kl": 60.0}  # at the parent, as top_p below 1 has it
    more: list[str] = []
    warn(partial | {"objective/kl": 80.0}, partial, None, [], more.append)
    one = line | {"turns/policy": 1.0}
    warn(one | {"answers/tokens": 60.0, "turns/policy": 3.0}, one, None, [], more.append)
    assert not more, "episodes grow by turns"
    warn(one | {"answers/tokens": 150.0, "turns/policy": 3.0}, one, None, [], more.append)
    assert "answers grow" in more[0]


def test_scores_are_one_until_one_differs():
    from llmpipe.rl.watch import TELLING, Sameness

    sameness = Sameness()
    for _ in range(TELLING - 1):
        sameness.add(0.5, 0.5)
    sameness.refuse()
    sameness.add(0.5, 0.5)
    with pytest.raises(UserError, match=r"scored 0\.5"):
        sameness.refuse()
    for low, high in ((0.5, 0.75), (0.25, 0.25)):
        other = Sameness(0.5, TELLING)
        other.add(low, high)
        for _ in range(2 * TELLING):
            other.add(0.5, 0.5)
        other.refuse()
        assert other.differed
