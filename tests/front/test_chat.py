"""Chat: the artifact's own template and stop tokens, one model or two, typed or piped."""

import io
import json
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import yaml

from llmpipe.errors import INTEGRITY, UserError
from llmpipe.front import chat, chat_named, cli
from tests import life, store


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    """A tiny model that knows some rows by heart."""
    run = tmp_path_factory.mktemp("chat") / "run"
    changes = {
        "optim__epochs": 20,
        "optim__steps": None,
        "optim__learning_rate": 5e-3,
        "optim__batch_size": 8,
    }
    artifact = store.made(
        life.write(
            run,
            **changes,
            data__max_length=128,
            checkpoint__every=99,
            log__every=50,
            evaluation={},
            launch__micro_batch_size=8,
            data__packing=True,
        )
    )
    return artifact


class Typed(io.StringIO):
    """Lines of somebody at a terminal."""

    def isatty(self):
        return True


def talk(monkeypatch, capsys, artifact, lines, count=1, stdin=io.StringIO, new_tokens=16):
    monkeypatch.setattr("sys.stdin", stdin("\n".join(lines) + "\n"))
    voices = [chat.open_voice(f"v{i}", artifact.model) for i in range(count)]
    capsys.readouterr()
    chat.chat(voices, chat.Sampling(new_tokens), 0)
    return capsys.readouterr().out, voices


def test_one_answers_with_its_template_and_stops_at_its_stop_token(voice, monkeypatch, capsys):
    out, (one,) = talk(monkeypatch, capsys, voice, ["What colour is grass?"])
    text = one.engine.tokenizer.apply_chat_template(
        one.turns[:1], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert out == "Green.\n" and one.turns[1] == {"role": "assistant", "content": "Green."}


def test_a_thought_that_the_template_opens_stays_open_in_the_turns_before(voice, monkeypatch):
    one = chat.open_voice("one", voice.model)
    one.engine.tokenizer.chat_template += (
        "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    )
    asked = []

    def generate(model, tokenizer, ids, *_):
        asked.append(tokenizer.decode(ids[0]))
        return [SimpleNamespace(text="so.</think>4", ended=True)]

    monkeypatch.setattr(chat, "generate", generate)
    for line in ("2 + 2?", "Sure?"):
        one.turns.append({"role": "user", "content": line})
        assert one.reply(chat.Sampling(4), stream=False).text == "so.</think>4"
    assert asked[0].endswith("<think>\n")
    assert asked[1].startswith(f"{asked[0]}so.</think>4<|im_end|>")


def test_two_answer_side_by_side(voice, monkeypatch, capsys):
    out, _ = talk(monkeypatch, capsys, voice, ["What colour is grass?"], count=2)
    head, body = out.splitlines()
    assert [cell.strip() for cell in head.split("|")] == ["v0", "v1"]
    assert [cell.strip() for cell in body.split("|")] == ["Green.", "Green."]


def test_commands(voice, monkeypatch, capsys, tmp_path):
    path = tmp_path / "saved.jsonl"
    lines = [
        "/system Be short.",
        "What colour is grass?",
        f"/save {path}",
        "/reset",
        "/nonsense",
        "",
        "/quit",
        "lost",
    ]
    out, (one,) = talk(monkeypatch, capsys, voice, lines)
    row = json.loads(path.read_text())
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
    assert one.turns == [{"role": "system", "content": "Be short."}]
    assert chat.HELP in out
    # what is saved can be trained on
    from llmpipe.data.formats import Conversation
    from llmpipe.data.sources import Origin
    from llmpipe.recipe.sections import Rows

    saved = Origin(Rows(path=str(path)), {})
    saved.open((Conversation,))
    example = saved.layout.convert(row).example
    assert example.messages[-1]["role"] == "assistant"


def test_ctrl_c_takes_the_turn_back(voice, monkeypatch, capsys):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Voice, "reply", stop)
    out, (one,) = talk(monkeypatch, capsys, voice, ["What colour is grass?"], stdin=Typed)
    assert one.turns == [] and "taken back" in out
    with pytest.raises(KeyboardInterrupt):  # and ends what is piped
        talk(monkeypatch, capsys, voice, ["What colour is grass?", "And snow?"])


def test_an_answer_goes_as_far_as_the_context(voice, monkeypatch, capsys):
    """The README's line: 512 new tokens are allowed, of a model that takes 512 with the prompt."""
    out, (one,) = talk(monkeypatch, capsys, voice, ["What colour is grass?"], new_tokens=512)
    assert out == "Green.\n" and one.turns[1]["content"] == "Green."


def never_ends(monkeypatch):
    """Let no token end an answer, so that it goes on to its limit."""
    monkeypatch.setattr("llmpipe.models.generate.stop_tokens", lambda *_: [10**6])


def test_what_cuts_an_answer_is_said_beside_it(voice, monkeypatch, capsys):
    never_ends(monkeypatch)
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is grass?\n"))
    one = chat.open_voice("one", voice.model)
    capsys.readouterr()
    chat.chat([one], chat.Sampling(5), 0)
    told = capsys.readouterr()
    assert told.out.startswith("Green.") and "cut after 5 tokens" in told.err
    assert "--max-new-tokens allows no more" in told.err
    one.turns.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is grass?\n"))
    chat.chat([one], chat.Sampling(4000), 0)
    told = capsys.readouterr()
    assert "the model takes 512 with the conversation" in told.err
    assert "--max-new-tokens allows (4,000)" in told.err and told.out


def test_a_piped_turn_without_an_answer_fails(voice, monkeypatch, capsys):
    lines = ["What colour is grass?", "word " * 600, "What is 2 + 2?"]
    with pytest.raises(UserError, match="1 of 3 turns got no answer") as failed:
        talk(monkeypatch, capsys, voice, lines)
    assert failed.value.code == 2
    told = capsys.readouterr()
    first, second = told.out.split()
    assert first == "Green." and second.endswith(".")
    assert "leaves no room for an answer in the 512" in told.err


def test_a_typed_turn_without_an_answer_is_taken_back(voice, monkeypatch, capsys):
    lines = ["word " * 600, "What colour is grass?"]
    out, (one,) = talk(monkeypatch, capsys, voice, lines, stdin=Typed)
    assert "leaves no room" in out and "taken back" in out
    assert [turn["content"] for turn in one.turns] == ["What colour is grass?", "Green."]


# --- formats of an export -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(voice):
    """The model that knows some rows by heart, for other engines."""
    values = {
        "stage": "export",
        "run": str(voice.run),
        "model": f"artifact:{voice.name}",
        "formats": {"merged": ["bf16"], "gguf": ["f32", "q8_0"], "bitsandbytes": ["int8", "nf4"]},
        "accept": {"otherwise": "warn"},
    }
    path = voice.run.parent / "export.yaml"
    path.write_text(yaml.safe_dump(values))
    return store.made(path)


def asked(monkeypatch, capsys, *arguments) -> str:
    """What the whole command answers to a piped turn."""
    monkeypatch.setattr("sys.stdin", io.StringIO("What colour is grass?\n"))
    capsys.readouterr()
    cli.chat(list(map(str, arguments)), temperature=0, max_new_tokens=16, seed=0)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["merged-bf16", "gguf-f32", "gguf-q8_0", "bitsandbytes-int8", "bitsandbytes-nf4"]
)
def test_every_format_answers_as_it_was_trained(exports, monkeypatch, capsys, name):
    out = asked(monkeypatch, capsys, exports.path / name)
    assert out.splitlines()[-1] == "Green."
    reads_gguf = name.startswith("gguf") and not find_spec("llama_cpp")
    assert ("read by transformers; for llama.cpp" in out) == reads_gguf


@pytest.mark.skipif(not find_spec("llama_cpp"), reason="pip install 'llmpipe[gguf]'")
def test_llama_cpp_answers_by_the_file_and_beside_another(exports, voice, monkeypatch, capsys):
    from llmpipe.models.in_llama_cpp import LlamaCpp

    [one] = (exports.path / "gguf-f32").glob("*.gguf")
    engine = LlamaCpp(one, {}, seed=0)
    assert engine.context == 512
    turns = [{"role": "user", "content": "What colour is grass?"}]
    text = engine.written(turns)
    assert text.endswith("<|im_start|>assistant\n")
    theirs = chat.open_voice("it", voice.model).engine
    assert text == theirs.written(turns) and engine.tokens(text) == theirs.tokens(text)
    short = engine.answer(engine.tokens(text), chat.Sampling(2), stream=False)
    assert (short.tokens, short.ended) == (2, False) and "Green.".startswith(short.text)
    whole = engine.answer(engine.tokens(text), chat.Sampling(16), stream=False)
    assert (whole.text, whole.ended) == ("Green.", True)
    out = asked(monkeypatch, capsys, exports.path / "gguf-f32", voice.path)
    assert [cell.strip() for cell in out.splitlines()[-1].split("|")] == ["Green.", "Green."]


def test_an_adapter_of_an_export_lies_on_its_base(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    adapter = {"rank": 4, "embeddings": "none"}
    quick = {"optim__steps": 2, "evaluation": {}, "samples": {}}
    made = store.made(life.write(run, name="low-rank", adapter=adapter, **quick))
    values = {
        "stage": "export",
        "run": str(run),
        "model": "artifact:low-rank",
        "formats": {"merged": ["fp32"], "adapter": True, "gguf": ["f16"]},
    }
    path = tmp_path / "export.yaml"
    path.write_text(yaml.safe_dump(values))
    export = store.made(path)
    out = asked(monkeypatch, capsys, export.path / "adapter")
    assert out.strip() and out == asked(monkeypatch, capsys, made.path)


def test_what_an_export_needs_and_is_not_there_is_said(exports, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exports.run, run)
    folder = run / exports.name / "merged-bf16"
    changed = folder / "config.json"
    changed.write_text(changed.read_text() + " ")
    with pytest.raises(UserError, match=f"{changed}: .* bytes, recorded") as damaged:
        asked(monkeypatch, capsys, folder)
    assert damaged.value.code == INTEGRITY
    (run / exports.name / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        asked(monkeypatch, capsys, folder)
    monkeypatch.setattr(chat_named, "reader_of", lambda folder: "compressed_tensors")
    monkeypatch.setattr(chat_named, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="compressed_tensors is not installed, which reads"
    ) as needs:
        asked(monkeypatch, capsys, exports.path / "merged-bf16")
    assert needs.value.hint == "pip install 'llmpipe[compressed-tensors]'"


def test_columns():
    assert chat.columns(["a", "b"], ["one two three", "x\n\ny"], 23).splitlines() == [
        "a                    | b",
        "one two three        | x",
        "                     |",
        "                     | y",
    ]
