"""Every recipe that ships is valid, says how it is run, and does what its comments promise."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from pydantic import BaseModel

from llmpipe.recipe.check import load, load_pipeline
from llmpipe.recipe.sections import Recipe, is_local
from llmpipe.recipe.yaml import read
from llmpipe.stages import STAGES, schema

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
STARTER = ROOT / "llmpipe" / "report" / "starter" / "sft.yaml"


def recipes_in(path: Path) -> list[Recipe]:
    values, _ = read(path)
    if "stages" in values:
        return [located.recipe for located in load_pipeline(path, schema).stages]
    return [load(path, schema(values["stage"]))]


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every section class that a recipe class reaches, by name."""
    found, todo = {}, [model]
    while todo:
        section = todo.pop()
        if found.setdefault(section.__name__, section) is not section or not section.model_fields:
            continue
        for field in section.model_fields.values():
            todo += [inner for inner in models_in(field.annotation) if inner.__name__ not in found]
    return found


def models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for arg in getattr(annotation, "__args__", ()) for found in models_in(arg)]


def questions(path: Path) -> list[str]:
    rows = [
        json.loads(line)["messages"]
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    ]
    return [message["content"] for row in rows for message in row if message["role"] == "user"]


def test_they_are_all_found():
    names = [str(path.relative_to(ROOT / "recipes")) for path in SHIPPED]
    assert names == [
        "alpaca.yaml",
        "compressed.yaml",
        "d12.yaml",
        "dpo.yaml",
        "eval.yaml",
        "export.yaml",
        "from-zero.yaml",
        "gpt2-124m.yaml",
        "gpt2-hellaswag.yaml",
        "grpo.yaml",
        "gsm8k.yaml",
        "guess.yaml",
        "kto.yaml",
        "llama-1b.yaml",
        "llama-8b-fsdp.yaml",
        "lora.yaml",
        "ppo.yaml",
        "pretrain.yaml",
        "qlora-8b.yaml",
        "qlora.yaml",
        "quickstart.yaml",
        "qwen-32b-qlora.yaml",
        "r1-zero.yaml",
        "reverse.yaml",
        "reward.yaml",
        "sample.yaml",
        "sentiment.yaml",
        "sft.yaml",
        "shop.yaml",
        "sums-grpo.yaml",
        "sums-sample.yaml",
        "sums.yaml",
        "tiny/dpo.yaml",
        "tiny/eval.yaml",
        "tiny/export.yaml",
        "tiny/grpo.yaml",
        "tiny/kto.yaml",
        "tiny/ppo.yaml",
        "tiny/reward.yaml",
        "tiny/sample.yaml",
        "tiny/sft.yaml",
        "tiny/turns.yaml",
        "tldr.yaml",
        "zephyr.yaml",
    ]


@pytest.mark.parametrize("path", [*SHIPPED, STARTER], ids=lambda path: str(path.relative_to(ROOT)))
def test_valid_and_begins_with_its_command(path):
    recipes = recipes_in(path)
    assert recipes
    command = path.read_text(encoding="utf-8").split("\n")[0]
    verb = "run" if "stages" in read(path)[0] else recipes[0].stage
    assert (
        command == f"# llmpipe {verb} {'sft.yaml' if path == STARTER else path.relative_to(ROOT)}"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_local_files_exist(path):
    for recipe in recipes_in(path):
        sources = [source.path for source in recipe.rows().values()]
        for name in [*recipe.references().values(), *sources]:
            made_by_a_command = name.startswith(
                (
                    "./models/",
                    "./from-zero/",
                    "./runs/",
                    "./sums/",
                    "./sentiment/",
                    "./reverse/",
                    "./guess/",
                )
            )
            if is_local(name) and not made_by_a_command:
                assert (ROOT / name).exists(), f"{path}: {name}"
        assert recipe.run.startswith("runs/"), "runs/ is what .gitignore leaves out"


def test_runs_do_not_overlap():
    places = [(recipe.run, recipe.artifact) for path in SHIPPED for recipe in recipes_in(path)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_the_recipe_that_it_takes_when_none_is_named(stage):
    path = ROOT / "recipes" / f"{stage}.yaml"
    assert path in SHIPPED
    assert load(path, schema(stage)).run == f"runs/{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_is_documented(stage):
    missing = [
        f"{name}.{field_name}"
        for name, section in sections(schema(stage)).items()
        for field_name, field in section.model_fields.items()
        if not field.description
    ]
    assert missing == []


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_of_the_json_schema_is_documented(stage):
    document = schema(stage).model_json_schema()
    parts = {stage: document, **document.get("$defs", {})}
    missing = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, field in part.get("properties", {}).items()
        if not field.get("description")
    ]
    assert missing == []


def test_quickstart_runs_on_any_machine():
    recipe, *learned, measured = recipes_in(ROOT / "recipes" / "quickstart.yaml")
    policies = [f"artifact:{stage.artifact}" for stage in learned if stage.stage != "reward"]
    assert list(measured.models.values()) == [recipe.model, "artifact:sft", *policies]
    assert measured.gate
    assert all(stage.launch.processes == 1 for stage in (recipe, *learned))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert recipe.model == "./" + re.search(r"^MODEL := (.*)$", makefile, re.M)[1]


@pytest.mark.parametrize("name", ["alpaca", "sft", "tiny/sft"])
def test_recipes_without_a_process_count_fit_eight_gpus(name):
    (recipe,) = recipes_in(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.launch.processes == "auto"
    assert recipe.optim.batch_size % 8 == 0


def lines_of(name: str) -> list[str]:
    """The lines of recipes/NAME.jsonl."""
    *lines, end = (ROOT / "recipes" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    assert end == ""
    return lines


def made_by(script: str) -> dict:
    """What is in recipes/make_SCRIPT.py."""
    return runpy.run_path(str(ROOT / "recipes" / f"make_{script}.py"))


def test_questions_are_what_the_generator_makes():
    made = made_by("questions")
    for name, rows, count in zip(made["FILES"], made["rows"](), (1100, 470), strict=True):
        lines = lines_of(name)
        assert [json.loads(line) for line in lines] == rows
        assert len(set(lines)) == len(lines) == count


def test_quickstart_rows_are_what_the_generator_makes():
    made = made_by("sums")["quick_rows"]()
    for name, rows in made.items():
        assert [json.loads(line) for line in lines_of(f"quickstart/{name}")] == rows
    shipped = {path.stem for path in (ROOT / "recipes" / "quickstart").iterdir()}
    assert shipped == set(made)


def test_questions_are_tested_on_what_was_not_trained_on():
    trained, tested = (
        set(questions(ROOT / "recipes" / f"{name}.jsonl"))
        for name in ("questions", "questions-test")
    )
    assert len(tested) == 470 and not tested & trained


def numbers_in(row: dict) -> frozenset[str]:
    """The operands of a row; a + b is b + a."""
    return frozenset(re.findall(r"\d+", json.dumps(row.get("prompt", row.get("messages"))[:1])))


@pytest.mark.parametrize("files", ["rows", "quick_rows"])
def test_answers_to_sums_are_right_and_wrong_as_they_are_called(files):
    made = made_by("sums")
    for name, rows in made[files]().items():
        for row in rows:
            asked, *answers = (
                message["content"]
                for side in ("messages", "prompt", "chosen", "rejected")
                for message in row.get(side, [])
            )
            right = sum(int(number) for number in re.findall(r"\d+", asked))
            assert int(answers[0]) == right, (name, row)
            if "rejected" in row:
                off = abs(int(answers[1]) - right)
                assert off >= (made["FAR"] if name == "far-pairs" else 1), (name, row)


def test_the_quickstart_is_tested_on_other_expressions():
    asked = {
        name: {numbers_in(row) for row in rows}
        for name, rows in made_by("sums")["quick_rows"]().items()
    }
    assert asked["pairs"] == asked["far-pairs"] and len(asked["pairs"]) == 1600
    assert len(asked["test"]) == 400
    assert not asked["form"] & (asked["pairs"] | asked["test"])
    assert not asked["pairs"] & asked["test"]


def test_sums_are_tested_on_other_expressions():
    """Split by expression: a + b is b + a."""
    files = made_by("sums")["rows"]()
    asked = {name: [numbers_in(row) for row in rows] for name, rows in files.items()}
    assert asked["test"] == asked["test-pairs"] and len(asked["test"]) >= 400
    assert set(asked["asks"]) == set(asked["pairs"]) and len(set(asked["asks"])) == len(
        asked["asks"]
    )
    parts = [set(asked[name]) for name in ("form", "pairs", "test")]
    assert [len(part) for part in parts] == [
        len(asked["form"]),
        len(asked["pairs"]) / 8,
        len(asked["test"]),
    ]
    assert len({json.dumps(row, sort_keys=True) for row in files["pairs"]}) == len(files["pairs"])
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert {max(map(len, part)) for part in asked["test"]} == {1, 2}


def test_from_zero_is_measured_on_what_it_was_not_taught():
    made = made_by("from_zero")
    learned, held_out = made["texts"]()
    assert not set(learned) & set(held_out) and len(held_out) > 30
    assert {"types", "library.types"} <= set(learned | held_out)  # a topic and a module
    files = made["rows"]()
    assert [len(files[name]) for name in ("form", "pairs", "test")] == [200, 2400, 400]
    asked = {name: {numbers_in(row) for row in rows} for name, rows in files.items()}
    assert sum(map(len, asked.values())) == 3000 == len(set.union(*asked.values()))
    for row in (row for rows in files.values() for row in rows):
        ask, *answers = (
            message["content"]
            for side in ("messages", "prompt", "chosen", "rejected")
            for message in row.get(side, [])
        )
        first, second = map(int, re.findall(r"\d+", ask))
        assert (
            answers[0] == ("Yes." if first > second else "No.") != answers[-1] or len(answers) == 1
        )


def test_answers_to_questions_are_right():
    """An independent reading of the prompts: sums, differences, comparisons, letters."""
    checked = 0
    for line in lines_of("questions") + lines_of("questions-test"):
        prompt, answer = (message["content"] for message in json.loads(line)["messages"])
        numbers = [int(n) for n in re.findall(r"\d+", prompt)]
        if match := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\.", answer):
            a, b, c = int(match[1]), int(match[3]), int(match[4])
            assert sorted(numbers) == sorted((a, b))
            assert c == (a + b if match[2] == "+" else a - b), line
        elif match := re.fullmatch(r"(\d+) is larger\.", answer):
            assert int(match[1]) == max(numbers), line
        elif match := re.fullmatch(r"(\d+) is (even|odd)\.", answer):
            assert numbers == [int(match[1])] and (numbers[0] % 2 == 0) == (match[2] == "even"), (
                line
            )
        elif match := re.fullmatch(r"'(\w+)' has (\d+) letters\.", answer):
            assert match[1] in prompt and len(match[1]) == int(match[2]), line
        elif match := re.fullmatch(r"(\w(?:-\w)+)\.", answer):
            assert f"'{match[1].replace('-', '')}'" in prompt, line
        elif match := re.fullmatch(r"(\w+, \w+, \w+)\.", answer):
            words = match[1].split(", ")
            assert words == sorted(words) and all(word in prompt for word in words), line
        else:
            continue
        checked += 1
    assert checked > 1000


@pytest.mark.parametrize(
    ("name", "rows"), [("quickstart", "quickstart/form"), ("sft", "questions")]
)
def test_sample_prompts_are_not_trained_on(name, rows):
    recipe = recipes_in(ROOT / "recipes" / f"{name}.yaml")[0]
    assert len(recipe.samples.prompts) >= 3
    assert not set(recipe.samples.prompts) & set(questions(ROOT / "recipes" / f"{rows}.jsonl"))


def test_the_tiny_model_is_tiny_and_loads_nothing_but_data():
    folder = ROOT / "recipes" / "tiny" / "model"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 700_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["vocab_size"], config["eos_token_id"], config["pad_token_id"]) == (512, 2, 0)
    asked = questions(ROOT / "recipes" / "tiny" / "rows.jsonl")
    (recipe,) = recipes_in(ROOT / "recipes" / "tiny" / "sft.yaml")
    assert [prompt in asked for prompt in recipe.samples.prompts] == [True, True, False]
