"""Embeddings have a row for every id of their tokenizer, and nothing is said twice of it."""

import json
import logging

from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpipe.models.pretrained import load_tokenizer, resize_embeddings, rows_of
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
    before = list(logger.filters)
    try:
        model = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
        rows = resize_embeddings(model, tokenizer)
        assert model.get_input_embeddings().weight.shape[0] == rows + 2
        logger.warning("a line that matters")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"a line that matters"}
    assert logger.filters == before
