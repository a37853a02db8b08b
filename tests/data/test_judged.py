"""What a reward model learns from is what it is asked with: answers without their thoughts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from llmpipe.data.judged import EMPTY, LEFT_OUT
from llmpipe.data.kinds.pairs import JUDGED, PAIRS
from llmpipe.recipe.sections import Pairs
from llmpipe.scores.thinking import OPENING, answer_to
from tests.data.conftest import make_model
from tests.data.test_proof import CHAT_TOKENS, SHIPPED, assistant, prepared, user

ASKED = [user("How old is it?")]


@pytest.fixture
def model(here) -> Path:
    return make_model(here / "model", special=CHAT_TOKENS, template=SHIPPED["chatml"])


def row(chosen: dict | str, rejected: dict | str, prompt=ASKED) -> dict:
    if isinstance(chosen, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}


def tokens(ready) -> list[dict]:
    folder = ready.folder(Path("cache"))
    with pa.memory_map(str(folder / "train.arrow")) as source:
        return pa.ipc.open_stream(source).read_all().to_pylist()


THOUGHTS = [
    row(assistant("<think>\nlong ago\n</think>\n\nOld."), assistant("New.")),
    row(assistant("Very.", reasoning_content="long ago"), assistant("<think></think>No.")),
    row(assistant("Yes."), assistant("<think>\nwhat is old, after all")),
]
BARE = [
    row(assistant("Old."), assistant("New.")),
    row(assistant("Very."), assistant("No.")),
    row(assistant("Yes."), assistant("")),
]


def test_a_reward_model_reads_no_thoughts_and_a_policy_learns_them(model):
    said: list[str] = []
    ready, rejected = prepared(JUDGED, THOUGHTS, Pairs, model, said)
    assert not rejected and ready.rows.kept == 3
    text = "\n".join(said)
    assert f"{LEFT_OUT}: 3 rows" in text and f"{EMPTY}: 1 row" in text, text
    seen = tokens(ready)
    bare, _ = prepared(JUDGED, BARE[:2], Pairs, model)
    assert seen[:2] == tokens(bare)
    assert len(seen[2]["rejected_ids"]) == 1, "what ends an answer"
    learned, _ = prepared(PAIRS, THOUGHTS[:2], Pairs, model)
    assert all(
        len(one["chosen_ids"]) > len(other["chosen_ids"])
        for one, other in zip(tokens(learned), seen, strict=False)
    )


def test_answers_that_differ_by_their_thoughts_alone_teach_nothing(model):
    same = row(assistant("<think>a</think>Old."), assistant("<think>b</think>Old."))
    ready, rejected = prepared(JUDGED, [same, *BARE[:2]], Pairs, model)
    assert [line["reason"] for line in rejected] == ["chosen equals rejected"]
    assert ready.rows.kept == 2


def test_a_text_is_read_as_ppo_scores_it(here):
    """With `rollout.think`, where the tag stands in front of what the policy said."""
    model = make_model(here / "model")
    drawn = ("long ago</think>\nOld.\n", "what is old")
    as_row = row(*(OPENING + text for text in drawn), prompt="How old is it?\n")
    as_scored = [answer_to(OPENING, text) for text in drawn]
    assert as_scored == ["Old.", ""]
    ready, rejected = prepared(JUDGED, [as_row], Pairs, model)
    assert not rejected
    (seen,) = tokens(ready)
    bare = row(as_scored[0], "x", prompt="How old is it?\n")
    (whole,) = tokens(prepared(PAIRS, [bare], Pairs, model)[0])
    assert seen["chosen_ids"] == whole["chosen_ids"] and len(seen["rejected_ids"]) == 1
