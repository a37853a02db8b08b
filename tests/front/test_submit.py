"""`llmpipe submit`: each file passes its system's own parser, and starts a command that resumes."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from llmpipe.errors import UserError
from llmpipe.front import cli
from llmpipe.front.submit import job, render, send
from llmpipe.run.artifact import Artifact
from llmpipe.run.outcome import Outcome
from tests.life import TINY

RECIPE = "recipes/tiny/sft.yaml"
SHAPES = [(1, 0), (1, 1), (1, 8), (2, 8)]
"""Machines, and GPUs of each."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with the tiny recipes; nothing of a cluster around."""
    shutil.copytree(TINY, tmp_path / "recipes" / "tiny")
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def asked(system, nodes=1, gpus=1, recipe=RECIPE, sets=()):
    sets = [f"optim.batch_size={max(8, nodes * gpus)}", *sets]
    words = [word for text in sets for word in ("--set", text)]
    return job.Asked(Path(recipe), system, nodes, gpus, sets, words)


def rendered(system, nodes=1, gpus=1, options=(), **how):
    what = job.job_of(asked(system, nodes, gpus, **how))
    return render.render(system, what, render.read_options(list(options)), "llmpipe submit ...")


def sbatch_options(text):
    lines = [line.removeprefix("#SBATCH --") for line in text.split("\n") if "#SBATCH" in line]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def check_shell(text):
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- the files, and their systems' parsers --------------------------------------------------------


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_slurm_asks_for_a_task_for_each_gpu(nodes, gpus):
    text = rendered("slurm", nodes, gpus)
    check_shell(text)
    expected = {
        "job-name": "tiny-sft",
        "nodes": str(nodes),
        "ntasks-per-node": str(max(1, gpus)),
        "gpus-per-node": str(gpus),
        "cpus-per-task": "8",
        "time": "24:00:00",
        "output": "runs/tiny/slurm-%j.log",
        "open-mode": "append",
        "signal": "TERM@120",
        "requeue": "",
    }
    if not gpus:
        del expected["gpus-per-node"]
    assert sbatch_options(text) == expected
    assert ("--kill-on-bad-exit=0" in text) == (nodes * gpus > 1)
    assert "RANK" not in text and "MASTER" not in text, "llmpipe knows srun's tasks itself"
    assert Path("runs/tiny").is_dir(), "SLURM ends a job at once that has no folder for its log"


@pytest.fixture
def controller(tmp_path):
    """A SLURM of this test's own, which plans and starts nothing: the path of its slurm.conf."""
    if not (shutil.which("slurmctld") and shutil.which("sbatch")):
        pytest.skip("no SLURM here: apt-get install slurm-wlm")
    conf = tmp_path / "slurm.conf"
    me = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    port = 20_000 + os.getpid() % 10_000
    conf.write_text(
        "\n".join(
            [
                "AuthType=auth/none",
                "CredType=cred/none",
                "ClusterName=test",
                "SlurmctldHost=localhost(127.0.0.1)",
                f"SlurmUser={me}",
                f"SlurmdUser={me}",
                f"SlurmctldPort={port}",
                f"StateSaveLocation={tmp_path}/state",
                f"SlurmctldPidFile={tmp_path}/slurmctld.pid",
                f"SlurmctldLogFile={tmp_path}/slurmctld.log",
                "ProctrackType=proctrack/linuxproc",
                "TaskPlugin=task/none",
                "SelectType=select/cons_tres",
                "GresTypes=gpu",
                "MessageTimeout=5",
                "NodeName=n[1-2] NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:8 State=FUTURE",
                "PartitionName=gpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP",
            ]
        )
        + "\n"
    )
    (tmp_path / "state").mkdir()
    process = subprocess.Popen(
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        env=os.environ | {"SLURM_CONF": str(conf)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield conf
    process.terminate()
    process.wait(timeout=20)


def test_sbatch_takes_the_file(controller, tmp_path):
    environment = os.environ | {"SLURM_CONF": str(controller)}

    def test_only(text):
        (tmp_path / "job.sh").write_text(text)
        command = ["sbatch", "--test-only", "job.sh"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done.stderr

    deadline = time.monotonic() + 20
    while "Unable to contact" in (said := test_only(rendered("slurm"))):
        assert time.monotonic() < deadline, said
    for nodes, gpus in SHAPES:
        said = test_only(rendered("slurm", nodes, gpus, ["partition=gpu", "comment=two words"]))
        assert "unrecognized" not in said and "Invalid" not in said, said
    assert "unrecognized option" in test_only(rendered("slurm", options=["partitoin=gpu"]))
    assert "invalid partition" in test_only(rendered("slurm", options=["partition=cpu"]))


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_sky_asks_for_spot_machines_that_are_found_again(nodes, gpus):
    options = ["volume=shared"] if nodes > 1 else []
    document = yaml.safe_load(rendered("sky", nodes, gpus, options))
    check_shell(document["run"])
    machine = {"accelerators": f"H100:{gpus}"} if gpus else {"cpus": "8+"}
    recovery = {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [75, 143]}
    bucket = {"name": "llmpipe-tiny-sft", "mode": "MOUNT"}
    run = document.pop("run")
    assert ("torchrun" in run) == (nodes > 1)
    assert document == {
        "name": "tiny-sft",
        "num_nodes": nodes,
        "workdir": ".",
        "resources": {**machine, "use_spot": True, "job_recovery": recovery},
        "secrets": {"HF_TOKEN": ""},
        "setup": "pip install -c constraints.txt -e .\n",
        **(
            {"volumes": {"/volume": "shared"}}
            if nodes > 1
            else {"file_mounts": {"/bucket": bucket}}
        ),
    }


def test_sky_takes_an_image_and_fields_of_its_resources():
    options = ["image=registry/llmpipe:1", "use_spot=false", "infra=aws", "disk_size=512"]
    document = yaml.safe_load(rendered("sky", options=[*options, "accelerators=A100:1"]))
    recovery = document["resources"].pop("job_recovery")
    assert recovery["recover_on_exit_codes"] == [75, 143]
    assert document["resources"] == {
        "accelerators": "A100:1",
        "use_spot": False,
        "infra": "aws",
        "disk_size": 512,
        "image_id": "docker:registry/llmpipe:1",
    }
    assert "setup" not in document


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_skypilots_own_loader_takes_the_task(nodes, gpus, tmp_path):
    if importlib.util.find_spec("sky") is None:
        pytest.skip("no SkyPilot here: pip install skypilot")
    task = pytest.importorskip("sky").Task
    options = ["volume=shared"] if nodes > 1 else []
    (tmp_path / "task.yaml").write_text(rendered("sky", nodes, gpus, options))
    loaded = task.from_yaml(str(tmp_path / "task.yaml"))
    assert loaded.num_nodes == nodes
    assert all(resources.use_spot for resources in loaded.resources)


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_kubeflow_runs_torchrun_on_several_machines_alone(nodes, gpus):
    text = rendered("kubeflow", nodes, gpus, ["image=registry/llmpipe:1", "claim=mine"])
    trainer = yaml.safe_load(text)["spec"]["trainer"]
    llmpipe = ["llmpipe", "sft", RECIPE, "--set", f"optim.batch_size={max(8, nodes * gpus)}"]
    launcher = ["torchrun", "--shutdown-timeout=120", "--no-python", "--"] if nodes > 1 else []
    assert [*trainer["command"], *trainer["args"]] == ["tini", "--", *launcher, *llmpipe]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (nodes, max(1, gpus))
    assert trainer["resourcesPerNode"]["limits"].get("nvidia.com/gpu", 0) == gpus


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_the_trainjob_is_one_by_kubeflows_own_classes(nodes, gpus):
    """They drop what a TrainJob does not have, so what is left must be all of it."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    document = yaml.safe_load(rendered("kubeflow", nodes, gpus, ["image=registry/llmpipe:1"]))
    held = models.TrainerV1alpha1TrainJob.from_dict(document)
    assert held is not None and held.to_dict() == document
    document["spec"]["trainer"]["numNode"] = 2
    held = models.TrainerV1alpha1TrainJob.from_dict(document)
    assert held is not None and held.to_dict() != document


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_docker_is_asked_for_no_more_than_it_needs(nodes, gpus, tmp_path):
    text = rendered("docker", nodes, gpus, ["memory=16g", "image=llmpipe:cpu"])
    check_shell(text)
    said = tmp_path / "said"
    double = tmp_path / "bin" / "docker"
    double.parent.mkdir()
    double.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {said}\n')
    double.chmod(0o755)
    environment = {
        "PATH": f"{double.parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "MASTER_ADDR": "first",
        "NODE_RANK": "1",
    }
    subprocess.run(["bash"], input=text, env=environment, text=True, check=True)
    words = said.read_text().split("\n")[:-1]
    llmpipe = ["sft", RECIPE, "--set", f"optim.batch_size={max(8, nodes * gpus)}"]
    assert words[-len(llmpipe) :] == llmpipe
    assert ("--gpus" in "".join(words)) == (gpus > 0)
    assert {"run", "--rm", "--name=tiny-sft", "--stop-timeout=120", "--memory=16g"} <= set(words)
    assert f"--user={os.getuid()}:{os.getgid()}" in words
    assert f"--volume={tmp_path}:/workspace" in words
    image = words.index("llmpipe:cpu")
    expected = (
        ["--", "torchrun", "--nnodes=2", f"--nproc-per-node={gpus}"] if nodes > 1 else llmpipe
    )
    assert words[image + 1 :][: len(expected)] == expected
    assert ("--node-rank=1" in words) == (nodes > 1)


@pytest.mark.parametrize("system", ["sky", "kubeflow", "docker"])
def test_torchruns_own_parser_leaves_llmpipes_options_alone(system):
    """It takes what looks like its own, as `--run` does, from behind the program's name, too."""
    from torch.distributed.run import get_args_parser

    options = {"sky": ["volume=shared"], "kubeflow": ["image=registry/llmpipe:1"]}.get(system, [])
    what = job.job_of(replace(asked(system, 2, 8), arguments=["--run", "runs/tiny", "--yes"]))
    text = render.render(system, what, render.read_options(options), "llmpipe submit ...")
    if system == "kubeflow":
        trainer = yaml.safe_load(text)["spec"]["trainer"]
        line = shlex.join([*trainer["command"], *trainer["args"]])
    else:
        line = re.sub(r"\$\(.*?\)|\"?\$\w+\"?", "1", text.replace("\\\n", " "))
        line = next(line for line in line.split("\n") if "torchrun" in line)
    words = shlex.split(line)
    launched = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert [launched.training_script, *launched.training_script_args] == what.command
    assert launched.no_python


@pytest.mark.parametrize(("nodes", "gpus"), SHAPES)
def test_dockers_own_command_takes_the_line(nodes, gpus, tmp_path):
    if not shutil.which("docker"):
        pytest.skip("no docker here")

    def read_by_docker(text):
        environment = os.environ | {
            "DOCKER_HOST": f"unix://{tmp_path}/nobody",
            "MASTER_ADDR": "first",
            "NODE_RANK": "0",
            "HF_HOME": str(tmp_path / "cache"),
        }
        done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True)
        return done.stderr

    assert "daemon" in read_by_docker(rendered("docker", nodes, gpus))
    assert "unknown flag" in read_by_docker(rendered("docker", nodes, gpus, ["memroy=16g"]))


def test_docker_of_several_machines_asks_which_one_this_is():
    text = rendered("docker", 2, 8)
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    done = subprocess.run(["bash"], input=text, env=environment, capture_output=True, text=True)
    assert done.returncode and "MASTER_ADDR: the name or address" in done.stderr


# --- what the files do ----------------------------------------------------------------------------

DOUBLES = {
    "srun": 'echo "srun $*" >> said; [ ! -e end ] || . ./end; exit $(cat code)',
    "scontrol": 'echo "scontrol $*" >> said',
    "squeue": "cat state",
}
"""SLURM's commands, which say in a file what they were told."""


@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize(
    ("code", "state", "restarts", "goes_on"),
    [
        (0, "RUNNING", 0, False),
        (143, "RUNNING", 0, True),
        (75, "RUNNING", 3, True),
        (143, "CANCELLED", 0, False),
        (143, "RUNNING", render.RESTARTS, False),
        (2, "RUNNING", 0, False),
        (4, "RUNNING", 0, False),
    ],
)
def test_a_slurm_job_goes_back_into_the_queue_when_it_can_go_on(
    code, state, restarts, goes_on, gpus, tmp_path
):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in DOUBLES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    Path("code").write_text(str(code))
    Path("state").write_text(state)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    text = rendered("slurm", 1, gpus).replace(os.path.dirname(sys.executable), str(programs))
    done = subprocess.run(["bash"], input=text, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (code, "")
    said = Path("said").read_text()
    options = "--kill-on-bad-exit=0 --wait=0 " if gpus > 1 else ""
    assert said.startswith(f"srun {options}llmpipe sft {RECIPE} --set optim.batch_size=8\n")
    assert ("scontrol requeue 7" in said) == goes_on
    assert not list(Path("runs/tiny").glob("*.begun"))


@pytest.mark.parametrize(
    ("srun", "earlier", "run", "code"),
    [
        (75, None, 5, 5),  # a full disk in one of them, which the others have lost
        (137, None, 75, 75),  # one was killed
        (137, 143, None, 137),  # before there was anything to train
        (2, 143, None, 2),
        (0, 143, 0, 0),
        (3, None, 0, 3),  # what was trained is not what its evaluation demands
    ],
)
def test_a_slurm_job_of_several_tasks_ends_as_the_run_says(srun, earlier, run, code, tmp_path):
    """Not with the highest of their codes, and not as an earlier job."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, body in DOUBLES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    Path("code").write_text(str(srun))
    Path("state").write_text("RUNNING")
    artifact = Artifact(Path("runs/tiny/sft"))
    artifact.path.mkdir(parents=True)
    if earlier is not None:
        Outcome(earlier, 'a text with "code": 9').write(artifact)
        os.utime(artifact.path / "outcome.json", (1, 1))
    Outcome(run or 0, 'a text with "code": 9').write(Artifact(tmp_path))
    if run is not None:
        moved = f"mv {tmp_path}/outcome.json {artifact.path}"
        Path("end").write_text(f"{moved}; touch {artifact.path}/*")
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    text = rendered("slurm", 1, 2).replace(os.path.dirname(sys.executable), str(programs))
    done = subprocess.run(["bash"], input=text, env=environment, text=True)
    assert done.returncode == code
    assert ("scontrol requeue 7" in Path("said").read_text()) == (code == 75)


LLMPIPE = """\
#!/bin/bash
mkdir -p runs/tiny/sft/checkpoints/step-1 runs/tiny/sft/checkpoints/.step-2 runs/tiny/.prepared
find runs -type f | sort > was-there
echo 1 >> runs/tiny/sft/metrics.jsonl
[ -s was-there ] && rm -r runs/tiny/sft/checkpoints/step-1 && mkdir runs/tiny/sft/checkpoints/step-3
echo state > "$(ls -d runs/tiny/sft/checkpoints/step-*)"/state
echo half > runs/tiny/sft/checkpoints/.step-2/state
echo tokens > runs/tiny/.prepared/tokens
exit 143
"""


def test_what_a_spot_machine_did_is_in_the_bucket_and_on_the_next_one(tmp_path):
    if not (shutil.which("rsync") and shutil.which("flock")):
        pytest.skip("no rsync and flock here")
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    run = yaml.safe_load(rendered("sky"))["run"].replace("/bucket/", f"{bucket}/")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "llmpipe").write_text(LLMPIPE)
    (programs / "llmpipe").chmod(0o755)

    def on_a_machine(name):
        machine = tmp_path / name
        machine.mkdir()
        environment = {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(machine)}
        done = subprocess.run(["bash", "-c", run], cwd=machine, env=environment)
        assert done.returncode == 143
        return (machine / "was-there").read_text().split()

    assert on_a_machine("first") == []
    copied = sorted(str(path.relative_to(bucket)) for path in bucket.rglob("*") if path.is_file())
    assert copied == ["sft/checkpoints/step-1/state", "sft/metrics.jsonl"]
    assert on_a_machine("second") == [f"runs/tiny/{name}" for name in copied]
    assert os.listdir(bucket / "sft/checkpoints") == ["step-3"], "the run keeps step-1 no longer"
    assert (bucket / "sft/metrics.jsonl").read_text() == "1\n1\n"


STAGE = [
    "stage: sft",
    f"model: {TINY}/model",
    f"data: {{train: [{{path: {TINY}/rows.jsonl}}], max_length: 64}}",
    "optim: {learning_rate: 1e-3, batch_size: 8, steps: 2}",
]

# --- what is refused ------------------------------------------------------------------------------


def ended(capsys, monkeypatch, *words):
    """(exit code, standard output, standard error) of a command."""
    monkeypatch.setattr(sys, "argv", ["llmpipe", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


MISTAKES = [
    ["optim.learning_rte=1"],
    ["model=./nowhere"],
    ["optim.batch_size=8", "launch.micro_batch_size=3"],
    ["data.train.0.path=./nowhere.jsonl"],
]


@pytest.mark.parametrize("sets", MISTAKES, ids=lambda sets: sets[-1])
@pytest.mark.parametrize("system", ["slurm", "sky", "kubeflow", "docker"])
def test_a_mistake_in_a_recipe_is_that_of_the_stage(system, sets, capsys, monkeypatch):
    words = [word for text in sets for word in ("--set", text)]
    expected = ended(capsys, monkeypatch, "sft", RECIPE, *words)
    assert expected[0] == 2
    said = ended(capsys, monkeypatch, "submit", RECIPE, "--to", system, *words)
    assert said == expected


def test_the_batch_divides_among_the_jobs_processes_not_this_machines():
    with pytest.raises(UserError, match=r"must be a multiple of launch.processes \(3\)"):
        rendered("slurm", 3, 1, sets=["optim.batch_size=8"])
    assert "RANK" not in os.environ and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_a_pipeline_is_checked_as_a_whole_and_run_by_its_own_command():
    stages = "\n".join(f"  - {line}" if not i else f"    {line}" for i, line in enumerate(STAGE))
    text = f"run: runs/pipe\nstages:\n{stages}\n"
    Path("pipe.yaml").write_text(text)
    what = job.job_of(job.Asked(Path("pipe.yaml"), "slurm", 1, 1, [], []))
    assert (what.command, what.name) == (["llmpipe", "run", "pipe.yaml"], "pipe")
    second = stages.replace("stage: sft", "stage: sft\n    name: again")
    Path("pipe.yaml").write_text(text + second.replace(f"{TINY}/model", "artifact:nobody") + "\n")
    with pytest.raises(UserError, match=r"pipe.yaml:9: model: artifact:nobody"):
        job.job_of(job.Asked(Path("pipe.yaml"), "slurm", 1, 1, [], []))


@pytest.mark.parametrize("system", ["sky", "kubeflow", "docker"])
def test_paths_that_only_this_machine_has_are_refused(system, tmp_path):
    sets = [f"data.train.0.path={tmp_path}/recipes/tiny/rows.jsonl", "run=../elsewhere"]
    with pytest.raises(UserError) as refused:
        rendered(system, sets=sets, options=["image=registry/llmpipe"])
    lines = refused.value.message.split("\n")
    assert [line.split(": ")[1] for line in lines] == ["run", "data.train.0.path"]
    assert all(line.endswith("is not below the current folder") for line in lines)
    assert rendered("slurm", sets=sets[:1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "slrum"], "did you mean 'slurm'?"),
        (["--to", "kubeflow"], "--option image=REGISTRY/llmpipe:TAG"),
        (["--to", "kubeflow", "--option", "imag=x"], "did you mean 'image'?"),
        (["--to", "sky", "--nodes", "2"], "--option volume=NAME"),
        (["--to", "slurm", "--option", "=x"], "expected KEY=VALUE"),
        (["--to", "docker", "--nodes", "2", "--yes"], "on this machine alone"),
    ],
)
def test_mistakes_of_the_command_line(words, message, capsys, monkeypatch):
    code, _, said = ended(capsys, monkeypatch, "submit", RECIPE, *words)
    assert code == 2 and message in said


def test_an_empty_option_leaves_a_line_out_and_a_word_alone_stays_one():
    options = sbatch_options(rendered("slurm", options=["requeue=", "exclusive", "time=60"]))
    assert "requeue" not in options
    assert (options["exclusive"], options["time"]) == ("", "60")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alpaca-dpo", "alpaca-dpo"),
        ("My_Run.v2-sft", "my-run-v2-sft"),
        ("2026-sft", "llmpipe-2026-sft"),
        ("智利-sft", "sft"),
        ("x" * 99, "x" * 40),
    ],
)
def test_names_are_what_every_system_takes(name, expected):
    assert job.plain(name) == expected


# --- submitting -----------------------------------------------------------------------------------


def test_nothing_is_submitted_unless_asked(capsys, monkeypatch):
    monkeypatch.setattr(send, "send", None)
    code, out, said = ended(capsys, monkeypatch, "submit", RECIPE, "--to", "slurm")
    assert code == 0 and out.startswith("#!/bin/bash\n# llmpipe submit recipes/tiny/sft.yaml")
    assert said == "# nothing was submitted; --yes does: sbatch runs/tiny/tiny-sft.slurm.sh\n"
    assert not Path("runs/tiny/tiny-sft.slurm.sh").exists()


@pytest.mark.parametrize(("code", "ends_with"), [(0, 0), (1, 5)])
def test_yes_keeps_the_file_and_hands_it_over(code, ends_with, capsys, monkeypatch, tmp_path):
    double = tmp_path / "programs" / "sbatch"
    double.parent.mkdir()
    double.write_text(f'#!/bin/bash\necho "$@" > said\nexit {code}\n')
    double.chmod(0o755)
    monkeypatch.setenv("PATH", f"{double.parent}:{os.environ['PATH']}")
    words = ["submit", RECIPE, "--to", "slurm", "--yes"]
    got, out, said = ended(capsys, monkeypatch, *words)
    assert got == ends_with
    assert Path("said").read_text() == "runs/tiny/tiny-sft.slurm.sh\n"
    assert Path("runs/tiny/tiny-sft.slurm.sh").read_text() == out
    assert ("sbatch ended with 1" in said) == bool(code)


def test_a_system_that_is_not_here_is_named(capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, said = ended(capsys, monkeypatch, "submit", RECIPE, "--to", "slurm", "--yes")
    assert code == 2 and "sbatch is not here" in said and "tiny-sft.slurm.sh" in said
