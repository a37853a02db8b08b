"""The training loop's surroundings, shared by every stage with a Hugging Face trainer underneath.

`durable(SFTTrainer)` is that trainer with exact checkpoints, signals served at the end of a step, a stop on NaN before
the optimizer sees it, and a held-out loss per token that does not depend on batch or process count. The loop itself,
the loss and the optimizer stay the library's.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from llmpipe.data.kinds import Kind
from llmpipe.data.stream import Position, Stream
from llmpipe.errors import NUMERIC, Stopped, UserError
from llmpipe.files import fsync, read_json
from llmpipe.models.generate import isolated_rng
from llmpipe.models.hardware import Hardware, flops_per_token, memory_gb, peak_flops, release_memory
from llmpipe.recipe.sections import Training
from llmpipe.run import checkpoints
from llmpipe.run.artifact import Artifact
from llmpipe.run.progress import Progress
from llmpipe.training.rows import Order, with_fillers


class _Interrupted(Exception):
    """A signal arrived inside evaluation."""


class _Loop(TrainerCallback):
    """Decides at the end of each step what follows it: log, evaluate, save, stop."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._on_begin()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._order.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        last = step >= state.max_steps
        due = trainer.recipe.evaluation.every
        control.should_evaluate = trainer.eval_dataset is not None and (
            last or bool(due and step % due == 0)
        )
        control.should_save = last or step % trainer.recipe.checkpoint.every == 0
        control.should_log = control.should_log or last
        if trainer._stop_asked():
            trainer._pending_evaluation = control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.trainer._write_metrics(logs)


def durable(trainer_class: type[Trainer]) -> type:
    """`trainer_class` with llmpipe's loop. Call `attach` before `fit`."""
    return type(f"Durable{trainer_class.__name__}", (_Durable, trainer_class), {})


class _Durable:
    """Mixed in before a transformers Trainer; see the module's docstring."""

    def __init__(self, *, model: Any, **arguments: Any):
        learned = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
        super().__init__(model=model, **arguments)
        for name, p in model.named_parameters():
            if name in learned:
                p.data = learned[name].to(
                    p.device
                )  # TRL rounds a QLoRA adapter to bf16; master weights stay fp32

    def attach(
        self,
        artifact: Artifact,
        recipe: Training,
        identity: str,
        hardware: Hardware,
        signals: Any,
        say: Any,
        *,
        kind: Kind,
        measure: Callable[[Any, dict], dict[str, tuple[Any, Any]]],
        inexact: bool,
        stream: Stream | None = None,
    ) -> None:
        """Bind the trainer to its artifact and look for a checkpoint to go on from.

        `measure(trainer, batch)` gives {name: (sum, count)} of held-out rows; `loss` is what the best is chosen by.
        `stream` replaces the dataset.
        """
        self.artifact, self.recipe, self.identity, self.hardware = (
            artifact,
            recipe,
            identity,
            hardware,
        )
        self.signals, self.say, self._measure = signals, say, measure
        self._pending_evaluation = False
        self._stopped: int | None = None
        self._peak = hardware.processes * (peak_flops() or 0)
        self._per_token = (
            flops_per_token(self.model, recipe.data.preparation.max_length) if self._peak else 0
        )
        self._best: tuple[float, int] | None = None
        self._worse = 0
        self._tokens = 0
        self._last_logged = (time.monotonic(), 0)
        self._begun = time.monotonic()
        self._restored: dict[str, Any] | None = None
        self._exact = True
        self._stream = stream
        count, together = (
            len(stream or self.train_dataset),
            hardware.micro_batch_size * hardware.processes,
        )
        fillers = -count % together if hardware.processes > 1 else 0
        self._order = Order(count, fillers, recipe.seed, shuffled=stream is None)
        assert kind.filler is not None  # every kind that TRL trains on has one
        filler = kind.filler(self.processing_class.pad_token_id)
        self.train_dataset = stream or with_fillers(self.train_dataset, fillers, filler)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Loop(self))
        self._progress = Progress(say) if self.is_world_process_zero() else None
        picked = checkpoints.pick(
            artifact.checkpoints, identity, hardware.resume_key(), say, inexact=inexact
        )
        self._checkpoint, self._exact = picked if picked else (None, True)
        if self.is_world_process_zero():
            kept = (
                read_json(self._checkpoint / checkpoints.STATE)["metrics_bytes"]
                if self._checkpoint
                else 0
            )
            with (artifact.path / "metrics.jsonl").open("ab") as file:
                file.truncate(kept)

    @property
    def resumes(self) -> bool:
        """Whether training goes on from a checkpoint."""
        return self._checkpoint is not None

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint when there is one; returns the last metrics.

        Raises Stopped when a signal was served (a checkpoint is written then) and UserError (4) on NaN or Inf.
        """
        self.signals.deferred = True
        checkpoint = self._checkpoint
        if checkpoint:
            state = read_json(checkpoint / "trainer_state.json")
            self.say(f"resuming from {checkpoint.name} of {state['max_steps']}")
            self._restored = read_json(checkpoint / checkpoints.STATE)
            if self._stream:
                self._stream.go(
                    state["global_step"] * self.recipe.batch_size,
                    Position(**self._restored["stream"]),
                )
            self._best = tuple(self._restored["best"]) if self._restored["best"] else None
            self._worse = self._restored["worse"]
            finished = state["global_step"] >= state["max_steps"] or self._restored["finished"]
            if finished or self._restored["pending_evaluation"]:
                self._load_from_checkpoint(str(checkpoint))
                self.state = type(self.state).load_from_json(str(checkpoint / "trainer_state.json"))
            if self._restored[
                "pending_evaluation"
            ]:  # a signal came before it; it may end the training
                self._evaluate(None, None)
                if self._stopped:
                    raise self._stop()
            if finished or self.control.should_training_stop:
                mine = self._restored["ranks"][0]
                self._tokens, self._begun = mine["tokens"], self._begun - mine["seconds"]
                return self._finish()
        elif self.eval_dataset is not None:
            try:
                self.evaluate()
            except _Interrupted:
                raise Stopped(self._stopped, "stopped before the first step") from None
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if self._stopped:
            raise self._stop()
        return self._finish()

    def _stop(self) -> Stopped:
        return Stopped(
            self._stopped, f"stopped at step {self.state.global_step}, checkpoint written"
        )

    def _finish(self) -> dict[str, Any]:
        """Load the best weights when the recipe keeps those, and gather what the manifest says."""
        self.signals.deferred = False
        if self._progress:
            self._progress.close()
        if (
            self.recipe.evaluation.keep_best
            and self._best
            and self._best[1] != self.state.global_step
        ):
            path = checkpoints.folder(self.artifact.checkpoints, self._best[1])
            if problems := checkpoints.verify(path):
                raise UserError(
                    f"{path}/{problems[0]}",
                    "the best checkpoint is damaged; --fresh trains anew",
                    3,
                )
            self._load_from_checkpoint(str(path))
            self.say(f"keeping the best: step {self._best[1]}, held-out loss {self._best[0]:.4f}")
        self.accelerator.wait_for_everyone()
        lines = [
            json.loads(x) for x in (self.artifact.path / "metrics.jsonl").read_text().splitlines()
        ]
        held_out = [line for line in lines if "eval_loss" in line]
        final = {"loss": next((x["loss"] for x in reversed(lines) if "loss" in x), None)}
        if held_out:
            kept = [line for line in held_out if line["step"] == self.facts()["published_step"]]
            after = (kept or held_out)[-1]
            final |= {"eval_loss_before": held_out[0]["eval_loss"]}
            final |= {name: value for name, value in after.items() if name.startswith("eval_")}
            self.say(
                f"held-out loss: {held_out[0]['eval_loss']:.4f} before, {after['eval_loss']:.4f} after"
            )
        return final

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training itself."""
        kept = (
            self._best[1]
            if self.recipe.evaluation.keep_best and self._best
            else self.state.global_step
        )
        return {
            "steps": self.state.global_step,
            "published_step": kept,
            "tokens": self._tokens * self.args.world_size,
            "seconds": round(time.monotonic() - self._begun, 1),
            "exact_resume": self._exact,
        }

    def plain_model(self) -> Any:
        """The model without DDP and autocast around it, as a reader of the saved files has it."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def forget_optimizer(self) -> None:
        """Free gradients and optimizer state: what follows needs the memory."""
        self.model.zero_grad(set_to_none=True)
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = self.callback_handler.optimizer = (
            self.callback_handler.lr_scheduler
        ) = None
        release_memory()

    def _stop_asked(self) -> bool:
        """Whether any rank was told to stop; all ranks get the same answer."""
        code = self._agree(self.signals.code or 0)
        if code:
            self._stopped = code
        return bool(code)

    def _agree(self, value: int) -> int:
        """The greatest value over all ranks."""
        if self.args.world_size == 1:
            return value
        box = torch.tensor(value, device=self.args.device)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return int(box)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        ids = inputs["input_ids"]
        self._tokens += (
            int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else ids.numel()
        )
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(norm)):
            raise self._not_finite("gradient norm", norm)
        return norm

    def _not_finite(self, what: str, value: Any) -> UserError:
        return UserError(
            f"step {self.state.global_step + 1}: the {what} is {float(value)}; stopped before the optimizer step",
            "lower optim.learning_rate, or set optim.precision: fp32; nothing was published, checkpoints are kept",
            NUMERIC,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What `measure` finds on the held-out rows, the same for every batch size and process count.

        Each rank takes every world-size-th batch, and one that has none left a batch that does not count, since what
        measures may speak to the other ranks; sums and counts are added over ranks. The generators of Python, NumPy
        and torch are left as they were found.
        """
        rows, size, world = (
            self.eval_dataset,
            self.args.per_device_eval_batch_size,
            self.args.world_size,
        )
        totals: dict[str, torch.Tensor] = {}
        was_training = self.model.training
        self.model.eval()
        with isolated_rng(), torch.no_grad():
            for start in range(0, len(rows), world * size):
                if code := self._agree(self.signals.code or 0):
                    self._stopped = code
                    self.model.train(was_training)
                    raise _Interrupted
                first = start + self.args.process_index * size
                mine = [rows[i] for i in range(first, min(first + size, len(rows)))]
                batch = self._prepare_inputs(self.data_collator(mine or [rows[0]]))
                # autocast by hand: before training, Accelerate has not put it around the model yet
                with torch.autocast(
                    self.args.device.type, torch.bfloat16, enabled=self.hardware.bf16
                ):
                    found = self._measure(self, batch)
                for name, pair in found.items():
                    sums = torch.tensor([float(value) for value in pair], dtype=torch.float64)
                    totals[name] = totals.get(
                        name, torch.zeros(2, dtype=torch.float64)
                    ) + sums * bool(mine)
        shared = torch.stack(list(totals.values()))
        if world > 1:
            shared = shared.to(
                self.args.device, torch.float32 if self.args.device.type == "mps" else torch.float64
            )
            torch.distributed.all_reduce(shared)
        metrics = {
            f"eval_{name}": float(value / count)
            for name, (value, count) in zip(totals, shared, strict=True)
        }
        if not math.isfinite(metrics["eval_loss"]):
            raise self._not_finite("held-out loss", metrics["eval_loss"])
        self.log(
            dict(metrics)
        )  # in eval mode still: the trainer underneath keeps its training averages then
        self.model.train(was_training)
        self.control.should_evaluate = False
        return metrics

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate inside the loop; note the best; a signal in the middle leaves the evaluation for the resumed run."""
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except _Interrupted:
            self._pending_evaluation = True
            self.control.should_save = self.control.should_training_stop = True
            return {"eval_loss": math.inf}
        step, loss, wanted = self.state.global_step, metrics["eval_loss"], self.recipe.evaluation
        if self._best is None or loss < self._best[0]:
            self._best, self._worse = (loss, step), 0
            self.control.should_save = self.control.should_save or wanted.keep_best
        else:
            self._worse += 1
            if wanted.patience and self._worse >= wanted.patience and step < self.state.max_steps:
                self.say(f"step {step}: no better for {self._worse} evaluations; stopping early")
                self.control.should_save = self.control.should_training_stop = True
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's own checkpoint, published whole; every rank writes its part."""
        step, main, where = (
            self.state.global_step,
            self.is_world_process_zero(),
            self.artifact.checkpoints,
        )
        about = {
            "identity": self.identity,
            "machine": self.hardware.resume_key(),
            "exact": self._exact,
        }
        state = self._gather_state()
        output, self.args.output_dir = self.args.output_dir, str(where / f".step-{step}.staging")
        if main and self._progress:
            self._progress.note(f"saving step {step}")
        with checkpoints.writing(where, step, about, lambda: state) if main else nullcontext():
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if main:
                inner = Path(self.args.output_dir, f"checkpoint-{step}")
                for path in inner.iterdir():
                    path.rename(inner.parent / path.name)
                inner.rmdir()
        self.args.output_dir = output
        if main:
            keep_best = self.recipe.evaluation.keep_best and self._best
            release_memory()
            checkpoints.rotate(
                where, self.recipe.checkpoint.keep, {self._best[1]} if keep_best else set()
            )
        self.accelerator.wait_for_everyone()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card in a checkpoint."""

    def _gather_state(self) -> dict[str, Any]:
        """What the library does not keep: sums since the last log, per rank, and llmpipe's own counters."""
        mine = {
            "loss_sum": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,
            "averages": {k: list(v) for k, v in self._metrics["train"].items()},
            "train_tokens": self._total_train_tokens,
            "tokens": self._tokens,
            "seconds": time.monotonic() - self._begun,
        }
        ranks = [mine]
        if self.args.world_size > 1:
            ranks = [None] * self.args.world_size
            torch.distributed.all_gather_object(ranks, mine)
        metrics = self.artifact.path / "metrics.jsonl"
        for path in (metrics, self._stream.rejected if self._stream else None):
            if self.is_world_process_zero() and path and path.exists():
                fsync(path)
        return {
            "ranks": ranks,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "best": self._best,
            "worse": self._worse,
            "pending_evaluation": self._pending_evaluation,
            "stream": self._stream
            and asdict(self._stream.position(self.state.global_step * self.recipe.batch_size)),
            "finished": self.control.should_training_stop and not self._stopped,
        }

    def _on_begin(self) -> None:
        """Put the counters back, after the library has restored its own."""
        if self._progress:
            self._progress.begin(self.state.global_step, self.state.max_steps)
        if not self._restored:
            return
        mine = self._restored["ranks"][
            min(self.args.process_index, len(self._restored["ranks"]) - 1)
        ]
        self._tr_loss += mine["loss_sum"]
        self._globalstep_last_logged = mine["last_logged"]
        self._metrics["train"] = defaultdict(
            list, {k: list(v) for k, v in mine["averages"].items()}
        )
        self._total_train_tokens, self._tokens = mine["train_tokens"], mine["tokens"]
        self._last_logged = (time.monotonic(), self._tokens)
        self._begun -= mine["seconds"]

    def _write_metrics(self, logs: dict[str, float]) -> None:
        """One line in metrics.jsonl and one on the screen."""
        if not self.is_world_process_zero() or "train_runtime" in logs:
            return
        now = time.monotonic()
        line: dict[str, Any] = {"step": self.state.global_step, **logs}
        if "loss" in logs:
            since, tokens = self._last_logged
            everywhere = (self._tokens - tokens) * self.args.world_size
            line["tokens_per_second"] = round(everywhere / max(now - since, 1e-9), 1)
            self._last_logged = (now, self._tokens)
            if self._peak:
                line["share_of_peak"] = round(
                    line["tokens_per_second"] * self._per_token / self._peak, 4
                )
        line |= {"memory_gb": round(memory_gb(), 3), "seconds": round(now - self._begun, 3)}
        with (self.artifact.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._progress:
            self._progress.show(line)
