"""A Modelfile says to Ollama what the chat template says, or says that it does not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmpipe.export.ask import written
from llmpipe.export.modelfile import AWKWARD, LATER, quoted, turns_of, write_modelfile
from llmpipe.front.push.ollama import Modelfile
from llmpipe.run.probe import QUESTIONS, Question
from tests.data import families
from tests.life import TINY

HOUSE = Path(__file__).parents[1] / "data" / "templates"
GO = pytest.mark.skipif(not shutil.which("go"), reason="no Go here: go is not on PATH")

CHATML = families.QWEN.replace("You help.", 'Say "x",\\n\\\\n {{z}}\u3000 """\\n')
THINKS = (
    families.QWEN.replace("+ m.content +", "+ m.content.split('</think>')[-1] +")
    + "{% if quick %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
DATED = "{{ bos_token }}{{ 'It is ' + date_string + '. ' }}" + families.LLAMA3.replace(
    "{{ bos_token }}", ""
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}" + (
    families.GEMMA
)
GREETS = families.PHI3.replace("+ m.content +", "+ (m.content or 'Hello') +")
"""What no mark tells: an empty content is another one."""

EXPRESSED = {
    "chatml": CHATML,
    "thinks": THINKS,
    "dated": DATED,
    "no system": NO_SYSTEM,
    "gemma": (HOUSE / "gemma.jinja").read_text(),
    "llama": (HOUSE / "llama.jinja").read_text(),
    "qwen": (HOUSE / "qwen.jinja").read_text(),
    "deepseek": (HOUSE / "deepseek.jinja").read_text(),
    "mistral": families.MISTRAL,
    "phi": families.PHI3,
    "zephyr": families.ZEPHYR,
    "llama 3": families.LLAMA3,
}


def source_of(template: str, begins: bool = True, **kwargs):
    """What of a source a Modelfile is made of; `begins`: whether a text begins with `<s>`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    if begins:
        token = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
        whole = TemplateProcessing(single="<s>:0 $A:0", special_tokens=[token])
        tokenizer.backend_tokenizer.post_processor = whole
    said = [
        SimpleNamespace(question=question, text=written(tokenizer, question, kwargs))
        for question in QUESTIONS
    ]
    probe = SimpleNamespace(said=said, stops=[tokenizer.eos_token_id])
    return SimpleNamespace(tokenizer=tokenizer, template_kwargs=kwargs, probe=probe)


def modelfile(source, folder: Path) -> tuple[str, list[str]]:
    """The Modelfile, and what is said of it."""
    said = write_modelfile(source, folder / "model-f16.gguf")
    return (folder / "Modelfile").read_text(encoding="utf-8"), said


def conversations() -> list[list[dict]]:
    asked = [q.messages for q in QUESTIONS if q.messages and not q.tools]
    odd = [
        [{"role": role, "content": content} for role, content in turns]
        for turns in [*AWKWARD, LATER]
    ]
    return asked + odd


def expected(source, messages: list[dict]) -> str | None:
    """What the template writes, less the token that llama.cpp puts in front."""
    question = Question(name="", messages=messages, continuation="")
    text = written(source.tokenizer, question, source.template_kwargs)
    return None if text is None else text.removeprefix("<s>")


@pytest.mark.parametrize("name", EXPRESSED)
def test_what_is_learned_writes_what_the_template_writes(name):
    source = source_of(EXPRESSED[name])
    turns = turns_of(source)
    assert turns is not None
    for messages in conversations():
        text, ours = expected(source, messages), turns.write(messages)
        later = any(turn["role"] == "system" for turn in messages[1:])
        assert text == ours or text is None or (later and ours is None)


def test_the_default_system_message_is_in_the_template_whatever_is_in_it(tmp_path):
    """A text in quotes has no escapes and loses the blank U+3000, so there is no SYSTEM."""
    text, _ = modelfile(source_of(CHATML), tmp_path)
    assert "SYSTEM" not in text and "\u3000" not in text and "\\U00003000" in text
    assert text.count("\n") == 3 and len(re.findall('"""', text.replace('\\"', ""))) == 2
    turns = turns_of(source_of(CHATML))
    assert turns.preamble.startswith(
        '<|im_start|>system\nSay "x",\n\\n {{z}}\u3000 """\n<|im_end|>'
    )
    assert turns.around["user"] == ("<|im_start|>user\n", "<|im_end|>\n")
    assert turns.opening == "<|im_start|>assistant\n" and turns.anywhere


def test_contents_are_trimmed_where_the_template_does_so(tmp_path):
    turns = turns_of(source_of(families.LLAMA3))
    assert turns.trimmed == {"system", "user", "assistant"}
    assert '{{ template "trim" .Content }}' in turns.template()
    assert "trim" not in turns_of(source_of(families.PHI3)).template()


def test_a_system_message_that_is_part_of_the_first_question(tmp_path):
    turns = turns_of(source_of(EXPRESSED["gemma"]))
    assert turns.joined and not turns.anywhere
    assert turns.around["system"] == ("<start_of_turn>user\n", "\n\n")


def test_the_first_token_is_ollamas_to_write(tmp_path):
    text, said = modelfile(source_of(families.LLAMA3), tmp_path)
    assert "<s>" not in text and said == []
    text, said = modelfile(source_of(families.LLAMA3, begins=False), tmp_path)
    assert "<s>" in text and said == []
    text, said = modelfile(source_of(families.PHI3), tmp_path)
    assert said == ["Modelfile: Ollama begins every prompt with <s>, and the template does not"]


def test_a_role_that_is_unknown_is_refused_and_not_left_out(tmp_path):
    turns = turns_of(source_of(NO_SYSTEM))
    assert turns.write([{"role": "system", "content": "a"}]) is None
    assert turns.write([{"role": "tool", "content": "a"}]) is None
    assert "system" not in turns.around and "knows no such message" in turns.template()


def test_what_the_template_in_the_file_knows_better_is_said(tmp_path):
    better = "Ollama from 0.30 on takes the template in the GGUF file"
    _, said = modelfile(source_of(EXPRESSED["qwen"], begins=False), tmp_path)
    assert said == [f"Modelfile: its TEMPLATE knows no tools and thoughts; {better}, which does"]
    _, said = modelfile(source_of(DATED), tmp_path)
    assert said == ["Modelfile: its TEMPLATE says the same date every day"]
    for template in (GREETS, (HOUSE / "mistral.jinja").read_text()):
        text, [line] = modelfile(source_of(template), tmp_path)
        assert "TEMPLATE" not in text and line.startswith("Modelfile: has no TEMPLATE, since Go's")
        assert line.endswith(f"{better}, or one that it knows")
    assert modelfile(source_of(""), tmp_path)[1] == []


STOPS = {"<|im_end|>": '"<|im_end|>"', "\n": '"\n"', 'a"': '"""a""""', "\\n": '"\\n"', " ": '" "'}


def test_a_stop_is_written_as_it_is_read(tmp_path):
    assert {stop: quoted(stop) for stop in STOPS} == STOPS
    assert quoted("\u200d") is None and quoted('a"""\nb') is None
    source = source_of(CHATML)
    source.tokenizer.add_tokens(["\u200d"])
    number = source.tokenizer.convert_tokens_to_ids("\u200d")
    newline = source.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    source.probe.stops = [*source.probe.stops, number, newline]
    text, said = modelfile(source, tmp_path)
    assert text.endswith('\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "\n"\n')
    assert f"Modelfile: no stop for token {number}, which Ollama cannot read there" in said
    assert Modelfile.of(tmp_path / "Modelfile").stops == ["<|im_end|>", "\n"]


@GO
@pytest.mark.faults
def test_gos_own_engine_writes_what_the_template_writes(tmp_path):
    sources = {name: source_of(template) for name, template in EXPRESSED.items()}
    sources["quick"] = source_of(THINKS, quick=True)
    sources["not begun"] = source_of(families.LLAMA3, begins=False)
    stops = "".join(f"PARAMETER stop {stop}\n" for stop in STOPS.values())
    orders = [
        {"modelfile": modelfile(source, tmp_path)[0] + stops, "conversations": conversations()}
        for source in sources.values()
    ]
    command = ["go", "run", str(Path(__file__).with_name("ollama.go"))]
    ran = subprocess.run(command, input=json.dumps(orders), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    written_alike = 0
    for name, source, answer in zip(sources, sources.values(), json.loads(ran.stdout), strict=True):
        assert answer["stops"] == ["<|im_end|>", *STOPS], name
        turns = turns_of(source)
        for messages, prompt, error in zip(
            conversations(), answer["prompts"], answer["errors"], strict=True
        ):
            ours = turns.write(messages)
            if ours is None:
                assert "this template knows no such message" in error, name
                continue
            text = expected(source, messages)
            bos = "<s>" if name == "not begun" else ""
            assert not error and prompt == ours, name
            assert text is None or prompt == bos + text, name
            written_alike += text is not None
    assert written_alike > 200
