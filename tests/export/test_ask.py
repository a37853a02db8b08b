"""What a model says to the probe: the numbers of a plain forward pass, by whatever way they are
computed, and the same from memory and from disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmpipe.export import ask as asking
from llmpipe.export.ask import ask
from llmpipe.models.load import load_any
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.run.manifest import Manifest
from llmpipe.run.probe import ANSWER_TOKENS, QUESTIONS, compare
from tests import life
from tests.life import TINY

MODEL = TINY / "model"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL).eval()


@pytest.fixture(scope="module")
def probe(model, tokenizer):
    return ask(model, tokenizer, {})


def test_sixteen_questions_have_names_of_their_own(probe):
    assert len({question.name for question in QUESTIONS}) == 16 == len(probe.asked)
    assert any(question.tools for question in QUESTIONS)
    assert any(len(question.messages) > 3 for question in QUESTIONS)
    assert probe.precision == "float32" and probe.stops == [2] and not probe.unasked


def test_log_probabilities_and_answers_are_those_of_a_plain_forward(model, probe):
    for said in probe.asked:
        ids = torch.tensor([said.tokens + said.continuation])
        with torch.no_grad():
            logits = model(ids).logits[0]
        behind = logits[len(said.tokens) - 1 : -1].log_softmax(-1)
        expected = behind.gather(1, torch.tensor(said.continuation)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(said.log_probs), expected, atol=2e-5)
        with torch.no_grad():
            answered = model.generate(
                torch.tensor([said.tokens]),
                attention_mask=torch.ones(1, len(said.tokens), dtype=torch.long),
                max_new_tokens=ANSWER_TOKENS,
                do_sample=False,
                eos_token_id=probe.stops,
            )
        assert answered[0, len(said.tokens) :].tolist() == said.answer
        assert len(said.margins) == len(said.answer) and min(said.margins) >= 0


def test_a_model_without_such_a_cache_says_the_same(model, tokenizer, probe, monkeypatch):
    monkeypatch.setattr(asking, "draws", lambda *_: False)
    again = ask(model, tokenizer, {})
    agreement = compare(probe, again, "again", 2e-5)
    assert agreement.equal_answers == agreement.answers == 16


def test_what_does_not_fit_and_what_is_refused_is_counted(tokenizer):
    short = load_model(MODEL).eval()
    short.config.max_position_embeddings = 40
    template = tokenizer.chat_template
    refusing = "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + template
    plain = load_tokenizer(MODEL)
    plain.chat_template = refusing
    probe = ask(short, plain, {})
    refused = [said.question.name for said in probe.said if said.text is None]
    assert refused == ["tools", "system and tools", "a tool's answer"]
    long = [said for said in probe.said if said.text is not None and not said.continuation]
    assert long and all(len(said.tokens) + ANSWER_TOKENS > 40 or said.tokens for said in long)
    counted = f"of 16 questions its template refuses 3 and {len(long)} exceed its context"
    assert probe.unasked == counted


def test_a_template_that_asks_for_today_says_the_same_tomorrow(tokenizer):
    dated = load_tokenizer(MODEL)
    dated.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}: {{ messages[-1].content }}"
    )
    [text] = {asking.written(dated, QUESTIONS[0], {}) for _ in range(2)}
    assert text == "26 Jul 2024: What is 2 + 2?"


def test_the_manifest_holds_what_the_published_model_says(tmp_path):
    """Of a model and, on its base, of an adapter."""
    shape = {"optim__steps": 2, "evaluation": {}, "samples": {}}
    for name, adapter in (("whole", None), ("low-rank", {"rank": 2, "embeddings": "none"})):
        path = life.write(tmp_path / name, adapter=adapter, **shape)
        artifact = life.command(path)
        manifest = artifact.manifest()
        recorded = manifest.probe
        assert recorded is not None
        base = MODEL if adapter else None
        loaded = load_any(artifact.model, base, load_tokenizer(artifact.model), bf16=False)
        again = ask(loaded, load_tokenizer(artifact.model), {})
        assert compare(recorded, again, "transformers", 1e-4).answers == 16
        older = artifact.document()
        del older["probe"]
        assert Manifest.of(older).probe is None


def test_another_stop_is_another_probe(probe):
    with pytest.raises(Exception, match="does not stop at token 2"):
        compare(probe, replace(probe, stops=[]), "a reader", 1.0)
