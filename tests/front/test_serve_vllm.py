"""`llmpipe serve --engine vllm`, with vLLM itself and OpenAI's client: `PATH=$PATH:./vllm-env/bin`.

One server for all that is asked of it, since it takes half a minute to begin.
"""

import json
import signal
import subprocess
import sys
import threading
import time

import pytest

from llmpipe.errors import INTEGRITY
from llmpipe.run.interpreters import VLLM, python_of
from llmpipe.run.probe import tolerance
from llmpipe.ties import descendants
from tests import life, store
from tests.export.test_vllm import wide_heads

openai = pytest.importorskip("openai")
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(python_of(VLLM) is None, reason="no command vllm on PATH"),
]

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a city",  # without one vLLM hands a null to the template
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def write(home, **changes):
    """A recipe that teaches a model with heads as wide as vLLM's CPU takes them a call by heart."""
    from tests.front.test_serve import TEMPLATE, WEATHER

    weather = json.dumps(WEATHER | {"tools": [TOOL]})
    if not (home / "base").exists():
        wide_heads(home / "base")
    lines = (life.TINY / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    rows = home / "rows.jsonl"
    rows.write_text("\n".join([weather] * 28 + lines) + "\n", encoding="utf-8")
    (home / "short.jinja").write_text(TEMPLATE)
    return life.write(
        home / "run",
        model=str(home / "base"),
        data={"train": [{"path": str(rows)}], "template": str(home / "short.jinja")},
        data__max_length=384,
        optim__learning_rate=4e-3,
        optim__batch_size=8,
        optim__steps=200,
        checkpoint__every=99,
        log__every=50,
        evaluation={},
        launch__micro_batch_size=8,
        **changes,
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return store.made(write(tmp_path_factory.mktemp("serve-vllm")))


def test_a_server_of_vllm_from_the_probe_to_its_end(artifact, tmp_path):
    from tests.front.test_serve import KEY, USER, ask, client_of, command, streamed

    probe = artifact.manifest().probe
    with command(artifact, tmp_path, "--engine", "vllm") as (process, line, said):
        assert any(text.startswith("probe: vllm, bfloat16: ") for text in said)
        with client_of(line) as client:
            assert [one.id for one in client.models.list()] == ["sft"]
            plain = [
                one
                for one in probe.asked
                if one.question.messages
                and not one.question.tools
                and one.answer[-1] in probe.stops
                and min(one.margins) > tolerance(probe, 2, "bfloat16")
            ]
            assert plain
            for one in plain:
                whole = ask(client, one.question.messages)
                assert whole.choices[0].message.content == one.words
                assert whole.usage.prompt_tokens == len(one.tokens)
                assert streamed(client, one.question.messages) == (one.words, "stop")
            called = ask(client, [USER], tools=[TOOL]).choices[0]
            (call,) = called.message.tool_calls
            assert called.finish_reason == "tool_calls" and call.function.name == "get_weather"
            assert json.loads(call.function.arguments) == {"city": "Bern"}
            answers = {}
            threads = [
                threading.Thread(
                    target=lambda i=i: answers.update(
                        {i: streamed(client, plain[0].question.messages)}
                    )
                )
                for i in range(32)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(answers) == 32 and set(answers.values()) == {(plain[0].words, "stop")}
        with client_of(line, "another") as stranger, pytest.raises(openai.AuthenticationError):
            ask(stranger, [USER])
        with client_of(line) as client, pytest.raises(openai.NotFoundError):
            client.post("/load_lora_adapter", cast_to=object, body={})
        below = descendants(process.pid)
        shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        assert len(below) >= 2 and KEY not in shown
        with client_of(line) as client:
            bias = {str(stop): -100 for stop in probe.stops}
            asked = {"max_tokens": 300, "logit_bias": bias, "stream": True}
            stream = ask(client, [USER], stream_options={"include_usage": True}, **asked)
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].usage.completion_tokens == 300
        assert process.wait(60) == 143
        deadline = time.monotonic() + 10
        while set(below) & set(descendants(1)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not set(below) & set(descendants(1))


def test_an_adapter_is_served_beside_its_base(tmp_path_factory, tmp_path):
    from tests.front.test_serve import ask, client_of, command

    home = tmp_path_factory.mktemp("serve-vllm-lora")
    adapter = {"rank": 8, "alpha": 64}
    lora = store.made(write(home, stage="lora", adapter=adapter))
    with command(lora, tmp_path, "--engine", "vllm") as (_, line, said):
        assert any(text.startswith("probe: vllm, ") for text in said)
        with client_of(line) as client:
            assert [one.id for one in client.models.list()] == ["lora-base", "lora"]
            assert ask(client, [{"role": "user", "content": "?"}], model="lora").choices


def test_what_vllm_does_not_take_is_said(tmp_path):
    """The tiny model has heads of 16, at which vLLM's engine ends when it is asked first."""
    run = tmp_path / "run"
    tiny = store.made(life.write(run, optim__steps=2, evaluation={}, samples={}))
    done = subprocess.run(
        [sys.executable, "-m", "llmpipe", "serve", str(tiny.path), "--engine", "vllm"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == INTEGRITY
    assert "the server answers the probe with 500" in done.stderr + done.stdout
