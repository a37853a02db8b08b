"""What the series of metrics.jsonl are called, and in which unit they are."""

from __future__ import annotations

from dataclasses import dataclass

from llmpipe.report.curves import Point


@dataclass(frozen=True)
class Named:
    title: str
    unit: str = ""
    factor: float = 1
    """From the number that is recorded to the one that is shown."""


def _share(title: str) -> Named:
    return Named(title, "%", 100)


PER_TOKEN = "nats per token"
PER_ANSWER = "nats per answer"
PER_PAIR = "nats per pair"

NAMES = {
    "loss": Named("loss"),
    "learning_rate": Named("learning rate"),
    "grad_norm": Named("gradient norm"),
    "val/grad_norm": Named("gradient norm of the critic"),
    "tokens_per_second": Named("speed", "tokens per second"),
    "share_of_peak": _share("share of the hardware's peak"),
    "memory_gb": Named("memory", "GB"),
    "num_tokens": Named("tokens so far"),
    "entropy": Named("entropy of the next token", PER_TOKEN),
    "mean_token_accuracy": _share("next tokens guessed right"),
    "compilations": Named("graphs compiled"),
    "accuracy": _share("pairs ranked right"),
    "margin": Named("margin", "reward"),
    "min_reward": Named("lowest reward", "reward"),
    "mean_reward": Named("mean reward", "reward"),
    "max_reward": Named("highest reward", "reward"),
    "rewards/accuracies": _share("pairs told apart"),
    "rewards/margins": Named("margin", "β × nats"),
    "rewards/chosen": Named("reward of chosen answers", "β × nats"),
    "rewards/rejected": Named("reward of rejected answers", "β × nats"),
    "logps/chosen": Named("log-probability of chosen answers", PER_ANSWER),
    "logps/rejected": Named("log-probability of rejected answers", PER_ANSWER),
    "logps_per_token/chosen": Named("log-probability of a chosen token", PER_TOKEN),
    "logps_per_token/rejected": Named("log-probability of a rejected token", PER_TOKEN),
    "logits/chosen": Named("mean logit of chosen answers"),
    "logits/rejected": Named("mean logit of rejected answers"),
    "log_ratio_per_token": Named("log-ratio to the parent", PER_TOKEN),
    "kl": Named("KL from the parent", PER_ANSWER),
    "score": Named("score"),
    "ended": _share("answers that ended"),
    "tokens": Named("length of answers", "tokens"),
    "turns": Named("turns of an episode"),
    "objective/scores": Named("score"),
    "objective/scores_std": Named("spread of scores"),
    "objective/kl": Named("KL from the reference", PER_ANSWER),
    "objective/entropy": Named("entropy", PER_TOKEN),
    "objective/non_score_reward": Named("penalty for KL", "score"),
    "objective/rlhf_reward": Named("score less the penalty"),
    "groups/mixed": _share("groups whose answers scored differently"),
    "groups/all_right": _share("prompts with every answer right"),
    "groups/none_right": _share("prompts with no answer right"),
    "groups/drawn": Named("groups drawn for an update"),
    "groups/skipped": Named("groups skipped"),
    "answers/tokens": Named("length of answers", "tokens"),
    "answers/ended": _share("answers that ended"),
    "turns/policy": Named("turns of an episode"),
    "turns/environment_tokens": Named("what the environment says", "tokens an episode"),
    "policy/approxkl": Named("KL within an update", PER_TOKEN),
    "policy/clipfrac": _share("tokens clipped"),
    "policy/entropy": Named("entropy while learning", PER_TOKEN),
    "loss/policy": Named("loss of the policy"),
    "loss/kl": Named("KL in the loss", PER_TOKEN),
    "loss/value": Named("loss of the critic"),
    "loss/mixture": Named("loss of the mixture", PER_TOKEN),
    "val/clipfrac": _share("values clipped"),
    "val/ratio": Named("ratio of probabilities, new to old"),
    "val/explained_variance": Named("variance that the critic explains"),
    "val/rollout_difference": Named("drawing against learning", PER_TOKEN),
}
UNITS_OF_LOSS = {"reward": PER_PAIR, "dpo": PER_PAIR, "kto": "", "ppo": "", "grpo": ""}


def named(metric: str, stage: str) -> Named:
    """A series in words, a held-out one like the one it is held against; unknown ones as they are
    called."""
    metric = metric.removeprefix("eval_")
    if metric == "loss":
        return Named("loss", UNITS_OF_LOSS.get(stage, PER_TOKEN))
    return NAMES.get(metric) or Named(metric.replace("_", " ").replace("/", ", "))


def scaled(points: list[Point], known: Named) -> list[Point]:
    return [(step, value * known.factor) for step, value in points]
