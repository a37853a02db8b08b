"""The token step of a decoder as the same work for every token, on tensors that stay in place.

Keys and values have a slot for every token from the start (transformers' static layers), and the
step's number, the slot and the positions are tensors that the step itself moves on. So it can be
recorded once and replayed (`replay`): the host looks every `UNREAD` tokens whether a response is
still going, and what is drawn behind an end token is thrown away.

A response is what `draw` gives with the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, get_layer_types_and_kwargs

from llmpipe.faults import of_memory
from llmpipe.models.drawing.draw import (
    UNREAD,
    Drawn,
    Episode,
    Sampling,
    allowed_ids,
    left_padded,
    pick,
)
from llmpipe.models.miniature import miniatures

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


# --- the step ---


class TokenStep:
    """The next token of every row, as work on tensors that stay where they are."""

    def __init__(
        self, model: Any, rows: int, slots: int, sampling: Sampling, end_tokens: list[int]
    ):
        """`rows` responses at a time, of `slots` tokens with their prompts."""
        windows = layer_windows(model)
        assert windows is not None  # it was asked before
        self.model = model
        self.sampling = sampling
        self.windows = dict(windows)
        self.cache = Cache(layers=[Slots(slots) for _ in windows])
        self.graph: torch.cuda.CUDAGraph | None = None
        """What `advance` does, once it is recorded."""
        device, tokens = model.device, sampling.max_new_tokens
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
        self._write_down(pick(out.logits[:, -1], numbers, self.sampling))

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
    most = step.sampling.max_new_tokens
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


def slots_differ(model: Any) -> float | None:
    """The greatest difference, in nats, between what a miniature of `model` says of tokens as they
    are drawn, and of the whole texts by a plain forward pass; None where none computes."""
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5], [8]]
    how = Sampling(6, temperature=1.0)
    numbers = torch.linspace(0.05, 0.95, 18, dtype=torch.float64).reshape(3, 6)
    device = model.device.type
    for small in miniatures(model, row=sys.maxsize):  # where windows are shorter than the texts
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                step = TokenStep(small, len(prompts), 32, how, [])
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
