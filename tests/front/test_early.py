"""A worker that is started before there is work for it."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from llmpipe.errors import Stopped, UserError
from llmpipe.front import early, launch
from llmpipe.recipe.check import load
from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import Outcome
from llmpipe.stages import schema
from tests import life

# a worker in place of llmpipe's: it says what it has imported, and what is left of its arguments
WORKER = """
    import sys
    from llmpipe.front.early import wait_for_work
    print("waits" if any("--early" in a for a in sys.argv) else "waits no more", flush=True)
    arguments = wait_for_work(sys.argv[1:])
    print("works", *arguments, "with" if "wave" in sys.modules else "without", flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    """`worker(module)`: the work that it waits for, and a process that waits for it."""
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(WORKER))
    started = []

    def start(module):
        work = early.coming(module)
        coming = work.__enter__()
        process = subprocess.Popen(
            [sys.executable, str(path), "train", coming.flag, "here"],
            env=os.environ | {"PYTHONPATH": f"{tmp_path}:{life.ROOT}"},
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[coming.descriptor],
        )
        started.append((work, process))
        assert process.stdout.readline() == "waits\n"
        return coming, process, work

    yield start
    for _, process in started:
        process.kill()
        process.communicate()


def test_it_imports_and_works_when_it_is_told(worker):
    coming, process, _ = worker("wave")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    coming.begin()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "works train here with\n")


def test_without_a_word_it_is_gone(worker):
    _, process, work = worker("wave")
    work.__exit__(None, None, None)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")


def test_a_failed_import_is_no_end_of_it(worker, tmp_path):
    """It begins anew, and what is wrong is said where it always was."""
    (tmp_path / "half.py").write_text("import wave\nraise OSError('libcudart.so: not here')\n")
    coming, process, _ = worker("half")
    coming.begin()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "waits no more\nworks train here without\n")


def test_who_has_ended_is_not_waited_for(worker):
    coming, process, _ = worker("wave")
    process.kill()
    process.wait()
    coming.begin()


@pytest.fixture
def asked(tmp_path):
    """An artifact and its recipe."""
    recipe = load(life.write(tmp_path / "run", optim__steps=1), schema("sft"))
    return Artifact(tmp_path / "run" / "sft"), recipe


def test_the_worker_that_trains_is_the_one_that_waited(asked):
    artifact, recipe = asked
    how = {"inexact": False, "debug": False}
    with launch.begun_early(artifact, recipe, **how) as worker:
        assert worker.process.poll() is None
        with pytest.raises(UserError, match=r"recipe\.yaml") as ended:  # nothing was planned
            launch.start("train", artifact, recipe, **how, early=worker)
        assert worker.process.returncode == ended.value.code


def test_one_that_was_killed_is_replaced(asked):
    artifact, recipe = asked
    how = {"inexact": False, "debug": False}
    with launch.begun_early(artifact, recipe, **how) as worker:
        worker.process.kill()
        worker.process.wait()
        with pytest.raises(UserError, match=r"recipe\.yaml"):
            launch.start("train", artifact, recipe, **how, early=worker)
        assert worker.process.returncode == -9


def test_who_is_left_behind_is_killed(asked):
    waiting = launch.begun_early(*asked, inexact=False, debug=False)
    with pytest.raises(KeyboardInterrupt), waiting as worker:
        pid = worker.process.pid
        raise KeyboardInterrupt
    assert worker.process.returncode == -9
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_several_are_left_to_the_launcher(tmp_path):
    path = life.write(tmp_path / "run", launch__processes=2, launch__micro_batch_size=2)
    recipe = load(path, schema("sft"))
    how = {"inexact": False, "debug": False}
    with launch.begun_early(Artifact(tmp_path / "run" / "sft"), recipe, **how) as worker:
        assert worker is None


def test_a_machine_that_takes_no_process_more_is_no_hindrance(asked, monkeypatch):
    def full(*_, **__):
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(launch.subprocess, "Popen", full)
    with launch.begun_early(*asked, inexact=False, debug=False) as worker:
        assert worker is None


@pytest.mark.parametrize(
    "name",
    ["sft", *map(life.by_the_dozen, ("dpo", "kto", "reward", "ppo", "grpo", "sample", "eval"))],
)
def test_what_is_imported_early_is_what_takes_its_time(name):
    """Of the large libraries a stage's `train` imports none that the early worker has not."""
    recipe = load(life.TINY / f"{name}.yaml", schema(name))
    large = ("torch", "transformers", "datasets", "peft", "bitsandbytes", "accelerate")
    of_stage = {"sft": "supervised", "dpo": "policy", "kto": "judged", "reward": "ranking"}
    later = f"llmpipe.training.{of_stage[name]}" if name in of_stage else "llmpipe.models.load"
    by_name = {name: f"llmpipe.rl.{name}" for name in ("ppo", "grpo", "sample")}
    later = (by_name | {"eval": "llmpipe.evaluation.book"}).get(name, later)
    code = f"""
        import importlib, sys, time
        from llmpipe.front.early import _imported
        assert _imported({early.libraries(recipe)!r})
        before = {{name for name in {large!r} if name in sys.modules}}
        importlib.import_module({later!r})
        print(sorted({{name for name in {large!r} if name in sys.modules}} - before))
    """
    environment = os.environ | {"PYTHONPATH": str(life.ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_signals_it_before_it_works_is_served_then(asked, number, code):
    """Python itself would end of it with a traceback, or another code."""
    artifact, recipe = asked
    how = {"inexact": False, "debug": False}
    with launch.begun_early(artifact, recipe, **how) as worker:
        os.kill(worker.process.pid, number)
        with pytest.raises(Stopped) as ended:
            launch.start("train", artifact, recipe, **how, early=worker)
        assert ended.value.code == code
        assert worker.process.wait() == -number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_does_not_import_to_the_end_once_it_is_stopped(worker, tmp_path, number):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(50)\n")
    coming, process, _ = worker("slow")
    coming.begin()
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (-number, "")


def test_what_signals_it_between_its_imports_and_its_work_waits(worker, tmp_path):
    """Nobody would catch it then."""
    (tmp_path / "last.py").write_text(
        "import os, signal\n"
        "close = os.close\n"
        "os.close = lambda of: (close(of), os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    coming, process, _ = worker("last")
    coming.begin()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "works train here without\n")


def test_a_command_that_is_stopped_begins_nothing_more(asked, monkeypatch):
    """Although what it had begun was done, and took no notice any more."""
    artifact, recipe = asked
    artifact.path.mkdir(parents=True)
    worker = SimpleNamespace(processes=1, launch="this one")

    def run(_):
        Outcome(code=0).write(artifact, worker.launch)
        return launch.Exit(0, [signal.SIGTERM], "")

    monkeypatch.setattr(launch, "begun", lambda *_: nullcontext(worker))
    monkeypatch.setattr(launch, "run", run)
    with pytest.raises(Stopped) as ended:
        launch.start("prepare", artifact, recipe, inexact=False, debug=False)
    assert ended.value.code == 143
