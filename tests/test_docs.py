"""What README.md and docs/ say can be typed is typed here, as written, in a copy of the checkout;
their links lead somewhere, and both languages say the same."""

from __future__ import annotations

import functools
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llmpipe import errors
from llmpipe.front import cli, launch
from llmpipe.front.proposal import MODEL
from llmpipe.recipe.check import load, load_pipeline
from llmpipe.recipe.yaml import read
from llmpipe.stages import STAGES, schema
from tests import life

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MAKE = DOCS / "make"
COPIED = ("llmpipe", "recipes")
CHINESE = {page: page.with_suffix(".zh.md") for page in DOCS.rglob("*.md")}
CHINESE = {page: chinese for page, chinese in CHINESE.items() if chinese.exists()}
CHINESE[ROOT / "README.md"] = ROOT / "README.zh-CN.md"
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted(DOCS.rglob("*.md"))]
NOT_HERE = {"source .venv/bin/activate": "the tests run in an environment already"}
SECONDS = 600  # for one command, on a machine that does other things as well

# for recipes of real models, which are not there where tests run
STAND_IN = ("./models/SmolLM2-135M-Instruct.gguf", "./recipes/tiny/model")


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def commands(text: str, language: str = "bash") -> list[str]:
    lines = [line for block in blocks(text, language) for line in block.split("\n")]
    return [line for line in lines if line and not line.startswith("#")]


EVERY = list(dict.fromkeys(line for page in PAGES for line in commands(text_of(page))))
TYPED = [line for line in EVERY if not line.startswith("make ") and line not in NOT_HERE]
SHOWN = {line for page in PAGES for line in commands(text_of(page), "console")}
MADE = [line for page in [*PAGES, ROOT / "CONTRIBUTING.md"] for line in commands(text_of(page))]


def stand_in(folder: Path) -> None:
    """Let recipes of the real model, whence they have it, begin with the tiny one, for an epoch."""
    for path in folder.glob("*.yaml"):
        words = path.read_text(encoding="utf-8").replace(*STAND_IN)
        words = words.replace(MODEL, STAND_IN[1]).replace("epochs: 12", "epochs: 1")
        path.write_text(words, encoding="utf-8")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands use, and the environment that a person would have after
    activating .venv. Recipes of the real model have the tiny one, and one epoch for twelve."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    stand_in(folder / "recipes")
    if not shutil.which("llmpipe", path=Path(sys.executable).parent):
        pytest.skip("llmpipe is not installed in this environment; make setup installs it")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("LLMPIPE_", "ACCELERATE_"))
    }
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return folder, environment | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "hub"),
    }


# --- commands -------------------------------------------------------------------------------------


def test_the_readme_shows_the_whole_front_door():
    readme = commands(text_of(ROOT / "README.md"))
    for command in (
        "make quickstart",
        "make test",
        "llmpipe sft",
        "llmpipe show",
        "llmpipe schema",
        "llmpipe init",
    ):
        assert any(line.startswith(command) for line in readme), command


@pytest.mark.parametrize("line", dict.fromkeys(line for line in MADE if line.startswith("make ")))
def test_make_targets_exist(line):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in line.split()[1:]:
        assert re.search(rf"^{target}:", makefile, re.M), line


SHELL = re.compile(r"[|>]|^(?!llmpipe )")  # lines that need one, or another program
LAUNCHED = "accelerate launch"
IN_A_SHELL = ("llmpipe show runs/tiny", "llmpipe schema sft", "llmpipe init my-first-run")


def typed(line: str, folder: Path, environment: dict[str, str]) -> None:
    """Type a line in a shell."""
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    stand_in(folder)  # in what `init` has written
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stdout + done.stderr, f"{line}\n{done.stderr[-3000:]}"


def called(line: str, monkeypatch, capsys) -> None:
    """The same command with its workers, in this process, where the heavy libraries are imported
    once."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as end:
        cli.main()
    printed = capsys.readouterr()
    stand_in(Path())  # in what `init` has written
    assert not end.value.code, f"{line}\n{printed.out[-3000:]}\n{printed.err[-3000:]}"


def promised_files_are_there(run: Path) -> None:
    _, _, of_a_run = text_of(DOCS / "run.md").partition("## Files")
    promised = set(re.findall(r"^\| `([\w.]+)/?` \|", of_a_run, re.M))
    assert promised
    for name in promised:
        assert (run / "sft" / name).exists(), f"the table of docs/run.md names {name}"


def test_commands_run_in_their_order(checkout, monkeypatch, capsys):
    """Every command of llmpipe's in this process; in a shell what needs one, and three of the
    front door's. Other launchers are started by tests/front/test_processes.py, and by `make
    faults`, which types every line."""
    folder, environment = checkout
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launch, "start", life.start_here)
    monkeypatch.setattr(launch, "begun_early", life.nobody_early)
    for line in TYPED:
        if line in IN_A_SHELL or (SHELL.search(line) and "llmpipe" not in line):
            typed(line, folder, environment)
        elif not SHELL.search(line):
            called(line, monkeypatch, capsys)
        elif piped := re.fullmatch(r"echo '(.*)' \| (llmpipe chat .*)", line):
            monkeypatch.setattr(sys, "stdin", io.StringIO(piped[1] + "\n"))
            called(piped[2], monkeypatch, capsys)
        else:
            assert line.startswith(LAUNCHED), line
    promised_files_are_there(folder / "runs" / "tiny")


@pytest.mark.faults
def test_commands_run_as_written(checkout):
    folder, environment = checkout
    shutil.rmtree(folder / "runs", ignore_errors=True)
    for line in TYPED:
        typed(line, folder, environment)
    promised_files_are_there(folder / "runs" / "tiny")


@pytest.mark.faults
@pytest.mark.parametrize("page", ["serve.md", "serve.zh.md"])
def test_the_server_of_the_page_answers_what_the_page_asks(checkout, page):
    """The command and the curl of docs/serve.md, with another artifact and a port that is free."""
    pytest.importorskip("uvicorn", reason="pip install 'llmpipe[serve]'")
    folder, environment = checkout
    typed("llmpipe sft recipes/tiny/sft.yaml", folder, environment)
    shown = blocks(text_of(DOCS / page), "")
    serve = next(line for block in shown for line in block.splitlines() if "llmpipe serve" in line)
    (curl,) = [block for block in shown if block.startswith("curl ")]
    assert serve == "llmpipe serve runs/alpaca/dpo" and '"model": "dpo"' in curl
    process = subprocess.Popen(
        ["llmpipe", "serve", "runs/tiny/sft", "--port", "0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        ready = next(line for line in process.stdout if "ready at" in line)
        address = re.search(r"http://[\d.:]+", ready)[0]
        asked = curl.replace("http://127.0.0.1:8000", address).replace('"dpo"', '"sft"')
        assert address in asked
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
    finally:
        process.terminate()
        left = process.communicate(timeout=60)[0]
    chunks = re.findall(r"^data: (\{.*)$", done.stdout, re.M)
    assert chunks, done.stdout + done.stderr
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert "".join(one["delta"].get("content") or "" for one in choices)
    assert choices[-1]["finish_reason"] in ("stop", "length")
    assert process.returncode == 143 and left.endswith("stopped\n")


def in_prose(text: str) -> list[str]:
    """Commands that a page names between its words, and of which no test has the time or the
    machine."""
    return re.findall(r"`((?:accelerate launch )?llmpipe \w[^`]*)`", text)


def test_what_is_not_typed_names_what_there_is():
    """Other commands, and those between words, are commands of llmpipe, and their recipes valid."""
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert set(STAGES) <= known
    lines = {line for page in PAGES for line in in_prose(text_of(page))}
    for line in {*lines, *SHOWN, *TYPED}:
        if match := re.match(r"(?:accelerate launch )?llmpipe (\w+)", line):
            assert match[1] in known or "check" in line, line
        for name in re.findall(r"recipes/[\w/-]+\.yaml", line):
            valid(ROOT / name)


def valid(path: Path) -> None:
    values, _ = read(path)
    if "stages" in values:
        assert not load_pipeline(path, schema).problems
    else:
        load(path, schema(values["stage"]))


# --- recipes and codes ----------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recipes_are_valid(page, tmp_path):
    for block in blocks(text_of(page), "yaml"):
        if name := re.search(r"^stage: (\w+)", block, re.M):
            path = tmp_path / "mine.yaml"
            path.write_text(block, encoding="utf-8")
            assert block.startswith(f"# llmpipe {name[1]} mine.yaml\n")
            load(path, schema(name[1]))
        else:
            yaml.safe_load(block)


@pytest.mark.parametrize("tool", ["Axolotl", "LLaMA-Factory"])
def test_their_config_is_the_recipe_beside_it(tool, tmp_path, monkeypatch):
    """What `init --from` makes of it says what ours says, but for what their tool leaves open."""
    from llmpipe.front.foreign import translate

    page = text_of(DOCS / "from.md")
    _, _, section = page.partition(f"## {tool}\n")
    monkeypatch.chdir(tmp_path)
    Path("theirs.yaml").write_text(blocks(section, "text")[0], encoding="utf-8")
    translate(Path("theirs.yaml"), lambda line: None)
    ours = yaml.safe_load(blocks(page, "yaml")[0])
    made = yaml.safe_load(Path("theirs-llmpipe.yaml").read_text(encoding="utf-8"))
    assert (made["stage"], made["model"]) == (ours["stage"], ours["model"])
    assert made["adapter"].items() >= ours["adapter"].items()
    for section, names in {
        "data": "max_length packing eval",
        "optim": "learning_rate batch_size epochs",
    }.items():
        for name in names.split():
            assert made[section][name] == ours[section][name], f"{section}.{name}"


def test_the_mistake_in_the_docs_is_answered_so(tmp_path):
    page = text_of(DOCS / "recipes.md")
    block = next(block for block in blocks(page, "yaml") if "stage:" in block)
    path = tmp_path / "mine.yaml"
    path.write_text(block.replace("learning_rate", "learning_rte"), encoding="utf-8")
    with pytest.raises(errors.UserError) as caught:
        load(path, schema("sft"))
    (promised,) = re.findall(r"`mine\.yaml(:\d+: .*?\?)`", page)
    assert promised in str(caught.value)


def test_exit_codes_are_the_real_ones():
    real = [
        value for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)
    ]
    for name in ("troubleshooting.md", "troubleshooting.zh.md"):
        cells = re.findall(r"^\| (\d[\d, ]*) \|", text_of(DOCS / name), re.M)
        told = [int(code) for cell in cells for code in cell.split(",")]
        assert sorted(told) == sorted({*real, 1})


def test_published_results_are_those_that_are_held_against():
    """docs/results.md names every pipeline with `expected:`, its numbers, and if it was run."""
    page = text_of(DOCS / "results.md")
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        values, _ = read(path)
        if numbers := values.get("expected"):
            (line,) = re.findall(rf"^\| `llmpipe reproduce {path.stem}`.*$", page, re.M)
            for number in numbers:
                assert f"{number['value']:g}" in line, path
                assert ("not yet" in line) == ("ran" not in number), path


# --- pages ----------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What headings are called in a link."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    bare = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in bare}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=named)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{named(page)}: {link}"
        assert not anchor or anchor in anchors(path), f"{named(page)}: {link}"


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml names a function of pymdownx."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    navigation = str(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    for page in DOCS.rglob("*.md"):
        if not page.name.endswith(".zh.md"):
            assert f"'{page.relative_to(DOCS)}'" in navigation, page


@pytest.mark.parametrize("page", CHINESE, ids=named)
def test_both_languages_say_the_same(page):
    """The same headings, commands, recipes, equations, pictures, links and figures."""
    english, chinese = text_of(page), text_of(CHINESE[page])
    for what, of in SAME.items():
        assert of(chinese) == of(english), f"{named(CHINESE[page])}: {what}"


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)", " ", text, flags=re.M | re.S)


def figures(text: str) -> list[str]:
    """Numbers of two digits and more, as they are written in both languages."""
    return sorted(re.findall(r"\d[\d,]*\.\d+|\d[\d,]*\d", prose(text)))


def without_comments(text: str) -> list[str]:
    recipes = blocks(text, "yaml")
    return [yaml.safe_load(block) for block in recipes]


def links(text: str) -> list[str]:
    """Where links lead, whatever the language there."""
    english = (link.replace(".zh.", ".") for link in re.findall(r"\]\(([^)\s]+)\)", text))
    return sorted(link.partition("#")[0] for link in english if "README" not in link)


SAME = {
    "levels of headings": lambda text: re.findall(
        r"^(#+) ", re.sub(r"(?ms)^```.*?^```$", "", text), re.M
    ),
    "commands": lambda text: commands(text) + commands(text, "console"),
    "recipes": without_comments,
    "equations": lambda text: len(re.findall(r'class="equation"', text)),
    "figures": figures,
    "links": links,
}


# --- what is made ---------------------------------------------------------------------------------


def made(name: str, what: str) -> dict[str, str]:
    """What a script of docs/make would make, in a process of its own: it sets how sections read."""
    program = f"import json, {name}; print(json.dumps({name}.{what}()))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(MAKE), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("name", "what", "folder"), [("pages", "pages", "."), ("pictures", "pictures", "pictures")]
)
def test_what_is_made_is_up_to_date(name, what, folder):
    for file, text in made(name, what).items():
        assert text_of(DOCS / folder / file).rstrip() == text.rstrip(), f"{file}: run `make docs`"
