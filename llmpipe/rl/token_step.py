"""Draw responses on a GPU with a token step that is recorded once and replayed.

A step of a decoder is a thousand small kernels, whose launches cost more than they compute. Here
every token is the same work on tensors that stay where they are: keys and values have a slot for
every token from the start (transformers' static layers), and the step's number, the slot and the
positions are tensors that the step itself moves on. So CUDA records one step as a graph and replays
it token after token; the host looks every `UNREAD` tokens whether a response is still going, and
what is drawn behind an end token is thrown away.

A response is what `rollout.draw` gives with the same numbers. Shapes are a function of the batch
alone: a resumed run computes what the straight one did.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticLayer, get_layer_types_and_kwargs

from llmpipe.errors import Say
from llmpipe.faults import first_line, of_memory
from llmpipe.models.miniature import miniatures
from llmpipe.recipe.reinforcement import Rollout
from llmpipe.rl.rollout import UNREAD, Drawn, Episode, allowed_ids, draw, left_padded, pick

DEVICES = {"cuda"}  # where launches cost more than they compute; a CPU computes the empty slots

LEAST_SLOTS = 64
LEAST_ROWS = 4
EAGER_STEPS = 2  # before a recording, which may not hold what libraries do when first called
KEPT_SHARE = 8  # what is kept between rollouts is at most one part in so many of the GPU's memory
AGREEMENT = 0.02  # nats, in a miniature: rounding is a thousandth, another architecture a tenth


class NoRecording(RuntimeError):
    """CUDA refused to record a step."""


# --- the cache ---


class Slots(StaticLayer):
    """Keys and values of one layer, a slot for every token from the start.

    They are kept in the type that attention computes in: autocast would round them at every step.
    transformers' own layer has one type for both, and under autocast keys and values may differ.
    """

    cumulative_length: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        device = key_states.device
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        self.dtype, self.device = key_states.dtype, device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.cumulative_length = self.cumulative_length.to(device)
        self.is_initialized = True

    def _room(self, states: Tensor) -> Tensor:
        rows, heads, _, width = states.shape
        return states.new_zeros(rows, heads, self.max_cache_len, width)

    def update(
        self, key_states: Tensor, value_states: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys, values = key_states.to(self.keys.dtype), value_states.to(self.values.dtype)
        return super().update(keys, values, *arguments, **options)


def layer_windows(model: Any) -> list[tuple[str, int | None]] | None:
    """What each layer attends to: the kind, as masks are named by it, and the width of its window;
    None where a layer is no attention of either kind."""
    kinds, options = get_layer_types_and_kwargs(model.config.get_text_config(decoder=True))
    if not kinds or not set(kinds) <= {"full_attention", "sliding_attention"}:
        return None
    pairs = zip(kinds, options, strict=True)
    windows = [(kind, option.get("sliding_window")) for kind, option in pairs]
    return windows if len(set(windows)) == len(set(kinds)) else None


def rounded_up(number: int, least: int) -> int:
    """The next of few sizes: a power of two times `least`, or half again as much."""
    size = least
    while size < number:
        if size * 3 // 2 >= number:
            return size * 3 // 2
        size *= 2
    return size


# --- the step ---


class TokenStep:
    """The next token of every row, as work on tensors that stay where they are."""

    def __init__(self, model: Any, rows: int, slots: int, rollout: Rollout, end_tokens: list[int]):
        """`rows` responses at a time, of `slots` tokens with their prompts."""
        windows = layer_windows(model)
        assert windows is not None  # it was asked before
        self.model = model
        self.rollout = rollout
        self.windows = dict(windows)
        self.cache = Cache(layers=[Slots(slots) for _ in windows])
        self.graph: torch.cuda.CUDAGraph | None = None
        """What `advance` does, once it is recorded."""
        device, tokens = model.device, rollout.max_new_tokens
        self.ends = torch.tensor(end_tokens, dtype=torch.long, device=device)
        self.columns = torch.arange(slots, device=device)
        self.uniforms = torch.zeros(rows, tokens, dtype=torch.float64, device=device)
        self.first = torch.zeros(rows, dtype=torch.long, device=device)
        """The slot of each prompt's first token."""
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        """Where the newest token goes."""
        self.number = torch.zeros(1, dtype=torch.long, device=device)
        """Which token of the responses is drawn next."""
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        """The newest tokens."""
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.going = torch.zeros(rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(rows, tokens, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(rows, tokens, device=device)
        self.allowed: Tensor | None = None
        """Of the last `UNREAD` tokens, bool [UNREAD, rows, vocabulary]."""

    @property
    def bytes(self) -> int:
        """What it holds on the device, without what a recording takes."""
        layers = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        held = (*layers, self.allowed, self.uniforms, self.tokens, self.log_probs)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def begin(self, prompts: Sequence[list[int]], uniforms: Tensor, pad_token: int) -> None:
        """Read the prompts, of which there may be fewer than rows, and draw the first tokens.

        `uniforms`: float64 [prompts, tokens of a response].
        """
        rows, count = len(self.going), len(prompts)
        padded = left_padded([*prompts, *[prompts[-1]] * (rows - count)], pad_token)
        width = padded.shape[1]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.cache.reset()
        self.uniforms.zero_()[:count] = uniforms.to(self.uniforms.device)
        self.first.fill_(width - len(prompts[-1]))[:count] = (width - lengths).to(self.first.device)
        self.going.zero_()[:count] = True
        self.slot.fill_(width)
        self.number.zero_()
        self.positions.copy_(width - self.first[:, None])
        slots = self.columns[:width]
        positions = (slots - self.first[:, None]).clamp(min=0)
        self._draw(padded.to(self.ids.device), positions, slots)

    def next(self) -> None:
        """Draw the next token of every row, by the recording where there is one."""
        if self.graph is None:
            self.advance()
        else:
            self.graph.replay()

    def advance(self) -> None:
        """Draw the next token of every row, one kernel after the other."""
        self._draw(self.ids, self.positions, self.slot)
        self.slot.add_(1)
        self.positions.add_(1)

    def _draw(self, ids: Tensor, positions: Tensor, slots: Tensor) -> None:
        out = self.model(
            input_ids=ids,
            attention_mask=self._masks(slots),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        numbers = self.uniforms.index_select(1, self.number)
        self._write_down(pick(out.logits[:, -1], numbers, self.rollout))

    def _write_down(self, drawn: Drawn) -> None:
        self.tokens.index_copy_(1, self.number, drawn.tokens[:, None])
        self.log_probs.index_copy_(1, self.number, drawn.log_probs[:, None])
        if drawn.allowed is not None:
            if self.allowed is None:  # before anything is recorded
                self.allowed = drawn.allowed.new_zeros(UNREAD, *drawn.allowed.shape)
            self.allowed.index_copy_(0, self.number % UNREAD, drawn.allowed[None])
        self.going.logical_and_((drawn.tokens[:, None] != self.ends).all(1))
        self.ids.copy_(drawn.tokens[:, None])
        self.number.add_(1)

    def _masks(self, slots: Tensor) -> Tensor | dict[str, Tensor]:
        """What the tokens in `slots` see: [rows, 1, slots, all slots], as attention takes it; by
        the kind of layer where there are several. transformers makes none where it is given one."""
        own = self.columns == slots[:, None]
        past = (self.columns <= slots[:, None]) & (self.columns >= self.first[:, None, None])
        masks = {}
        for kind, window in self.windows.items():
            near = past if window is None else past & (self.columns > slots[:, None] - window)
            masks[kind] = self._added((near | own)[:, None])  # a row that saw nothing would be NaN
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _added(self, mask: Tensor) -> Tensor:
        """A mask as it is added to products, in their type: each layer would make that of it."""
        on = mask.device.type
        dtype = self.model.get_input_embeddings().weight.dtype
        if torch.is_autocast_enabled(on):
            dtype = torch.get_autocast_dtype(on)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, -torch.inf
        )

    # --- what the host reads ---

    def is_going(self) -> bool:
        """Whether a response has not ended."""
        return bool(self.going.any())

    def read_allowed(self, count: int) -> list[list[Tensor]]:
        """Which ids the last `count` tokens of each row were drawn from, an entry for each token;
        nothing where all were. `count` is at most `UNREAD`, and no step lies before them there."""
        if self.allowed is None:
            return []
        rows = len(self.going)
        flat = allowed_ids(self.allowed[:count].flatten(0, 1))
        return [flat[i : i + rows] for i in range(0, len(flat), rows)]


def respond(step: TokenStep, prompts: list[list[int]], end_tokens: list[int]) -> list[Episode]:
    """Go on from the first tokens to the end of every response."""
    most = step.rollout.max_new_tokens
    allowed: list[list[Tensor]] = []
    drawn = unread = 1
    while drawn < most:
        if unread == UNREAD:
            allowed += step.read_allowed(unread)
            unread = 0
            if not step.is_going():
                break
        step.next()
        drawn += 1
        unread += 1
    allowed += step.read_allowed(unread)
    tokens = step.tokens[: len(prompts), :drawn].tolist()
    log_probs = step.log_probs[: len(prompts), :drawn].cpu()
    ends = set(end_tokens)
    episodes = []
    for row, prompt in enumerate(prompts):
        length = next((i + 1 for i, token in enumerate(tokens[row]) if token in ends), drawn)
        response = tokens[row][:length]
        ids = [each[row] for each in allowed[:length]] if allowed else None
        ended = response[-1] in ends
        episodes.append(Episode(prompt, response, ended, log_probs[row, :length].clone(), ids))
    return episodes


# --- weights ---


@dataclass
class _RoundedLayer:
    """A linear layer, and its parameters as products read them under autocast."""

    layer: nn.Linear
    rounded: dict[str, nn.Parameter]


class RoundedWeights:
    """The weights of products in autocast's type, made once for a rollout: the same numbers as
    autocast gives, which would round the fp32 weights anew for every token, reading and writing
    three times what a product reads."""

    def __init__(self, model: nn.Module):
        device = next(model.parameters()).device.type
        self.layers: list[_RoundedLayer] = []
        if not torch.is_autocast_enabled(device):
            return
        dtype = torch.get_autocast_dtype(device)
        apart = set()  # DoRA computes with the weights themselves, in fp32
        for module in model.modules():
            if getattr(module, "lora_variant", None):
                apart |= set(module.modules())
        for module in model.modules():
            if type(module) is nn.Linear and module not in apart:
                wide = _wide(module)
                rounded = {
                    name: nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    for name, weight in wide.items()
                }
                if rounded:
                    self.layers.append(_RoundedLayer(module, rounded))

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for each in self.layers for weight in each.rounded.values())

    @torch.no_grad()
    def refresh(self) -> None:
        """Round again what an optimizer has moved, in the same places."""
        for each in self.layers:
            for name, rounded in each.rounded.items():
                rounded.copy_(getattr(each.layer, name))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Compute with them; the parameters themselves are back afterwards. A weight that is an
        embedding as well stays what it is there."""
        kept = [dict(each.layer._parameters) for each in self.layers]
        try:
            for each in self.layers:
                each.layer._parameters.update(each.rounded)
            yield
        finally:
            for each, parameters in zip(self.layers, kept, strict=True):
                each.layer._parameters.update(parameters)


def _wide(layer: nn.Linear) -> dict[str, nn.Parameter]:
    """The parameters of a layer that are in fp32."""
    named = layer.named_parameters(recurse=False)
    return {name: weight for name, weight in named if weight.dtype == torch.float32}


# --- all of it ---


class Replay:
    """Draws responses with recorded steps, and as `draw` does where that cannot be.

    Weights are read where they lie, which no optimizer step changes: a recording stays right from
    update to update, and is kept with its cache where both are small beside the GPU's memory. Else
    memory is handed to the learner, and recording again costs a few steps.
    """

    def __init__(
        self, model: Any, rollout: Rollout, end_tokens: list[int], pad_token: int, say: Say
    ):
        self.model = model
        self.rollout = rollout
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
        """Responses to tokenized prompts, in their order; `uniforms` as `rollout.draw` has them."""
        if self.serves:
            try:
                with torch.no_grad():
                    return self._drawn(prompts, uniforms)
            except NoRecording as problem:
                self.say(f"answers are drawn step by step: CUDA records no step: {problem}")
                self.serves = False
                self.release()
        ends, pad = self.end_tokens, self.pad_token
        return draw(self.model, prompts, uniforms, self.rollout, ends, pad)

    def release(self) -> None:
        """Give the memory back."""
        self.steps.clear()
        self.weights = None
        self._pool = None
        torch.cuda.empty_cache()

    # --- a batch ---

    def _drawn(self, prompts: list[list[int]], uniforms: Tensor) -> list[Episode]:
        tokens = max(map(len, prompts)) + self.rollout.max_new_tokens
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
        long = self.rollout.max_new_tokens > EAGER_STEPS + 1
        return self.model.device.type == "cuda" and long

    def _step(self, rows: int, tokens: int) -> TokenStep:
        """The step for a batch of so many rows, of so many tokens with their prompts."""
        size = (rounded_up(rows, LEAST_ROWS), rounded_up(tokens, LEAST_SLOTS))
        step = self.steps.pop(size, None)
        if step is None:
            self._keep_what_is_small(keep_weights=True)
            step = TokenStep(self.model, *size, self.rollout, self.end_tokens)
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
            self.say(f"answers are drawn step by step: {kind} computes nothing with fixed slots")
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


def slots_differ(model: Any) -> float | None:
    """The greatest difference, in nats, between what a miniature of `model` says of tokens as they
    are drawn, and of the whole texts by a plain forward pass; None where none computes."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]
    how = Rollout(max_new_tokens=6)
    numbers = torch.linspace(0.05, 0.95, 18, dtype=torch.float64).reshape(3, 6)
    device = model.device.type
    for small in miniatures(model, row=sys.maxsize):  # where windows are shorter than the texts
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                step = TokenStep(small, len(prompts), LEAST_SLOTS, how, [])
                step.begin(prompts, numbers, 0)
                drawn = respond(step, prompts, [])
                differences = [_difference(small, episode) for episode in drawn]
        except Exception as error:  # whatever a class does with masks and caches it does not know
            if of_memory(error):
                raise
            continue
        return max(differences)
    return None


def _difference(model: Any, episode: Episode) -> float:
    ids = torch.tensor([episode.prompt + episode.response], device=model.device)
    logits = model(ids, use_cache=False).logits[0, len(episode.prompt) - 1 : -1].float()
    said = logits.log_softmax(-1).gather(1, ids[0, len(episode.prompt) :, None])[:, 0]
    return float((said.cpu() - episode.log_probs).abs().max())
