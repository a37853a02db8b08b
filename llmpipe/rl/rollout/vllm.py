"""vLLM draws: a copy of the policy on the same GPU, in this process.

It is given the weights before each rollout, by vLLM's own `reload_weights`, and sleeps while the
policy learns: level 2, which keeps neither weights nor cache. After every push a probe, a few
prompts with fixed seeds, is answered, and what vLLM says of its tokens is held to what the policy
says of them: an engine that goes on with old weights, or tells of another distribution than it
draws from, would teach the policy silently wrong things.

Every request has a seed of its own, and the cache a size that follows from the recipe. How exactly
vLLM's kernels repeat themselves is vLLM's matter.
"""

from __future__ import annotations

import copy
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.faults import first_line, of_memory
from llmpipe.models.drawing.draw import Episode
from llmpipe.models.rng import isolated_rng
from llmpipe.rl.packing import pack_episodes
from llmpipe.rl.rollout.engine import Terms
from llmpipe.rl.rollout.weights import weights_of
from llmpipe.rl.seeds import Place, Use, number

SLEEPS = {"cuda"}  # devices whose memory vLLM can give back

PROBES = 4  # prompts
PROBE_TOKENS = 16  # of each answer
ROUNDING_FP32 = 1e-3
ROUNDING_BF16 = 0.05
"""Nats a token, on average, that two engines may differ by: several times what was seen."""
STILL = 1e-3
"""Nats a token that the policy may move by without a bit of the engine's answers moving."""

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in this process, where weights are handed
    "VLLM_NO_USAGE_STATS": "1",  # nobody is told
    "VLLM_LOGGING_LEVEL": "WARNING",
}

BLOCK = 16  # tokens that the cache is given out by
SPARE = 2 << 30  # bytes, for what vLLM computes in


class VLLM:
    """Draws with a copy of the policy, which is held to the policy after every push."""

    def __init__(self, terms: Terms, probe: list[list[int]], longest: int):
        """`probe`: prompts that both are asked; `longest`: tokens of any prompt.

        Raises UserError (2) where vLLM does not take the model.
        """
        self.terms = terms
        self.batch_size = sys.maxsize  # vLLM makes its own
        self.probe = probe
        self.pushes = 0
        self.before: tuple[list[list[int]], Tensor, Tensor] | None = None
        """What was said of the probe before the last push: the tokens, and log-probabilities by
        vLLM and by the policy."""
        os.environ.update(ENVIRONMENT)
        tokens = longest + terms.sampling.max_new_tokens
        with isolated_rng():  # it seeds them all
            self.llm = self._begun(tokens)
        self.asleep = False
        self._sleep()
        terms.say("answers: drawn by vLLM, which is given the weights before each rollout")

    def _begun(self, tokens: int) -> Any:
        """vLLM with a model of the policy's shape, for texts of so many tokens."""
        from vllm import LLM

        terms = self.terms
        config = copy.deepcopy(terms.actors.causal.config)
        config.architectures = [type(terms.actors.causal).__name__]
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            try:
                return LLM(
                    model=folder,
                    load_format="dummy",  # weights are pushed before anything is drawn
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # nothing but what is asked for
                    logprobs_mode="processed_logprobs",  # of the distribution that is drawn from
                    dtype="bfloat16" if terms.hardware.bf16 else "float32",
                    seed=terms.seed,
                    max_model_len=tokens,
                    max_num_seqs=terms.batch_size,
                    enable_prefix_caching=False,  # of weights that are gone
                    enable_sleep_mode=terms.hardware.device in SLEEPS,
                    trust_remote_code=False,
                    **self._memory(tokens),
                )
            except Exception as error:  # whatever vLLM thinks of a model or a machine
                if of_memory(error):
                    raise
                raise UserError(
                    f"rollout.engine: vllm does not take the model: {first_line(error)}",
                    "set rollout.engine: local",
                ) from error

    def _memory(self, tokens: int) -> dict[str, Any]:
        """A cache for as many texts as are drawn at a time, beside a policy that learns."""
        if not torch.cuda.is_available():
            return {}
        torch.cuda.empty_cache()
        model = self.terms.actors.causal
        text = model.config.get_text_config()
        size = 2 if self.terms.hardware.bf16 else 4
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        slots = self.terms.batch_size * (-(-tokens // BLOCK) + 1) * BLOCK
        cache = 2 * text.num_hidden_layers * heads * width * size * slots
        free, total = torch.cuda.mem_get_info()
        cache = min(cache, free // 2)
        needed = cache + size * model.num_parameters() + SPARE
        return {
            "kv_cache_memory_bytes": cache,
            "gpu_memory_utilization": min(needed / total, 0.95),
        }

    # --- a rollout ---

    @contextmanager
    def begun(self) -> Iterator[None]:
        self._wake("weights")
        # layer by layer: what vLLM made of the last ones for its kernels, it makes anew
        pushed = chain.from_iterable(weights_of(self.terms.actors))
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pushed})
        self.pushes += 1
        self._wake("kv_cache")
        self._refuse_stale()
        yield
        self._sleep()

    def draw(self, prompts: list[list[int]], places: list[Place]) -> list[Episode]:
        return self._answers(prompts, places, self.terms.sampling.max_new_tokens)

    def _answers(self, prompts: list[list[int]], places: list[Place], tokens: int) -> list[Episode]:
        """Responses of at most so many tokens."""
        from vllm import SamplingParams

        ends = self.terms.ends
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        how = [
            SamplingParams(
                temperature=self.terms.sampling.temperature,
                seed=number(self.terms.seed, *place.key) >> 1,  # of 63 bits
                max_tokens=tokens,
                logprobs=0,  # that of the drawn token alone
                stop_token_ids=ends,
                ignore_eos=True,  # of which it knows other ones
                detokenize=False,
            )
            for place in places
        ]
        outputs = self.llm.generate(asked, how, use_tqdm=False)
        pairs = zip(prompts, outputs, strict=True)
        return [_episode(prompt, output.outputs[0], ends) for prompt, output in pairs]

    def _wake(self, what: str) -> None:
        if self.asleep:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.llm.wake_up(tags=[what])
            self.asleep = what != "kv_cache"  # which is woken last

    def _sleep(self) -> None:
        if self.terms.hardware.device in SLEEPS:
            self.llm.sleep(level=2)
            self.asleep = True

    def release(self) -> None:
        self.llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- whether it is the policy that answers ---

    def _refuse_stale(self) -> None:
        """Raises UserError (3) where what vLLM says of the probe is not what the policy says."""
        places = [Place(Use.PROBE, 0, i) for i in range(len(self.probe))]
        most = min(PROBE_TOKENS, self.terms.sampling.max_new_tokens)
        episodes = self._answers(self.probe, places, most)
        tokens = [episode.response for episode in episodes]
        by_vllm = torch.cat([episode.log_probs for episode in episodes])
        by_policy = self._said_by_policy(episodes)
        before, self.before = self.before, (tokens, by_vllm, by_policy)
        rounding = ROUNDING_BF16 if self.terms.hardware.bf16 else ROUNDING_FP32
        difference = _apart(by_vllm, by_policy)
        if not difference <= rounding:  # nor where it is no number
            raise _stale(
                f"on a probe it is {difference:.2g} nats a token from the policy's "
                f"log-probabilities, and rounding is at most {rounding:g}",
                self.pushes,
            )
        if before and before[0] == tokens and torch.equal(before[1], by_vllm):
            moved = _apart(before[2], by_policy)
            if moved > STILL:
                raise _stale(
                    f"its answers to a probe are the last ones bit by bit, and the policy has "
                    f"moved by {moved:.2g} nats a token",
                    self.pushes,
                )

    @torch.no_grad()
    def _said_by_policy(self, episodes: list[Episode]) -> Tensor:
        """The policy's log-probabilities of responses, float32 [tokens of all], on the CPU."""
        actors = self.terms.actors
        with self.terms.hardware.autocast():
            said = actors.policy(pack_episodes(episodes, actors.device))[0]
        return said.float().cpu()


def _episode(prompt: list[int], drawn: Any, ends: list[int]) -> Episode:
    """A response as vLLM returns it: its last token is the one that ended it."""
    response = list(drawn.token_ids)
    ended = bool(response) and response[-1] in ends
    assert response and ended >= (drawn.finish_reason == "stop")
    said = zip(response, drawn.logprobs, strict=True)
    log_probs = torch.tensor([by_token[token].logprob for token, by_token in said])
    return Episode(prompt, response, ended, log_probs, None)


def _apart(some: Tensor, others: Tensor) -> float:
    return float((some - others).abs().mean())


def _stale(how: str, pushes: int) -> UserError:
    times = "the first push" if pushes == 1 else f"push {pushes}"
    return UserError(
        f"rollout.engine: vllm has stale weights, or is another model: after {times} {how}",
        "set rollout.engine: local; nothing was published, checkpoints are kept",
        INTEGRITY,
    )
