"""What the models say of a rollout before they learn from it, and what is learned from each
episode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmpipe.models.hardware import Hardware
from llmpipe.rl.actors import Actors
from llmpipe.rl.packing import pack_episodes
from llmpipe.rl.passes import PassSize
from llmpipe.rl.rollout import Episode


@dataclass(frozen=True)
class Experience:
    """An episode, and what is learned from it: float32 [tokens of the response] each."""

    episode: Episode
    old: Tensor
    """Log-probabilities as the training pass computes them, before it changes anything."""
    values: Tensor
    """V(s_t), before as well."""
    advantages: Tensor
    returns: Tensor


@dataclass(frozen=True)
class Measured:
    """A rollout as the models see it, on the CPU: float32 [episodes, tokens], 0 behind a
    response."""

    episodes: list[Episode]
    lengths: list[int]
    """Tokens of each response."""
    mask: Tensor
    """1 for a token of a response."""
    ended: Tensor
    """1 for an episode that ended, float32 [episodes]."""
    log_probs: Tensor
    """The policy's."""
    entropies: Tensor
    values: Tensor
    reference: Tensor
    """The reference's log-probabilities."""

    @property
    def rollout_difference(self) -> float:
        """Nats between drawing and training, summed over tokens: what padding and caches round."""
        return sum(
            float((self.log_probs[i, :length] - episode.log_probs).abs().sum())
            for i, (episode, length) in enumerate(zip(self.episodes, self.lengths, strict=True))
        )

    def experiences(self, advantages: Tensor, returns: Tensor) -> list[Experience]:
        """`advantages` and `returns` [episodes, tokens], an episode at a time."""
        return [
            Experience(
                episode,
                self.log_probs[i, :length],
                self.values[i, :length],
                advantages[i, :length],
                returns[i, :length],
            )
            for i, (episode, length) in enumerate(zip(self.episodes, self.lengths, strict=True))
        ]


def measure(
    actors: Actors, episodes: list[Episode], size: PassSize, hardware: Hardware
) -> Measured:
    """Log-probabilities, entropies and values of every response, in passes of `size`."""
    log_probs: dict[int, Tensor] = {}
    entropies: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    # one autocast for all passes: weights are cast to bf16 once
    with torch.no_grad(), hardware.autocast():
        for places in size.cut([episode.tokens for episode in episodes]):
            chosen = [episodes[i] for i in places]
            lengths = [len(episode.response) for episode in chosen]
            batch = pack_episodes(chosen, actors.device)
            log_p, entropy, value = actors.policy(batch)
            if value is None:
                with actors.as_critic():
                    value = actors.values(batch)
            log_probs |= _by_place(log_p, places, lengths)
            entropies |= _by_place(entropy, places, lengths)
            values |= _by_place(value, places, lengths)
            reference |= _by_place(actors.reference(batch), places, lengths)
    lengths = [len(episode.response) for episode in episodes]
    columns = torch.arange(max(lengths))[None]
    return Measured(
        episodes,
        lengths,
        mask=(columns < torch.tensor(lengths)[:, None]).float(),
        ended=torch.tensor([float(episode.ended) for episode in episodes]),
        log_probs=_padded(log_probs),
        entropies=_padded(entropies),
        values=_padded(values),
        reference=_padded(reference),
    )


def _by_place(packed: Tensor, places: Sequence[int], lengths: list[int]) -> dict[int, Tensor]:
    """What was computed for texts end to end, by the places of the episodes."""
    return dict(zip(places, packed.float().cpu().split(lengths), strict=True))


def _padded(by_place: dict[int, Tensor]) -> Tensor:
    return pad_sequence([by_place[i] for i in range(len(by_place))], batch_first=True)
