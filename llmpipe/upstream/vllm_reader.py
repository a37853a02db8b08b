"""vLLM as a reader, in the Python that has it, which may be another one than llmpipe's.

Run by its path: nothing of llmpipe is imported here, nor of what it needs. Lines of JSON come by
standard input, and each is answered by one on standard output; all that libraries print goes to
standard error. The first line says what is read (`_Engine`), those behind it what is asked:

    {"questions": [...], "adapted": true}   what it makes of questions, and of their continuations
    {"stops": [2, 7]}                       which of these tokens end an answer
    {"ids": [...], "file": "x.safetensors"} its logits behind each token of a sequence
    {"applied": true}                       how many numbers of the adapter are in its layers

A line that cannot be done is answered by {"error": "..."}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Of adapters, that vLLM makes room for."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process, where its logits are seen
    "VLLM_NO_USAGE_STATS": "1",  # nobody is told
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CACHE_ON_CPU = "VLLM_CPU_KVCACHE_SPACE"  # GB; unless told, it takes much of the machine

NEAR = 1e-3
"""Nats that logits which were seen may be from what vLLM itself says of its tokens."""


class _Engine:
    """vLLM with a model in it, and an adapter beside it."""

    def __init__(self, order: dict[str, Any]):
        """`order`: folder of a `model`, of an `adapter` or None, of the `tokenizer`; the `dtype`,
        the `tokens` that a row has at most."""
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        adapter, options = order["adapter"], {}
        self.adapter = LoRARequest("adapter", 1, adapter) if adapter else None
        if adapter:
            rank = room_for(adapter)
            options = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        self.llm = LLM(
            model=order["model"],
            tokenizer=order["tokenizer"],
            dtype=order["dtype"],
            max_model_len=order["tokens"],
            max_num_batched_tokens=max(order["tokens"], 2048),  # a row is read at once
            max_num_seqs=16,
            enable_prefix_caching=False,
            enforce_eager=True,
            generation_config="auto",
            logprobs_mode="raw_logprobs",
            trust_remote_code=False,
            seed=0,
            **options,
        )
        self.seen: list[Any] = []
        # an adapter that vLLM does not take, or heads without a kernel, it refuses when computing
        self._read([0, 0], {"lora_request": self.adapter, "use_tqdm": False})
        self.llm.apply_model(self._watch)

    def _watch(self, model: Any) -> None:
        """Keep the logits that the model computes from here on."""
        compute = model.compute_logits

        def watched(*given: Any, **more: Any) -> Any:
            logits = compute(*given, **more)
            self.seen.append(logits)
            return logits

        model.compute_logits = watched

    # --- what is asked ---

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        if "questions" in asked:
            adapter = self.adapter if asked["adapted"] else None
            return {"said": [self._said(question, adapter) for question in asked["questions"]]}
        if "stops" in asked:
            return {"stops": [token for token in asked["stops"] if self._ends(token)]}
        if "ids" in asked:
            return self._predict(asked["ids"], asked["file"])
        return {"applied": self._applied()}

    def _said(self, question: dict[str, Any], adapter: Any) -> dict[str, Any] | None:
        """What a question becomes, what is answered, how likely the continuation is.

        None where the template refuses it.
        """
        from vllm import SamplingParams

        self.seen.clear()
        most = question["answer_tokens"]
        greedily = SamplingParams(temperature=0, max_tokens=most, logprobs=2)
        terms: dict[str, Any] = {"lora_request": adapter, "use_tqdm": False}
        if question["text"] is not None:
            (output,) = self.llm.generate([question["text"]], greedily, **terms)
        else:
            try:
                (output,) = self.llm.chat(
                    question["messages"],
                    greedily,
                    tools=question["tools"],
                    chat_template_kwargs=question["kwargs"],
                    **terms,
                )
            except (ValueError, TypeError):  # what a template raises, vLLM gives as these
                return None
        tokens = list(output.prompt_token_ids)
        (answered,) = output.outputs
        return {
            "text": self.llm.get_tokenizer().decode(tokens),
            "tokens": tokens,
            "answer": list(answered.token_ids),
            "margins": [_margin(place) for place in answered.logprobs],
            "words": answered.text,
            "log_probs": self._log_probs(tokens, question["continuation"], terms),
        }

    def _log_probs(
        self, tokens: list[int], continuation: list[int], terms: dict[str, Any]
    ) -> list[float]:
        """Of a continuation's tokens, in nats."""
        if not continuation:
            return []
        said = self._read(tokens + continuation, terms)
        return said[len(tokens) - 1 :]

    def _read(self, ids: list[int], terms: dict[str, Any]) -> list[float]:
        """Log-probabilities of a row's tokens, but of the first, as vLLM itself says them."""
        from vllm import SamplingParams

        self.seen.clear()
        how = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], how, **terms)
        places = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        return [place[token].logprob for token, place in places]

    def _ends(self, token: int) -> bool:
        """Whether an answer ends with a token, seen by making it the only one there is."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=2, allowed_token_ids=[token])
        (output,) = self.llm.generate([{"prompt_token_ids": [token]}], how, use_tqdm=False)
        (answered,) = output.outputs
        return answered.finish_reason == "stop" and list(answered.token_ids) == [token]

    def _predict(self, ids: list[int], file: str) -> dict[str, Any]:
        """Write the logits behind each token, float32 [tokens, vocabulary].

        What vLLM hands out of them are lists of Python's numbers, 100 bytes for each of a
        vocabulary, so they are taken where the model has computed them, and held to what vLLM says
        of the tokens.
        """
        import torch
        from safetensors.torch import save_file

        said = torch.tensor(self._read(ids, {"lora_request": self.adapter, "use_tqdm": False}))
        last, *behind = (logits.float().cpu() for logits in self.seen)
        rows = torch.cat(behind)
        chosen = rows.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        if not (chosen - said).abs().max() <= NEAR:
            raise RuntimeError("its logits are not those that its log-probabilities are made of")
        save_file({"logits": torch.cat([rows, last])}, file)
        self.seen.clear()
        return {}

    def _applied(self) -> int:
        """Numbers of the adapter, those that are zero aside, in layers of the model.

        vLLM passes over what is for a layer that the model has not.
        """

        def count(model: Any) -> int:
            numbers = 0
            for module in model.modules():
                for name in ("lora_a_stacked", "lora_b_stacked"):
                    parts = getattr(module, name, ())
                    parts = parts if isinstance(parts, tuple | list) else (parts,)
                    # the first place is that of the one adapter that there is room for
                    numbers += sum(int(part[0].count_nonzero()) for part in parts)
            return numbers

        (applied,) = self.llm.apply_model(count)
        return int(applied)


def room_for(adapter: str) -> int:
    """The rank that vLLM has to be told for an adapter."""
    with open(os.path.join(adapter, "adapter_config.json"), encoding="utf-8") as file:
        config = json.load(file)
    highest = max(config["r"], *config.get("rank_pattern", {}).values(), 1)
    return next((rank for rank in RANKS if rank >= highest), highest)  # which vLLM refuses


def _margin(place: dict[int, Any]) -> float:
    """By how many nats the likeliest token is likelier than the one that comes next."""
    first, second, *_ = sorted((one.logprob for one in place.values()), reverse=True)
    return float(first - second)


def main() -> None:
    """Answer lines until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engine: _Engine | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if engine is None:
                import vllm

                engine = _Engine(asked)
                answer: dict[str, Any] = {"name": f"vLLM {vllm.__version__}"}
            else:
                answer = engine.answer(asked)
        except Exception as error:  # whatever vLLM thinks of a model or a machine
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.path[0:1] = []  # the folder of this file, whose names are none of vLLM's
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault(CACHE_ON_CPU, "1")
    main()
