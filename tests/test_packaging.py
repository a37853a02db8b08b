"""One closure for a newcomer, continuous integration and the image: pyproject, constraints,
Makefile, Dockerfile."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import llmpipe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TEXT = (
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".json",
    ".jinja",
    "Makefile",
    "Dockerfile",
    ".ci/run",
    "ignore",
)


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(name): version for name, version in pairs}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


UNTESTED = {"zero", "rl"}  # what needs a GPU, is experimental, or is skipped where absent


def requirements() -> list[Requirement]:
    """What the suite runs with: all but the extras that are not tested here, which `dev` must not
    take."""
    project = PROJECT["project"]
    extras = [
        r
        for name, group in project["optional-dependencies"].items()
        for r in group
        if name not in UNTESTED
        if not r.startswith("llmpipe[")
    ]
    return [Requirement(r) for r in [*project["dependencies"], *extras]]


def shipped() -> list[Path]:
    """Every text file that git tracks or would track."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [
        path
        for name in done.stdout.split("\n")
        if name.endswith(TEXT) and (path := ROOT / name).is_file()
    ]


def targets() -> dict[str, str]:
    """Makefile target -> its prerequisites."""
    rules = re.findall(
        r"^([a-z]+):([^#=\n]*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M
    )
    return {name: needs.strip() for name, needs in rules}


def instructions() -> list[tuple[str, str]]:
    """(KEYWORD, rest) of the Dockerfile, continued lines joined."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.split("\n") if line and not line.startswith("#")]
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in lines]


def test_every_dependency_is_constrained_within_its_bounds():
    pinned = constraints()
    for requirement in requirements():
        version = pinned.get(canonical(requirement.name))
        assert version, f"{requirement.name}: not in constraints.txt"
        assert requirement.specifier.contains(version), (
            f"{requirement}: constraints.txt says {version}"
        )


def test_constraints_are_sorted_exact_versions_without_a_local_part():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").strip().split("\n")
    body = [line for line in lines if not line.startswith("#")]
    assert lines[0].startswith("#")
    assert body == sorted(body, key=str.lower)
    for line in body:
        version = line.split("==")[1]
        assert str(Version(version)) == version and not Version(version).local, line
    assert len(constraints()) == len(body)


def test_transformers_and_trl_are_capped_at_the_tested_minor():
    specifiers = {requirement.name: requirement.specifier for requirement in requirements()}
    for name in ("transformers", "trl"):
        major, minor, *_ = Version(constraints()[name]).release
        assert specifiers[name] == SpecifierSet(f">={major}.{minor},<{major}.{minor + 1}")


def test_the_constraints_hold_the_whole_closure():
    from importlib.metadata import PackageNotFoundError, requires

    pinned, seen = constraints(), set()
    todo = [(requirement.name, requirement.extras) for requirement in requirements()]
    while todo:
        name, extras = todo.pop()
        if (canonical(name), frozenset(extras)) in seen:
            continue
        seen.add((canonical(name), frozenset(extras)))
        assert canonical(name) in pinned, f"{name} is installed, but not in constraints.txt"
        try:
            needs = requires(name) or []
        except PackageNotFoundError:
            continue  # a marker excludes it here
        for need in map(Requirement, needs):
            markers = [{"extra": extra} for extra in ("", *extras)]
            own = re.match(
                r"nvidia-|cuda-|triton", need.name
            )  # torch pins its CUDA libraries itself
            if not own and (need.marker is None or any(need.marker.evaluate(m) for m in markers)):
                todo.append((need.name, need.extras))


def test_project_metadata():
    project = PROJECT["project"]
    assert project["name"] == "llmpipe"
    assert (
        "version" in project["dynamic"]
        and PROJECT["tool"]["hatch"]["version"]["path"] == "llmpipe/__init__.py"
    )
    assert str(Version(llmpipe.__version__)) == llmpipe.__version__
    assert project["scripts"] == {"llmpipe": "llmpipe.front.cli:main"}
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_data_of_the_package_is_not_ignored_by_git():
    """hatchling leaves out what .gitignore names: templates and starter files must not be among
    it."""
    files = [
        str(p)
        for p in (ROOT / "llmpipe").rglob("*")
        if p.suffix in (".jinja", ".j2", ".css", ".yaml", ".jsonl", ".html")
    ]
    assert files
    done = subprocess.run(
        ["git", "-C", str(ROOT), "check-ignore", *files], capture_output=True, text=True
    )
    assert done.stdout == ""


def test_makefile_targets():
    found = targets()
    assert {
        "setup",
        "models",
        "quickstart",
        "check",
        "format",
        "test",
        "faults",
        "bench",
        "constraints",
    } <= set(found)
    for name in ("quickstart", "check", "test", "faults", "bench"):
        first = "setup" if name in ("quickstart", "bench") else "$(TOOLS)"
        assert first in found[name].split(), f"make {name} does not set up first"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    assert set(phony) == set(found)
    for line in makefile.split("\n"):
        if "pip install" in line and ".venv-new" not in line:
            assert "-c constraints.txt" in line, line


def test_ci_runs_what_the_readme_tells_a_newcomer():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = [
        line
        for line in script.read_text(encoding="utf-8").split("\n")
        if line and not line.startswith("#")
    ]
    assert lines[:2] == ["set -euo pipefail", 'cd "$(dirname "${BASH_SOURCE[0]}")/.."']
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in lines[2:]:
        assert re.search(rf"^{re.escape(line)}\b", readme, re.M), f"{line}: not in README.md"
        assert line.removeprefix("make ") in targets()
    assert "make test" in lines


def test_dockerfile():
    steps = instructions()
    installs = [rest for keyword, rest in steps if keyword == "RUN" and "pip install" in rest]
    assert installs
    for rest in installs:
        assert rest.count("pip install") == rest.count("pip install -c /venv/constraints.txt"), rest
    assert all(keyword != "ADD" for keyword, _ in steps)
    users = [rest for keyword, rest in steps if keyword == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert re.fullmatch(r"\d+:\d+", users[-1]), (
        "by number: `runAsNonRoot` of Kubernetes reads no names"
    )
    entries = [rest for keyword, rest in steps if keyword == "ENTRYPOINT"]
    assert entries == ['["tini", "--", "llmpipe"]'], (
        "exec form, so that a stop signal reaches llmpipe and not a shell"
    )
    keywords = [keyword for keyword, _ in steps]
    assert keywords.index("USER") > max(i for i, k in enumerate(keywords) if k == "RUN")
    base = next(rest for keyword, rest in steps if keyword == "ARG" and rest.startswith("BASE="))
    assert re.search(r":3\.11\.[\w.-]+@sha256:[0-9a-f]{64}$", base)
    assert ("ARG", "DEVICE=cuda") in steps


def test_what_submit_and_the_readme_run_is_what_the_image_has():
    """The same folders, options and launcher in docker's template, in docker/README.md and in the
    Dockerfile."""
    readme = (ROOT / "docker" / "README.md").read_text(encoding="utf-8")
    template = (ROOT / "llmpipe" / "front" / "submit" / "docker.jinja").read_text(encoding="utf-8")
    steps = instructions()
    assert ("WORKDIR", "/workspace") in steps and ("VOLUME", '["/cache", "/tmp"]') in steps
    for text in (readme, template):
        assert re.search(r'--volume.?"\$PWD":/workspace ', text)
        assert ":/cache/huggingface --env" in text
        assert "--no-python" in text and re.search(r"--entrypoint.tini .*-- ", text)
    settings = " ".join(rest for keyword, rest in steps if keyword == "ENV")
    assert "HF_HOME=/cache/huggingface" in settings and "HOME=/tmp" in settings


def test_the_image_gets_all_that_is_installed_from():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    assert {
        "llmpipe",
        "recipes",
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
    } <= kept
    assert all((ROOT / name).exists() for name in kept)


def test_no_paths_of_somebodys_machine():
    here = "|".join(["work", "root", "opt", "Users", "mnt"])
    pattern = re.compile(rf"(?<![\w.~:-])/({here})/[\w.-]+|(?<![\w.])/home/(?!llmpipe\b|me\b)\w+")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in shipped()
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
        if pattern.search(line)
    ]
    assert found == []


NAMED = re.compile(r"(?<![\w./-])(?:llmpipe|tests|benchmarks|docs/make|recipes)/[a-z0-9_/-]+\.py\b")
"""A script by its path. A capital stands for a name that is somebody's."""
HISTORY = {"CHANGELOG.md", "RESULTS.md"}  # what they tell of may have gone since


def test_scripts_that_are_named_are_there():
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in shipped()
        if path.name not in HISTORY
        for name in NAMED.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert missing == []


def test_what_contributing_names_of_the_package_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:[a-z_]+/)+[a-z_]+(?:\.py|/))`", text)
    assert "front/asked.py" in names and "models/verify/" in names
    places = (ROOT / "llmpipe", ROOT)
    assert [n for n in names if not any((place / n).exists() for place in places)] == []


def test_rules_of_the_tools_are_for_files_that_are_there():
    """One for `llmpipe.files` would not hold for what lies in a folder of that name."""
    tool = PROJECT["tool"]
    for pattern in tool["ruff"]["lint"]["per-file-ignores"]:
        assert any(ROOT.glob(pattern)), pattern
    modules = [each for rule in tool["mypy"]["overrides"] for each in rule["module"]]
    for module in (each for each in modules if each.startswith("llmpipe.")):
        path = ROOT.joinpath(*module.removesuffix(".*").split("."))
        assert path.is_dir() if module.endswith(".*") else path.with_suffix(".py").is_file(), module


def test_what_is_not_tested_here_is_bounded_and_not_installed_here():
    groups = PROJECT["project"]["optional-dependencies"]
    for extra in UNTESTED:
        assert all(Requirement(line).specifier for line in groups[extra])
        assert not any(extra in line for line in groups["dev"])
    from llmpipe.front.ahead import EXTRAS

    named = {extra.partition("[")[2].rstrip("]") for extra in EXTRAS.values()}
    assert named <= groups.keys() and named >= UNTESTED
