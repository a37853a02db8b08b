"""Embeddings have a row for every id of their tokenizer, and nothing is said twice of it. Code that
a model's configuration names is never run.
"""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llmpipe.errors import UserError
from llmpipe.models.pretrained import load_model, load_tokenizer, resize_embeddings, rows_of
from tests import life


def test_ids_with_gaps_have_rows(tmp_path):
    """A vocabulary of 512 tokens, of which one has the id 600."""
    AutoTokenizer.from_pretrained(life.TINY / "model").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 600
    path.write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
    resize_embeddings(model, tokenizer)
    assert len(tokenizer) < 600
    assert model.get_input_embeddings().weight.shape[0] == rows_of(tokenizer) == 601


def test_transformers_line_on_new_rows_is_dropped(caplog):
    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    tokenizer.add_tokens(["<one>", "<two>"])
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    caplog.set_level("WARNING", logger.name)  # whatever was silenced before in this process
    before = list(logger.filters)
    try:
        model = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
        rows = resize_embeddings(model, tokenizer)
        assert model.get_input_embeddings().weight.shape[0] == rows + 2
        logger.warning("a line that matters")
    finally:
        logger.removeHandler(caplog.handler)
    said = {line.getMessage() for line in caplog.records if line.name == logger.name}
    assert said == {"a line that matters"}
    assert logger.filters == before


def with_code(folder: Path, **config) -> None:
    """The tiny model, whose configurations name classes of a module `evil`."""
    shutil.copytree(life.TINY / "model", folder, dirs_exist_ok=True)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    maps = {
        "config.json": config | {"auto_map": dict.fromkeys(names, "evil.Evil")},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
    }
    for name, changes in maps.items():
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(values))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """`evil` where Python finds it; it leaves a file where it is run."""
    (tmp_path / "evil.py").write_text("open('CANARY', 'w').close()\nclass Evil: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "CANARY"


def test_transformers_takes_its_own_classes(tmp_path, canary):
    """Also where the code lies in the folder, which is refused before it comes to this."""
    with_code(tmp_path)
    plain = load_tokenizer(life.TINY / "model")
    tokenizer = load_tokenizer(tmp_path)
    model = load_model(tmp_path)
    assert type(model) is LlamaForCausalLM and type(tokenizer) is type(plain)
    assert tokenizer("What is 2 + 2?")["input_ids"] == plain("What is 2 + 2?")["input_ids"]
    assert not hasattr(model.config, "auto_map")
    assert not canary.exists() and "evil" not in sys.modules


def test_transformers_does_not_ask_for_classes_that_it_lacks(tmp_path, canary):
    with_code(tmp_path, model_type="evil")
    with pytest.raises(UserError, match="cannot be read as a configuration"):
        load_model(tmp_path)
    assert not canary.exists() and "evil" not in sys.modules


def test_a_model_that_transformers_has_is_taken_without_its_code(tmp_path, canary):
    with_code(tmp_path / "model")
    recipe = life.write(
        tmp_path / "run", model=str(tmp_path / "model"), optim__steps=1, samples={}, evaluation={}
    )
    artifact = life.command(recipe)
    log = (artifact.path / "log.txt").read_text()
    for name in ("config.json", "tokenizer_config.json"):
        assert f"auto_map of {name} is not used: transformers' own classes are" in log
        assert "auto_map" not in (artifact.model / name).read_text()
    assert not canary.exists() and "evil" not in sys.modules
