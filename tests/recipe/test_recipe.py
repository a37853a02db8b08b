"""Recipes: every problem at once, each with its line; what YAML would let pass is refused."""

import random
import re
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmpipe.errors import UserError
from llmpipe.files.json import digest
from llmpipe.recipe.check import load, load_pipeline
from llmpipe.recipe.sections import Hosted, Recipe, science
from llmpipe.recipe.trainer import config_fields
from llmpipe.recipe.yaml import parse
from llmpipe.record import Record
from llmpipe.stages import STAGES, Judging, prepared_by, schema, stage

SFT = schema("sft")
RECIPES = Path(__file__).parents[2] / "recipes"

GOOD = """\
stage: sft
run: runs/x
model: ./model
data:
  train:
    - path: ./rows.jsonl
      weight: 2
    - {path: tatsu-lab/alpaca, limit: 10}
  eval: {holdout: 0.1}
optim:
  learning_rate: 1e-5
evaluation: {every: 5}
"""


def write(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def problems(tmp_path, text, sets=()):
    with pytest.raises(UserError) as caught:
        load(write(tmp_path, text), SFT, list(sets))
    assert caught.value.code == 2
    return str(caught.value).replace(str(tmp_path) + "/", "").splitlines()


def test_reads_a_recipe(tmp_path):
    recipe = load(
        write(tmp_path, GOOD),
        SFT,
        ["optim.epochs=2", "data.train.1.limit=5", "launch.processes=2", "seed=7"],
    )
    assert recipe.optim.learning_rate == 1e-5
    assert (
        recipe.optim.epochs,
        recipe.data.train[1].limit,
        recipe.launch.processes,
        recipe.seed,
    ) == (2.0, 5, 2, 7)
    assert recipe.data.train[0].weight == 2.0
    assert recipe.artifact == "sft"


def test_every_problem_at_once_with_its_line(tmp_path):
    text = (
        GOOD.replace("weight: 2", "wieght: 2")
        .replace("1e-5", "fast")
        .replace("model: ./model", "modle: ./model")
    )
    found = problems(tmp_path, text)
    assert any(
        line.startswith("r.yaml:3: modle: unknown key; did you mean 'model'?") for line in found
    )
    assert any(
        line.startswith("r.yaml:7: data.train.0.wieght: unknown key; did you mean 'weight'?")
        for line in found
    )
    assert any(
        line.startswith("r.yaml:11: optim.learning_rate: should be a valid number, not 'fast'")
        for line in found
    )
    assert any("model: required, but missing" in line for line in found)
    assert len(found) == 4


def fields(model, prefix=""):
    """(dotted path of the section, field name) of every field of a recipe."""
    from llmpipe.recipe.check import fields_of, sections_in

    for name, field in fields_of(model).items():
        yield prefix, name
        for inner in sections_in(field.annotation):
            yield from fields(inner, f"{prefix}{name}.")


@pytest.mark.parametrize(("section", "name"), sorted(set(fields(SFT))))
def test_a_typo_in_every_field_gives_the_near_name_and_the_line(tmp_path, section, name):
    typo = (
        name + "s"
        if len(name) < 4
        else name[:2] + name[3] + name[2] + name[4:]
        if name[2] != name[3]
        else name[:-1]
    )
    lines = ["stage: sft", "run: runs/x", "model: ./m"]
    parts = [p for p in section.split(".") if p]
    indent = 0
    for part in parts:
        lines.append("  " * indent + f"{part}:")
        indent += 1
        if part in ("train", "sources"):
            lines.append("  " * indent + "- path: ./a.jsonl")
            indent += 1
    lines.append("  " * indent + f"{typo}: 1")
    found = problems(tmp_path, "\n".join(lines))
    mine = [line for line in found if line.startswith(f"r.yaml:{len(lines)}: ") and typo in line]
    assert mine and f"did you mean '{name}'?" in mine[0], found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x", "r.yaml:1: anchors"),
        ("a: 1\nb: *x", "r.yaml:2: aliases"),
        ("a: !!python/object:os.system x", "r.yaml:1: tags"),
        ("a: 1\nb: 2\na: 3", "r.yaml:3: a: given twice; the first is on line 1"),
        ("a: [1, 2", "r.yaml:1: not valid YAML"),
        ("a: 1\n\tb: 2", "r.yaml:2: not valid YAML"),
        ("", "r.yaml:1: the file is empty"),
        ("- 1", "r.yaml:1: a recipe is a mapping"),
        ("? [1]\n: 2", "r.yaml:1: a key must be a plain word"),
        ("a: 1\n---\nb: 2", "r.yaml:2: not valid YAML"),
        ("stages: []", "r.yaml:1: this is a pipeline"),
    ],
)
def test_refuses_what_yaml_would_let_pass(tmp_path, text, message):
    assert problems(tmp_path, text)[0].startswith(message)


def test_scalars_are_yaml_1_2():
    values, _ = parse(
        "a: 1e-5\nb: no\nc: 12:30\nd: 0x10\ne: 1_000\nf: ~\ng: '1'\nh: .5\ni: off\nj: 1.\nk: 010",
        "x",
    )
    assert values == {
        "a": 1e-5,
        "b": "no",
        "c": "12:30",
        "d": "0x10",
        "e": 1000,
        "f": None,
        "g": "1",
        "h": 0.5,
        "i": "off",
        "j": 1.0,
        "k": 10,
    }


def test_sets_are_located(tmp_path):
    assert problems(tmp_path, GOOD, ["optim.learning_rte=1"])[0].startswith(
        "--set optim.learning_rte=1: optim.learning_rte: unknown key; did you mean 'learning_rate'?"
    )
    assert "no data.train.7" in problems(tmp_path, GOOD, ["data.train.7.path=x"])[0]
    assert "expected key.sub=value" in problems(tmp_path, GOOD, ["novalue"])[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("novalue", "expected key.sub=value\n.*--set optim.learning_rate=1e-5"),
        ("=1", "expected key.sub=value"),
        ("optim..epochs=1", "expected key.sub=value"),
        ("optim.epochs=two", "optim.epochs: should be a valid number, not 'two'"),
        ("optim=3", r"optim: should be a section such as {learning_rate: ...}, not 3"),
        ("adapter=16", r"adapter: should be a section such as {rank: 16}, not 16"),
        ("data.train=x", r"data.train: should be a list, such as \[one, two\], not 'x'"),
        ("samples.prompts=x", "samples.prompts: should be a list"),
        ("data.packing=yes", "data.packing: should be true or false, not 'yes'"),
        ("model=135", "model: should be text, not 135; in quotes it is"),
        ("model=", "model: should be text, not None$"),
        ("data.train.7.path=x", "no data.train.7 in the recipe\n.*data.train.0 to data.train.1"),
        ("data.train.path=x", "no data.train.path in the recipe\n.*data.train is a list"),
        ("optim.0=x", "no optim.0 in the recipe\n.*optim has keys, and no places: learning_rate"),
        ("run.name=x", "no run.name in the recipe\n.*run is 'runs/x', and holds no keys"),
        ("model=[", "not valid YAML"),
    ],
)
def test_a_bad_set_is_refused_with_what_to_write(tmp_path, given, message):
    said = problems(tmp_path, GOOD, [given])
    assert said[0].startswith(f"--set {given}:") and len(said) <= 2
    assert re.search(message, "\n".join(said)), said


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sft", "model=''", "model: names nothing; give a Hub id, or a path"),
        ("sft", "model=' '", "model: names nothing"),
        ("pretrain", "tokenizer=''", "tokenizer: names nothing"),
        ("eval", "models.base=''", "models.base: names nothing"),
        ("ppo", "reward.0={model: ''}", "reward.0: names nothing"),
        ("ppo", "reward.0={function: ''}", "reward.0: function: '' is not ./file.py:name"),
        ("ppo", "reward.0={verifier: regex, pattern: ''}", "pattern: '' fits any answer"),
        ("ppo", "reward.0={verifier: regex, pattern: '.*'}", r"pattern: '\.\*' fits any answer"),
        ("eval", "tasks.0.pattern=a|", r"pattern: 'a\|' fits any answer"),
        ("eval", "gate.regex={min: 0.9, max: 0.1}", "no number is at least 0.9 and at most 0.1"),
        ("sft", "data.train.0.revision=abc", "revision is of a dataset of the Hub, and ./rows"),
        ("sft", "run=''", "run: names no folder"),
        ("sft", "run=' '", "run: names no folder"),
        ("sft", "run=s3://bucket/run", "run: 's3://bucket/run' is an address"),
        ("sft", "run=~nobody-here/x", "run: '~nobody-here/x': there is no home of that name"),
    ],
)
def test_what_names_nothing_is_refused_in_every_field(tmp_path, name, given, message):
    texts = {"sft": GOOD, "eval": EVAL, "pretrain": "stage: pretrain", "ppo": "stage: ppo\n" + PPO}
    with pytest.raises(UserError, match=message) as refused:
        load(write(tmp_path, texts[name]), schema(name), [given])
    assert refused.value.code == 2


EVAL = """\
stage: eval
run: runs/x
models: {base: ./m}
tasks: [{task: generate, data: [{path: ./rows.jsonl}], score: [regex], pattern: a}]
"""

PPO = """\
run: runs/x
reward: [{verifier: json}]
"""

PIPELINE = """\
run: runs/p
stages:
  - {stage: sft, model: ./m, data: {train: [{path: ./a.jsonl}]}, optim: {learning_rate: 1e-5}}
  - {stage: dpo, name: v1.5, model: 'artifact:sft', data: {train: [{path: ./a.jsonl}]},
     optim: {learning_rate: 1e-5}}
"""


def test_sets_of_a_pipeline_name_the_stage(tmp_path):
    sets = ["sft.optim.epochs=2", "v1.5.beta=0.2", "run=runs/q", "stages.1.seed=7"]
    first, second = load_pipeline(write(tmp_path, PIPELINE), schema, sets).stages
    assert (first.recipe.optim.epochs, second.recipe.beta, second.recipe.seed) == (2.0, 0.2, 7)
    assert first.recipe.run == second.recipe.run == "runs/q"
    assert first.line("optim.epochs") == "--set sft.optim.epochs=2"
    assert second.line("seed") == "--set stages.1.seed=7"
    assert second.line("data.train.0.path").endswith("r.yaml:4")
    assert second.line("beta.of.nothing") == "--set v1.5.beta=0.2"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "optim.epochs=2",
            "stages: sft, v1.5\n.*say of which one: --set sft.optim.epochs=2",
        ),
        ("stf.optim.epochs=2", "say of which one: --set sft.optim.epochs=2"),
        ("sft=2", "say of which one: --set sft.FIELD=2"),
        ("stages.2.seed=7", "no stages.2 in the recipe\n.*stages.0 to stages.1"),
        ("stages=7", "a pipeline has `run:` and a list `stages:`"),
        ("novalue", "expected key.sub=value"),
        ("sft.data.train.4.path=x", "no stages.0.data.train.4 in the recipe"),
    ],
)
def test_a_bad_set_of_a_pipeline_is_refused_with_what_to_write(tmp_path, given, message):
    with pytest.raises(UserError) as refused:
        load_pipeline(write(tmp_path, PIPELINE), schema, [given])
    assert refused.value.code == 2 and re.search(message, str(refused.value))


def test_a_bad_value_of_a_pipeline_is_shown_as_it_was_given(tmp_path):
    asked = load_pipeline(write(tmp_path, PIPELINE), schema, ["sft.optim.epochs=two", "v1.5.bta=1"])
    assert asked.problems == [
        "--set sft.optim.epochs=two: optim.epochs: should be a valid number, not 'two'",
        "--set v1.5.bta=1: bta: unknown key; did you mean 'beta'?",
    ]


def test_a_recipe_for_another_command_says_which(tmp_path):
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match=rf"r.yaml:1: .* sft, not for dpo\n.*`llmpipe sft {path}`"):
        load(path, schema("dpo"))
    with pytest.raises(UserError, match=rf"r.yaml:1: .* not a pip.*\n.*`llmpipe sft {path}`"):
        load_pipeline(path, schema)
    path = write(tmp_path, PIPELINE)
    with pytest.raises(UserError, match=rf"r.yaml:2: .* several stages\n.*`llmpipe run {path}`"):
        load(path, SFT)


def test_the_escape_hatch_is_checked_by_name(tmp_path):
    assert len(config_fields("trl", "trainer.sft_config", "SFTConfig")) > 100
    text = (
        GOOD
        + "trainer:\n"
        + "  neftune_noise_alhpa: 5\n"
        + "  learning_rate: 1\n"
        + "  activation_ofloading: true\n"
        + "  save_stepz: 4\n"
    )
    found = problems(tmp_path, text)
    assert found[0] == (
        "r.yaml:14: trainer.neftune_noise_alhpa: SFTConfig has no such field; "
        "did you mean 'neftune_noise_alpha'?"
    )
    assert (
        found[1]
        == "r.yaml:15: trainer.learning_rate: llmpipe sets this itself; use optim.learning_rate"
    )
    assert "'activation_offloading': is refused: " in found[2]
    assert found[3].endswith("'save_steps': llmpipe sets this itself; use checkpoint.every")
    recipe = load(write(tmp_path, GOOD + "trainer: {neftune_noise_alpha: 5}"), SFT)
    assert science(recipe)["trainer"] == {"neftune_noise_alpha": 5}


def test_identity_is_science_only(tmp_path):
    one = load(write(tmp_path, GOOD), SFT)
    for same in (
        "run=other",
        "name=b",
        "log.every=3",
        "checkpoint.every=7",
        "launch.threads=3",
        "data.processes=2",
    ):
        assert digest(science(load(write(tmp_path, GOOD), SFT, [same]))) == digest(science(one)), (
            same
        )
    for other in (
        "seed=1",
        "optim.epochs=2",
        "data.max_length=99",
        "optim.precision=fp32",
        "samples.max_new_tokens=3",
    ):
        assert digest(science(load(write(tmp_path, GOOD), SFT, [other]))) != digest(science(one)), (
            other
        )


def test_pipeline(tmp_path):
    inner = "\n".join(
        "    " + line for line in GOOD.splitlines() if not line.startswith("run:")
    ).replace("    stage", "  - stage", 1)
    path = write(tmp_path, f"run: runs/p\nstages:\n{inner}\n")
    asked = load_pipeline(path, schema)
    assert [located.recipe.run for located in asked.stages] == ["runs/p"] and not asked.problems
    path.write_text(
        path.read_text().replace("learning_rate", "learning_rat").replace("run:", "rum:")
    )
    asked = load_pipeline(path, schema)
    assert asked.stages == [None] and asked.names == ["sft"]
    problems = "\n".join(asked.problems)
    assert "r.yaml:1: rum: unknown key; did you mean 'run'?" in problems
    assert "did you mean 'learning_rate'?" in problems


def mutate(text: str, rng: random.Random) -> bytes:
    """A recipe with one to four random hurts: bytes, lines, words, indentation."""
    data = bytearray(text.encode())
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(7), rng.randrange(max(1, len(data)))
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = rng.choice(
                [
                    b"&a ",
                    b"*a ",
                    b"!!x ",
                    b": ",
                    b"- ",
                    b"[",
                    b"}",
                    b"\t",
                    b"'",
                    b'"',
                    b"\x00",
                    b"%",
                    b"{a: ",
                ]
            )
        elif kind == 3:
            data[at:at] = "".join(rng.choices(string.printable, k=5)).encode()
        elif kind == 4:
            lines = bytes(data).split(b"\n")
            rng.shuffle(lines)
            data = bytearray(b"\n".join(lines))
        elif kind == 5:
            data[at:at] = bytes(data[at : at + 40])
        else:
            data[at:at] = rng.choice(
                [b"1e999", b".nan", b"-1", b"null", b"[]", b"{}", b"true", b"9" * 400]
            )
    return bytes(data)


def check_fuzzed(path, data):
    """Loads, or is refused with exit 2 and a place: nothing else may come out."""
    path.write_bytes(data)
    try:
        load(path, SFT)
    except UserError as error:
        assert error.code == 2
        assert all(line.startswith((f"{path}:", "--set")) for line in error.message.splitlines()), (
            error.message
        )


def test_fuzz_mutations(tmp_path):
    """R6: 5,000 mutated recipes."""
    rng = random.Random(20261121)
    seeds = [GOOD, *(p.read_text() for p in sorted(RECIPES.rglob("*.yaml")))]
    for _ in range(5000):
        check_fuzzed(tmp_path / "r.yaml", mutate(rng.choice(seeds), rng))


@settings(max_examples=300)
@given(st.text(max_size=200))
def test_fuzz_text(tmp_path_factory, text):
    check_fuzzed(tmp_path_factory.getbasetemp() / "h.yaml", text.encode("utf-8", "replace"))


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(sorted(SFT.model_fields)), YAML_VALUES))
def test_fuzz_values(tmp_path_factory, values):
    import yaml

    check_fuzzed(
        tmp_path_factory.getbasetemp() / "h.yaml",
        yaml.safe_dump(values, allow_unicode=True).encode(),
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_offers_what_is_asked_of_it(name):
    module = stage(name)
    assert issubclass(module.Schema, Recipe) and issubclass(prepared_by(module), Record)
    assert isinstance(module.MAKES, str) and isinstance(module.PROGRESS, str) and module.ACCEPTS
    assert callable(module.prepare) and callable(module.train)
    assert isinstance(module, Judging) == (name == "eval")
    if issubclass(module.Schema, Hosted):
        config = module.Schema.trainer_config
        fields = config_fields(config.package, config.module, config.name)
        assert "learning_rate" in fields and config.owned.keys() <= fields
