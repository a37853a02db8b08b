"""What one stage hands to the next. R11: every kind of artifact as input of every stage: it
runs, or is refused in one line with code 3. R9, R12: artifacts of preferences that are damaged,
or whose base is another one, are refused."""

import json
import pydoc_data.topics
import shutil
import signal

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.run.artifact import Artifact
from tests import life, store
from tests.models import test_adapters
from tests.rl import test_ppo
from tests.training import test_preference, test_pretrain

QUICK = {"optim__steps": 2, "evaluation": {}}
ADAPTER = {"adapter": {"rank": 4, "alpha": 8}}
MADE = {  # artifacts by name, and their kind
    "pretrain": "model",
    "sft": "model",
    "lora": "adapter",
    "lora-merged": "model",
    "qlora": "adapter",
    "reward": "reward-model",
    "reward-lora": "reward-model",
    "dpo": "adapter",
    "ppo": "model",
    "eval": "evaluation",
}
STAGES = [
    "pretrain",
    "sft",
    "lora",
    "qlora",
    "reward",
    "ppo",
    "grpo",
    "dpo",
    "kto",
    "eval",
    "a reward of ppo",
]


def recipe(stage, run, texts, reference, **changes):
    """The path of a recipe of `stage` that takes `reference`."""
    fits = {"data__max_rejected": 1.0}  # the pretrained tokenizer makes long rows
    if stage == "pretrain":
        values = {"architecture": None, "tokenizer": None, "optim__steps": 2, **changes}
        return test_pretrain.write(run, texts, model=reference, **values)
    if stage == "eval":
        tasks = [{"task": "preference", "data": [{"path": str(test_preference.PAIRS)}]}]
        values = {
            "stage": "eval",
            "run": str(run),
            "models": {"it": reference},
            "tasks": tasks,
            "precision": "fp32",
        }
        path = run.parent / "eval.yaml"
        path.write_text(json.dumps({**values, "launch": {"threads": 1}, **changes}))
        return path
    if stage in ("reward", "dpo", "kto"):
        return test_preference.write(run, stage, model=reference, **QUICK, **fits, **changes)
    if stage == "a reward of ppo":
        return test_ppo.write(run, reward=[{"model": reference}], **{**QUICK, **changes})
    if stage in ("ppo", "grpo"):
        of_stage = test_ppo.GRPO if stage == "grpo" else {}
        return test_ppo.write(run, model=reference, **{**QUICK, **fits, **of_stage, **changes})
    if stage == "sft":
        return life.write(run, model=reference, **{**QUICK, **fits, **changes})
    return test_adapters.write(run, stage, model=reference, **{**QUICK, **fits, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with an artifact of every kind in every form, and the texts that pretrain reads."""
    home = tmp_path_factory.mktemp("handoff")
    texts, run = store.texts(), home / "run"
    # its own tokenizer makes longer prompts than the other models'
    store.made(test_pretrain.write(run, texts, optim__steps=2, data__max_length=128))
    store.made(recipe("sft", run, texts, str(life.TINY / "model")))
    store.made(
        recipe("lora", run, texts, "artifact:sft", adapter={"rank": 4, "alpha": 8, "merge": True})
    )
    store.made(recipe("qlora", run, texts, "artifact:sft"))
    store.made(recipe("reward", run, texts, "artifact:sft"))
    store.made(recipe("reward", run, texts, "artifact:sft", name="reward-lora", **ADAPTER))
    store.made(recipe("dpo", run, texts, "artifact:sft", **ADAPTER))
    store.made(recipe("ppo", run, texts, "artifact:sft"))
    store.made(recipe("eval", run, texts, "artifact:sft"))
    return run, texts


def takes(stage, kind):
    if stage == "a reward of ppo":
        return kind == "reward-model"
    return kind in ("model", "adapter") or (stage == "eval" and kind == "reward-model")


def test_it_is_every_kind(made):
    run, _ = made
    assert {
        name: json.loads((run / name / "manifest.json").read_text())["kind"] for name in MADE
    } == MADE


RUNS = [(stage, name) for stage in STAGES for name, kind in MADE.items() if takes(stage, kind)]
OFTEN = [(stage, name) for stage, name in RUNS if name == "lora" or "reward" in name]


@pytest.mark.parametrize(
    ("stage", "name"), [life.by_the_dozen(*p) if p not in OFTEN else p for p in RUNS]
)
def test_it_runs(made, stage, name):
    run, texts = made
    four = {"quantization": {"bits": 4}} if stage == "lora" and name == "qlora" else {}
    artifact = life.command(
        recipe(stage, run, texts, f"artifact:{name}", name=f"{stage.split()[-1]}-of-{name}", **four)
    )
    assert name in [parent.name for parent in artifact.verify().parents]


@pytest.mark.parametrize("stage", STAGES)
def test_it_is_refused(made, stage):
    run, texts = made
    names = [name for name, kind in MADE.items() if not takes(stage, kind)]
    for name in names:
        with pytest.raises(UserError, match=f"is of kind '{MADE[name]}'") as refused:
            life.command(recipe(stage, run, texts, f"artifact:{name}", name="refused"))
        assert refused.value.code == 3 and "\n" not in refused.value.message
    assert names
    assert not (run / "refused").exists()


@pytest.mark.parametrize("name", ["reward", "reward-lora", "dpo"])
def test_a_damaged_artifact_is_refused(made, tmp_path, name):
    """R9: every file flipped, cut, removed, and one more: exit 3, the file named."""
    run, _ = made
    (tmp_path / "run").mkdir()
    shutil.copytree(
        run / name, tmp_path / "run" / name, ignore=shutil.ignore_patterns("checkpoints")
    )
    artifact = Artifact(tmp_path / "run" / name)
    hurts = {
        "flipped": lambda data: bytes([data[0] ^ 4]) + data[1:],
        "cut": lambda data: data[:-1],
        "removed": None,
    }
    for at in artifact.verify().files:
        victim = artifact.path / at
        whole = victim.read_bytes()
        for hurt, change in hurts.items():
            victim.unlink()
            if change and whole:
                victim.write_bytes(change(whole))
            if not whole and change:
                victim.write_bytes(whole)
                continue
            with pytest.raises(UserError) as refused:
                artifact.verify()
            assert refused.value.code == 3 and at in str(refused.value), (at, hurt)
            victim.write_bytes(whole)
    (artifact.model / "more.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"more\.safetensors") as refused:
        artifact.verify()
    assert refused.value.code == 3


@pytest.mark.parametrize("hurt", ["base", "missing", "renamed"])
@pytest.mark.parametrize("name", ["reward-lora", "dpo"])
def test_an_adapter_on_another_base_is_refused(made, tmp_path, name, hurt):
    """R12."""
    run, texts = made
    shutil.copytree(run, tmp_path / "run")
    run = tmp_path / "run"
    if hurt == "base":
        life.command(recipe("sft", run, texts, str(life.TINY / "model"), seed=9), fresh=True)
    else:
        test_adapters.publish_wrongly(Artifact(run / name), hurt)
    path = recipe("eval", run, texts, f"artifact:{name}", name="refused")
    with pytest.raises(UserError) as refused:
        life.command(path)
    words = {"base": "not the one it was trained on", "missing": "is missing", "renamed": "layers."}
    assert refused.value.code == 3 and words[hurt] in str(refused.value)


@pytest.mark.parametrize(
    "stage", ["sft", "dpo", "ppo killed", *map(life.by_the_dozen, ("ppo", "ppo in two"))]
)
def test_a_tracker_gets_what_metrics_have(tmp_path, monkeypatch, stage):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "TENSORBOARD_LOGGING_DIR"):
        monkeypatch.setenv(name, "")  # which is undone
        monkeypatch.delenv(name)
    stage, _, how = stage.partition(" ")
    log = {"every": 1, "trackers": ["tensorboard"]}
    write = {"sft": life.write, "dpo": test_preference.write, "ppo": test_ppo.write}[stage]
    named = (tmp_path / "run", stage) if stage == "dpo" else (tmp_path / "run",)
    more = {"killed": {"checkpoint": {"every": 1}}, "in two": {"launch__processes": "auto"}}.get(
        how, {}
    )
    path = write(*named, log=log, optim__steps=2, **more)
    if how == "killed":
        trial = life.Trial(path, hook="ppo_kill_after_1")
        assert trial.wait() == -signal.SIGKILL, trial.text()
    if how == "in two":
        artifact = life.pair(path)
    else:
        artifact = life.command(path)
    home = artifact.run / ".trackers" / artifact.name
    key, tag = ("objective/scores",) * 2 if stage == "ppo" else ("loss", "train/loss")
    lines = [
        json.loads(line) for line in (artifact.path / "metrics.jsonl").read_text().splitlines()
    ]
    written = [(line["step"], line[key]) for line in lines if key in line]
    assert len(written) == 2
    points = []
    for events in home.rglob("events.*"):
        seen = EventAccumulator(str(events))
        seen.Reload()
        points += seen.Scalars(tag) if tag in seen.Tags()["scalars"] else []
    assert sorted((point.step, pytest.approx(point.value, rel=1e-5)) for point in points) == written
    if stage == "ppo":
        asked = [yaml.safe_load(file.read_text()) for file in home.rglob("hparams.yml")]
        assert [one["optim learning_rate"] for one in asked] == [2e-3] * (
            2 if how == "killed" else 1
        )


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}


def other(folder, kind, **more):
    """A model of another architecture with random weights, under the tiny tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(life.TINY / "model")
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tokens |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **tokens, **more))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


EXPERTS = LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS = {
    "gpt_neox": {"intermediate_size": 64},  # Pythia: its head has a name of its own
    "gemma2": LLAMA | {"query_pre_attn_scalar": 16},  # bounded logits, and no sdpa
    "qwen3_moe": EXPERTS,  # returns its routing in training, which breaks generation
    "cohere": LLAMA | {"logit_scale": 0.25},  # transformers has no reward model of it
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_walk_the_road(tmp_path, kind):
    run, model = tmp_path / "run", other(tmp_path / kind, kind, **OTHERS[kind])
    sft = life.command(life.write(run, model=model, data__packing=True, **QUICK))
    config = json.loads((sft.model / "config.json").read_text())
    assert config["model_type"] == kind and not config.get("output_router_logits")
    reward, changes = test_preference.write(run, "reward", model="artifact:sft", **QUICK), {}
    if kind == "cohere":
        with pytest.raises(UserError, match="no reward model of the kind cohere"):
            life.command(reward)
    else:
        life.command(reward)
        changes["reward"] = [{"model": "artifact:reward"}]
    for name, how in (("ppo", {}), ("ppo-lora", ADAPTER)):
        made = life.command(
            test_ppo.write(run, name=name, model="artifact:sft", optim__steps=2, **changes, **how)
        )
        first = test_ppo.updates(made)[0]
        assert abs(first["objective/kl"]) < 1e-4 and first["val/ratio"] == pytest.approx(1, abs=0.1)


def test_tldr_in_small(tmp_path):
    """The shipped pipeline as it stands, but for the size of model, data and steps."""
    pipeline = yaml.safe_load((life.ROOT / "recipes" / "tldr.yaml").read_text())
    model = other(tmp_path / "pythia", "gpt_neox", **OTHERS["gpt_neox"])
    asks = [f"POST: I have {i} keys and lost {i % 5}.\n\nTL;DR:" for i in range(60)]
    rows = [{"prompt": ask, "completion": " Lost keys."} for ask in asks]
    pairs = [
        {"prompt": ask, "chosen": " Lost keys.", "rejected": " I have keys, I had keys."}
        for ask in asks
    ]
    for name, made in (("trl-lib/tldr", rows), ("trl-lib/tldr-preference", pairs)):
        (tmp_path / f"{name[8:]}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    small = {"batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"}
    for stage in pipeline["stages"]:
        values = {"run": str(tmp_path / "run"), **stage, "launch": {"processes": 1, "threads": 1}}
        values["model"] = values["model"].replace("EleutherAI/pythia-1b-deduped", model)
        for source in values["data"]["train"] + values["data"]["eval"].get("sources", []):
            source["path"] = f"{tmp_path}/{source.pop('split') and source['path'][8:]}.jsonl"
        values["optim"] |= small | ({"steps": 2} if "steps" in values["optim"] else {})
        path = tmp_path / f"{stage['stage']}.yaml"
        path.write_text(yaml.safe_dump(values))
        artifact = life.command(path)
    log = (artifact.path / "log.txt").read_text()
    assert "critic: a model of its own, from the reward model" in log and "step 2/2" in log


HYBRID = LLAMA | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}


@pytest.mark.parametrize(
    ("kind", "sizes", "changes"),
    [
        ("falcon", {}, {}),  # looks at everything before, whatever the positions say
        ("falcon", {}, {"optim__precision": "bf16", **ADAPTER}),
        ("lfm2", HYBRID, {}),  # a short convolution, whose kernel for this is not there
    ],
)
def test_documents_that_the_architecture_would_mix_are_padded_or_refused(
    tmp_path, kind, sizes, changes
):
    model = other(tmp_path / kind, kind, **sizes)
    with pytest.raises(
        UserError, match=rf"{kind} does not keep documents of one row apart\n.*packing: false"
    ):
        life.command(life.write(tmp_path / "packed", model=model, data__packing=True, **changes))
    losses = []
    for size in (1, 4):
        changes |= {"launch__micro_batch_size": size, "data__packing": False, **QUICK}
        made = life.command(life.write(tmp_path / f"padded{size}", model=model, **changes))
        assert f"rows are padded: {kind} does not keep" in (made.path / "log.txt").read_text()
        lines = (made.path / "metrics.jsonl").read_text().splitlines()
        losses += [[line["loss"] for line in map(json.loads, lines) if "loss" in line]]
    assert (
        losses[0] == pytest.approx(losses[1], abs=0.02 if "adapter" in changes else 1e-5)
        and losses[0]
    )


def test_blocks_that_the_architecture_would_mix_are_refused_where_asked_for(tmp_path):
    (tmp_path / "text.txt").write_text(pydoc_data.topics.topics["class"])
    begin = {"model": other(tmp_path / "falcon", "falcon"), "architecture": None, "tokenizer": None}
    begin |= {"data__eval": {}}  # there is one document
    with pytest.raises(
        UserError, match=r"falcon does not keep documents of one row apart\n.*isolate: false"
    ):
        life.command(test_pretrain.write(tmp_path / "run", tmp_path, **begin, data__isolate=True))
    life.command(test_pretrain.write(tmp_path / "run", tmp_path, **begin, **QUICK))


def test_a_model_of_the_hub_has_no_parents_template():
    """Whose record names no folder."""
    from types import SimpleNamespace

    from llmpipe.run.handoff import refuse_another_template
    from llmpipe.run.reference import Model

    model = Model("hub", "some/model", {"hub": "some/model", "revision": "0" * 40}, None)
    job = SimpleNamespace(plan=SimpleNamespace(models={"model": model}))
    refuse_another_template(job, SimpleNamespace(template="f" * 64))
