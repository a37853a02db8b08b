"""What the models say of a rollout before they learn from it, and what is learned from each
episode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmpipe.models.drawing.draw import Episode
from llmpipe.models.hardware import Hardware
from llmpipe.parallel.parts import looking
from llmpipe.parallel.world import World
from llmpipe.rl.actors import Actors
from llmpipe.rl.packing import Packed, Text, pack, sent, texts_of
from llmpipe.rl.passes import PassSize

COLUMNS = 5
"""Tensors of an experience."""


@dataclass(frozen=True)
class Experience:
    """An episode, and what is learned from it: float32 [tokens of the response] each, on the
    device."""

    episode: Episode
    text: Text
    old: Tensor
    """Log-probabilities as the training pass computes them, before it changes anything."""
    advantages: Tensor
    values: Tensor | None = None
    """V(s_t), before as well; where there is a critic."""
    returns: Tensor | None = None
    """What the critic should have said."""
    reference: Tensor | None = None
    """The reference's log-probabilities, where the loss holds the policy to it."""


@dataclass(frozen=True)
class Measured:
    """A rollout as the models see it, on the CPU: float32 [episodes, tokens], 0 behind a
    response."""

    episodes: list[Episode]
    texts: list[Text]
    """The same on the device."""
    lengths: list[int]
    """Tokens of each response."""
    mask: Tensor
    """1 for a token of a response."""
    ended: Tensor
    """1 for an episode that ended, float32 [episodes]."""
    log_probs: Tensor
    """The policy's."""
    entropies: Tensor
    values: Tensor | None
    """The critic's, where there is one."""
    reference: Tensor | None
    """The reference's log-probabilities, where there is one."""

    @property
    def rollout_difference(self) -> float:
        """Nats between drawing and training, summed over tokens: what padding and caches round."""
        return sum(
            float((self.log_probs[i, :length] - episode.log_probs).abs().sum())
            for i, (episode, length) in enumerate(zip(self.episodes, self.lengths, strict=True))
        )

    def experiences(self, **columns: Tensor) -> list[Experience]:
        """An episode at a time; `columns` as `Experience` calls them, [episodes, tokens] each."""
        names = ("old", *columns)
        table = torch.stack([self.log_probs, *columns.values()])
        on_device = sent(table, self.texts[0].ids.device)
        episodes = zip(self.episodes, self.texts, self.lengths, strict=True)
        return [
            Experience(episode, text, **dict(zip(names, on_device[:, i, :length], strict=True)))
            for i, (episode, text, length) in enumerate(episodes)
        ]


def measure(
    actors: Actors, episodes: list[Episode], size: PassSize, hardware: Hardware, world: World
) -> Measured:
    """What the models that there are say of every response, in passes of `size`.

    Collective where models are in parts: what a process says once more is thrown away.
    """
    texts = texts_of(episodes, actors.device)
    order: list[int] = []
    columns: list[Tensor] = []
    passes = size.cut([episode.tokens for episode in episodes])
    # one autocast for all passes: weights are cast to bf16 once
    with torch.no_grad(), looking(actors.modules), hardware.autocast():
        for places in world.evened(passes) if hardware.sharded else passes:
            batch = pack([texts[i] for i in places or passes[0]])
            said = _said(actors, batch)
            if places:
                columns.append(torch.stack([each.float() for each in said.values()], dim=1))
                order += places
    lengths = [len(episode.response) for episode in episodes]
    parts = torch.cat(columns).cpu().split([lengths[i] for i in order])
    by_place = dict(zip(order, parts, strict=True))
    rows = pad_sequence([by_place[i] for i in range(len(episodes))], batch_first=True)
    by_name = dict(zip(said, rows.permute(2, 0, 1).contiguous(), strict=True))
    return Measured(
        episodes,
        texts,
        lengths,
        mask=(torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]).float(),
        ended=torch.tensor([float(episode.ended) for episode in episodes]),
        log_probs=by_name["log_probs"],
        entropies=by_name["entropies"],
        values=by_name.get("values"),
        reference=by_name.get("reference"),
    )


def _said(actors: Actors, batch: Packed) -> dict[str, Tensor]:
    """What the models say of the targets, [targets] each, by the names that `Measured` has."""
    log_probs, entropies, values = actors.policy(batch)
    said = {"log_probs": log_probs, "entropies": entropies}
    if actors.cast.critic:
        if values is None:
            with actors.as_critic():
                values = actors.values(batch)
        said["values"] = values
    if actors.cast.reference:
        said["reference"] = actors.reference(batch)
    return said
