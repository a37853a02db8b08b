"""A function of a user's file is looked at, and the file is not run."""

import pytest

from llmpipe.errors import UserError
from llmpipe.recipe.functions import check_function

KEYWORDS = ("prompts", "completions", "reference")

SOUND = {
    "all by keyword": "def f(prompts, completions, reference): ...",
    "the rest by name": "def f(completions, **rest): ...",
    "in any order": "def f(*, reference=None, completions, prompts): ...",
    "columns": "def f(prompts, completions, reference, answer): ...",
    "a lambda": "f = lambda completions, **rest: []",
    "a class": "class f: ...",
    "another's": "from json import f",
    "another's by another name": "from os.path import g as f",
    "perhaps another's": "from json import *",
    "its neighbour's": "from .somewhere import f",
    "from a way of its own": "import sys\nsys.path.append('lib')\nfrom somewhere import f",
    "a module's own way": "def __getattr__(name): ...",
    "what code makes": "f = make()",
    "one of two": "f, g = make()",
    "in a branch": "import sys\nif sys.argv:\n    def f(**rest): ...\nelse:\n    f = None",
    "if it can be": "try:\n    from x import f\nexcept ImportError:\n    f = None",
    "in a block": "with open('x') as f: ...",
    "by the way": "print(f := make())",
    "by hand": "globals()['f'] = make()",
    "decorated": "@decorated\ndef f(): ...",
    "twice": "def f(): ...\ndef f(**rest): ...",
}

WRONG = {
    "": "no attribute 'f'",
    "def g(**rest): ...\ndef h(**rest): ...": "no attribute 'f'\n.*it has g, h",
    "def outer():\n    def f(**rest): ...": "no attribute 'f'",
    "class A:\n    def f(self, **rest): ...": "no attribute 'f'",
    "if f:\n    g = f": "no attribute 'f'",
    "f = 3": "line 1: f is no function",
    "f = [1]": "line 1: f is no function",
    "def f(texts): ...": "line 1: f does not take prompts, completions, reference",
    "def f(prompts, completions): ...": "does not take reference\n.*called with keywords",
    "def f(prompts, completions, reference, /): ...": "does not take prompts",
    "def f(*everything): ...": "does not take prompts",
    "f = lambda texts: []": "does not take prompts",
    "async def f(**rest): ...": "line 1: f is async",
    "\ndef f(:": "line 2: invalid syntax",
    "import json\nimport nowhere.at_all\ndef f(**rest): ...": "line 2: there is no module nowhere",
    "from nowhere import f": "line 1: there is no module nowhere here\n.*install",
    "x = '\0'": "line 1: source code string cannot contain null bytes",
}


def check(tmp_path, text):
    path = tmp_path / "rewards.py"
    path.write_text(text + "\nraise RuntimeError('run')\n")
    check_function(path, "f", KEYWORDS)


@pytest.mark.parametrize("name", SOUND)
def test_what_may_be_the_function_passes(tmp_path, name):
    check(tmp_path, SOUND[name])


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_it_is_named(tmp_path, text):
    with pytest.raises(UserError, match=WRONG[text]):
        check(tmp_path, text)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        check_function(tmp_path, "f", KEYWORDS)
