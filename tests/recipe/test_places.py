"""What the text of `model:` or `path:` names: a path, the Hub's, or neither, which is said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmpipe.errors import UserError
from llmpipe.recipe.places import is_here, is_hub_id

HERE = ["./folder", "../folder", "/folder", "~/folder", "~nobody/folder", "rows.jsonl", "a/b.gguf"]
HUB = ["gpt2", "HuggingFaceTB/SmolLM2-135M", "a.b/c_d-1", "tatsu-lab/alpaca"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "tiny" / "model").mkdir(parents=True)
    (tmp_path / "my model").mkdir()
    (tmp_path / "mymodel").mkdir()
    (tmp_path / "rows").write_text("")


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_paths_and_ids(folder, kind):
    assert all(is_here(text, kind) for text in HERE)
    assert not any(is_here(text, kind) for text in HUB)


def test_a_revision_is_of_the_hub(folder):
    assert not is_here("gpt2@main", "model")
    assert not is_here("mymodel@main", "model")  # and not the folder that lies here
    assert not is_here("mymodel", "data set", pinned=True)
    with pytest.raises(UserError, match="no revision after the @"):
        is_here("gpt2@", "model")


NEITHER = {
    "recipes/tiny/model": "did you mean ./recipes/tiny/model?",
    "recipes/tiny/modle": "did you mean ./recipes/tiny/model?",
    "my model": "did you mean ./my model?",
    "my modle": "did you mean ./my model?",
    "mymodel": "did you mean ./mymodel? The Hub's is mymodel@main",
    "rows": "did you mean ./rows?",
    "a/b/c": "a path starts with ./, ../, / or ~",
    "data/*": "did you mean ./data/*?",
    "https://huggingface.co/org/name": "write org/name",
    "https://huggingface.co/datasets/org/name": "write org/name",
    "https://huggingface.co/org/name/tree/main": "write org/name",
    "https://huggingface.co/org/name/tree/abc?x=1": "write org/name@abc",
    "huggingface.co/org/name": "write org/name",
    "http://hf.co/name": "write name",
    "hf://org/name": "write org/name",
    "hf://datasets/org/name": "write org/name",
    "s3://bucket/model": "fetch it first",
    "git@github.com:org/name.git": "fetch it first",
    "git@hf.co:org/name": "fetch it first",
    "https://example.org/rows.jsonl": "fetch it first",
    "file:///data/rows.jsonl": "write /data/rows.jsonl",
    r"C:\models\tiny": "a path with /",
    r"C:\rows.jsonl": "a path with /",
    "C:/models/tiny": "a path with /",
    r"recipes\tiny\model": "did you mean ./recipes/tiny/model?",
    r".\recipes\tiny\model": "did you mean ./recipes/tiny/model?",
    "": "give a Hub id, or a path",
    "  ": "give a Hub id, or a path",
    "modèle/été": "a path starts with",
    "org/name/": "a path starts with",
    "a--b": "a path starts with",
    "org/" + "n" * 97: "a path starts with",
    "nul\0": "a path starts with",
}


@pytest.mark.parametrize("text", NEITHER)
def test_what_is_neither_says_what_to_write(folder, text):
    with pytest.raises(UserError) as refused:
        is_here(text, "model")
    assert refused.value.code == 2 and "\n" not in refused.value.message
    assert NEITHER[text] in refused.value.hint


@given(st.text("ab1/-_.é @", max_size=12) | st.from_regex(r"[\w./-]{0,100}", fullmatch=True))
def test_ids_are_what_the_hub_takes(text):
    """Whatever passes here does not fail there, in a traceback."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
        valid = True
    except HFValidationError:
        valid = False
    assert is_hub_id(text) == valid
