"""No recipe holds a secret, and nothing that is kept says one.

R15: canaries in the environment, no byte of them in a run that finishes, fails or is killed.
"""

import time

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.recipe.check import load
from llmpipe.secrets import REDACTED, is_secret_name, kind_of, redacted
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
