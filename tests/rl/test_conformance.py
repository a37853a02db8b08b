"""Every advantage and every loss of ppo and grpo once more, from the papers' equations, as loops
over plain numbers: what the engine computes of ragged batches is this to 1e-6 in double precision,
values and gradients, however the batch is cut into passes, minibatches and processes.

The policy is the smallest that is one: a table of logits by the token before. The engine's half is
the real one, from judging to the gradient that the optimizer is given.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llmpipe.front.launch import free_port
from llmpipe.models.drawing.draw import Episode, Inserted
from llmpipe.parallel.group import join
from llmpipe.rl import group_relative
from llmpipe.rl.experience import Measured
from llmpipe.rl.grpo import GRPO
from llmpipe.rl.learner import Learner
from llmpipe.rl.method import Answer, Ground, worths
from llmpipe.rl.packing import texts_of
from llmpipe.rl.ppo import PPO
from llmpipe.rl.seeds import Use, generator
from llmpipe.rl.state import State
from llmpipe.stages import schema
from tests import life
from tests.parallel.test_world import world

WORDS, BATCH, GROUP, MOST = 5, 16, 4, 7
BETA = 0.3  # of the KL penalty
TABLE = list[list[float]]


# --- what is computed ---


@dataclass
class Sample:
    """An answer, and what is known of it when it is learned from."""

    prompt: int
    response: list[int]
    score: float
    inserted: list[Inserted]
    """What an environment says in it."""

    def steps(self) -> list[tuple[int, int]]:
        """(the token before, the token) of each place of the answer; behind what an environment
        says, the token before is its last."""
        before = [self.prompt, *self.response[:-1]]
        for at, others in self.inserted:
            before[at] = others[-1]
        return list(zip(before, self.response, strict=True))


def log_prob(logits: TABLE, before: int, token: int) -> float:
    return logits[before][token] - math.log(sum(math.exp(x) for x in logits[before]))


def log_probs(logits: TABLE, sample: Sample) -> list[float]:
    return [log_prob(logits, before, token) for before, token in sample.steps()]


def entropy(logits: TABLE, before: int) -> float:
    each = [log_prob(logits, before, token) for token in range(WORDS)]
    return -sum(math.exp(log_p) * log_p for log_p in each)


def k1(log_p: float, log_q: float) -> float:
    return log_p - log_q


def k3(log_p: float, log_q: float) -> float:
    return math.exp(log_q - log_p) - 1 - (log_q - log_p)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    """min( ratio A, clip(ratio, 1 - low, 1 + high) A )."""
    held = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, held * advantage)


# --- grpo and its kin ---


def worth(sample: Sample, ended: bool, unfinished: float, overlong: int) -> float:
    """The score, with what an answer pays that does not end, and what DAPO's soft penalty takes of
    one that is nearly too long: 0 up to MOST - overlong tokens, -1 at MOST."""
    paid = 0.0 if ended else unfinished
    length = len(sample.response)
    if overlong and length > MOST - overlong:
        paid += ((MOST - overlong) - length) / overlong
    return sample.score + paid


def group_advantages(rewards: list[float], baseline: str, normalize: str) -> list[float]:
    """Of the answers to one prompt."""
    size = len(rewards)
    mean = sum(rewards) / size
    advantages = []
    for i, reward in enumerate(rewards):
        if baseline == "leave-one-out":
            others = [rewards[j] for j in range(size) if j != i]
            advantages.append(reward - sum(others) / len(others))
        else:
            advantages.append(reward - mean)
    if normalize == "std":
        variance = sum((reward - mean) ** 2 for reward in rewards) / (size - 1)
        advantages = [each / (math.sqrt(variance) + 1e-4) for each in advantages]
    return advantages


def grpo_loss(
    logits: TABLE,
    old: TABLE,
    parent: TABLE,
    samples: list[Sample],
    advantages: list[float],
    asked: dict,
) -> float:
    """Of one minibatch: samples in all, whatever groups they are of."""
    tokens = sum(len(sample.response) for sample in samples)
    loss = 0.0
    for sample, advantage in zip(samples, advantages, strict=True):
        length = len(sample.response)
        now, before = log_probs(logits, sample), log_probs(old, sample)
        log_ratios = [p - q for p, q in zip(now, before, strict=True)]
        if asked["ratio"] == "sequence":
            log_ratios = [sum(log_ratios) / length] * length
        weight = {
            "token": 1 / tokens,
            "sequence": 1 / len(samples) / length,
            "constant": 1 / len(samples) / MOST,
        }[asked["loss"]]
        for t, (seen, token) in enumerate(sample.steps()):
            gain = clipped(math.exp(log_ratios[t]), advantage, asked["low"], asked["high"])
            cost = asked["in_loss"] * k3(now[t], log_prob(parent, seen, token))
            bonus = asked["entropy"] * entropy(logits, seen)
            loss += weight * (-gain + cost - bonus)
    return loss


# --- ppo ---


def token_rewards(sample: Sample, old: TABLE, parent: TABLE, estimator: str) -> list[float]:
    """-beta KL at each token, and the score at the last one."""
    estimate = {"k1": k1, "k3": k3}[estimator]
    pairs = zip(log_probs(old, sample), log_probs(parent, sample), strict=True)
    rewards = [-BETA * estimate(log_p, log_q) for log_p, log_q in pairs]
    rewards[-1] += sample.score
    return rewards


def generalized_advantages(
    rewards: list[float], values: list[float], discount: float, smoothing: float
) -> list[float]:
    """A_t = sum over j >= t of (discount smoothing)^(j - t) delta_j."""
    following = [*values[1:], 0.0]
    deltas = [
        reward + discount * after - value
        for reward, after, value in zip(rewards, following, values, strict=True)
    ]
    return [
        sum((discount * smoothing) ** (j - t) * deltas[j] for j in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def whitened(advantages: list[list[float]]) -> list[list[float]]:
    every = [each for of_one in advantages for each in of_one]
    mean = sum(every) / len(every)
    variance = sum((each - mean) ** 2 for each in every) / len(every)
    return [[(each - mean) / math.sqrt(variance + 1e-8) for each in one] for one in advantages]


def ppo_loss(
    logits: TABLE,
    values: list[float],
    old: tuple[TABLE, list[float]],
    samples: list[Sample],
    advantages: list[list[float]],
    returns: list[list[float]],
    asked: dict,
) -> float:
    """Of one minibatch: the mean over its tokens. `old`: logits and values when it was drawn."""
    old_logits, old_values = old
    tokens = sum(len(sample.response) for sample in samples)
    loss = 0.0
    for sample, advantage, target in zip(samples, advantages, returns, strict=True):
        now, before = log_probs(logits, sample), log_probs(old_logits, sample)
        for t, (seen, _) in enumerate(sample.steps()):
            gain = clipped(math.exp(now[t] - before[t]), advantage[t], 0.2, 0.2)
            error = (values[seen] - target[t]) ** 2
            if asked["clip"] is not None:
                near = min(max(values[seen] - old_values[seen], -asked["clip"]), asked["clip"])
                error = max(error, (old_values[seen] + near - target[t]) ** 2)
            bonus = asked["entropy"] * entropy(logits, seen)
            loss += (-gain - bonus + asked["coefficient"] * 0.5 * error) / tokens
    return loss


def gradient(loss, table: TABLE) -> TABLE:
    """Central differences of what is a function of a table."""
    step, slopes = 1e-5, [[0.0] * len(row) for row in table]
    for i, j in itertools.product(range(len(table)), range(len(table[0]))):
        ends = []
        for sign in (1, -1):
            moved = [list(row) for row in table]
            moved[i][j] += sign * step
            ends.append(loss(moved))
        slopes[i][j] = (ends[0] - ends[1]) / (2 * step)
    return slopes


# --- the same by the engine ---


@dataclass
class Tables:
    """Logits of the policy when it drew, of its parent and of itself now; the critic's values then
    and now. And what it drew."""

    old: TABLE
    parent: TABLE
    logits: TABLE
    old_values: list[float]
    values: list[float]
    samples: list[Sample]
    ended: list[bool]

    @classmethod
    def drawn(cls, seed: int, turns: bool = False) -> Tables:
        """`turns`: with what an environment says in most answers."""
        chance, others = random.Random(seed), random.Random(seed)

        def table(like: TABLE | None = None) -> TABLE:
            return [
                [chance.gauss(like[i][j] if like else 0, 0.4 if like else 1) for j in range(WORDS)]
                for i in range(WORDS)
            ]

        old = table()
        old_values = [chance.gauss(0, 1) for _ in range(WORDS)]
        samples = []
        for place in range(BATCH):
            response = [chance.randrange(WORDS) for _ in range(chance.randint(1, MOST))]
            right = float(chance.random() < 0.5) if place >= GROUP else 1.0  # one without spread
            places = sorted(others.sample(range(1, len(response)), min(2, len(response) - 1)))
            inserted = [Inserted(at, others.choices(range(WORDS), k=2 + at)) for at in places]
            samples.append(Sample(place // GROUP, response, right, inserted if turns else []))
        return cls(
            old,
            parent=table(old),
            logits=table(old),
            old_values=old_values,
            values=[value + chance.gauss(0, 0.3) for value in old_values],
            samples=samples,
            ended=[place < GROUP or chance.random() < 0.7 for place in range(BATCH)],
        )


class Looked(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))


class LookedUp:
    """Stands for `Actors`: all that it says is in tables."""

    adapted = False

    def __init__(self, tables: Tables, critic: bool, trunk: bool):
        parts = {"policy": Looked(tables.logits)}
        if critic:
            parts["value"] = Looked(tables.values)
        self.modules = nn.ModuleDict(parts)
        self.cast = SimpleNamespace(learning=[])
        self.trunk = trunk

    def learned(self):
        return dict(self.modules.named_parameters())

    def policy(self, batch):
        before = batch.ids[0][batch.predictors]
        log_p = self.modules["policy"].table[before].log_softmax(-1)
        of_targets = log_p.gather(1, batch.targets[:, None])[:, 0]
        values = self.values(batch) if self.trunk else None
        return of_targets, -(log_p.exp() * log_p).sum(-1), values

    def values(self, batch):
        return self.modules["value"].table[batch.ids[0][batch.predictors]]

    def as_critic(self):
        return nullcontext()


def engine(stage: str, settings: dict, tables: Tables, micro: int, rank: int = 0, size: int = 1):
    """The advantages that the engine gives to the answers of one process, by their places, and what
    its learner hands to the optimizer: gradients and losses, a minibatch at a time."""
    values = {
        "stage": stage,
        "run": "runs/x",
        "model": "./model",
        "data": {"train": [{"path": "./rows.jsonl"}]},
        "reward": [{"verifier": "number"}],
        "reference": {"coefficient": BETA},
        "rollout": {"max_new_tokens": MOST} | ({"group": GROUP} if stage == "grpo" else {}),
        "algorithm": {"epochs": 1, "minibatches": 2},
        "optim": {"learning_rate": 1e-3, "batch_size": BATCH, "max_grad_norm": 0},
        "launch": {"micro_batch_size": micro},
    }
    recipe = schema(stage).model_validate(life.put(values, settings))
    hardware = SimpleNamespace(
        autocast=nullcontext, spread=None, sharded=False, micro_batch_size=micro
    )
    trunk = stage == "ppo" and recipe.critic.start == "trunk"
    actors = LookedUp(tables, stage == "ppo", trunk)
    ground = Ground(recipe, actors, hardware, world(rank, size))
    method = {"ppo": PPO, "grpo": GRPO}[stage](ground, State.begin(recipe.reference))
    answers = answers_of(tables)[rank::size]
    measured = measured_of(tables, answers, recipe.has_reference)
    experiences, _ = method.judge(measured, answers, worths(answers, recipe))
    learner = Learner(ground, method, 1, None)
    steps = []
    optimizer_step = learner.optimizer_step

    def spied(step, number, minibatch, total, passes):
        metrics, norms = optimizer_step(step, number, minibatch, total, passes)
        means = {name: value / total.tokens for name, value in metrics.items()}
        steps[-1]["loss"] = method.loss(means) - bonus(means)
        return metrics, norms

    def bonus(means):
        return recipe.algorithm.entropy * means["policy/entropy"]

    def taken():
        gradients = {name: weight.grad.tolist() for name, weight in learner.weights.items()}
        steps.append({"gradients": gradients})

    learner.optimizer_step = spied
    learner.optimizer.step = taken
    learner.learn(0, experiences)
    advantages = {place: each.advantages.tolist() for place, each in experiences.items()}
    return advantages, steps


def answers_of(tables: Tables) -> list[Answer]:
    answers = []
    for place, (sample, ended) in enumerate(zip(tables.samples, tables.ended, strict=True)):
        inserted = tuple(sample.inserted)
        episode = Episode([sample.prompt], sample.response, ended, torch.zeros(0), None, inserted)
        scores = {"number": sample.score}
        answers.append(Answer(place, {}, episode, "", sample.score, scores))
    return answers


def measured_of(tables: Tables, answers: list[Answer], has_reference: bool) -> Measured:
    samples = [tables.samples[answer.place] for answer in answers]
    lengths = [len(sample.response) for sample in samples]

    def padded(rows):
        widest = max(lengths)
        return torch.tensor([[*row, *[0.0] * (widest - len(row))] for row in rows])

    episodes = [answer.episode for answer in answers]
    log_p = padded([log_probs(tables.old, sample) for sample in samples])
    drawn = [replace(each, log_probs=log_p[i, : lengths[i]]) for i, each in enumerate(episodes)]
    return Measured(
        drawn,
        texts_of(drawn, torch.device("cpu")),
        lengths,
        mask=padded([[1.0] * length for length in lengths]),
        ended=torch.tensor([float(each.ended) for each in episodes]),
        log_probs=log_p,
        entropies=torch.zeros_like(log_p),
        values=padded([[tables.old_values[seen] for seen, _ in s.steps()] for s in samples]),
        reference=padded([log_probs(tables.parent, s) for s in samples]) if has_reference else None,
    )


def minibatches(places: list[int]) -> list[list[int]]:
    """The engine's draw of which answers are a minibatch, of those that are learned from."""
    order = torch.randperm(BATCH, generator=generator(42, Use.SHUFFLE, 0, 0)).tolist()
    kept = torch.tensor([place for place in order if place in places])
    return [chosen.tolist() for chosen in kept.chunk(2)]


@pytest.fixture(autouse=True)
def double():
    """Numbers of 64 bits, in everything that says nothing of its type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --- grpo: how it is asked, and what it should be ---

PAPERS = {
    "grpo": {"algorithm__loss": "sequence"},
    "dr. grpo": {
        "algorithm__loss": "constant",
        "algorithm__normalize": "none",
        "reference__coefficient": 0.0,
    },
    "dapo": {
        "algorithm__clip_high": 0.28,
        "rollout__overlong": 3,
        "rollout__without_spread": "skip",
        "reference__coefficient": 0.0,
    },
    "rloo": {
        "algorithm__baseline": "leave-one-out",
        "algorithm__normalize": "none",
        "algorithm__loss": "constant",
        "reference__place": "reward",
    },
    "gspo": {
        "algorithm__ratio": "sequence",
        "algorithm__loss": "sequence",
        "algorithm__clip": 0.05,
        "algorithm__clip_high": 0.1,
    },
    "all else": {
        "algorithm__entropy": 0.02,
        "algorithm__baseline": "leave-one-out",
        "algorithm__loss": "token",
        "algorithm__ratio": "sequence",
        "rollout__unfinished": -0.5,
        "rollout__without_spread": "skip",
    },
}


def asked_of(settings: dict) -> dict:
    """The settings of an equation, by a recipe's."""
    given = {name.rpartition("__")[2]: value for name, value in settings.items()}
    in_loss = given.get("place", "loss") == "loss"
    beta = given.get("coefficient", BETA)
    return {
        "baseline": given.get("baseline", "group"),
        "normalize": given.get("normalize", "std"),
        "loss": given.get("loss", "token"),
        "ratio": given.get("ratio", "token"),
        "low": given.get("clip", 0.2),
        "high": given.get("clip_high", given.get("clip", 0.2)),
        "entropy": given.get("entropy", 0.0),
        "unfinished": given.get("unfinished", 0.0),
        "overlong": given.get("overlong", 0),
        "skips": given.get("without_spread") == "skip",
        "in_loss": beta if in_loss else 0.0,
        "in_reward": 0.0 if in_loss else beta,
    }


def grpo_by_hand(tables: Tables, settings: dict) -> tuple[dict, list]:
    """What `engine` returns of grpo."""
    asked = asked_of(settings)
    advantages: dict[int, float] = {}
    for first in range(0, BATCH, GROUP):
        places = range(first, first + GROUP)
        worths_ = [
            worth(tables.samples[i], tables.ended[i], asked["unfinished"], asked["overlong"])
            for i in places
        ]
        if asked["skips"] and len(set(worths_)) == 1:
            continue
        rewards = []
        for i, each in zip(places, worths_, strict=True):
            pairs = zip(
                log_probs(tables.old, tables.samples[i]),
                log_probs(tables.parent, tables.samples[i]),
                strict=True,
            )
            rewards.append(each - asked["in_reward"] * sum(k1(p, q) for p, q in pairs))
        judged = group_advantages(rewards, asked["baseline"], asked["normalize"])
        advantages |= dict(zip(places, judged, strict=True))
    steps = []
    for chosen in minibatches(list(advantages)):

        def loss(logits, chosen=chosen):
            samples = [tables.samples[i] for i in chosen]
            judged = [advantages[i] for i in chosen]
            return grpo_loss(logits, tables.old, tables.parent, samples, judged, asked)

        gradients = {"policy.table": gradient(loss, tables.logits)}
        steps.append({"gradients": gradients, "loss": loss(tables.logits)})
    by_token = {i: [each] * len(tables.samples[i].response) for i, each in advantages.items()}
    return by_token, steps


# --- ppo ---

PPOS = {
    "a critic": {},
    "a trunk": {"critic__start": "trunk", "algorithm__entropy": 0.02},
    "k3, unclipped, bare": {
        "reference__estimator": "k3",
        "critic__clip": None,
        "algorithm__whiten": False,
        "algorithm__discount": 0.9,
        "algorithm__smoothing": 0.8,
    },
}


def ppo_by_hand(tables: Tables, settings: dict) -> tuple[dict, list]:
    """What `engine` returns of ppo."""
    given = {name.rpartition("__")[2]: value for name, value in settings.items()}
    discount, smoothing = given.get("discount", 1.0), given.get("smoothing", 0.95)
    asked = {
        "entropy": given.get("entropy", 0.0),
        "clip": given.get("clip", 0.2),
        "coefficient": 0.1,
    }
    advantages, returns = [], []
    for sample in tables.samples:
        rewards = token_rewards(sample, tables.old, tables.parent, given.get("estimator", "k1"))
        values = [tables.old_values[seen] for seen, _ in sample.steps()]
        judged = generalized_advantages(rewards, values, discount, smoothing)
        advantages.append(judged)
        returns.append([each + value for each, value in zip(judged, values, strict=True)])
    if given.get("whiten", True):
        advantages = whitened(advantages)
    steps = []
    for chosen in minibatches(list(range(BATCH))):

        def loss(logits, values, chosen=chosen):
            columns = [[each[i] for i in chosen] for each in (tables.samples, advantages, returns)]
            old = (tables.old, tables.old_values)
            return ppo_loss(logits, values, old, *columns, asked)

        def of_values(rows, loss=loss):
            return loss(tables.logits, rows[0])

        def of_logits(logits, loss=loss):
            return loss(logits, tables.values)

        gradients = {
            "policy.table": gradient(of_logits, tables.logits),
            "value.table": gradient(of_values, [tables.values])[0],
        }
        steps.append({"gradients": gradients, "loss": loss(tables.logits, tables.values)})
    return dict(enumerate(advantages)), steps


# --- whether they agree ---

EVERY = [
    *(("grpo", settings) for settings in PAPERS.values()),
    *(("ppo", settings) for settings in PPOS.values()),
]
IDS = [*PAPERS, *PPOS]
BY_HAND = {"grpo": grpo_by_hand, "ppo": ppo_by_hand}


def agree(given: tuple[dict, list], right: tuple[dict, list]) -> None:
    near = {"rel": 0, "abs": 1e-6}
    advantages, steps = given
    assert advantages.keys() <= right[0].keys()
    for place, each in advantages.items():
        assert each == pytest.approx(right[0][place], **near), place
    assert len(steps) == len(right[1]) == 2
    for one, other in zip(steps, right[1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], **near)
        assert one["gradients"].keys() == other["gradients"].keys()
        for name, table in other["gradients"].items():
            mine = torch.tensor(one["gradients"][name])
            assert (mine - torch.tensor(table)).abs().max() < 1e-6, name
            assert mine.abs().max() > 1e-3, "there is a gradient"


@pytest.mark.parametrize(("stage", "settings"), EVERY, ids=IDS)
def test_the_engine_computes_the_equations(stage, settings):
    """Passes of one answer, of two, of eight, and of all."""
    tables = Tables.drawn(seed=7)
    right = BY_HAND[stage](tables, settings)
    for micro in (1, 2, 8, BATCH):
        given = engine(stage, settings, tables, micro)
        assert given[0].keys() == right[0].keys()
        agree(given, right)


@pytest.mark.parametrize(("stage", "settings"), EVERY, ids=IDS)
def test_what_an_environment_says_is_read_and_never_learned(stage, settings):
    """Masks are ragged: answers of one turn, of two and of three, in one batch. Every count, mean,
    advantage and gradient is over the policy's own tokens."""
    tables = Tables.drawn(seed=7, turns=True)
    assert {len(sample.inserted) for sample in tables.samples} == {0, 1, 2}
    right = BY_HAND[stage](tables, settings)
    for micro in (2, BATCH):
        agree(engine(stage, settings, tables, micro), right)
    # with other words there, of other lengths, but for the last, by which a table goes on
    for sample in tables.samples:
        sample.inserted = [Inserted(at, [0, 0, 0, ids[-1]]) for at, ids in sample.inserted]
    agree(engine(stage, settings, tables, BATCH), right)
    for sample in tables.samples:
        sample.inserted = [Inserted(at, [(ids[-1] + 1) % WORDS]) for at, ids in sample.inserted]
    with pytest.raises(AssertionError):
        agree(engine(stage, settings, tables, BATCH), right)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
def test_no_bit_of_the_mask_may_be_another(stage, monkeypatch):
    """One more, and nothing fits; one in the place of another, and the numbers are others."""
    tables = Tables.drawn(seed=7, turns=True)
    right = BY_HAND[stage](tables, {})
    spans = Episode.spans.fget

    def flipped(self):
        (start, end), *others = spans(self)
        return [(start, end + 1), *others] if others else [(start, end)]

    def swapped(self):
        (start, end), *others = spans(self)
        return [(start + 1, end + 1), *others] if others else [(start, end)]

    agree(engine(stage, {}, tables, BATCH), right)
    monkeypatch.setattr(Episode, "spans", property(flipped))
    with pytest.raises(RuntimeError, match="size"):
        engine(stage, {}, tables, BATCH)
    monkeypatch.setattr(Episode, "spans", property(swapped))
    with pytest.raises(AssertionError):
        agree(engine(stage, {}, tables, BATCH), right)


def rank_of_two(rank: int, port: int, queue: multiprocessing.Queue) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_default_dtype(torch.float64)
    join("cpu")
    tables = Tables.drawn(seed=7)
    queue.put([engine(stage, settings, tables, 2, rank, 2) for stage, settings in EVERY])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_compute_the_equations():
    """Each has every other answer, of every group; the gradients of both are the whole."""
    queue = multiprocessing.get_context("forkserver").Queue()
    port = free_port()
    processes = [life.forked(rank_of_two, rank, port, queue) for rank in range(2)]
    ranks = [queue.get(timeout=120) for _ in processes]
    assert life.ends(processes, 60) == [0, 0]
    tables = Tables.drawn(seed=7)
    for name, (stage, settings), one, other in zip(IDS, EVERY, *ranks, strict=True):
        right = BY_HAND[stage](tables, settings)
        assert one[0].keys() | other[0].keys() == right[0].keys(), name
        agree(one, right)
        agree(other, right)


def test_every_branch_is_taken():
    """The batch that is compared has what the equations tell apart."""
    tables = Tables.drawn(seed=7)
    advantages, _ = grpo_by_hand(tables, {})
    assert len({len(sample.response) for sample in tables.samples}) > 4, "it is ragged"
    held = {
        (ratio > 1, advantages[i][0] > 0)
        for i, sample in enumerate(tables.samples)
        for ratio in (
            math.exp(p - q)
            for p, q in zip(
                log_probs(tables.logits, sample), log_probs(tables.old, sample), strict=True
            )
        )
        if abs(ratio - 1) > 0.28 and advantages[i][0]
    }
    assert len(held) == 4, "bounds are met from both sides, by good answers and by bad ones"
    assert set(advantages[0]) == {0.0}, "a group without spread"
    skipped, _ = grpo_by_hand(tables, {"rollout__without_spread": "skip"})
    assert set(range(BATCH)) - set(skipped) >= set(range(GROUP))


def test_scores_that_differ_by_rounding_teach_nothing():
    """Of answers that a reward model scores alike."""
    noise = torch.tensor([[0.7, 0.7 + 1e-7, 0.7, 0.7 - 1e-7]])
    assert group_relative.advantages(noise, "group", "std").abs().max() < 2e-3
