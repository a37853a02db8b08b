"""A double for the package vllm: what llmpipe asks of it, computed by transformers on a CPU.

Weights are random until some are pushed, and gone when it has slept. Each request is answered by
itself, from a generator of its own seed.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    temperature: float
    seed: int
    max_tokens: int
    logprobs: int
    stop_token_ids: list
    ignore_eos: bool
    detokenize: bool


OPTIONS = set(
    "model load_format skip_tokenizer_init generation_config logprobs_mode dtype seed "
    "max_model_len max_num_seqs enable_prefix_caching enable_sleep_mode trust_remote_code".split()
)
MEMORY = {"kv_cache_memory_bytes", "gpu_memory_utilization"}  # where there is a GPU


class LLM:
    made: list = []

    def __init__(self, **options):
        assert options.keys() == OPTIONS | (MEMORY if torch.cuda.is_available() else set())
        self.options = asked = SimpleNamespace(**options)
        assert asked.load_format == "dummy" and asked.skip_tokenizer_init
        assert asked.logprobs_mode == "processed_logprobs"
        assert not asked.trust_remote_code and not asked.enable_prefix_caching
        torch.manual_seed(asked.seed)  # of the whole process, as vLLM does it
        config = AutoConfig.from_pretrained(asked.model)
        assert config.architectures == ["LlamaForCausalLM"]
        self.model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, asked.dtype)
        ).eval()
        self.asleep: set[str] = set()
        self.pushed: dict[str, int] = {}
        self.answered: list[int] = []
        self.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights" and kwargs.keys() == {"weights_iterator"}
        self.reload_weights(kwargs["weights_iterator"])

    def reload_weights(self, weights):
        assert "weights" not in self.asleep
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            with torch.no_grad():
                own[name].copy_(weight)
            self.pushed[name] = self.pushed.get(name, 0) + 1

    def sleep(self, level):
        assert self.options.enable_sleep_mode and level == 2 and not self.asleep
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(torch.nan)

    def wake_up(self, tags):
        assert set(tags) <= self.asleep
        self.asleep -= set(tags)

    def generate(self, prompts, sampling_params, use_tqdm):
        assert not self.asleep and not use_tqdm
        self.answered.append(len(prompts))
        return [
            SimpleNamespace(outputs=[self.answer(prompt["prompt_token_ids"], how)])
            for prompt, how in zip(prompts, sampling_params, strict=True)
        ]

    @torch.inference_mode()
    def answer(self, ids, how):
        luck = torch.Generator().manual_seed(how.seed)
        drawn, log_probs = [], []
        while len(drawn) < how.max_tokens and (drawn[-1:] or [-1])[0] not in how.stop_token_ids:
            assert len(ids) + len(drawn) < self.options.max_model_len
            logits = self.model(torch.tensor([ids + drawn])).logits[0, -1].float()
            processed = (logits / how.temperature).log_softmax(-1)
            noise = torch.empty_like(processed).exponential_(generator=luck)
            token = int((processed.exp() / noise).argmax())
            drawn.append(token)
            said = self.said(logits, processed)[token]
            log_probs.append({token: SimpleNamespace(logprob=float(said), rank=1)})
        reason = "stop" if drawn[-1] in how.stop_token_ids else "length"
        return SimpleNamespace(token_ids=drawn, logprobs=log_probs, finish_reason=reason)

    def said(self, logits, processed):
        return processed


class Deaf(LLM):
    """Takes the weights of one push, and goes on with them."""

    def reload_weights(self, weights):
        if not self.pushed:
            super().reload_weights(weights)

    def sleep(self, level):
        self.asleep = {"weights", "kv_cache"}


class Raw(LLM):
    """Says how likely a token was before the temperature."""

    def said(self, logits, processed):
        return logits.log_softmax(-1)


class Unwilling(LLM):
    def __init__(self, **options):
        raise ValueError("Model architectures ['LlamaForCausalLM'] are not supported for now")


def module(kind=LLM):
    """The package, with this class for an engine."""
    made = ModuleType("vllm")
    made.__spec__ = ModuleSpec("vllm", None)
    made.LLM, made.SamplingParams = kind, SamplingParams
    return made


def installed(monkeypatch, kind=LLM):
    """Let `import vllm` find the double; the engines that are made."""
    monkeypatch.setitem(sys.modules, "vllm", module(kind))
    monkeypatch.setattr(LLM, "made", [])
    return LLM.made
