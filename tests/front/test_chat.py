"""Chat: the artifact's own template and stop tokens, one model or two, typed or piped."""

import io
import json

import pytest

from llmpipe.front import chat
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


def talk(monkeypatch, capsys, artifact, lines, count=1):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    voices = [chat.open_voice(f"v{i}", artifact.model) for i in range(count)]
    capsys.readouterr()
    chat.chat(voices, chat.Sampling(16), 0)
    return capsys.readouterr().out, voices


def test_one_answers_with_its_template_and_stops_at_its_stop_token(voice, monkeypatch, capsys):
    out, (one,) = talk(monkeypatch, capsys, voice, ["What colour is grass?"])
    text = one.tokenizer.apply_chat_template(
        one.turns[:1], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert out == "Green.\n" and one.turns[1] == {"role": "assistant", "content": "Green."}


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
    from llmpipe.data.formats import convert, detect

    example = convert(row, detect(["messages"], "auto", {}, "saved"))
    assert example.messages[-1]["role"] == "assistant"


def test_ctrl_c_takes_the_turn_back(voice, monkeypatch, capsys):
    def stop(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.Voice, "reply", stop)
    out, (one,) = talk(monkeypatch, capsys, voice, ["What colour is grass?"])
    assert one.turns == [] and "taken back" in out


def test_columns():
    assert chat.columns(["a", "b"], ["one two three", "x\n\ny"], 23).splitlines() == [
        "a                    | b",
        "one two three        | x",
        "                     |",
        "                     | y",
    ]
