"""What a model sees of an item is all that the item says, or the item is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmpipe.errors import UserError
from llmpipe.evaluation.candidate import Candidate
from llmpipe.evaluation.task import Ask, Marked, Place
from llmpipe.evaluation.tasks.preference import Pair, Preference
from llmpipe.models.drawing.draw import Sampling
from llmpipe.models.pretrained import load_model, load_tokenizer
from llmpipe.recipe.sections import Rows

TINY = Path(__file__).parents[2] / "recipes/tiny/model"
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Lima"}}}


@pytest.fixture(scope="module")
def tiny() -> Candidate:
    tokenizer = load_tokenizer(TINY)
    return Candidate("tiny", TINY, None, tokenizer, ranks=False, kwargs={}, batch_size=1, say=print)


def asked(*contents: str, **more) -> Ask:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    turns[-1] |= more
    return Ask.of(turns, bare=False)


@pytest.mark.parametrize("ranks", [False, True])
def test_a_token_that_the_model_has_no_row_for_is_named(tiny, ranks):
    """Of a base whose tokenizer is longer, in what is answered, scored and ranked."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.add_tokens(["<|one|>", "<|two|>"], special_tokens=True)
    model = load_model(TINY, scores=ranks)
    longer = replace(tiny, model=model, tokenizer=tokenizer, ranks=ranks)
    ids = tokenizer("Warm?")["input_ids"]
    beyond = [*ids, tokenizer.convert_tokens_to_ids("<|two|>")]

    def score(given: list[int]) -> None:
        if ranks:
            longer.rewards([ids, given])
        else:
            longer.log_probs([Marked(ids, [True] * len(ids)), Marked(given, [True] * len(given))])
            longer.responses([ids, given], Sampling(4), seed=0)

    score(ids)
    with pytest.raises(UserError, match=r"514 tokens .* 512 rows.*none for <\|two\|>") as error:
        score(beyond)
    assert error.value.code == 2
    if not ranks:
        with pytest.raises(UserError, match=r"none for <\|two\|>"):
            longer.responses([beyond], Sampling(4), seed=0)


def test_a_reward_that_is_no_number_ranks_nothing(tiny):
    """NaN is not above what it is compared with, which would count as a wrong choice."""
    ranker = replace(tiny, model=load_model(TINY, scores=True), ranks=True)
    task = Preference(task="preference", data=[Rows(path="rows.jsonl")])
    answers = [[{"role": "assistant", "content": text}] for text in ("Yes.", "No.")]
    pair = Pair(
        **Place(0, "rows.jsonl:3", 0)._asdict(),
        ask=asked("Warm?"),
        chosen=answers[0],
        rejected=answers[1],
    )
    [scored] = task.score_batch(ranker, [pair], seed=0)
    assert scored.scores["accuracy"] in (0.0, 1.0)
    ranker.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"rows\.jsonl:3: tiny: a reward is not finite") as error:
        task.score_batch(ranker, [pair], seed=0)
    assert error.value.code == 4


@pytest.mark.parametrize(
    ("ask", "tools", "problem"),
    [
        (asked("Warm?"), [TOOL], "template drops the tools"),
        (asked("Warm?", "", tool_calls=[CALL]), None, "template drops tool calls: turn 2"),
        (asked("Warm?", "Yes", thinking="30 is"), None, "template drops the thinking: turn 2"),
        (asked("What is <|im_end|>?"), None, "turn 1 holds <|im_end|>"),
        (Ask.of([{"role": "user", "content": "Warm?"}], bare=True), [TOOL], "has tools, and bare"),
    ],
)
def test_an_item_that_is_not_rendered_as_a_whole_is_named(tiny, ask, tools, problem):
    with pytest.raises(UserError) as error:
        tiny.prompt(ask, tools, "items.jsonl:3")
    assert str(error.value).startswith("items.jsonl:3: tiny: ")
    assert problem in str(error.value)


def test_a_prompt_is_what_transformers_renders(tiny):
    turns = [{"role": "user", "content": "Warm?"}]
    text = tiny.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tiny.prompt(asked("Warm?"), None, "items.jsonl:1") == text
    assert tiny.prompt(Ask.of("Go on", bare=True), None, "items.jsonl:1") == "Go on"
