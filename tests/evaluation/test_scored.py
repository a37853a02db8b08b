"""Bits per byte count the bytes of the very text that is scored, and nothing scored is no score."""

import math
import shutil
from types import SimpleNamespace

import pytest

from llmpipe.data.formats import Completion, Conversation, Document, Preference
from llmpipe.errors import UserError
from llmpipe.evaluation.book import Line
from llmpipe.evaluation.candidate import Candidate
from llmpipe.evaluation.statistics import corpus_scores
from llmpipe.evaluation.task import Ask, Marked, check_scored
from llmpipe.evaluation.tasks.choice import Choice, Question
from llmpipe.evaluation.tasks.generate import Generate, Prompt
from llmpipe.evaluation.tasks.perplexity import Passage, Perplexity
from llmpipe.recipe.sections import TEMPLATES
from tests.life import TINY

CALL = {"type": "function", "function": {"name": "grow", "arguments": {"cm": 3}}}
WRITTEN = '<tool_call>\n{"name": "grow", "arguments": {"cm": 3}}\n</tool_call>'
ASKED = {"role": "user", "content": "Grow, please."}
ROWS = [{"path": "rows.jsonl"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with chatml, which writes tool calls."""
    from importlib.resources import files

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert "chatml" in TEMPLATES
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(TINY / "model", folder)
    source = files("llmpipe.data.template").joinpath("chatml.jinja")
    (folder / "chat_template.jinja").write_text(source.read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    return Candidate(
        "it", folder, loaded, AutoTokenizer.from_pretrained(folder), False, {}, 4, print
    )


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (Document("Ein Satz mit Ümläuten 你好."), "Ein Satz mit Ümläuten 你好."),
        (Completion("The sky is", " blau und grün."), " blau und grün."),
        (Conversation([ASKED, assistant("Blue.")]), "Blue."),
        (Conversation([ASKED, assistant("Grün.")]), "Grün."),
        (Conversation([ASKED, assistant("", tool_calls=[CALL])]), WRITTEN),
        (Conversation([ASKED, assistant("Yes.", tool_calls=[CALL])]), f"Yes.\n{WRITTEN}"),
        (Conversation([ASKED, assistant("One."), ASKED, assistant("Two.")]), "One.Two."),
        (Conversation([ASKED, assistant("One."), ASKED, assistant("Two.")], None, 2), "Two."),
        (Conversation([ASKED, assistant("One.", weight=0), ASKED, assistant("Two.")]), "Two."),
    ],
)
def test_bytes_are_those_of_the_text_that_is_scored(model, example, text):
    assert model.taught_bytes(example) == len(text.encode())
    if not isinstance(example, Document):
        ids, marks = model.taught(example)
        scored = [token for token, is_scored in zip(ids, marks, strict=True) if is_scored]
        assert model.tokenizer.decode(scored, skip_special_tokens=True) == text


def test_bits_of_a_tool_call_are_finite(model):
    task = Perplexity.model_validate({"task": "perplexity", "data": ROWS})
    turns = [ASKED, assistant("", tool_calls=[CALL])]
    (scored,) = task.score_batch(model, [Passage(id=0, at="rows:1", asks=0, messages=turns)], 0)
    bits, size = scored.scores["bits_per_byte"]
    nats, tokens = scored.scores["nats_per_token"]
    assert size == len(WRITTEN) and bits == pytest.approx(nats / math.log(2)) and tokens > 9


def test_a_shape_that_teaches_nothing(model):
    with pytest.raises(TypeError, match="teaches no text"):
        model.taught_bytes(Preference("a", "b", "c"))


class Silent:
    """A model whose tokenizer makes nothing of an answer."""

    label = "mute"

    def prompt(self, ask, tools, at):
        return "What?"

    def sees_text(self, ask):
        return False

    def ids(self, text, ask):
        return [1, 2, 3]

    def taught(self, example):
        return Marked([1, 2, 3], [False] * 3)

    def taught_bytes(self, example):
        return 3

    def log_probs(self, sequences):
        return []


class Thinks(Silent):
    """A model whose template opens a block of thought."""

    def prompt(self, ask, tools, at):
        return "What?<think>\n"

    def responses(self, prompts, sampling, seed):
        texts = ("It is 4, I think.", "4 or 5?</think>\n4", "4.</think>\n5")
        return [SimpleNamespace(text=text, ended=True) for text in texts]


def test_what_follows_a_thought_is_scored():
    """As in training: nothing where the thought never ended, whatever it says."""
    task = {"task": "generate", "data": ROWS, "score": ["exact_match", "number", "bleu"]}
    items = [
        Prompt(id=i, at=f"rows.jsonl:{i}", asks=0, ask=Ask(text="What?"), reference="4")
        for i in range(3)
    ]
    scored = Generate.model_validate(task).score_batch(Thinks(), items, 0)
    assert [one.scores["exact_match"] for one in scored] == [0, 1, 0]
    assert [one.scores["number"] for one in scored] == [0, 1, 0]
    assert scored[0].shown["answers"] == ["It is 4, I think."], "what is kept is all of it"
    lines = [Line("it", "mute", i, shown=one.shown) for i, one in enumerate(scored)]
    ((right, thought), _) = corpus_scores("chrf", [[lines[1]] * 2, [lines[0]] * 2], 0)
    assert right == 100 and thought == 0


def test_an_item_of_which_nothing_is_scored_is_refused():
    perplexity = Perplexity.model_validate({"task": "perplexity", "data": ROWS})
    passage = Passage(id=0, at="rows.jsonl:4", asks=0, prompt="a", completion="b")
    choice = Choice.model_validate({"task": "choice", "data": ROWS})
    ask = Ask(text="What?")
    question = Question(id=0, at="rows.jsonl:4", asks=0, ask=ask, choices=["a", "b"], answer=0)
    for task, item in ((perplexity, passage), (choice, question)):
        with pytest.raises(UserError, match=r"rows\.jsonl:4: mute: no token of it is scored"):
            task.score_batch(Silent(), [item], 0)
    check_scored(Marked([1, 2], [False, True]), "rows.jsonl:1", "it")
