"""The life of one sft command: recipe -> tokens -> training -> verified artifact, and everything
that may stop it."""

import json
import shutil
import signal
import time

import pytest

from llmpipe.errors import Stopped, UserError
from llmpipe.files.writing import publishing
from llmpipe.run.artifact import Artifact
from llmpipe.run.lock import Lock
from llmpipe.run.manifest import Parent
from llmpipe.sums import seal
from tests import life, store


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An artifact made without interruption."""
    return store.made(life.write(tmp_path_factory.mktemp("straight") / "run"))


def copy(artifact, tmp_path):
    shutil.copytree(artifact.run, tmp_path / "run")
    return Artifact(tmp_path / "run" / artifact.name)


def test_the_exact_files(straight):
    assert {p.name for p in straight.path.iterdir()} == {
        "recipe.yaml",
        "manifest.json",
        "model",
        "checkpoints",
        "metrics.jsonl",
        "samples.jsonl",
        "rejected.jsonl",
        "seen.safetensors",
        "log.txt",
        "outcome.json",
    }
    assert {p.name for p in straight.model.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert sorted(p.name for p in straight.checkpoints.iterdir()) == ["step-12", "step-9"]
    assert set(straight.verify().files) == {
        "recipe.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "rejected.jsonl",
        "seen.safetensors",
        *(f"model/{p.name}" for p in straight.model.iterdir()),
    }


def test_the_manifest_says_what_was_made(straight):
    manifest = straight.verify()
    rows = manifest.data.rows
    assert rows.read == rows.kept + rows.rejected == 72
    assert manifest.kind == "model" and manifest.stage == "sft"
    assert manifest.training.steps == 12
    assert manifest.final["eval_loss"] < manifest.final["eval_loss_before"]
    assert manifest.verified["max_logit_difference"] == 0
    assert str(straight.run) not in json.dumps(
        {**straight.document(), "asked": {}, "models": {}}
    ), "an absolute path in the manifest"


def test_the_model_is_the_trained_one(straight):
    """Every parameter moved, and plain transformers loads it and stops where the template ends a
    turn."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = AutoModelForCausalLM.from_pretrained(life.TINY / "model").state_dict()
    model = AutoModelForCausalLM.from_pretrained(straight.model)
    for name, tensor in model.state_dict().items():
        assert not torch.equal(tensor, before[name]), f"{name} did not move"
    tokenizer = AutoTokenizer.from_pretrained(straight.model)
    assert tokenizer.chat_template
    assert model.config._attn_implementation == "sdpa"
    stop = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stop if isinstance(stop, list) else [stop])


def test_skip_when_finished_refuse_when_different_fresh_moves_aside(straight, tmp_path, capsys):
    artifact = copy(straight, tmp_path)
    path = life.write(artifact.run)
    before = (artifact.path / "manifest.json").stat().st_mtime_ns
    life.command(path)
    assert "skip" in capsys.readouterr().out
    assert (artifact.path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError) as refused:
        life.command(path, ["optim.learning_rate=2e-3", "seed=1"])
    assert refused.value.code == 3
    assert "optim.learning_rate: 0.001 there, 0.002 now" in str(refused.value)
    assert "seed: 42 there, 1 now" in str(refused.value)
    life.command(path, ["optim.steps=2"], fresh=True)
    assert Artifact(artifact.run / "sft.old-1").verify().training.steps == 12
    assert artifact.verify().training.steps == 2


def test_harmless_changes_do_not_refuse(straight, tmp_path):
    artifact = copy(straight, tmp_path)
    life.command(
        life.write(artifact.run), ["log.every=7", "checkpoint.keep=4", "launch.micro_batch_size=4"]
    )


def test_move_the_run(straight, tmp_path):
    """An artifact survives mv: verified, used as a parent by name and by path."""
    artifact = copy(straight, tmp_path)
    moved = tmp_path / "elsewhere"
    artifact.run.rename(moved)
    child = life.command(life.write(moved, name="again", model="artifact:sft", optim__steps=2))
    manifest = child.verify()
    parent = Artifact(moved / "sft").manifest()
    assert manifest.parents == [Parent("sft", parent.fingerprint)]
    other = life.command(life.write(tmp_path / "other", model=str(moved / "sft"), optim__steps=2))
    assert other.verify().parents[0].fingerprint == parent.fingerprint
    assert life.essence(child)["files"] == life.essence(other)["files"]


def test_start_from_a_checkpoint(straight, tmp_path):
    artifact = copy(straight, tmp_path)
    child = life.command(
        life.write(artifact.run, name="early", model="artifact:sft@9", optim__steps=1)
    )
    assert child.verify().parents[0].name == "sft@9"
    with pytest.raises(UserError, match=r"no such checkpoint; there are: 12, 9"):
        life.command(life.write(artifact.run, name="none", model="artifact:sft@7", optim__steps=1))


@pytest.mark.parametrize("hurt", ["flip", "cut", "remove", "add", "swap", "link", "manifest"])
def test_a_damaged_parent_is_refused(straight, tmp_path, hurt):
    """R9: exit 3, the file named."""
    artifact = copy(straight, tmp_path)
    path, other = artifact.model / "model.safetensors", artifact.model / "config.json"
    named = path.name
    if hurt == "flip":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif hurt == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif hurt == "remove":
        path.unlink()
    elif hurt == "add":
        (artifact.model / "extra.json").write_text("{}")
        named = "extra.json"
    elif hurt == "swap":
        (artifact.path / "x").write_bytes(other.read_bytes())
        other.write_bytes((artifact.path / "recipe.yaml").read_bytes())
        (artifact.path / "x").rename(artifact.path / "recipe.yaml")
        named = "config.json"
    elif hurt == "link":
        path.rename(tmp_path / "weights")
        path.symlink_to(tmp_path / "weights")
    else:
        path = artifact.path / "manifest.json"
        path.write_text(path.read_text().replace('"steps": 12', '"steps": 13'))
        named = "manifest.json"
    with pytest.raises(UserError) as refused:
        life.command(life.write(artifact.run, name="child", model="artifact:sft", optim__steps=1))
    assert refused.value.code == 3
    assert named in str(refused.value)


# --- durability -----------------------------------------------------------------------------------
# -------------------


@pytest.mark.parametrize("step", [3, 6, 9])
def test_resume_is_bitwise_the_straight_run(straight, tmp_path, step):
    """R1: from every checkpoint, with evaluation, logging and epochs not aligned to it."""
    path = life.write(tmp_path / "run")
    trial = life.Trial(path, hook=f"kill_after_checkpoint_{step}")
    assert trial.wait() == -signal.SIGKILL, trial.text()
    artifact = life.command(path)
    assert f"resuming from step-{step}" in (artifact.path / "log.txt").read_text()
    assert life.essence(artifact) == life.essence(straight)


def test_sigterm_is_served_at_the_end_of_the_step(straight, tmp_path):
    """R5: exit 143, a checkpoint, an exact resume; inside a step, the evaluation and a save."""
    path = life.write(tmp_path / "run")
    codes = []
    for hook in ("term_in_step_2", "term_in_evaluation", "term_in_save_9"):
        trial = life.Trial(path, hook=hook)
        codes.append(trial.wait())
    assert codes == [143, 143, 143], trial.text()
    artifact = life.command(path)
    assert life.essence(artifact) == life.essence(straight)


def test_sigint_gives_130(tmp_path):
    trial = life.Trial(life.write(tmp_path / "run"), hook="int_in_step_2")
    assert trial.wait() == 130, trial.text()


@pytest.mark.parametrize(
    ("name", "hurt"),
    [
        ("model.safetensors", "flipped"),
        ("optimizer.pt", "missing"),
        ("scheduler.pt", "missing"),
        ("trainer_state.json", "half"),
        ("llmpipe.json", "empty"),
        ("sums.json", "flipped"),
        ("rng_state.pth", "swapped"),
        ("model.safetensors", "a link"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path, name, hurt):
    """R2, a share of it (tests/test_faults.py has the rest): the older one is taken, the end is
    the same."""
    passed_over(straight, tmp_path, name, hurt)


def passed_over(straight, tmp_path, name, hurt, write=life.write):
    """Damage a file of the newest checkpoint, run the command again, compare with the straight
    run."""
    artifact = copy(straight, tmp_path)
    begin_again(artifact, write)
    damage(artifact.checkpoints / "step-12" / name, hurt)
    life.command(write(artifact.run))
    assert "step-12 is damaged" in (artifact.path / "log.txt").read_text()
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize("stray", ["step-x", "step-12.bak", "step-²", "a file step-3"])
def test_what_is_no_checkpoint_is_not_gone_on_from(tmp_path, capsys, stray):
    """It is begun, and nothing says that it is resumed."""
    home = tmp_path / "run" / "sft" / "checkpoints"
    home.mkdir(parents=True)
    if stray.startswith("a file "):
        (home / stray.removeprefix("a file ")).write_text("mine")
    else:
        (home / stray).mkdir()
    artifact = life.command(life.write(tmp_path / "run"), only_prepare=True)
    assert artifact.path == home.parent
    said = capsys.readouterr().out
    assert f"{artifact.path}: run: nothing there yet" in said and "resume" not in said


def begin_again(artifact, write=life.write):
    """Take a finished artifact back to the moment before it was published."""
    manifest = artifact.manifest()
    from llmpipe.front.worker import write_plan
    from llmpipe.recipe.check import load
    from llmpipe.run.plan import decide
    from llmpipe.stages import CHECKPOINTS, schema

    path = write(artifact.run)
    made = load(path, schema(manifest.stage))
    decision = decide(artifact, made, ("model", "adapter"), CHECKPOINTS)
    assert decision.action == "skip"
    write_plan(artifact, made, decision.plan)
    assert manifest.identity == decision.plan.identity
    (artifact.path / "manifest.json").unlink()
    shutil.rmtree(artifact.model)


def damage(path, hurt):
    data = bytearray(path.read_bytes())
    if hurt == "missing":
        path.unlink()
    elif hurt == "empty":
        path.write_bytes(b"")
    elif hurt == "half":
        path.write_bytes(data[: len(data) // 2])
    elif hurt == "swapped":
        older = path.parent.with_name("step-9") / path.name
        beside = path.with_name("sums.json")
        path.write_bytes((older if older.read_bytes() != data else beside).read_bytes())
    elif hurt == "a link":
        path.rename(path.parents[4] / "aside")
        path.symlink_to(path.parents[4] / "aside")
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


def test_another_machine_setting_refuses_to_resume(tmp_path):
    path = life.write(tmp_path / "run")
    assert life.Trial(path, hook="kill_after_checkpoint_3").wait() == -signal.SIGKILL
    with pytest.raises(UserError, match=r"micro_batch_size 2 there, 4 now") as refused:
        life.command(path, ["launch.micro_batch_size=4"])
    assert refused.value.code == 3
    artifact = life.command(path, ["launch.micro_batch_size=4"], inexact=True)
    assert artifact.manifest().training.exact_resume is False


@pytest.mark.parametrize("where", ["loss_1", "loss_6", "loss_12", "gradient_6"])
def test_nan_stops_before_the_optimizer(tmp_path, where):
    """R13: exit 4, nothing published, the weights of the last checkpoint are finite."""
    trial = life.Trial(life.write(tmp_path / "run"), hook=f"nan_{where}")
    assert trial.wait() == 4, trial.text()
    assert f"step {where.split('_')[1]}: the " in trial.text()
    artifact = Artifact(tmp_path / "run" / "sft")
    assert not artifact.finished and not artifact.model.exists()
    from safetensors.torch import load_file

    for path in artifact.checkpoints.glob("step-*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("hurt", ["flipped", "empty", "half", "missing"])
def test_lines_that_are_not_what_a_checkpoint_knew_are_not_gone_on_from(
    straight, tmp_path, name, hurt
):
    """Said before a step is trained, instead of at the end."""
    artifact = copy(straight, tmp_path)
    begin_again(artifact)
    before, _ = (artifact.path / "samples.jsonl").read_text().splitlines(keepends=True)
    (artifact.path / "samples.jsonl").write_text(before)  # as they are in training
    damage(artifact.path / name, hurt)
    with pytest.raises(UserError, match=rf"sft/{name}: ") as refused:
        life.command(life.write(artifact.run))
    assert refused.value.code == 3 and "restore the file" in refused.value.hint
    assert not artifact.finished


def test_an_older_checkpoint_fits_lines_that_were_cut(straight, tmp_path, capsys):
    artifact = copy(straight, tmp_path)
    begin_again(artifact)
    metrics = artifact.path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-9])
    life.command(life.write(artifact.run))
    said = capsys.readouterr().out
    assert "checkpoint step-12 is of no use (metrics.jsonl: " in said and "from step-9 of" in said
    assert life.essence(artifact) == life.essence(straight)


@pytest.mark.parametrize("hurt", ["flipped", "empty", "half", "missing"])
def test_what_was_begun_is_not_gone_on_with_by_another_plan(straight, tmp_path, hurt):
    artifact = copy(straight, tmp_path)
    begin_again(artifact)
    damage(artifact.path / "plan.json", hurt)
    with pytest.raises(UserError, match=r"sft/plan\.json: (damaged|missing)") as refused:
        life.command(life.write(artifact.run))
    assert refused.value.code == 3 and "--fresh" in refused.value.hint


def test_a_recipe_that_changes_under_way_is_not_trained(straight, tmp_path, monkeypatch):
    artifact = copy(straight, tmp_path)
    begin_again(artifact)
    path, start = artifact.path / "recipe.yaml", life.start_here

    def started(action, *arguments, **options):
        if action == "train":
            path.write_text(path.read_text().replace("steps: 12", "steps: 13"))
        start(action, *arguments, **options)

    monkeypatch.setattr(life, "start_here", started)
    with pytest.raises(UserError, match=r"recipe\.yaml: is not the one") as refused:
        life.command(life.write(artifact.run))
    assert refused.value.code == 3


def test_one_wins_the_others_are_told_who(tmp_path):
    """R8: sixteen starts of one stage."""
    path = life.write(tmp_path / "run", optim__steps=3)
    trials = []
    for i in range(16):
        own = tmp_path / f"copy{i}.yaml"
        own.write_text(path.read_text())
        trials.append(life.Trial(own))
    codes = [trial.wait() for trial in trials]
    assert codes.count(0) >= 1 and set(codes) <= {0, 75}, codes
    published = sum("published" in trial.text() for trial in trials)
    assert published == 1
    told = [trial.text() for trial, code in zip(trials, codes, strict=True) if code == 75]
    assert all("busy: pid " in text and " on " in text for text in told)
    life.command(path)  # the lock is free again


def test_a_full_disk_is_said_and_nothing_is_lost(straight, tmp_path):
    path = life.write(tmp_path / "run")
    trial = life.Trial(path, hook="disk_full_at_6")
    assert trial.wait() == 5, trial.text()
    assert "No space left" in trial.text()
    assert life.essence(life.command(path)) == life.essence(straight)


def test_keep_best_and_patience(tmp_path):
    """A learning rate that overshoots: the best evaluation is published, training stops early."""
    path = life.write(
        tmp_path / "run",
        optim__learning_rate=0.05,
        optim__steps=40,
        optim__scheduler="constant",
        evaluation={"every": 2, "keep_best": True, "patience": 2},
    )
    artifact = life.command(path)
    manifest = artifact.manifest()
    losses = {
        x["step"]: x["eval_loss"]
        for x in map(json.loads, (artifact.path / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in x
    }
    best = min((s for s in losses if s), key=losses.get)
    last = manifest.training.steps
    assert manifest.training.published_step == best
    assert manifest.final["eval_loss"] == losses[best]
    assert last < 40

    # a signal in the last step leaves its evaluation, which ends the training, to the resumed run
    again = tmp_path / "again"
    text = path.read_text().replace(str(tmp_path / "run"), str(again))
    (tmp_path / "again.yaml").write_text(text)
    assert life.Trial(tmp_path / "again.yaml", hook=f"term_in_step_{last}").wait() == 143
    assert life.essence(life.command(tmp_path / "again.yaml")) == life.essence(artifact)


def test_stop_before_training_starts(tmp_path):
    """A signal while tokenizing ends at once with its code; the next start does everything."""
    path = life.write(tmp_path / "run", optim__steps=2)
    trial = life.Trial(path, hook="term_in_prepare")
    begun = time.monotonic()
    assert trial.wait() == 143
    assert time.monotonic() - begun < 10
    assert life.command(path).finished


def test_samples_and_evaluation_change_nothing(straight, tmp_path):
    """Their own random numbers: the same weights without samples, and with another evaluation
    rhythm."""
    artifact = life.command(life.write(tmp_path / "run", samples={}, evaluation={}))
    assert life.essence(artifact)["files"] == life.essence(straight)["files"]


def test_stopped_is_not_a_user_error():
    assert not issubclass(Stopped, UserError)


def test_publishing_replaces_whole(tmp_path):
    target = tmp_path / "t"
    for text in ("one", "two"):
        with publishing(target) as staging:
            (staging / "a").write_text(text)
    assert (target / "a").read_text() == "two"
    with pytest.raises(RuntimeError), publishing(target) as staging:
        (staging / "a").write_text("three")
        raise RuntimeError
    assert (target / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_a_parent_in_use_is_not_moved_and_one_in_the_making_is_busy(straight, tmp_path):
    """Locks are shared on parents: two children at once, but no `--fresh` of the parent
    meanwhile."""
    artifact = copy(straight, tmp_path)
    child = life.write(artifact.run, name="child", model="artifact:sft", optim__steps=1, samples={})
    with Lock(artifact, shared=True).acquire():
        life.command(child)
        with pytest.raises(UserError) as busy:
            life.command(life.write(artifact.run), fresh=True)
        assert busy.value.code == 75
    with Lock(artifact).acquire(), pytest.raises(UserError, match=r"busy: pid \d+ on ") as busy:
        life.command(life.write(artifact.run, name="other", model="artifact:sft", optim__steps=1))
    assert busy.value.code == 75


def test_other_tokens_under_a_checkpoint_refuse_it(tmp_path):
    """A checkpoint is of the very tokens it saw: where others were prepared, whatever their table
    says, it is not gone on with."""
    path = life.write(tmp_path / "run")
    assert life.Trial(path, hook="kill_after_checkpoint_3").wait() == -signal.SIGKILL
    rows = next((tmp_path / "run" / ".prepared").glob("*/train.arrow"))
    change_tokens(rows)
    with pytest.raises(UserError, match=r"train\.arrow: sha256 ") as refused:
        life.command(path)
    assert refused.value.code == 3
    record = rows.with_name("prepared.json")
    record.write_text(record.read_text().replace('"content_digest": "', '"content_digest": "0'))
    seal(rows.parent)
    with pytest.raises(UserError, match="is of another recipe") as refused:
        life.command(path)
    assert refused.value.code == 3


def change_tokens(rows):
    """Exchange four pairs of token ids in an Arrow file, in its own bytes."""
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(rows))).read_all()
    ids = table["input_ids"].chunk(0).values.to_numpy()
    data = bytearray(rows.read_bytes())
    at = data.index(ids.tobytes())
    changed = ids.copy()
    changed[8:16] = ids[8:16][::-1]
    assert (changed != ids).sum() >= 4
    data[at : at + ids.nbytes] = changed.tobytes()
    rows.write_bytes(data)
