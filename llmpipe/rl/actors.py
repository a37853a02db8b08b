"""Policy, critic and reference, as far as there are any, each weight in memory once.

    all weights   policy, a frozen copy of the parent, and a critic: a model with a value head, or a
                  head on the policy
    adapter       one frozen base: the policy is its adapter `default`, the reference the base alone
                  or the parent's adapter, kept as `reference`, and the critic an adapter `critic`
                  of its own with a value head; a reward model that is an adapter on the same base
                  is one more

Either way each of the three is a `Role`, and what is computed with it is written once. Texts lie
end to end (`packing`), and logits exist for a tile of tokens at a time (`head`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmpipe import upstream
from llmpipe.kernels.log_probs import head_of
from llmpipe.parallel.parts import device_of, within
from llmpipe.rl.head import log_probs
from llmpipe.rl.packing import Packed

POLICY = "default"  # PEFT's name of the adapter that is learned and published
CRITIC = "critic"
REFERENCE = "reference"


@dataclass(frozen=True)
class Role:
    """What plays a part: a model, and the adapter that is on in it."""

    model: Any
    """As transformers knows it."""
    adapter: str | None = None
    """None: none of them, or there are none."""


@dataclass(frozen=True)
class Cast:
    """Who plays which part."""

    published: Any
    """The policy as it is published: a model, or PEFT's wrapper of one."""
    policy: Role
    critic: Role | None
    """None: answers are judged without one."""
    reference: Role | None
    """None: nothing holds the policy to its parent."""
    value: nn.Linear | None
    """The value head: what the critic makes values of."""

    @property
    def shares_trunk(self) -> bool:
        """Whether policy and critic are one body, so that values come from the policy's pass."""
        return self.critic == self.policy

    @property
    def learning(self) -> list[Role]:
        """Who learns."""
        return [self.policy, *([self.critic] if self.critic else [])]


@dataclass(frozen=True)
class Distribution:
    """What the policy's log-probabilities are of."""

    temperature: float
    learns_entropy: bool
    """Whether gradients flow through the entropy."""


class Actors:
    """What learns, and what it is held to. Log-probabilities and values are float32 [targets]."""

    def __init__(self, cast: Cast, distribution: Distribution):
        self.cast = cast
        self.distribution = distribution
        self.recomputes = False  # whether layers do, their activations, in the backward pass
        self.adapted = cast.published is not cast.policy.model
        # the names are those of a checkpoint's tensors
        parts = {"policy": cast.published}
        for name, role in (("critic", cast.critic), ("reference", cast.reference)):
            if role and role.model is not cast.policy.model:
                parts[name] = role.model
        if cast.value:
            parts["value"] = cast.value
        self.modules = nn.ModuleDict(parts)

    @property
    def causal(self) -> Any:
        """The policy as transformers knows it; its layers hold the adapters."""
        return self.cast.policy.model

    @property
    def device(self) -> torch.device:
        return device_of(self.causal)

    # --- what is computed ---

    def policy(self, batch: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
        """The policy's log-probabilities, its entropies in nats, and the values where they come
        from the same pass."""
        return within(self.causal, lambda: self._policy(batch))

    def _policy(self, batch: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden = self._hidden(self.causal, batch)
        log_p, entropy = log_probs(
            hidden,
            head_of(self.causal),
            batch.targets,
            self.distribution.temperature,
            batch.allowed,
            self.distribution.learns_entropy,
        )
        return log_p, entropy, self._values(hidden) if self.cast.shares_trunk else None

    def policy_of_text(self, batch: Packed) -> Tensor:
        """The policy's log-probabilities of text that it did not draw: temperature 1, and every
        token of the vocabulary."""
        return within(self.causal, lambda: self._of_text(self.causal, batch, 1.0))

    def values(self, batch: Packed) -> Tensor:
        """The critic's values V(s_t), s_t the text before a target; to be called in `as_critic`."""
        assert self.cast.critic
        model = self.cast.critic.model
        return within(model, lambda: self._values(self._hidden(model, batch)))

    def reference(self, batch: Packed) -> Tensor:
        """The reference's log-probabilities, over the whole vocabulary: what no token was drawn
        from counts as well."""
        role, temperature = self.cast.reference, self.distribution.temperature
        assert role
        with torch.no_grad(), self.using(role.adapter):
            return within(role.model, lambda: self._of_text(role.model, batch, temperature))

    def _of_text(self, model: Any, batch: Packed, temperature: float) -> Tensor:
        """Log-probabilities over the whole vocabulary."""
        hidden = self._hidden(model, batch)
        return log_probs(hidden, head_of(model), batch.targets, temperature)[0]

    def _hidden(self, model: Any, batch: Packed) -> Tensor:
        """States that the targets are predicted from, [targets, width]."""
        body = model.base_model
        ends = _ends(batch) if _takes_ends(body) else {}
        out = body(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **ends)
        return out.last_hidden_state[0].index_select(0, batch.predictors)

    def _values(self, hidden: Tensor) -> Tensor:
        assert self.cast.value
        with torch.autocast(hidden.device.type, enabled=False):
            return self.cast.value(hidden.float()).squeeze(-1)

    # --- what it is computed in ---

    def as_critic(self) -> AbstractContextManager[None]:
        """What `values`, and the backward pass of what it returns, have to run in."""
        assert self.cast.critic
        return self.using(self.cast.critic.adapter)

    def using(self, adapter: str | None) -> AbstractContextManager[None]:
        """Compute with one of the adapters, or with none. PEFT's own switch also decides what
        learns; this does not."""
        if not self.adapted:
            return nullcontext()
        return upstream.using_adapter(self.cast.published, adapter, otherwise=POLICY)

    @contextmanager
    def padded(self) -> Iterator[None]:
        """Compute padded batches, with a cache or without: responses are drawn so, and reward
        models that share the base read so."""
        self.recompute(False)
        try:
            with upstream.generating(self.causal):
                yield
        finally:
            self.recompute(self.recomputes)

    def compute_again(self, kind: str) -> None:
        """Let the layers of what learns compute activations again, `selective` or `full`."""
        learning = {id(role.model): role.model for role in self.cast.learning}
        for model in learning.values():
            upstream.checkpoint_layers(model, kind)
        self.recomputes = True
        self.recompute(True)

    def recompute(self, on: bool) -> None:
        """Whether layers compute their activations again in the backward pass."""
        upstream.recompute(self.modules, on)

    # --- what is learned ---

    def learned(self) -> dict[str, nn.Parameter]:
        """What learns, by its name in a checkpoint."""
        named = self.modules.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def leave_only_policy(self) -> None:
        """Leave the policy as it is published, and free the rest."""
        if self.adapted:
            others = [name for name in self.cast.published.peft_config if name != POLICY]
            for name in others:
                self.cast.published.delete_adapter(name)
        self.modules = nn.ModuleDict({"policy": self.cast.published})
        self.cast = Cast(self.cast.published, self.cast.policy, None, None, None)


def _takes_ends(body: nn.Module) -> bool:
    """Whether a model's body hands on what attention alone knows."""
    parameters = inspect.signature(body.forward).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)


def _ends(batch: Packed) -> dict[str, Any]:
    """Where texts end, in transformers' words."""
    return {
        "cu_seq_lens_q": batch.ends,
        "cu_seq_lens_k": batch.ends,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }
