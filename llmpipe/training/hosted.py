"""A trainer of TRL's that can be stopped and resumed to the bit, shared by every stage with one.

`Durable` is mixed in before a TRL trainer and adds exact checkpoints, signals served at the end of
a step, a stop on NaN before the optimizer sees it, and a held-out loss that does not depend on
batch or process count. It holds only the methods that a subclass has to override; what they do lies
with `Resume`, `HeldOut` and `MetricsLog`, and what is otherwise of a model in parts in `Sharded`.
The loop itself, the loss and the optimizer stay the library's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback

from llmpipe import upstream
from llmpipe.errors import NUMERIC, Stopped, UserError, first_line
from llmpipe.files.writing import fsync
from llmpipe.models.device import release_memory
from llmpipe.models.moved import Start
from llmpipe.parallel import zero
from llmpipe.parallel.tensors import whole
from llmpipe.parallel.world import World
from llmpipe.recipe import sections
from llmpipe.training import resume
from llmpipe.training.heldout import (
    Best,
    HeldOut,
    Interrupted,
    Measure,
    overfitting,
    without_effect,
)
from llmpipe.training.laid import Counted
from llmpipe.training.memory import fit_memory
from llmpipe.training.metrics_log import MetricsLog
from llmpipe.training.resume import Resume, State, as_numbers
from llmpipe.training.rows import Order, longest, with_fillers
from llmpipe.training.saving import Saving
from llmpipe.training.schedule import (
    make_scheduler,
    refuse_another_schedule,
    say_if_peak_is_missed,
)
from llmpipe.training.sharded import Sharded
from llmpipe.training.training import Training
from llmpipe.upstream.layers import left_as_written


class Durable(Sharded):
    """Mixed in before one of TRL's trainers; see the module's docstring."""

    train_dataset: Any  # a Dataset or a Stream
    data_collator: Any  # what the library was given, counted

    def __init__(self, training: Training[sections.Hosted], measure: Measure, **arguments: Any):
        """`measure`: what is said of held-out rows; `arguments`: those of TRL's trainer."""
        self.training = training
        self.artifact = training.artifact
        self.recipe = training.recipe
        self.say = training.say
        self.signals = training.job.signals
        self.stop_code = 0
        weights = _trained_weights(training.model)
        upstream.as_asked(self.layered, self.hardware.activation_checkpointing)
        try:
            super().__init__(model=training.model, processing_class=training.tokenizer, **arguments)
        except ValueError as error:
            if not self.recipe.trainer:
                raise
            hint = "remove from `trainer:` what does not fit this model"
            raise UserError(f"trainer: {first_line(error)}", hint) from error
        if self.hardware.zero:
            zero.hide()
        if not self.learns_in_parts:
            _put_back(weights, training.model)
        # trackers show it, and the library pickles it; see `_get_output_dir`
        self.args.output_dir = f"{self.artifact.run.name}/{self.artifact.name}"
        self.start = Start.of(training.model)

        self.world = World(self.accelerator)
        self.metrics_log = MetricsLog(self.artifact.path / "metrics.jsonl", self.world, self.say)
        self.held_out = HeldOut(self, measure, self.hardware, self.world, self.stop_asked)
        self.resume = Resume(training, self.world)
        checkpoint = self.recipe.checkpoint
        home, device = self.artifact.checkpoints, self.hardware.device
        self.saving = Saving(home, checkpoint, device, self.world, self.say)
        self.metrics_log.cut(self.resume.state.metrics_bytes if self.resume.state else 0)
        self._rows = self.train_dataset
        self._even_out_batches()
        self.library_collator = self.data_collator
        self.data_collator = Counted(self.library_collator)
        self.left_as_written = left_as_written()
        self._step_loss: torch.Tensor | float = 0.0  # the sum of its micro-batches'
        self._last_loss = math.nan  # of this process's share of the last step
        self.remove_callback(PrinterCallback)
        self.add_callback(_Loop(self))

    def _even_out_batches(self) -> None:
        """Set the rows and their order, with fillers where processes would have other numbers."""
        stream = self.training.stream
        rows = stream or self._rows
        count = len(rows)
        together = self.hardware.micro_batch_size * self.world.size
        fillers = -count % together if self.world.size > 1 else 0
        self.order = Order(count, fillers, self.recipe.seed, shuffled=stream is None)
        if stream is None:
            filler = self.training.kind.filler
            assert filler is not None  # every kind that TRL trains on has one
            rows = with_fillers(rows, fillers, filler(self.processing_class.pad_token_id))
        self.train_dataset = rows

    def cut(self, micro_batch_size: int) -> None:
        """Take so many sequences a forward pass, as if there had never been another number; before
        the first one.
        """
        self.training.cut(micro_batch_size)
        self.args.per_device_train_batch_size = micro_batch_size
        self.args.per_device_eval_batch_size = micro_batch_size
        self.args.gradient_accumulation_steps = self.hardware.accumulation
        self._train_batch_size = self.args.train_batch_size
        self._even_out_batches()

    def compute_again(self, kind: str) -> None:
        """Let the backward pass compute activations again, `selective` or `full`, where it did not;
        before the first one.
        """
        self.training.compute_again(kind)
        self.args.activation_checkpointing = self.args.gradient_checkpointing = True
        options = self.args.activation_checkpointing_kwargs or {}
        upstream.checkpoint_layers(self.layered, kind, **options)

    @property
    def layered(self) -> PreTrainedModel:
        """What is trained, without an adapter's wrapper."""
        model = self.training.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    def longest_rows(self, count: int) -> list[dict[str, Any]]:
        """The longest of the rows, before fillers: as many as a forward pass takes."""
        if self.training.stream is None:
            return longest(self._rows, count)
        block = [self.processing_class.pad_token_id] * self.training.preparation.max_length
        row = {"input_ids": block, "labels": block, "seq_lengths": [len(block)]}
        return [row] * count

    # --- what a stage asks of it; see `training.Trained` ---

    @property
    def resumes(self) -> bool:
        """Whether training goes on from a checkpoint."""
        return self.resume.checkpoint is not None

    def fit(self) -> dict[str, Any]:
        """Train to the end, from the newest checkpoint when there is one; the last metrics.

        Raises Stopped when a signal was served (a checkpoint is written then) and UserError (4) on
        NaN or Inf.
        """
        self.signals.deferred = True
        done = self.resumes and self._go_on()
        if not done:
            fit_memory(self)
        if not self.resumes:
            self._evaluate_at_first()
        if not done:
            checkpoint = self.resume.checkpoint
            with self.saving:
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            self._raise_if_stopped()
        self.leave_zero()
        self.signals.deferred = False
        self.metrics_log.close()
        self._load_best()
        self.world.wait()
        final = self.metrics_log.final(self.published_step)
        if "eval_loss" in final:
            before, after = final["eval_loss_before"], final["eval_loss"]
            self.say(f"held-out loss: {before:.4f} before, {after:.4f} after")
            if warning := overfitting(self.held_out.best, before, after):
                self.say(warning)
        return final

    @property
    def published_step(self) -> int:
        """The step whose weights are published."""
        best = self._kept_best()
        return best.step if best else self.state.global_step

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the training itself. Collective."""
        return {
            "steps": self.state.global_step,
            "published_step": self.published_step,
            "tokens": self.metrics_log.total(),
            "seconds": round(self.metrics_log.seconds, 1),
            "exact_resume": self.resume.exact,
            "legs": [asdict(leg) for leg in self.resume.legs],
        }

    def plain_model(self) -> Any:
        """The model without DDP and autocast around it, as a reader of the saved files has it."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    def forget_optimizer(self) -> None:
        """Free gradients and optimizer state: what follows needs the memory."""
        self.model.zero_grad(set_to_none=True)
        self.accelerator.free_memory()
        self.optimizer = None
        self.lr_scheduler = None
        self.callback_handler.optimizer = None
        self.callback_handler.lr_scheduler = None
        release_memory()

    # --- before the first step, and after the last ---

    def _evaluate_at_first(self) -> None:
        if self.eval_dataset is None:
            return
        try:
            self.evaluate()
        except Interrupted:
            raise Stopped(self.stop_code, "stopped before the first step") from None

    def _go_on(self) -> bool:
        """Put back what the library does not; whether nothing is left to train."""
        checkpoint, saved = self.resume.checkpoint, self.resume.state
        assert checkpoint is not None and saved is not None
        reached = self.resume.library_state()
        self.say(f"resuming from {checkpoint.name} of {reached.max_steps}")
        if self.training.stream:
            block = reached.global_step * self.recipe.batch_size
            assert saved.stream is not None  # the recipe is the same one
            self.training.stream.go(block, saved.stream)
        self.held_out.put_back(saved.best, saved.worse)

        at_end = reached.global_step >= reached.max_steps or saved.finished
        if at_end or saved.pending_evaluation:
            self._load_from_checkpoint(str(checkpoint))
            self.state = reached
        if saved.pending_evaluation:  # a signal came before it; it may end the training
            self._evaluate(None, None)
            self._raise_if_stopped()
        if at_end or self.control.should_training_stop:
            self.metrics_log.go_on(self.resume.tokens, saved.ranks[0].seconds)
            return True
        return False

    def _raise_if_stopped(self) -> None:
        if self.stop_code:
            step = self.state.global_step
            raise Stopped(self.stop_code, f"stopped at step {step}, checkpoint written")

    def _kept_best(self) -> Best | None:
        """The best step so far, where the recipe keeps that one."""
        return self.held_out.best if self.recipe.evaluation.keep_best else None

    def _load_best(self) -> None:
        """Go back to the best weights, when the recipe keeps those and they are not the last."""
        best = self._kept_best()
        if best is None or best.step == self.state.global_step:
            return
        self._load_from_checkpoint(str(self.resume.best(best.step)))
        self.say(f"keeping the best: step {best.step}, held-out loss {best.loss:.4f}")

    # --- what a subclass of the library's trainer has to override ---

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Also count tokens, and keep the loss for the one look at it before the optimizer's step:
        a device that is asked nothing before has the next micro-batch to compute meanwhile.
        """
        self.metrics_log.count(inputs.pop("tokens"))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_loss = self._step_loss + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """The norm of the gradients. Raises UserError (4) where it or the loss is no number, and
        the optimizer sees none of it; nor does anybody what it did, under ZeRO.
        """
        norm = whole(super()._get_grad_norm(model, grad_norm))
        norm = torch.as_tensor(norm, device=self.args.device)
        loss = torch.as_tensor(self._step_loss, device=norm.device)
        self._step_loss = 0.0
        read: list[float] = torch.stack([loss.float(), norm.float()]).tolist()
        for quantity, value in zip(("loss", "gradient norm"), read, strict=True):
            if not math.isfinite(value):
                raise self._not_finite(quantity, value)
        self._last_loss = read[0]
        return read[1]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the library does it, with averages that are numbers by then."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].update(as_numbers(self._metrics[mode]))
        super().log(logs, start_time)

    def _not_finite(self, quantity: str, value: Any) -> UserError:
        step = self.state.global_step + 1
        # DeepSpeed's engine steps in the backward pass
        when = "stopped" if self.hardware.zero else "stopped before the optimizer step"
        return UserError(
            f"step {step}: the {quantity} is {float(value)}; {when}",
            "lower optim.learning_rate, or set optim.precision: fp32; nothing was published, "
            "checkpoints are kept",
            NUMERIC,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self.order

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """llmpipe's schedule, of which no step has a rate of 0."""
        if self.lr_scheduler is None:
            say_if_peak_is_missed(self.recipe, num_training_steps, self.say)
            optimizer = optimizer or self.optimizer
            self.lr_scheduler = make_scheduler(self.recipe, optimizer, num_training_steps)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            refuse_another_schedule(self.lr_scheduler, checkpoint)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """What the stage measures on the held-out rows, instead of the library's mean of means.

        Raises Interrupted when a signal has asked to stop, and UserError (4) on NaN or Inf.
        """
        with _evaluation_mode(self.model):
            metrics = self.held_out.metrics()
            if "eval_loss" not in metrics:
                problem = "the held-out rows teach nothing: there is no token or pair to measure"
                raise UserError(problem, "give others in data.eval", NUMERIC)
            if not math.isfinite(metrics["eval_loss"]):
                raise self._not_finite("held-out loss", metrics["eval_loss"])
            # in this mode still: TRL's trainers keep their averages of the training then
            self.log(dict(metrics))
        self.control.should_evaluate = False
        return metrics

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate inside the loop and note the best step.

        A signal in the middle leaves the evaluation for the resumed run.
        """
        try:
            metrics: dict[str, float] = super()._evaluate(
                trial, ignore_keys_for_eval, skip_scheduler
            )
        except Interrupted:
            self.held_out.pending = True
            self.control.should_save = True
            self.control.should_training_stop = True
            return {"eval_loss": math.inf}
        step = self.state.global_step
        if self.held_out.note(metrics["eval_loss"], step):
            keep_best = self.recipe.evaluation.keep_best
            self.control.should_save = self.control.should_save or keep_best
        elif self._out_of_patience():
            worse = self.held_out.worse
            self.say(f"step {step}: no better for {worse} evaluations; stopping early")
            self.control.should_save = True
            self.control.should_training_stop = True
        return metrics

    def _out_of_patience(self) -> bool:
        patience = self.recipe.evaluation.patience
        early = self.state.global_step < self.state.max_steps
        return early and patience is not None and self.held_out.worse >= patience

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The library's own checkpoint, published whole."""
        state = self.gather_state()
        self.metrics_log.note(f"saving step {self.state.global_step}")
        step, last = self.state.global_step, self.control.should_training_stop
        first = self.world.is_first
        content = self.resume.content(state, self._kept_best()) if first else None
        below = f"checkpoint-{step}"
        with self.saving.checkpoint(step, content, below=below, at_once=last):
            super()._save_checkpoint(model, trial)
        if first:
            release_memory()
        self.show_step()

    def _get_output_dir(self, trial: Any) -> str:
        """Where a checkpoint goes."""
        return str(self.resume.staging(self.state.global_step))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card in a checkpoint."""

    # --- what happens at the end of a step ---

    def gather_state(self) -> State:
        """What the library's checkpoint lacks, from all processes."""
        counts = resume.counted(self, self.metrics_log.tokens, self.metrics_log.seconds)
        step, stream = self.state.global_step, self.training.stream
        if stream and stream.rejected and stream.rejected.exists():
            fsync(stream.rejected)  # the position knows its size
        return State(
            ranks=self.world.gather(counts),
            metrics_bytes=self.metrics_log.size(),
            best=self.held_out.best,
            worse=self.held_out.worse,
            pending_evaluation=self.held_out.pending,
            stream=stream.position(step * self.recipe.batch_size) if stream else None,
            finished=self.control.should_training_stop and not self.stop_code,
        )

    def show_step(self) -> None:
        """Let a terminal see that a step is done."""
        if not self.metrics_log.is_live:
            return
        rate = float(self._get_learning_rate())
        self.metrics_log.at(self.state.global_step, self._last_loss, rate)

    def stop_asked(self) -> bool:
        """Whether any process was told to stop; all processes get the same answer. Whoever asks
        is between two steps, or two batches of an evaluation, and so are the others.
        """
        self.saving.poll()
        code = self.world.stop_code(self.signals)
        self.stop_code = code or self.stop_code
        return bool(code)


def _trained_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}


def _put_back(weights: dict[str, torch.Tensor], model: Any) -> None:
    """TRL rounds a QLoRA adapter to bf16; master weights stay fp32."""
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data = weights[name].to(parameter.device)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Loop(TrainerCallback):
    """Decides at the end of each step what follows it: log, evaluate, save, stop."""

    def __init__(self, trainer: Durable):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The library has restored its own state; put the rest back."""
        trainer = self.trainer
        context = trainer.training.preparation.max_length
        for line in without_effect(trainer.recipe.evaluation, state.max_steps):
            trainer.say(line)
        trainer.metrics_log.begin(state.global_step, state.max_steps, trainer.model, context)
        if trainer.resumes:
            counts = trainer.resume.rank_state
            resume.put_back(trainer, counts)
            trainer.metrics_log.go_on(trainer.resume.tokens, counts.seconds)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.order.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.show_step()
        if trainer.hardware.compiles and (count := left_as_written()) > trainer.left_as_written:
            trainer.left_as_written = count
            trainer.say(
                f"compile: {count} functions of its layers are computed as they are written"
            )
        last = step >= state.max_steps
        every = trainer.recipe.evaluation.every
        due = last or bool(every and step % every == 0)
        control.should_evaluate = trainer.eval_dataset is not None and due
        control.should_save = last or step % trainer.recipe.checkpoint.every == 0
        control.should_log = control.should_log or last
        if trainer.stop_asked():
            trainer.held_out.pending = control.should_evaluate
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "train_runtime" not in logs:  # the library's summary at the end
            self.trainer.metrics_log.write(state.global_step, logs)
