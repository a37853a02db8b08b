"""One update after the other: draw answers, score them, learn from them. Checkpoints lie between updates.

Nothing random has a state to keep: what an update draws depends on the seed, the update and the episode alone, so that
a resumed run goes on bit by bit, and every way to cut a batch gives the same episodes. Losses are sums over tokens
divided by the number of tokens in the whole minibatch; gradients are summed over processes once per step.
"""

from __future__ import annotations

import json
import math
import os
import time
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.prepared import PreparedRows
from llmpipe.errors import Stopped, UserError
from llmpipe.files import flat, fsync, read_json
from llmpipe.models.hardware import Hardware, choose, memory_gb, release_memory
from llmpipe.models.pretrained import load_tokenizer
from llmpipe.parallel import World
from llmpipe.rl import policy_gradient
from llmpipe.rl.actors import Actors, build, pack
from llmpipe.rl.learner import Learner, broken
from llmpipe.rl.rewards import Rewards
from llmpipe.rl.rollout import DRAW, HELD_OUT, ORDER, Episode, Shuffled, draw, seeded
from llmpipe.run import checkpoints
from llmpipe.run.artifact import SUMS
from llmpipe.run.manifest import Made
from llmpipe.run.progress import Progress
from llmpipe.training.arguments import trackers
from llmpipe.training.conclude import conclude
from llmpipe.training.rows import dataset
from llmpipe.training.samples import answer_samples
from llmpipe.training.setup import Training

SHOWN = 4  # episodes of an update that rollouts.jsonl shows


def train(job: Any, prepared: PreparedRows) -> Made:
    """Train a policy and publish it; returns what the manifest says of it."""
    rows, hardware = prepared.folder(job.prepared), choose(job.recipe, job.say, job.weights)
    world, tokenizer = World(_tracked(job, hardware)), load_tokenizer(rows / "tokenizer")
    actors = build(job, prepared, hardware, tokenizer)
    loop = Loop(job, prepared, hardware, world, tokenizer, actors, Rewards(job, hardware, actors))
    answer_samples(loop, tokenizer, "before")
    final = loop.fit()
    for (
        tracker
    ) in loop.accelerator.trackers:  # `end_training` would end the processes' group as well
        tracker.finish()
    actors.alone()
    answer_samples(loop, tokenizer, "after")
    training = Training(job, prepared, hardware, tokenizer, actors.policy)
    return conclude(loop, training, final)


class Loop:
    """The state of a training, and how it moves on."""

    def __init__(
        self, job: Any, prepared: PreparedRows, hardware: Hardware, world: World, tokenizer: Tokenizer, actors: Actors,
        rewards: Rewards,
    ):  # fmt: skip
        self.recipe, self.artifact, self.say, self.signals = (
            job.recipe,
            job.artifact,
            job.say,
            job.signals,
        )
        self.hardware, self.world, self.tokenizer = hardware, world, tokenizer
        self.actors, self.rewards, self.rank, self.accelerator = (
            actors,
            rewards,
            world.rank,
            world.accelerator,
        )
        rows = prepared.folder(job.prepared)
        self.rows = Shuffled(dataset(rows / "train.arrow"), job.recipe.seed, ORDER)
        self.held_out = dataset(rows / "eval.arrow") if prepared.rows.eval else None
        stops = actors.causal.generation_config.eos_token_id
        self.stops = stops if isinstance(stops, list) else [stops]
        held_out = max(map(len, self.held_out["prompt_ids"])) if self.held_out is not None else 0
        _fits(
            actors.causal,
            max(prepared.lengths.max, held_out),
            self.recipe.rollout.max_new_tokens,
        )
        optim, size = self.recipe.optim, self.recipe.optim.batch_size
        self.steps = optim.steps or max(1, math.ceil(optim.epochs * prepared.rows.train / size))
        mixed = prepared.mixture
        mixture = dataset(mixed.folder(job.prepared) / "train.arrow") if mixed else None
        self.learner: Any = Learner(actors, self.recipe, hardware, world, mixture)
        kl = self.recipe.reference
        self.coefficient = policy_gradient.Coefficient(kl.coefficient, kl.target, kl.horizon)
        self.moments = policy_gradient.Moments()
        self.step = self.tokens = 0
        self.pending = False  # whether an evaluation is due that a signal put off
        self.first: dict[str, float] = {}  # metrics of the first update, to warn of drift
        self.warned: list[str] = []
        self.begun = time.monotonic()
        self.metrics, self.table = artifact_files(self.artifact)
        identity = f"{job.plan.identity}:{prepared.content_digest}"
        identity += f":{mixed.content_digest}" if mixed else ""
        launch = self.recipe.launch
        machine = hardware.resume_key() | {"rollout_batch_size": launch.rollout_batch_size}
        machine["activation_checkpointing"] = launch.activation_checkpointing
        filled = self.learner.pass_tokens
        if filled:
            machine["micro_batch_size"] = f"auto ({filled:,} tokens)"
        held = f"{filled:,} tokens" if filled else f"{hardware.micro_batch_size} episodes"
        self.say(f"update: {optim.batch_size} episodes, in passes of up to {held} a process")
        self.about = {"identity": identity, "machine": machine}
        picked = checkpoints.pick(
            self.artifact.checkpoints, identity, machine, self.say, inexact=job.inexact
        )
        self.resumes, self.exact = picked is not None, picked[1] if picked else True
        self.about["exact"] = self.exact
        kept = self._restore(picked[0]) if picked else (0, 0)
        for path, size in (
            zip((self.metrics, self.table), kept, strict=True) if self.rank == 0 else ()
        ):
            with path.open("ab") as file:
                file.truncate(size)
        self.progress = Progress(self.say) if self.rank == 0 else None

    # --- what publishing and samples ask of a trainer ---

    def is_world_process_zero(self) -> bool:
        return self.rank == 0

    def plain_model(self) -> Any:
        return self.actors.policy

    def forget_optimizer(self) -> None:
        self.learner = None
        release_memory()

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training itself."""
        seconds = round(time.monotonic() - self.begun, 1)
        about = {
            "steps": self.step,
            "published_step": self.step,
            "tokens": self.tokens,
            "seconds": seconds,
        }
        return about | {"exact_resume": self.exact}

    # --- the loop ---

    def fit(self) -> dict[str, Any]:
        """Update to the end; returns the last metrics. Raises Stopped when a signal was served, after a checkpoint."""
        self.signals.deferred = True
        if self.resumes:
            self.say(f"resuming from step-{self.step} of {self.steps}")
        if self.held_out is not None and (self.pending or not self.resumes):
            self._evaluate()
            if not self.resumes and (stop := self._asked_to_stop()):
                raise Stopped(stop, "stopped before the first update")
        if self.progress:
            self.progress.begin(self.step, self.steps)
        every = self.recipe.evaluation.every
        while self.step < self.steps:
            line = self.update()
            last = self.step == self.steps
            if last or self.step % self.recipe.log.every == 0:
                self._write(line)
            self.pending = self.held_out is not None and bool(
                last or (every and self.step % every == 0)
            )
            stop = self._asked_to_stop()
            if self.pending and not stop:
                self._evaluate()
                stop = self._asked_to_stop()
            if stop or last or self.step % self.recipe.checkpoint.every == 0:
                self._save()
            if stop:
                raise Stopped(stop, f"stopped at step {self.step}, checkpoint written")
        self.signals.deferred = False
        if self.progress:
            self.progress.close()
        self.accelerator.wait_for_everyone()
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        updates, held = (
            [line for line in lines if key in line] for key in ("objective/scores", "eval_score")
        )
        final = {name: updates[-1][name] for name in ("loss", "objective/scores", "objective/kl")}
        if held:
            final |= {
                "eval_score_before": held[0]["eval_score"],
                "eval_score": held[-1]["eval_score"],
            }
            self.say(
                f"held-out score: {held[0]['eval_score']:.4f} before, {held[-1]['eval_score']:.4f} after"
            )
        return final

    def _asked_to_stop(self) -> int:
        """The signal that any process was sent, 0 for none."""
        return self.world.stop_code(self.signals)

    def scored(
        self, rows: list[dict], answers: list[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Scores of this process's answers. What one process raises, all do: none may wait for another."""
        found, error = ([], {}), None
        try:
            found = self.rewards(rows, answers) if rows else found
        except UserError as problem:
            error = problem
        self.world.agree(error)
        return found

    def update(self) -> dict[str, float]:
        """Draw, score, learn; what there is to say of it."""
        begun, recipe = time.monotonic(), self.recipe
        rate = self.learner.rate(self.step, self.steps)
        size = recipe.optim.batch_size
        mine = list(range(self.rank, size, self.world.size))  # positions in the batch
        asked = [self.rows[self.step * size + i] for i in mine]
        rows = [json.loads(ask["row"]) for ask in asked]
        luck = torch.stack([self._luck(DRAW, self.step, i) for i in mine])
        episodes = self.drawn([ask["prompt_ids"] for ask in asked], luck)
        answers = [self.text(episode) for episode in episodes]
        scores, each = self.scored(rows, answers)
        line = self.judge(episodes, torch.tensor(scores))
        drawn = time.monotonic()
        line |= self.learner.learn(self.step, episodes, mine)
        self.step += 1
        sums = {f"scores/{name}": sum(values) for name, values in each.items() if len(each) > 1}
        sums = self.world.totals(
            sums | {"tokens": sum(len(episode.answer) for episode in episodes)}
        )
        tokens = sums.pop("tokens")
        line |= {name: total / size for name, total in sums.items()}
        self.tokens += int(tokens)
        seconds = time.monotonic() - begun
        line |= {
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "episodes_per_second": size / seconds,
        }
        line |= {"rollout_share": (drawn - begun) / seconds, "coefficient": self.coefficient.value}
        self.coefficient.adapt(line["objective/kl"], size)
        if self.rank == 0 and (self.step % recipe.log.every == 0 or self.step == self.steps):
            self._show(rows, episodes, answers, scores)
        self._warn(line)
        return line

    def drawn(self, prompts: list[list[int]], luck: Tensor) -> list[Episode]:
        """Answers of the policy as it is now, a batch of like length at a time."""
        causal, size = self.actors.causal, self.recipe.launch.rollout_batch_size
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        found: list[Any] = [None] * len(prompts)
        with self.actors.padded(), self.hardware.autocast():
            for start in range(0, len(order), size):
                part = order[start : start + size]
                made = draw(causal, [prompts[i] for i in part], luck[part], self.recipe.rollout, self.stops,
                            self.tokenizer.pad_token_id)  # fmt: skip
                for i, episode in zip(part, made, strict=True):
                    found[i] = episode
                if self.progress:
                    self.progress.note(
                        f"step {self.step + 1}: {min(start + size, len(order))}/{len(order)} answers"
                    )
        return found

    def text(self, episode: Episode) -> str:
        tokens = episode.answer[:-1] if episode.ended else episode.answer
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def judge(self, episodes: list[Episode], scores: Tensor) -> dict[str, float]:
        """Old log-probabilities, values, advantages and returns of each episode, from their scores [episodes]."""
        recipe, how = self.recipe, self.recipe.algorithm
        old, entropy, values, reference = ([None] * len(episodes) for _ in range(4))
        with torch.no_grad(), self.hardware.autocast():
            for part in self.learner.passes(episodes):
                batch = pack([episodes[i] for i in part], self.world.device)
                lengths = [len(episodes[i].answer) for i in part]
                spoken, bits, valued = self.actors.spoken(batch)
                if valued is None:
                    with self.actors.as_critic():
                        valued = self.actors.valued(batch)
                for into, found in zip((old, entropy, values, reference),
                                       (spoken, bits, valued, self.actors.referred(batch)), strict=True):  # fmt: skip
                    for i, piece in zip(part, found.float().cpu().split(lengths), strict=True):
                        into[i] = piece
        lengths = torch.tensor([len(episode.answer) for episode in episodes])
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).float()
        padded = lambda parts: pad_sequence(parts, batch_first=True)  # noqa: E731
        ended = torch.tensor([float(episode.ended) for episode in episodes])
        raw = scores + recipe.rollout.unfinished * (1 - ended)
        shaped = self._shaped(raw)
        kl = (
            policy_gradient.kl_penalty(padded(old), padded(reference), recipe.reference.estimator)
            * mask
        )
        rewards = policy_gradient.token_rewards(shaped, kl, mask, self.coefficient.value)
        found, returns = policy_gradient.advantages(
            rewards, padded(values), mask, how.discount, how.smoothing
        )
        if how.whiten:
            found = policy_gradient.whitened(found, mask, self.world.sum)
        for i, episode in enumerate(episodes):
            n = int(lengths[i])
            episode.old, episode.values = old[i], values[i]
            episode.advantages, episode.returns = found[i, :n], returns[i, :n]
        sums = {
            "episodes": len(episodes),
            "tokens": mask.sum(),
            "kl": ((padded(old) - padded(reference)) * mask).sum(),
            "penalty": kl.sum(),
            "entropy": padded(entropy).sum(),
            "scores": scores.sum(),
            "squares": (scores.double() ** 2).sum(),
            "raw": raw.sum(),
            "ended": ended.sum(),
            "error": ((returns - padded(values)) ** 2 * mask).sum(),
            "returns": (returns * mask).sum(),
            "square returns": (returns.double() ** 2 * mask).sum(),
            "noise": sum(
                float((episode.old - episode.log_probs).abs().sum()) for episode in episodes
            ),
        }
        found = self.world.totals(sums)
        each = {name: value / found["episodes"] for name, value in found.items()}
        token = {name: value / found["tokens"] for name, value in found.items()}
        spread = token["square returns"] - token["returns"] ** 2
        penalty = self.coefficient.value * each["penalty"]
        line = {
            "objective/scores": each["scores"],
            "objective/scores_std": math.sqrt(max(each["squares"] - each["scores"] ** 2, 0)),
            "objective/kl": each["kl"],
            "objective/entropy": token["entropy"],
            "objective/non_score_reward": -penalty,
            "objective/rlhf_reward": each["raw"] - penalty,
            "val/explained_variance": 1 - token["error"] / spread if spread > 0 else 0.0,
            "val/rollout_difference": token["noise"],
            "answers/tokens": each["tokens"],
            "answers/ended": each["ended"],
        }
        if odd := [name for name, value in line.items() if not math.isfinite(value)]:
            raise broken(self.step, odd[0], line[odd[0]])
        return line

    def _shaped(self, scores: Tensor) -> Tensor:
        """Scores as the algorithm sees them: by their running deviation, and clipped, where the recipe says so."""
        how = self.recipe.algorithm
        if how.normalize_scores:
            wide = scores.double()
            sums = {"count": len(wide), "total": wide.sum(), "squares": (wide**2).sum()}
            self.moments.add(**self.world.totals(sums))
            scores = (scores - self.moments.mean) / self.moments.deviation
        return (
            scores if how.clip_scores is None else scores.clamp(-how.clip_scores, how.clip_scores)
        )

    def _evaluate(self) -> None:
        """The mean score of answers to the held-out prompts, each drawn with the same numbers every time."""
        self.pending = False
        mine = list(range(self.rank, len(self.held_out), self.world.size))
        rows = [json.loads(self.held_out[i]["row"]) for i in mine]
        episodes: list[Episode] = []
        if mine:
            luck = torch.stack([self._luck(HELD_OUT, 0, i) for i in mine])
            episodes = self.drawn([self.held_out[i]["prompt_ids"] for i in mine], luck)
        scores, _ = self.scored(rows, [self.text(episode) for episode in episodes])
        sums = {"eval_score": sum(scores), "eval_ended": sum(episode.ended for episode in episodes)}
        sums["eval_tokens"] = sum(len(episode.answer) for episode in episodes)
        self._write(
            {name: total / len(self.held_out) for name, total in self.world.totals(sums).items()}
        )

    # --- small parts ---

    def _luck(self, use: int, step: int, i: int) -> Tensor:
        chance = seeded(self.recipe.seed, use, step, i)
        return torch.rand(self.recipe.rollout.max_new_tokens, generator=chance, dtype=torch.float64)

    def _warn(self, line: dict[str, float]) -> None:
        """Say once what looks like a policy that games its reward (Gao 2022; Stiennon 2020, section 4.3)."""
        self.first = self.first or line
        signs = {
            "KL ran away": line["objective/kl"] > 4 * (self.recipe.reference.target or 12.5),
            "answers grow": line["answers/tokens"] > 2 * self.first["answers/tokens"] + 8,
            "answers shrink": line["answers/tokens"] < 0.4 * self.first["answers/tokens"] - 1,
            "entropy collapsed": line["objective/entropy"] < 0.1 * self.first["objective/entropy"],
        }
        for sign in (name for name, there in signs.items() if there and name not in self.warned):
            self.warned.append(sign)
            what = {
                "KL": "objective/kl",
                "answers": "answers/tokens",
                "entropy": "objective/entropy",
            }[sign.split()[0]]
            self.say(f"warning: {sign}: {what} {self.first[what]:.2f} at first, {line[what]:.2f} now; read "
                     "rollouts.jsonl, raise reference.coefficient, or lower optim.learning_rate")  # fmt: skip

    # --- files ---

    def _write(self, logs: dict[str, float]) -> None:
        """One line in metrics.jsonl and one on the screen."""
        if self.rank:
            return
        line = {"step": self.step, **logs, "memory_gb": round(memory_gb(), 3)}
        line["seconds"] = round(time.monotonic() - self.begun, 3)
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self.accelerator.trackers:
            step = (
                None if tracker.name == "wandb" else self.step
            )  # which drops what comes for a step that it has
            tracker.log(logs | {"train/global_step": self.step}, step=step)
        self.progress.show(line)

    def _show(
        self, rows: list[dict], episodes: list[Episode], answers: list[str], scores: list[float]
    ) -> None:
        """Some episodes of an update, to read."""
        with self.table.open("a", encoding="utf-8") as file:
            for row, episode, answer, score in list(
                zip(rows, episodes, answers, scores, strict=True)
            )[:SHOWN]:
                line = {
                    "step": self.step,
                    "prompt": row["prompt"],
                    "answer": answer,
                    "score": score,
                }
                line |= {"ended": episode.ended, "tokens": len(episode.answer)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _save(self) -> None:
        """A checkpoint: all that learns, the optimizer, and what was counted. Rank 0 has it all."""
        if self.rank == 0:
            if self.progress:
                self.progress.note(f"saving step {self.step}")
            for path in (self.metrics, self.table):
                path.touch()
                fsync(path)
            state = {
                "moments": vars(self.moments), "coefficient": self.coefficient.value, "tokens": self.tokens,
                "pending": self.pending, "first": self.first, "warned": self.warned,
                "seconds": time.monotonic() - self.begun,
                "bytes": [self.metrics.stat().st_size, self.table.stat().st_size],
            }  # fmt: skip
            state["optimizer"], tensors = apart(self.learner.optimizer.state_dict()["state"])
            parts = {
                "learned": {name: p.detach() for name, p in self.learner.weights.items()},
                "optimizer": tensors,
            }
            with checkpoints.writing(
                self.artifact.checkpoints, self.step, self.about, lambda: state
            ) as staging:
                for name, part in parts.items():
                    save_file(separate(part), staging / f"{name}.safetensors")
            checkpoints.rotate(self.artifact.checkpoints, self.recipe.checkpoint.keep, set())
        self.accelerator.wait_for_everyone()

    def _restore(self, folder: Any) -> list[int]:
        """Go on from a checkpoint; the sizes that the files of lines had."""
        state = read_json(folder / checkpoints.STATE)
        for name, tensor in load_file(folder / "learned.safetensors").items():
            self.learner.weights[name].data.copy_(tensor)
        tensors = load_file(folder / "optimizer.safetensors")
        held = {int(i): together(own, tensors) for i, own in state["optimizer"].items()}
        self.learner.optimizer.load_state_dict(
            self.learner.optimizer.state_dict() | {"state": held}
        )
        self.step = read_json(folder / SUMS)["step"]
        self.moments = policy_gradient.Moments(**state["moments"])
        self.coefficient.value, self.tokens = state["coefficient"], state["tokens"]
        self.first, self.warned, self.pending = state["first"], state["warned"], state["pending"]
        self.begun -= state["seconds"]
        return state["bytes"]


def _tracked(job: Any, hardware: Hardware) -> Accelerator:
    """Accelerate, with the recipe's experiment trackers begun."""
    trackers(job.recipe, job.artifact)
    names, home = job.recipe.log.trackers, os.environ.get("TENSORBOARD_LOGGING_DIR")
    accelerator = Accelerator(
        cpu=hardware.device == "cpu", log_with=names or None, project_dir=home
    )
    if names:
        project = os.environ.get(
            "WANDB_PROJECT", "huggingface"
        )  # what transformers calls it for the other stages
        name = f"{job.artifact.run.name}-{job.artifact.name}"
        own = {
            "wandb": {"name": name},
            "mlflow": {"run_name": name},
            "trackio": {"name": name, "resume": "allow"},
        }
        asked = flat(job.recipe.model_dump(mode="json", by_alias=True))
        known = {
            at: value if isinstance(value, bool | int | float) else str(value)
            for at, value in asked.items()
        }
        accelerator.init_trackers(project, known, own)
    return accelerator


def artifact_files(artifact: Any) -> tuple[Any, Any]:
    return artifact.path / "metrics.jsonl", artifact.path / "rollouts.jsonl"


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as safetensors takes them: those that share memory, as bitsandbytes' maps do, are copied."""
    seen, found = set(), {}
    for at, tensor in tensors.items():
        own = tensor.untyped_storage().data_ptr()
        found[at] = (tensor.clone() if own in seen else tensor).cpu().contiguous()
        seen.add(own)
    return found


def apart(value: Any, at: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nested state as JSON, and its tensors by their places in it."""
    if isinstance(value, Tensor):
        return {"tensor": at}, {at: value}
    if not isinstance(value, dict):
        return value, {}
    plain, tensors = {}, {}
    for key, inner in value.items():
        plain[str(key)], found = apart(inner, f"{at}/{key}")
        tensors |= found
    return plain, tensors


def together(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """What `apart` took apart."""
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {"tensor"}:
        return tensors[plain["tensor"]]
    return {key: together(inner, tensors) for key, inner in plain.items()}


def _fits(model: Any, prompt: int, answer: int) -> None:
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt + answer > most:
        problem = (
            f"a prompt of {prompt:,} tokens and an answer of {answer:,} exceed the model's {most:,}"
        )
        raise UserError(problem, "lower data.max_length or rollout.max_new_tokens")
