"""Tokens come from the distribution that is claimed, and end where they end."""

import math

import pytest
import torch

from llmpipe.models.drawing.draw import Sampling, draw


class Fixed(torch.nn.Module):
    """A `model` that says the same at every place."""

    def __init__(self, logits):
        super().__init__()
        from transformers import LlamaConfig

        self.logits, self.device, self.config = (
            logits,
            torch.device("cpu"),
            LlamaConfig(num_hidden_layers=1),
        )

    def forward(self, input_ids, past_key_values, **_):
        from types import SimpleNamespace

        one = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(one, one, 0)
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.3, 0.8, 0), (1.0, 1.0, 5), (0.9, 0.7, 6)],
)
def test_tokens_are_drawn_from_the_distribution_that_is_claimed(temperature, top_p, top_k):
    torch.manual_seed(2)
    logits = torch.randn(20)
    luck = torch.rand(4000, 5, generator=torch.Generator().manual_seed(1))
    how = Sampling(5, temperature, top_p, top_k)
    drawn = draw(Fixed(logits), [[1]] * 4000, luck, how, [99], 0)
    probabilities = (logits / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or 20]
    shares = probabilities[kept] / probabilities[kept].sum()
    kept = kept[: int((shares.cumsum(0) - shares < top_p).sum())]
    expected = torch.zeros(20)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = torch.zeros(20)
    for episode in drawn:
        for i, (token, log_p) in enumerate(
            zip(episode.response, episode.log_probs.tolist(), strict=True)
        ):
            counts[token] += 1
            assert log_p == pytest.approx(math.log(expected[token]), abs=1e-5)
            if episode.allowed:
                assert sorted(episode.allowed[i].tolist()) == sorted(kept.tolist())
    assert float((counts / counts.sum() - expected).abs().max()) < 0.01


def test_an_answer_ends_with_an_end_token_and_costs_nothing_more():
    logits = torch.zeros(4)
    model, sizes = Fixed(logits), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    luck = torch.rand(64, 30, generator=torch.Generator().manual_seed(3))
    drawn = draw(model, [[1, 2]] * 64, luck, Sampling(30, temperature=1.0), [3], 0)
    for episode in drawn:
        assert episode.ended == (episode.response[-1] == 3) and 3 not in episode.response[:-1]
        assert len(episode.response) == len(episode.log_probs) <= 30
    needed = sum(len(episode.response) for episode in drawn)
    assert sum(sizes) <= needed * 8 / 7 + 64, "finished answers ride along only while they are few"


def test_a_prompt_that_is_asked_several_times_is_read_once():
    """And answered as if each were asked alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=30, num_hidden_layers=2, initializer_range=0.5, **shape)
    model, read = LlamaForCausalLM(config).eval(), []
    prompts = [[3, 4, 5], [6], [3, 4, 5], [7, 8], [6], [3, 4, 5]]
    luck = torch.rand(len(prompts), 9, generator=torch.Generator().manual_seed(3))
    how = Sampling(9, temperature=1.0)
    alone = [
        draw(model, [prompt], luck[i, None], how, [99], 0)[0] for i, prompt in enumerate(prompts)
    ]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    together = draw(model, prompts, luck, how, [99], 0)
    assert read[0] == (3, 3) and read[1] == (6, 1)
    assert len({tuple(episode.response) for episode in together}) == len(prompts)
    for one, other in zip(together, alone, strict=True):
        assert (one.prompt, one.response, one.ended) == (other.prompt, other.response, other.ended)
        assert (one.log_probs - other.log_probs).abs().max() < 1e-5
