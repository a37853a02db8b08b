"""No recipe holds a secret, and nothing that is kept says one.

R15: canaries in the environment, no byte of them in a run that finishes, fails or is killed.
"""

import time

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.secrets import REDACTED, is_secret_name, kind_of, redacted, secrets_in
from llmpipe.stages import schema
from tests import life
from tests.front import test_processes

# put together here: what looks like a secret is not for a repository
RANDOM = "Zq8xY2mN4pL7vT1wK9sJ3hF6"
LOOK = {
    "hf": f"hf_{RANDOM}abcdefghij",
    "openai": f"sk-proj-{RANDOM}",
    "anthropic": f"sk-ant-api03-{RANDOM}",
    "github": f"ghp_{RANDOM}abcdefghijkl",
    "fine": f"github_pat_{RANDOM}_{RANDOM}",
    "gitlab": f"glpat-{RANDOM}",
    "slack": f"xoxb-1234567890-{RANDOM}",
    "aws": "AKIA" + "IOSFODNN7EXAMPL3",
    "jwt": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{RANDOM}",
    "google": f"AIza{RANDOM}{RANDOM[:11]}",
    "address": f"https://me:{RANDOM}@example.com/x",
    "query": f"https://example.com/x?token={RANDOM}&a=1",
    "header": f"Authorization: Bearer {RANDOM}",
    "words": f"Authorization: Bearer {RANDOM.lower()[:8]}-plain",
    "bearer": f"bearer {RANDOM.lower()}",
    "basic": f"-H 'Basic {RANDOM[:12]}/{RANDOM[12:]}=='",
    "deepseek": f"sk-{'0123456789abcdef' * 2}",
    "router": f"sk-or-v1-{'0123456789abcdef' * 4}",
    "hyphens": f"sk-proj-a-b_{RANDOM}-c_d",
    "letters": f"hf_{'abcdefghijklmnopq' * 2}",
    "in a path": f"./models/hf_{RANDOM}/x",
    "pem": f"-----BEGIN RSA PRIVATE KEY-----\n{RANDOM}\n-----END RSA PRIVATE KEY-----",
}
NAMES = (
    "token hub_token hubToken HF_TOKEN access_token api_key apikey API_KEY openai-api-key secret "
    "client_secret password db_passwd credentials auth AWS_SECRET_ACCESS_KEY private_key sshKey"
).split()
HARMLESS = (
    "max_new_tokens batch_tokens tokenizer eos_token pad_token image_token key keys monkey author "
    "authors enable_thinking tokens secretary template keyboard public_key"
).split()


def test_names():
    assert [name for name in NAMES if not is_secret_name(name)] == []
    assert [name for name in HARMLESS if is_secret_name(name)] == []


def test_looks():
    assert [name for name, text in LOOK.items() if not kind_of(f"a {text} b")] == []
    harmless = [
        "hf_internal",
        "sk-learn",
        "./data/rows.jsonl",
        "HuggingFaceTB/SmolLM2-135M@main",
        "https://example.com/x?a=1&token",
        "a" * 64,
        "What is a bearer of news?",
        "<|im_end|>",
    ]
    assert [text for text in harmless if kind_of(text)] == []


@pytest.mark.parametrize("look", LOOK)
def test_what_looks_like_one_is_kept_by_nobody(look):
    kept = redacted(f"before {LOOK[look]} after")
    assert RANDOM not in kept and "EXAMPL3" not in kept and REDACTED in kept
    assert kept.startswith("before ") and kept.endswith(" after")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("--set trainer.hub_token=abcd: no", f"--set trainer.hub_token={REDACTED}: no"),
        ("  api_key: abcd-1234\n  b: 2", f"  api_key: {REDACTED}\n  b: 2"),
        ("{'password': 'abcd', 'a': 1}", f"{{'password': {REDACTED}, 'a': 1}}"),
        ("trainer.hub_token: looks like one", "trainer.hub_token: looks like one"),
        ("eos_token: </s>", "eos_token: </s>"),
        ("token: 352", "token: 352"),
        ("r.yaml:3: optim.lr: unknown key", "r.yaml:3: optim.lr: unknown key"),
    ],
)
def test_what_is_called_so(text, kept):
    assert redacted(text) == kept


def test_a_path_of_the_environment_is_kept(tmp_path, monkeypatch):
    for name in ("PWD", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("DB_PWD", f"/{RANDOM}")
    monkeypatch.setenv("API_AUTH", "disabled")
    text = f"{tmp_path}/rows.jsonl disabled "
    assert redacted(f"{text}/{RANDOM}") == f"{text}{REDACTED}"


@pytest.mark.parametrize(
    "word", ["x", "a=", "a: ", "://", "?token=", "eyJ", "=", "token", "-", "hf_"]
)
def test_a_long_text_takes_no_time(word):
    begun = time.monotonic()
    redacted(word * (200_000 // len(word)))
    assert time.monotonic() - begun < 5


def refused(path):
    with pytest.raises(UserError, match="secrets come from the environment") as error:
        load(path, schema(yaml.safe_load(path.read_text())["stage"]))
    assert error.value.code == 2
    return error.value.message


@pytest.mark.parametrize("look", LOOK)
@pytest.mark.parametrize(
    "field",
    [
        "model",
        "samples__prompts",
        "trainer__hub_model_id",
        "data__chat_template_kwargs",
        "data__template",
    ],
)
def test_a_recipe_with_what_looks_like_one_is_refused(tmp_path, field, look):
    value = {"samples__prompts": [LOOK[look]], "data__chat_template_kwargs": {"a": [LOOK[look]]}}
    path = life.write(tmp_path / "run", **{field: value.get(field, LOOK[look])})
    assert field.replace("__", ".") in refused(path)
    assert RANDOM not in refused(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("section", ["trainer", "data__chat_template_kwargs"])
def test_a_recipe_with_what_is_called_so_is_refused(tmp_path, section, name):
    path = life.write(tmp_path / "run", **{section: {name: "plain words"}})
    said = refused(path)
    assert f"{section.replace('__', '.')}.{name}: looks like a secret" in said
    assert "plain words" not in said


HF = "hf_llama2converted20240101final"
INNOCENT = [
    {"trainer__eos_token": "<|im_end|>"},
    {"trainer__eos_token": "im_end"},
    {"trainer__pad_token": "<pad>"},
    {"trainer__pad_token": "padding"},
    {"data__chat_template_kwargs": {"token_budget": 5, "max_tokens": 3, "eos_token": "</s>"}},
    {"data__chat_template_kwargs": {"stop_token": "STOP", "start_token": "begin", "keys": "many"}},
    {"data__chat_template_kwargs": {"think_token": "think", "tool_token": "call", "token": None}},
    {"data__chat_template_kwargs": {"auth": "none", "secret_level": "high", "password": False}},
    {"data__chat_template_kwargs": {"password_policy": "strict", "secretary": "Mrs. Key"}},
    {"data__template": "./secret-santa.jinja"},
    {"data__template": f"./templates/{HF}.jinja"},
    {"name": "tokens"},
    {"name": "sk-sft-slovak-instructions-v2"},
    {"name": "desk-classification-of-things-v2"},
    {"run": "runs/tokens"},
    {"run": "runs/secret/password"},
    {"run": "runs/sk-classification-of-all-those-things-v2"},
    {"run": "runs/2026-11-26T22:17:23-0123456789abcdef0123456789abcdef01234567"},
    {"model": "org/key-value-7b"},
    {"model": "org/sk-SK-LlamaInstruct-7B-chat"},
    {"model": "org/password-classifier@" + "0123456789abcdef0123" * 2},
    {"model": f"./models/{HF}"},
    {"model": "/cas/sha256/" + "0f" * 32},
    {"data__train": [{"path": "./cas/" + "a1" * 32 + ".jsonl"}]},
    {"data__train": [{"path": "./blobs/eyJhbGciOiJIUzI1NiJ9cafe.jsonl"}]},
    {"data__train": [{"path": "./blobs/QUtJQUlPU0ZPRE5ON0VYQU1QTDM.jsonl"}]},
    {"data__train": [{"path": "org/secrets", "columns": {"auth_token": "prompt"}}]},
    {"samples__prompts": ["What is a password?", "My api key: what is it?", "password: hunter2"]},
    {"samples__prompts": ["Is a bearer responsible-for-everything?", "Basic introduction-to-c99"]},
    {"samples__prompts": ["Explain https://example.com/login?token=abc&auth=none to me."]},
    {"samples__prompts": ["Write BEGIN PRIVATE KEY in Morse.", "What is sk-learn?", "hf_hub"]},
]


@pytest.mark.parametrize("changes", INNOCENT)
def test_what_is_innocent_is_no_secret(tmp_path, changes):
    """It may be wrong for other reasons: no file is there, or the field is none of TRL's."""
    path = life.write(tmp_path / "run")
    values = life.put(yaml.safe_load(path.read_text()), changes)
    assert list(secrets_in(values)) == []
    path.write_text(yaml.safe_dump(values))
    try:
        load(path, schema("sft"))
    except UserError as error:
        assert "secret" not in error.message


def test_names_of_the_recipe_and_of_rows_are_no_secrets(tmp_path):
    source = {"path": "./rows.jsonl", "columns": {"secret": "prompt", "password": "completion"}}
    kwargs = {"eos_token": "</s>", "think_token": "<think>", "enable_thinking": False}
    path = life.write(tmp_path / "run", data__train=[source], data__chat_template_kwargs=kwargs)
    assert load(path, schema("sft")).data.chat_template_kwargs == kwargs


CANARIES = {
    "HF_TOKEN": "canary-hf-8f3a91",
    "WANDB_API_KEY": "canary-wandb-8f3a92",
    "AWS_SECRET_ACCESS_KEY": "canary-aws-8f3a93",
    "OPENAI_API_KEY": "canary-openai-8f3a94",
    "MY_SERVICE_PASSWORD": "canary-service-8f3a95",
}
TELLS = """
import os


def tells(prompts, completions, **columns):
    everything = [f"{name}={value}" for name, value in os.environ.items() if "canary" in value]
    raise ValueError(f"told {everything}")
"""


def told(run) -> list[str]:
    """The files of a run that hold a canary."""
    files = [file for file in run.rglob("*") if file.is_file()]
    assert any(file.name == "log.txt" for file in files)
    return [str(file) for file in files if b"canary" in file.read_bytes()]


def test_a_function_that_says_them_all(tmp_path, monkeypatch):
    """Of the user's, whose words go into outcome.json."""
    from tests.rl import test_ppo

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tells.py").write_text(TELLS)
    reward = [{"function": f"{tmp_path}/tells.py:tells"}]
    with pytest.raises(UserError, match=r"told \['"):
        life.command(test_ppo.write(tmp_path / "run", reward=reward))
    assert told(tmp_path / "run") == []
    assert REDACTED in (tmp_path / "run" / "ppo" / "outcome.json").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("end", ["finishes", "fails", "is killed"])
def test_canaries(tmp_path, monkeypatch, end):
    """The real process tree with --debug, and a bug that says them all."""
    from tests.rl import test_ppo

    for name, value in CANARIES.items():
        monkeypatch.setitem(test_processes.ENVIRONMENT, name, value)
    (tmp_path / "tells.py").write_text(TELLS.replace("ValueError", "BaseException"))
    changes = {"reward": [{"function": f"{tmp_path}/tells.py:tells"}]} if end == "fails" else {}
    path = test_ppo.write(tmp_path / "run", log__trackers=["tensorboard"], **changes)
    command = [*test_processes.PYTHON, "ppo", str(path), "--debug"]
    if end == "is killed":
        worker = test_processes.start(command)
        while not list((tmp_path / "run" / "ppo").glob("checkpoints/step-*")):
            time.sleep(0.05)
            assert worker.poll() is None
        worker.kill()
        worker.communicate()
    else:
        code, out = test_processes.run(command)
        assert (code == 0) == (end == "finishes"), out
    assert told(tmp_path / "run") == []
