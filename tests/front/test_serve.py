"""`llmpipe serve`: asked by OpenAI's own client, and refused where it is not what was published."""

import dataclasses
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file, save_file

from llmpipe.errors import INTEGRITY, RESOURCES, UserError
from llmpipe.front.serve import engines, host, named, server
from llmpipe.front.serve.agree import Agreed, agree
from llmpipe.front.serve.agree import _words_of as words_of
from llmpipe.front.serve.asking import Line
from llmpipe.front.serve.gate import Gate
from llmpipe.run import gguf
from llmpipe.run.artifact import Artifact
from llmpipe.run.gguf import CONTROL, TOKEN_TYPES, TOKENS, arrays_of, check_gguf
from llmpipe.run.probe import tolerance
from tests import life, store

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

KEY, WORD = "a-key", "a-word"
USER = {"role": "user", "content": "Is it warm in Bern?"}
GRASS = [{"role": "user", "content": "What colour is grass?"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}
WEATHER = {
    "messages": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "get_weather", "content": '{"celsius": 21}'},
        {"role": "assistant", "content": "It is 21 degrees."},
    ],
    "tools": [TOOL],
}
TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {%- set call = call.function or call %}
                {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
                {{- (call.arguments | tojson) + '}\\n</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A tiny model that knows by heart how to ask for the weather, and what colour grass is."""
    home = tmp_path_factory.mktemp("serve")
    lines = (life.TINY / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:16]
    rows = home / "rows.jsonl"
    rows.write_text("\n".join([json.dumps(WEATHER)] * 16 + lines) + "\n", encoding="utf-8")
    (home / "short.jinja").write_text(TEMPLATE)
    return store.made(
        life.write(
            home / "run",
            data={"train": [{"path": str(rows)}], "template": str(home / "short.jinja")},
            data__max_length=384,
            optim__learning_rate=1e-2,
            optim__batch_size=8,
            optim__steps=40,
            checkpoint__every=99,
            log__every=40,
            evaluation={},
            launch__micro_batch_size=8,
        )
    )


@pytest.fixture(scope="module")
def model(artifact):
    return named.served(str(artifact.path), artifact.run, print)


def order(model, **changes):
    """What the server's process is told."""
    values = server.Order.of(model, -1, KEY, WORD)
    return dataclasses.replace(values, **changes)


@contextmanager
def hosted(order, is_open=True):
    """What the server's process runs, in a thread of this one: the gate and its address."""
    app, precision = host.application(order)
    gate = Gate(app, order.key, order.word, precision)
    gate.is_open = is_open
    listening = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(gate, log_level="critical"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield gate, Line("127.0.0.1", listening.getsockname()[1], WORD)
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def line(model):
    with hosted(order(model)) as (_, line):
        yield line


def client_of(line, key=KEY):
    url = f"http://{line.host}:{line.port}/v1"
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def client(line):
    with client_of(line) as client:
        yield client


def ask(client, messages, **more):
    asked = {"model": "sft", "temperature": 0, **more}
    return client.chat.completions.create(messages=messages, **asked)


def streamed(client, messages, **more):
    """The text of an answer, and what ended it."""
    chunks = [chunk.choices[0] for chunk in ask(client, messages, stream=True, **more)]
    return "".join(one.delta.content or "" for one in chunks), chunks[-1].finish_reason


# --- what a client gets ---------------------------------------------------------------------------


def test_a_client_gets_the_answers_of_the_probe(client, model):
    """Streamed and not, up to the stop token, which ends them."""
    plain = [
        said
        for said in model.probe.asked
        if said.question.messages
        and not said.question.tools
        and said.answer[-1] in model.probe.stops
        and min(said.margins) > tolerance(model.probe, model.layers, "bfloat16")
    ]
    assert plain
    for said in plain:
        whole = ask(client, said.question.messages)
        assert whole.choices[0].message.content == said.words
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage.completion_tokens == len(said.answer)
        assert whole.usage.prompt_tokens == len(said.tokens)
        assert streamed(client, said.question.messages) == (said.words, "stop")


def test_a_text_is_completed(client, model):
    (said,) = (said for said in model.probe.asked if said.question.text)
    answer = client.completions.create(
        model="sft", prompt=said.text, temperature=0, max_tokens=len(said.answer)
    )
    assert answer.choices[0].text == said.words


def test_a_tool_is_called_and_its_answer_heard(client):
    asked = ask(client, [USER], tools=[TOOL]).choices[0]
    (call,) = asked.message.tool_calls
    assert asked.finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    heard = {"role": "tool", "tool_call_id": call.id, "content": '{"celsius": 21}'}
    turns = [USER, asked.message.model_dump(exclude_none=True), heard]
    assert ask(client, turns, tools=[TOOL]).choices[0].message.content == "It is 21 degrees."
    chunks = list(ask(client, [USER], tools=[TOOL], stream=True))
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    assert [call.function.name for call in calls] == ["get_weather"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_call_that_is_cut_off_is_text(client):
    cut = ask(client, [USER], tools=[TOOL], max_tokens=12).choices[0]
    assert cut.finish_reason == "length" and not cut.message.tool_calls
    assert cut.message.content.startswith("<tool_call>")


def test_32_streams_at_once(client):
    answers = {}
    expected = ask(client, GRASS).choices[0].message.content

    def one(number):
        answers[number] = streamed(client, GRASS)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 32 and set(answers.values()) == {(expected, "stop")}


def test_a_temperature_draws(client):
    """transformers' own server takes one, and answers greedily all the same."""
    answers = {
        ask(client, GRASS, temperature=2, max_tokens=6, seed=seed).choices[0].message.content
        for seed in range(8)
    }
    assert len(answers) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("frequency_penalty", 0.5),
        ("response_format", {"type": "json_object"}),
    ],
)
def test_what_would_be_passed_over_is_refused(client, field, value):
    with pytest.raises(openai.BadRequestError, match=f"{field}: .* is not supported"):
        ask(client, GRASS, **{field: value})
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(model="sft", prompt="a", logit_bias={"1": 1})


@pytest.mark.parametrize("page", ["serve.md", "serve.zh.md"])
def test_the_page_says_how_to_ask(line, page, capsys):
    """Its lines of Python, asked here, with the name and the key of what is served here."""
    (code,) = re.findall(r"```python\n(.*?)```", (life.ROOT / "docs" / page).read_text(), re.S)
    for said, here in (("8000", str(line.port)), ('"none"', f'"{KEY}"'), ('"dpo"', '"sft"')):
        assert said in code
        code = code.replace(said, here)
    exec(code, {})
    with client_of(line) as client:
        expected = ask(client, GRASS).choices[0].message.content
    assert capsys.readouterr().out == f"{expected}\n"


def test_another_model_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="other"):
        client.chat.completions.create(model="other", messages=GRASS)


# --- who is let in --------------------------------------------------------------------------------


def test_a_wrong_key_is_401(line, client):
    assert [one.id for one in client.models.list()] == ["sft"]
    with client_of(line, "another") as stranger, pytest.raises(openai.AuthenticationError):
        ask(stranger, GRASS)
    nobody = Line(line.host, line.port, None)
    assert nobody.get("/v1/models")[0] == 401
    assert nobody.get("/health") == (200, {"status": "ok"})


@pytest.mark.parametrize(
    "path", ["/reset", "/load_model", "/docs", "/v1/responses", "/openapi.json"]
)
def test_what_would_unload_the_model_is_nobodys(line, path):
    assert line.get(path)[0] == 404


def test_nobody_is_let_in_before_the_probe(model):
    with hosted(order(model), is_open=False) as (gate, line):
        with client_of(line) as client, pytest.raises(openai.InternalServerError, match="probe"):
            ask(client, GRASS)
        assert Line(line.host, line.port, KEY).get("/health")[0] == 503
        assert line.get("/health")[1]["open"] is False
        assert agree(line, model, gate.precision).asked == len(model.probe.asked)


# --- what is not the model that was published -----------------------------------------------------


def refusal(model, **changes):
    with hosted(order(model, **changes)) as (gate, line), pytest.raises(UserError) as refused:
        agree(line, model, gate.precision)
    assert refused.value.code == INTEGRITY
    return str(refused.value)


def test_other_weights_are_seen(model, tmp_path):
    """With the artifact's own tokenizer and template."""
    folder = tmp_path / "model"
    shutil.copytree(model.folder, folder)
    (file,) = folder.glob("*.safetensors")
    weights = {name: weight.flip(0).contiguous() for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    assert "when published" in refusal(model, folder=str(folder))


def test_another_template_is_seen(model, tmp_path):
    shutil.copytree(model.folder, tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + "{{- '\\n' }}")
    assert "its template writes the question" in refusal(model, folder=str(tmp_path / "model"))


def test_an_end_that_is_not_taken_for_one_is_seen(model):
    said = refusal(model, stops=[])
    assert "does not stop" in said or "when published" in said


def test_an_adapter_is_in_effect_or_refused(artifact, tmp_path):
    """Served on its base it is what was published; its base alone is not."""
    run = tmp_path / "run"
    rows = [{"path": str(life.TINY / "rows.jsonl")}]
    lora = life.command(
        life.write(
            run,
            stage="lora",
            data={"train": rows, "max_length": 64},
            adapter={"rank": 8, "alpha": 64},
            optim__learning_rate=2e-2,
            optim__batch_size=16,
            optim__steps=12,
            checkpoint__every=99,
            evaluation={},
            launch__micro_batch_size=16,
        )
    )
    model = named.served(str(lora.path), tmp_path, print)
    assert model.base
    with hosted(order(model)) as (gate, line):
        agreed = agree(line, model, gate.precision)
    assert agreed.asked == len(model.probe.asked) and agreed.equal + agreed.nearly == agreed.asked
    assert "when published" in refusal(model, folder=str(model.base), base=None)


def test_what_agreed_is_said():
    assert str(Agreed(16, 0, 16)) == "16 of 16 answers equal"
    assert str(Agreed(15, 1, 16)) == "15 of 16 answers equal; 1 otherwise, where two were as likely"


# --- of an export ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(artifact):
    """Its formats; f16 is as near as bf16."""
    recipe = artifact.run.parent / "export.yaml"
    formats = {"gguf": ["f16", "q8_0"], "merged": ["bf16"]}
    asked = {"stage": "export", "run": str(artifact.run), "model": "artifact:sft"}
    recipe.write_text(json.dumps(asked | {"formats": formats}))
    return life.command(recipe)


# llama-cpp-python's server leaves the reading end of each stream to the garbage collector
@pytest.mark.filterwarnings("ignore:Unclosed <MemoryObjectReceiveStream:ResourceWarning")
@pytest.mark.parametrize("form", ["gguf-f16", "gguf-q8_0"])
def test_a_gguf_file_is_served_by_llama_cpp(exported, form):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("sse_starlette")
    model = named.served(str(exported.path / form), exported.run, print)
    assert model.gguf and model.gguf.parent.name == form
    with hosted(order(model)) as (gate, line):
        agreed = agree(line, model, gate.precision)
        assert agreed.equal >= agreed.asked - 2
        with client_of(line) as client:
            answers = {}

            def one(number):
                answers[number] = streamed(client, GRASS, max_tokens=16)

            threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(answers) == 8 and len(set(answers.values())) == 1
        assert {finish for _, finish in answers.values()} == {"stop"}
    gc.collect()  # the streams, while their warnings are filtered
    other = exported.run / "other.gguf"
    whole = model.gguf.read_bytes()
    for changed, words in (
        (whole[:-4096], "cannot be read as GGUF: its tensors end at"),
        (whole.replace(b"llama", b"zlama"), "llama.cpp does not load it"),
    ):
        other.write_bytes(changed)
        with pytest.raises(UserError, match=words):
            host.application(order(model, gguf=str(other)))


def test_llama_cpp_takes_no_memory_for_more_than_is_said(exported, monkeypatch):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("sse_starlette")
    from llmpipe.upstream import llama_cpp_server

    model = named.served(str(exported.path / "gguf-f16"), exported.run, print)
    longest = check_gguf(model.gguf).longest
    said, asked = [], []
    model.tell_context(said.append)
    monkeypatch.setattr(llama_cpp_server, "application", lambda **terms: asked.append(terms))
    host.application(order(model))
    monkeypatch.setattr(gguf, "CONTEXT", 100)
    model.tell_context(said.append)
    host.application(order(model))
    assert [terms["context"] for terms in asked] == [min(longest, 8192), 100]
    assert said == [f"context: 100 of the {longest:,} tokens that it takes"]


def test_a_gguf_file_is_served_wherever_its_source_is(exported, model, tmp_path):
    """Its vocabulary says the words of the tokenizer, and its header how deep it is."""
    shutil.copytree(exported.path, tmp_path / "run" / "export")
    alone = named.served(str(tmp_path / "run" / "export" / "gguf-q8_0"), tmp_path, print)
    assert alone.has_template and alone.as_exported is not None
    assert alone.layers == model.layers > 1
    ours, theirs = words_of(model), words_of(alone)
    texts, types = arrays_of(alone.gguf, TOKENS, TOKEN_TYPES)
    assert {1, CONTROL} <= set(types)
    for token in range(len(texts)):
        if not texts[token].startswith("[PAD"):
            assert ours([token]) == theirs([token])
    for said in model.probe.asked:
        assert ours(said.answer) == theirs(said.answer)
    with pytest.raises(UserError, match="none is missing"):
        arrays_of(alone.gguf, "none")


@pytest.mark.parametrize(("kept", "least"), [(16, 8), (10, 8), (6, 4), (1, 0), (None, 8)])
def test_few_bits_are_held_to_what_they_said_when_exported(line, model, kept, least):
    """Of sixteen answers as many are equal as have to be, and then one less."""
    few = dataclasses.replace(model, rounded="int8", as_exported=kept)
    assert agree(line, otherwise(few, 16 - least), "float32") == Agreed(least, 0, 16)
    if least:
        with pytest.raises(UserError, match=f"{least - 1} of 16 .* where {least} have to be"):
            agree(line, otherwise(few, 17 - least), "float32")


def otherwise(model, count):
    """A model that said something else to so many questions."""
    asked = model.probe.asked
    changed = {said.question.name for said in asked[:count]}
    said = [
        dataclasses.replace(one, words=f"?{one.words}") if one.question.name in changed else one
        for one in model.probe.said
    ]
    return dataclasses.replace(model, probe=dataclasses.replace(model.probe, said=said))


def test_a_merged_folder_is_served_by_its_own_probe(exported, tmp_path):
    """What it was made of may be gone."""
    shutil.copytree(exported.path, tmp_path / "run" / "export")
    model = named.served(str(tmp_path / "run" / "export" / "merged-bf16"), tmp_path, print)
    assert model.name == "sft" and model.rounded == "bf16" and model.has_template
    with hosted(order(model)) as (gate, line):
        agreed = agree(line, model, gate.precision)
    assert agreed.asked == 16 and agreed.equal >= 14


TORCHAO = pytest.mark.skipif(not find_spec("torchao"), reason="pip install 'llmpipe[torchao]'")


@pytest.mark.parametrize(
    ("library", "bits", "precision"),
    [
        ("bitsandbytes", "nf4", "bfloat16"),
        life.by_the_dozen("bitsandbytes", "int8", "bfloat16"),
        pytest.param("torchao", "int8", "float32", marks=TORCHAO),
        pytest.param("torchao", "int4", "float32", marks=TORCHAO),
    ],
)
def test_few_bits_are_served_too(artifact, tmp_path, library, bits, precision):
    """In the precision that they were saved in, whatever the hardware has."""
    recipe = tmp_path / "export.yaml"
    asked = {"stage": "export", "name": f"{library}-{bits}", "run": str(artifact.run)}
    asked |= {"model": "artifact:sft", "formats": {library: [bits]}}
    recipe.write_text(json.dumps(asked | {"accept": {"otherwise": "warn"}}))
    folder = life.command(recipe).path / f"{library}-{bits}"
    model = named.served(str(folder), tmp_path, print)
    assert model.rounded == bits
    with hosted(order(model)) as (gate, line):
        assert gate.precision == precision
        agreed = agree(line, model, gate.precision)
    assert agreed.asked == 16 and agreed.equal >= (14 if bits == "int8" else 8)


def test_what_bitsandbytes_holds_is_left_to_transformers(exported, tmp_path, monkeypatch):
    """On a GPU as well, where vLLM is: nobody has seen it read one."""
    folder = tmp_path / "few"
    shutil.copytree(exported.path / "merged-bf16", folder)
    merged = named.served(str(exported.path / "merged-bf16"), tmp_path, print)
    monkeypatch.setattr(engines, "gpus", lambda: ["a GPU"])
    monkeypatch.setattr(engines, "python_of", lambda command: sys.executable)
    few = dataclasses.replace(merged, folder=folder)
    assert engines.engine_for(few, "auto").name == "vllm"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    assert engines.engine_for(few, "auto").name == "transformers"
    assert engines.engine_for(few, "vllm").name == "vllm"
    monkeypatch.setattr(engines, "find_spec", lambda name: name != "bitsandbytes")
    with pytest.raises(UserError, match="serve: needs bitsandbytes, which is not") as refused:
        engines.engine_for(few, "auto")
    assert refused.value.hint == "pip install 'bitsandbytes'"


def test_what_reads_few_bits_is_named_where_it_is_missing(exported, tmp_path, monkeypatch):
    folder = tmp_path / "few"
    shutil.copytree(exported.path / "merged-bf16", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao"}
    (folder / "config.json").write_text(json.dumps(config))
    merged = named.served(str(exported.path / "merged-bf16"), tmp_path, print)
    monkeypatch.setattr(engines, "find_spec", lambda name: name != "torchao")
    with pytest.raises(UserError, match="serve: needs torchao, which is not") as refused:
        engines.engine_for(dataclasses.replace(merged, folder=folder), "transformers")
    assert refused.value.hint == "pip install 'llmpipe[torchao]'"
    assert engines.engine_for(merged, "transformers").name == "transformers"


def test_what_of_an_export_is_not_served(exported, tmp_path):
    with pytest.raises(UserError, match="one format of it is taken"):
        named.served(str(exported.path), tmp_path, print)
    alone = tmp_path / "run" / "export"
    shutil.copytree(exported.path, alone)
    weights = alone / "merged-bf16" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"model\.safetensors") as refused:
        named.served(str(alone / "merged-bf16"), tmp_path, print)
    assert refused.value.code == INTEGRITY


# --- what is refused before anything is loaded ----------------------------------------------------


def test_a_key_is_not_shown(monkeypatch):
    monkeypatch.delenv("SECRET_OF_MINE", raising=False)
    with pytest.raises(UserError, match="no such variable") as refused:
        named.key_in("SECRET_OF_MINE")
    assert "SECRET_OF_MINE" not in str(refused.value)
    monkeypatch.setenv("SECRET_OF_MINE", " a-key\n")
    assert named.key_in("SECRET_OF_MINE") == "a-key" and named.key_in(None) is None
    monkeypatch.setenv("SECRET_OF_MINE", "two words")
    with pytest.raises(UserError, match="without blanks"):
        named.key_in("SECRET_OF_MINE")


def test_a_port_that_is_taken():
    with named.Address("127.0.0.1", 0) as address:
        assert address.url == f"http://127.0.0.1:{address.port}" and address.is_local
        with pytest.raises(UserError, match=f"port {address.port} of .* is taken") as refused:
            named.Address("127.0.0.1", address.port)
    assert refused.value.code == RESOURCES
    with pytest.raises(UserError, match="--host 192"):
        named.Address("192.0.2.1", 0)


def test_what_is_no_finished_artifact(artifact, tmp_path):
    for name, words, code in (
        (str(tmp_path / "none"), "no such artifact", 2),
        (str(artifact.model), "no manifest.json", 2),
        ("artifact:sft", "knows of none", 2),
    ):
        with pytest.raises(UserError, match=words) as refused:
            named.served(name, tmp_path, print)
        assert refused.value.code == code
    copy = Artifact(tmp_path / "run" / "sft")
    shutil.copytree(artifact.path, copy.path)
    weights = copy.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"model\.safetensors") as refused:
        named.served(str(copy.path), tmp_path, print)
    assert refused.value.code == INTEGRITY
    (copy.path / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not finished") as refused:
        named.served(str(copy.path), tmp_path, print)
    assert refused.value.code == INTEGRITY


def test_which_server_answers(model, monkeypatch):
    of_gguf = dataclasses.replace(model, gguf=model.folder)
    monkeypatch.setattr(engines, "find_spec", lambda name: object())
    monkeypatch.setattr(engines, "gpus", lambda: 0)
    monkeypatch.setattr(engines, "python_of", lambda command: "/srv/vllm/bin/python")
    assert engines.engine_for(model, "auto").name == "transformers"
    assert engines.engine_for(of_gguf, "auto").name == "llama-cpp"
    asked = engines.engine_for(model, "vllm")
    assert asked.command[0] == "/srv/vllm/bin/python" and os.path.isfile(asked.command[1])
    assert "PYTHONPATH" not in asked.environment
    monkeypatch.setattr(engines, "gpus", lambda: 1)
    assert engines.engine_for(model, "auto").name == "vllm"
    assert engines.engine_for(of_gguf, "auto").name == "llama-cpp"
    monkeypatch.setattr(engines, "python_of", lambda command: None)
    assert engines.engine_for(model, "auto").name == "transformers"
    for one, name, words in (
        (model, "vllm", "no command vllm on PATH"),
        (model, "llama-cpp", "takes a GGUF file alone"),
        (of_gguf, "vllm", "takes no GGUF file"),
        (of_gguf, "transformers", "takes no GGUF file"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            engines.engine_for(one, name)
        assert refused.value.code == 2


def test_packages_that_are_not_here(model, monkeypatch):
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="fastapi, openai, uvicorn") as refused:
        engines.engine_for(model, "transformers")
    assert refused.value.hint == "pip install 'llmpipe[serve]'"
    with pytest.raises(UserError, match="llama_cpp") as refused:
        engines.engine_for(dataclasses.replace(model, gguf=model.folder), "auto")
    assert refused.value.hint == "pip install 'llmpipe[serve,gguf]'"


# --- the process ----------------------------------------------------------------------------------


@contextmanager
def ended(code):
    """A process that has run some Python."""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.wait()
        yield server.Server(process, Line("127.0.0.1", 1, None))


def test_what_the_server_ends_with_is_the_commands_error():
    said = json.dumps({"message": "no room", "hint": "make some", "code": 5})
    told = f"print({said!r}); exit(5)"
    with ended(told) as one, pytest.raises(UserError, match="no room") as refused:
        one.answers()
    assert (refused.value.hint, refused.value.code) == ("make some", 5)
    with ended("exit(1)") as one, pytest.raises(UserError, match="ended with exit code 1"):
        one.answers()
    killed = "import os; os.kill(os.getpid(), 9)"
    with ended(killed) as one, pytest.raises(UserError, match="ended with signal SIGKILL"):
        one.wait(print)


def test_no_key_stands_in_the_environment_of_the_server(model):
    """Whatever it prints, or starts."""
    keys = {"A_KEY": KEY, "HF_TOKEN": "hf_a", "HUGGING_FACE_HUB_TOKEN": "hf_b"}
    tell = [sys.executable, "-c", "import json, os; print(json.dumps(dict(os.environ)))"]
    engine = engines.Engine("any", tell, {**os.environ, **keys, "ANOTHER": "stays"})
    with (
        named.Address("127.0.0.1", 0) as address,
        server.running(model, engine, address, KEY, "A_KEY") as one,
    ):
        environment = json.loads(one.process.stdout.read())
    assert not environment.keys() & keys and environment["ANOTHER"] == "stays"


@contextmanager
def command(artifact, tmp_path, *more, **environment):
    """`llmpipe serve`, ready: its process and its address."""
    path = os.pathsep.join([str(life.ROOT), os.environ.get("PYTHONPATH", "")])
    arguments = ["serve", str(artifact.path), "--port", "0", "--api-key-from", "A_KEY", *more]
    with (tmp_path / "errors.txt").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmpipe", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "A_KEY": KEY, **environment},
        )
    try:
        said = []
        for text in process.stdout:
            said.append(text)
            if "ready at" in text:
                break
        assert said, (tmp_path / "errors.txt").read_text()
        port = int(said[-1].rpartition(":")[2].removesuffix("/v1\n"))
        yield process, Line("127.0.0.1", port, None), said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_sigterm_lets_a_stream_come_to_its_end(artifact, tmp_path):
    stops = artifact.manifest().probe.stops
    with command(artifact, tmp_path) as (process, line, said):
        assert any(text.startswith("probe: ") for text in said)
        with client_of(line) as client:
            stream = ask(
                client,
                GRASS,
                max_tokens=300,
                logit_bias={str(stop): -100 for stop in stops},  # they would end it
                stream=True,
            )
            first = next(stream)
            process.send_signal(signal.SIGTERM)
            chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert chunks[-1].usage.completion_tokens == 300
        assert process.wait(60) == 143
        assert process.stdout.read() == "stopped\n"
    errors = (tmp_path / "errors.txt").read_text()
    assert "Traceback" not in errors and "ERROR" not in errors
    assert KEY not in "".join(said)


@pytest.mark.faults
def test_the_server_ends_with_a_command_that_is_killed(artifact, tmp_path):
    with command(artifact, tmp_path) as (process, line, _):
        process.kill()
        process.wait()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                socket.create_connection((line.host, line.port)).close()
            except ConnectionRefusedError:
                return
            time.sleep(0.1)
    pytest.fail("it still listens")
