"""A reward model that is an adapter on the policy's own base: no second model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import reading
from llmpipe.models.adapters import WEIGHTS
from llmpipe.models.pretrained import rows_of
from llmpipe.parallel.parts import within
from llmpipe.recipe.reinforcement import RLRecipe, Scored
from llmpipe.rl.actors import Actors
from llmpipe.run.job import Job


@dataclass(frozen=True)
class SharedRanker:
    """Called as AutoModelForSequenceClassification is."""

    actors: Actors
    adapter: str
    score: Tensor
    """Weight of the head, [1, width]."""
    pad_token: int

    @property
    def config(self) -> Any:
        return self.actors.causal.config

    @property
    def device(self) -> torch.device:
        return self.score.device

    def get_input_embeddings(self) -> Any:
        return self.actors.causal.get_input_embeddings()

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        """Scores [texts, 1] of texts that are padded on the right, as `logits`."""
        model = self.actors.causal
        asked = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        with self.actors.padded(), self.actors.using(self.adapter):
            out = within(model, lambda: model.base_model(**asked))
        hidden = out.last_hidden_state
        # as transformers reads it, where pad ends turns as well
        places = torch.arange(input_ids.shape[1], device=hidden.device)
        last = ((input_ids != self.pad_token) * places).argmax(1)
        hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return SimpleNamespace(logits=linear(hidden.to(self.score.dtype), self.score))


def shared_ranker(
    actors: Actors, job: Job[Scored], at: str, tokenizer: Tokenizer
) -> SharedRanker | None:
    """The reward model that the recipe has `at`, on the policy's base; None where it needs a model
    of its own. `tokenizer`: the reward model's."""
    from peft import PeftConfig, set_peft_model_state_dict

    folder = job.models[at]
    if not _shares_base(actors, job, at, rows_of(tokenizer)):
        return None
    with reading(folder / "adapter_config.json", "a configuration of PEFT"):
        config = PeftConfig.from_pretrained(str(folder))
    if {*config.modules_to_save} - {"classifier", "score"} or config.trainable_token_indices:
        return None
    config.modules_to_save = None
    config.task_type = "CAUSAL_LM"
    config.lora_dropout = 0.0
    adapter = at.replace(".", "-")
    policy = actors.cast.published
    policy.add_adapter(adapter, config)
    with reading(folder / WEIGHTS, "safetensors"):
        tensors = load_file(folder / WEIGHTS)
    score = tensors.pop(next(name for name in tensors if name.endswith("score.weight")))
    unexpected = set_peft_model_state_dict(policy, tensors, adapter_name=adapter).unexpected_keys
    if unexpected:
        raise UserError(f"{folder}: {unexpected[0]} is left over", code=INTEGRITY)
    for name, parameter in policy.named_parameters():
        if f".{adapter}." in name:
            parameter.requires_grad = False
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return SharedRanker(actors, adapter, score.to(actors.device), pad)


def _shares_base(actors: Actors, job: Job[Scored], at: str, vocabulary: int) -> bool:
    """Whether it is an adapter on the very weights under the policy's adapter, which are as they
    were published and know all its tokens."""
    base = job.bases.get(at)
    quantized = isinstance(job.recipe, RLRecipe) and job.recipe.quantization
    if base is None or not actors.adapted or quantized:
        return False
    rows: int = actors.causal.get_input_embeddings().weight.shape[0]
    return base.resolve() == job.weights.resolve() and vocabulary <= rows
