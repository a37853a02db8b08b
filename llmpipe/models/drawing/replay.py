"""Draw responses on a GPU with token steps that CUDA records once and replays.

A step of a decoder is a thousand small kernels, whose launches cost more than they compute; a
replay launches all of them at once. Whatever cannot be recorded is drawn by `draw`, which a
line says.

Shapes are a function of the batch alone: a resumed run computes what the straight one did.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from llmpipe.errors import Say
from llmpipe.faults import first_line
from llmpipe.models.drawing.draw import Episode, Sampling, draw
from llmpipe.models.drawing.rounded import RoundedWeights
from llmpipe.models.drawing.token_step import TokenStep, layer_windows, respond, slots_differ

DEVICES = {"cuda"}  # where launches cost more than they compute; a CPU computes the empty slots

LEAST_SLOTS = 64
LEAST_ROWS = 4
EAGER_STEPS = 2  # before a recording, which may not hold what libraries do when first called
KEPT_SHARE = 8  # what is kept between rollouts is at most one part in so many of the GPU's memory
AGREEMENT = 0.02  # nats, in a miniature: rounding is a thousandth, another architecture a tenth


class NoRecording(RuntimeError):
    """CUDA refused to record a step."""


def rounded_up(number: int, least: int) -> int:
    """The next of few sizes: a power of two times `least`, or half again as much."""
    size = least
    while size < number:
        if size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size


class Replay:
    """Draws responses with recorded steps, and as `draw` does where that cannot be.

    Weights are read where they lie, which no optimizer step changes: a recording stays right from
    update to update, and is kept with its cache where both are small beside the GPU's memory. Else
    memory is handed to the learner, and recording again costs a few steps.
    """

    def __init__(
        self, model: Any, sampling: Sampling, end_tokens: list[int], pad_token: int, say: Say
    ):
        self.model = model
        self.sampling = sampling
        self.end_tokens = end_tokens
        self.pad_token = pad_token
        self.say = say
        self.serves: bool | None = None
        """Whether steps are of this form; None: nobody has asked yet."""
        self.steps: dict[tuple[int, int], TokenStep] = {}
        """By rows and slots, the one that was used last at the end."""
        self.weights: RoundedWeights | None = None
        self._pool: Any = None
        self._stream: Any = None

    @contextmanager
    def rollout_begun(self) -> Iterator[None]:
        """What batches of one rollout have to be drawn in, under the caller's autocast."""
        if self.serves is None:
            self.serves = self._is_served()
        if not self.serves:
            yield
            return
        if self.weights is None:
            self.weights = RoundedWeights(self.model)
        else:
            self.weights.refresh()
        with self.weights.in_place(), _uncached_autocast(self.model.device.type):
            yield
        self._keep_what_is_small()

    def draw(self, prompts: list[list[int]], uniforms: Tensor) -> list[Episode]:
        """Responses to tokenized prompts, in their order; `uniforms` as `draw` has them."""
        if self.serves:
            try:
                with torch.no_grad():
                    return self._drawn(prompts, uniforms)
            except NoRecording as problem:
                self.say(f"answers are drawn step by step: CUDA records no step: {problem}")
                self.serves = False
                self.release()
        ends, pad = self.end_tokens, self.pad_token
        return draw(self.model, prompts, uniforms, self.sampling, ends, pad)

    def release(self) -> None:
        """Give the memory back."""
        self.steps.clear()
        self.weights = None
        self._pool = None
        torch.cuda.empty_cache()

    # --- a batch ---

    def _drawn(self, prompts: list[list[int]], uniforms: Tensor) -> list[Episode]:
        tokens = max(map(len, prompts)) + self.sampling.max_new_tokens
        step = self._step(len(prompts), tokens)
        step.begin(prompts, uniforms, self.pad_token)
        if step.graph is None and self._records:
            step.graph = self._recorded(step)
            # once more: every response is replayed, whenever its step was recorded
            step.begin(prompts, uniforms, self.pad_token)
        return respond(step, prompts, self.end_tokens)

    @property
    def _records(self) -> bool:
        """Whether steps are recorded, before which a few are drawn that need room."""
        long = self.sampling.max_new_tokens > EAGER_STEPS + 1
        return self.model.device.type == "cuda" and long

    def _step(self, rows: int, tokens: int) -> TokenStep:
        """The step for a batch of so many rows, of so many tokens with their prompts."""
        size = (rounded_up(rows, LEAST_ROWS), rounded_up(tokens, LEAST_SLOTS))
        step = self.steps.pop(size, None)
        if step is None:
            self._keep_what_is_small(keep_weights=True)
            step = TokenStep(self.model, *size, self.sampling, self.end_tokens)
        self.steps[size] = step
        return step

    def _recorded(self, step: TokenStep) -> torch.cuda.CUDAGraph:
        """Draw a few tokens and record how. Raises NoRecording where CUDA refuses."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at once
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # the recording's own, as CUDA asks for
            for _ in range(EAGER_STEPS - 1):
                step.advance()
            with _refusing_reads():
                step.advance()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        )
        try:
            # the outer one: a recording that fails leaves its stream the current one
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                step.advance()
        except RuntimeError as error:
            # PyTorch leaves the pool taken, and would free no memory any more
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise NoRecording(first_line(error)) from error
        return graph

    # --- what is kept ---

    def _keep_what_is_small(self, keep_weights: bool = False) -> None:
        """Drop the steps that were used longest ago, and the weights with the last of them, until
        what is left is small beside the device's memory."""
        most = room(self.model.device)
        if most is None or self.weights is None:
            return
        size = sum(step.bytes for step in self.steps.values()) + self.weights.bytes
        if size <= most:
            return
        while self.steps and size > most:
            size -= self.steps.pop(next(iter(self.steps))).bytes
        if not self.steps:
            self._pool = None  # what no recording holds may not be taken again
            self.weights = self.weights if keep_weights else None
        torch.cuda.empty_cache()

    # --- whom it serves ---

    def _is_served(self) -> bool:
        """Whether the model's architecture computes with slots what it says of texts alone; asked
        of a miniature, in fp32."""
        kind = self.model.config.model_type
        text = self.model.config.get_text_config(decoder=True)
        if layer_windows(self.model) is None:
            self.say(f"answers are drawn step by step: not every layer of {kind} is attention")
            return False
        if "dynamic" in str(getattr(text, "rope_parameters", None)):
            self.say("answers are drawn step by step: dynamic RoPE follows the longest text")
            return False
        difference = slots_differ(self.model)
        if difference is None or difference > AGREEMENT:
            words = f"with fixed slots {kind} says something else, or nothing"
            self.say(f"answers are drawn step by step: {words}")
            return False
        return True


def room(device: torch.device) -> int | None:
    """Bytes that may be kept on a GPU; None where nobody waits for them."""
    if device.type != "cuda":
        return None
    _, total = torch.cuda.mem_get_info(device)
    return total // KEPT_SHARE


@contextmanager
def _refusing_reads() -> Iterator[None]:
    """Raise NoRecording where the host waits for the device: a recording would fail there, and
    leave CUDA's generator and memory as if it still went on."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # of a prototype that does not see all of them
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            raise NoRecording(first_line(error)) from error
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _uncached_autocast(device: str) -> Iterator[None]:
    """Autocast as it is, keeping no rounded weights: a recording must not read what is freed."""
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype, torch.is_autocast_enabled(device), cache_enabled=False):
        yield
