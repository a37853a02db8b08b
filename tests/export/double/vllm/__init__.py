"""A double for the package vllm: what llmpipe's reader asks of it, computed by transformers.

As vLLM does, it takes of an adapter what is for layers that it has, and passes over the rest in
silence; DoRA it refuses, and a prompt that leaves no room for an answer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

__version__ = "0.0, a double"


@dataclass
class SamplingParams:
    max_tokens: int
    temperature: float
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: list[int] | None = None


class _Linear(nn.Module):
    """A layer with room for an adapter."""

    def __init__(self, whole: nn.Linear):
        super().__init__()
        self.whole = whole
        self.lora_a_stacked = (torch.zeros(1, 1, 1, whole.in_features),)
        self.lora_b_stacked = (torch.zeros(1, 1, whole.out_features, 1),)
        self.is_on = False

    def forward(self, x):
        y = self.whole(x)
        if self.is_on:
            y = y + x @ self.lora_a_stacked[0][0, 0].T @ self.lora_b_stacked[0][0, 0].T
        return y


class _Model(nn.Module):
    def __init__(self, folder, dtype, enable_lora):
        super().__init__()
        kind = "auto" if dtype == "auto" else getattr(torch, dtype)
        self.whole = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
        self.layers = {}
        for name, module in list(self.whole.named_modules()) if enable_lora else ():
            if isinstance(module, nn.Linear) and name != "lm_head":
                self.layers[name] = _Linear(module)
                self.whole.set_submodule(name, self.layers[name])

    def hidden(self, ids):
        if self.whole.config.head_dim < 32:
            raise RuntimeError(f"Head size {self.whole.config.head_dim} is not supported.")
        return self.whole.model(torch.tensor([ids])).last_hidden_state[0]

    def compute_logits(self, hidden):
        return self.whole.lm_head(hidden)


class LLM:
    def __init__(self, *, model, tokenizer, dtype, enable_lora=False, max_model_len, **_):
        self.model = _Model(model, dtype, enable_lora)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.most = max_model_len
        ends = self.model.whole.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {*ends, self.tokenizer.eos_token_id} - {None}

    def get_tokenizer(self):
        return self.tokenizer

    def apply_model(self, work):
        return [work(self.model)]

    def chat(self, messages, sampling_params, *, tools, chat_template_kwargs, **terms):
        for message in messages:
            for call in message.get("tool_calls", ()):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        ids = self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, **chat_template_kwargs
        )["input_ids"]
        return self.generate([{"prompt_token_ids": ids}], sampling_params, **terms)

    @torch.no_grad()
    def generate(self, prompts, sampling_params, *, lora_request=None, use_tqdm):
        for layer in self.model.layers.values():
            layer.is_on = lora_request is not None
        if lora_request is not None:
            self._put(Path(lora_request.path))
        (prompt,) = prompts
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else None
        return [self._answer(ids or prompt["prompt_token_ids"], sampling_params)]

    def _put(self, folder):
        config = json.loads((folder / "adapter_config.json").read_text())
        if config["use_dora"]:
            raise ValueError("vLLM does not yet support DoRA.")
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, layer in self.model.layers.items():
            if f"base_model.model.{name}.lora_A.weight" in tensors:
                a, b = (tensors[f"base_model.model.{name}.lora_{one}.weight"] for one in "AB")
                layer.lora_a_stacked = (a[None, None],)
                layer.lora_b_stacked = (b[None, None] * config["lora_alpha"] / config["r"],)

    def _answer(self, ids, how):
        if len(ids) >= self.most:
            raise ValueError("the prompt leaves no room in the model's context")
        room = min(how.max_tokens, self.most - len(ids))
        answer, places, said = [], [], None
        while len(answer) < room and not (answer and answer[-1] in self.ends):
            hidden = self.model.hidden(ids + answer)
            log_probs = self.model.compute_logits(hidden[-1:]).float().log_softmax(-1)[0]
            if how.prompt_logprobs is not None:
                rows = self.model.compute_logits(hidden[:-1]).float().log_softmax(-1)
                said = [None] + [
                    {token: SimpleNamespace(logprob=float(row[token]))}
                    for token, row in zip(ids[1:], rows, strict=True)
                ]
            best = log_probs.topk(2)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            places.append({token: SimpleNamespace(logprob=value) for token, value in pairs})
            answer.append(how.allowed_token_ids[0] if how.allowed_token_ids else int(best[1][0]))
        ended = answer[-1] in self.ends
        words = [token for token in answer if token not in self.ends]
        output = SimpleNamespace(
            token_ids=answer,
            logprobs=places,
            text=self.tokenizer.decode(words, skip_special_tokens=True),
            finish_reason="stop" if ended else "length",
        )
        return SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=said, outputs=[output])
