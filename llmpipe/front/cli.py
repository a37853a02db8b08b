"""The front door: the commands with their options, and the exit code.

Light: nothing here imports torch, and `--help` does not even import pydantic; a command imports
what it needs. (No `from __future__ import annotations`: typer evaluates those of every command, and
text would have to be compiled.)
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

# typer imports pydantic; looking for its plugins takes longer than help
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

import typer

from llmpipe import __version__, noise, screen
from llmpipe.errors import SIGINT, Stopped, UserError, near
from llmpipe.faults import a_bug, of_machine
from llmpipe.front.asked import overrides, read_recipe, stage_in
from llmpipe.front.make import make, make_stages
from llmpipe.front.terminal import exit_code, open_terminal, say
from llmpipe.stages import STAGES

if TYPE_CHECKING:
    from llmpipe.recipe.sections import Recipe

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The whole road of making a language model, one verified stage after the other.",
)

SHELLS = ("bash", "zsh", "fish")

COMPLETING = "_LLMPIPE_COMPLETE"
"""The variable by which a shell asks how a word may go on."""

RecipeFile = Annotated[
    Path | None,
    typer.Argument(metavar="RECIPE", help="The recipe; recipes/STAGE.yaml if not given."),
]
RunOption = Annotated[
    str | None, typer.Option("--run", metavar="DIR", help="Run directory, instead of the recipe's.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe field; repeatable."),
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Move an artifact that is there aside and start anew.")
]
InexactOption = Annotated[
    bool,
    typer.Option(
        "--inexact-resume", help="Resume although processes, micro-batch or threads changed."
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _stages_like(begun: str) -> list[str]:
    """Stages whose names begin so."""
    return [name for name in STAGES if name.startswith(begun)]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"llmpipe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of no command."""


def _add_stage(name: str, story: str) -> None:
    def command(
        recipe: RecipeFile = None,
        run: RunOption = None,
        sets: SetOption = None,
        fresh: FreshOption = False,
        inexact_resume: InexactOption = False,
        debug: DebugOption = False,
    ) -> None:
        asked = read_recipe(name, recipe, run, sets, fresh=fresh)
        make(asked, fresh=fresh, inexact=inexact_resume, debug=debug)

    app.command(name, help=f"{story[0].upper()}{story[1:]}.")(command)


for _name, _story in STAGES.items():
    _add_stage(_name, _story)


@app.command("run")
def run_pipeline(
    pipeline: Annotated[Path, typer.Argument(help="A YAML file with `run:` and a list `stages:`.")],
    run: RunOption = None,
    sets: SetOption = None,
    fresh: FreshOption = False,
    inexact_resume: InexactOption = False,
    debug: DebugOption = False,
) -> None:
    """The stages of a pipeline in order; finished ones are skipped.

    An interrupted one is resumed.
    """
    from llmpipe.recipe.check import load_pipeline
    from llmpipe.stages import schema

    asked = load_pipeline(pipeline, schema, overrides(sets, run))
    make_stages(asked, fresh=fresh, inexact=inexact_resume, debug=debug)


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="recipes/NAME.yaml, or another pipeline's file.")
    ],
    run: RunOption = None,
    sets: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Run a pipeline, and hold it against what was published.

    Ends with 4 where a number is outside of what its `expected:` allows.
    """
    from llmpipe.front.reproduce import announce, compare, pipeline_of
    from llmpipe.recipe.check import load_pipeline
    from llmpipe.run.machine import rank
    from llmpipe.stages import schema

    path = pipeline_of(name)
    asked = load_pipeline(path, schema, overrides(sets, run))
    announce(asked, path, say)
    if sets:
        say(f"warning: this is another pipeline than the published one: --set {' '.join(sets)}")
    make_stages(asked, debug=debug)
    if rank() == 0:  # others of a launcher may be here before it has published
        compare(asked, say)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="The recipe of a stage that trains.")],
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Processes, each with a device: the recipe's, or else 8."),
    ] = None,
    machines: Annotated[int, typer.Option(min=1, help="Machines that they are on.")] = 1,
    memory: Annotated[float, typer.Option(min=1, help="GiB of a device.")] = 80,
    config: Annotated[
        Path | None, typer.Option(help="The model's config.json, where it is not here.")
    ] = None,
    sets: SetOption = None,
) -> None:
    """What each process would hold in memory, and how much of it."""
    from llmpipe.front import memory as footprint
    from llmpipe.recipe.check import load
    from llmpipe.stages import schema

    given = load(recipe, schema(stage_in(recipe, "plan")), overrides(sets, None))
    asked = footprint.training_of(given)
    shape = footprint.shape_of(asked, config)
    for line in footprint.plan(asked, shape, processes, machines, memory * 2**30):
        say(line)


@app.command()
def prepare(
    recipe: Annotated[Path, typer.Argument(help="The recipe of any stage.")],
    run: RunOption = None,
    sets: SetOption = None,
    show_rows: Annotated[
        int, typer.Option(min=0, metavar="N", help="Show N rows as the model will see them.")
    ] = 0,
    debug: DebugOption = False,
) -> None:
    """Only the data: rows to tokens, before GPUs are rented."""
    asked = read_recipe(stage_in(recipe, "prepare"), recipe, run, sets, only_prepare=True)
    make(asked, debug=debug, only_prepare=True)
    if show_rows:
        _show_rows(asked.recipe, show_rows)


def _show_rows(recipe: "Recipe", count: int) -> None:
    """Print prepared rows. Raises UserError (2) where the stage prepares none."""
    from llmpipe.data.prepared import PreparedRows
    from llmpipe.report.rows import show_rows
    from llmpipe.run.artifact import artifact_of
    from llmpipe.stages import prepared_by, stage
    from llmpipe.sums import check

    if prepared_by(stage(recipe.stage)) is not PreparedRows:
        raise UserError(f"{recipe.stage} prepares no rows to train on, so there are none to show")
    artifact = artifact_of(recipe)
    prepared = PreparedRows.whole(artifact.path / "prepared.json")
    for kept in prepared.kept(artifact.run / ".prepared"):
        check(kept)
    colour = screen.has_colours(sys.stdout)
    for line in show_rows(prepared, artifact.run / ".prepared", count, colour):
        say(line)


@app.command()
def show(
    run: Annotated[Path, typer.Argument(help="A run directory, or one artifact of it.")],
) -> None:
    """Stages of a run: status, parents, rows, steps, loss, time."""
    from llmpipe.report.terminal import show_run

    print(show_run(run))


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="A run directory, or one artifact of it.")],
) -> None:
    """Hash every file of a run: is it what was recorded?

    Artifacts, checkpoints and prepared data are held against their tables; nothing is written.
    """
    from llmpipe.run.verify import verify_run

    with screen.doing("hashing") as show:
        aside = show if screen.is_shown() else _aside
        verify_run(run, say, aside)


def _aside(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN [RUN]", help="A run directory; two are compared.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to; RUN/report.html.")
    ] = None,
) -> None:
    """One HTML page of a run: curves, data, evaluations, samples.

    It is self-contained; given two runs, it compares them.
    """
    from llmpipe.report.page import write_report

    if len(runs) > 2:
        raise UserError("report takes one run, or two to compare")
    with screen.doing("drawing the page"):
        page = write_report(runs, out)
    print(f"wrote {page}")


@app.command()
def chat(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT [ARTIFACT]",
            help="An artifact, a format of an export, or a model folder.",
        ),
    ],
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest word each time.")
    ] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
) -> None:
    """Talk to a model in the terminal, or to two side by side."""
    if len(models) > 2:
        raise UserError("chat takes one model, or two side by side")
    os.environ |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from llmpipe.front.chat_named import named

    with screen.doing("verifying the model"):
        spoken_to = [named(name, say) for name in models]

    with screen.doing("importing the libraries"):
        noise.silence()
        from llmpipe.front import chat as conversation
        from llmpipe.models.drawing.draw import Sampling

    with screen.doing("loading"):
        voices = conversation.open_voices(spoken_to, seed, say)
    conversation.chat(voices, Sampling(max_new_tokens, temperature), seed)


@app.command()
def doctor() -> None:
    """This machine: what is here, what would be chosen, and why."""
    from llmpipe.front.doctor import examine

    examine(say)


@app.command()
def submit(  # noqa: PLR0913  # each is an option of the command
    recipe: Annotated[Path, typer.Argument(help="The recipe of a stage, or a pipeline.")],
    to: Annotated[
        str, typer.Option("--to", metavar="SYSTEM", help="slurm, sky, kubeflow or docker.")
    ],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each; 0 for its CPUs.")] = 1,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="What the system itself is told; repeatable."),
    ] = None,
    run: RunOption = None,
    sets: SetOption = None,
    inexact_resume: InexactOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Submit it, too.")] = False,
    debug: DebugOption = False,
) -> None:
    """A run as a file for SLURM, SkyPilot, Kubeflow or docker.

    It is there to be read; with --yes it is submitted, too.
    """
    import shlex

    from llmpipe.front.submit import job, render, send

    system = job.system_of(to)
    options = render.read_options(option or [])
    arguments = [word for text in sets or [] for word in ("--set", text)]
    arguments += ["--run", run] if run is not None else []
    arguments += ["--inexact-resume"] if inexact_resume else []
    asked = job.Asked(recipe, system, nodes, gpus, overrides(sets, run), arguments)
    what = job.job_of(asked)
    made_by = f"llmpipe {shlex.join(word for word in sys.argv[1:] if word != '--yes')}"
    text = render.render(system, what, options, made_by)
    print(text, end="", flush=True)
    command = shlex.join(send.command_of(system, what))
    if yes:
        print(f"# {command}", file=sys.stderr, flush=True)
        send.send(system, what, text)
    else:
        print(f"# nothing was submitted; --yes does: {command}", file=sys.stderr)


@app.command()
def push(
    artifacts: Annotated[
        list[str],
        typer.Argument(
            metavar="ARTIFACT",
            help="A finished artifact, such as runs/NAME/dpo, or formats of an export.",
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="NAMESPACE/NAME", help="What the Hub calls it.")],
    public: Annotated[bool, typer.Option("--public", help="For everybody to see.")] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write what would be pushed, and push nothing."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="Of the model, where its base names none."),
    ] = None,
    data_licences: Annotated[
        list[str] | None,
        typer.Option(
            "--data-license",
            metavar="[ROWS=]ID",
            help="Of rows of which none is recorded; repeatable.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="NAMESPACE/NAME", help="Where the Hub has what it was made of."),
    ] = None,
) -> None:
    """A verified artifact to the Hub, with a card made of manifests.

    Private unless --public is given. The same command goes on with a push that was killed.
    """
    from llmpipe.front.push import push as sending
    from llmpipe.front.push.licences import read_said

    said = read_said(licence, data_licences or [])
    sending.push(sending.Asked(artifacts, repo, public, said, base, dry_run), say)


@app.command()
def serve(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="A finished artifact, such as runs/NAME/dpo.")
    ],
    engine: Annotated[
        Literal["auto", "transformers", "vllm", "llama-cpp"],
        typer.Option(help="Which server; auto: llama-cpp for GGUF, vllm where there is a GPU."),
    ] = "auto",
    host: Annotated[
        str, typer.Option(help="Where to listen: 127.0.0.1 is this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_from: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Of the environment: holds the key to be shown."),
    ] = None,
) -> None:
    """Answer by OpenAI's interface, once the probe agrees.

    The server is that of transformers, vLLM or llama.cpp; it is asked the probe before anybody
    else may ask.
    """
    from llmpipe.front.serve import serve as serving

    sys.exit(serving.serve(serving.Asked(artifact, engine, host, port, api_key_from), say))


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print what lets a shell complete the words of commands.

    For bash: `eval "$(llmpipe completion bash)"` in ~/.bashrc; for zsh the same with zsh, in
    ~/.zshrc behind compinit; for fish: llmpipe completion fish | source.
    """
    if shell not in SHELLS:
        problem = f"completion: {shell}: no such shell{near(shell, SHELLS)}"
        raise UserError(problem, f"there are: {', '.join(SHELLS)}")
    from typer.completion import get_completion_script

    asked = {"prog_name": "llmpipe", "complete_var": COMPLETING, "shell": shell}
    print(get_completion_script(**asked))


@app.command("schema")
def show_schema(
    name: Annotated[
        str,
        typer.Argument(metavar="STAGE", help=", ".join(STAGES), autocompletion=_stages_like),
    ],
) -> None:
    """JSON Schema of a stage's recipe, for completion in an editor."""
    os.environ["LLMPIPE_DOCSTRINGS"] = "1"
    from llmpipe.stages import schema

    print(json.dumps(schema(name).model_json_schema(), indent=2, ensure_ascii=False))


@app.command()
def init(
    what: Annotated[
        Path | None,
        typer.Argument(
            metavar="ROWS or DIR",
            help="Rows to learn from, with --model also a folder of them; or a folder to begin in.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="What to start from; SmolLM2-135M."),
    ] = None,
    foreign: Annotated[
        Path | None,
        typer.Option("--from", metavar="YAML", help="A config of Axolotl or LLaMA-Factory."),
    ] = None,
) -> None:
    """Write a recipe: for rows, another tool's config, or to begin."""
    if foreign:
        if what or model:
            raise UserError("init: --from says it all", "set other fields in what is written")
        from llmpipe.front.foreign import translate

        translate(foreign, say)
    elif what is None:
        raise UserError("init: of what?", "llmpipe init ROWS --model MODEL, or llmpipe init DIR")
    elif model or _names_rows(str(what)):
        from llmpipe.front.proposal import propose

        propose(str(what), model, say)
    else:
        from llmpipe.report.starter import write_starter

        for path in write_starter(what):
            print(f"wrote {path}")
        print(f"next: cd {what} && llmpipe sft sft.yaml")


def _names_rows(path: str) -> bool:
    """Whether a path names rows, and no folder to write a starter to."""
    from llmpipe.recipe.sections import LOCAL_SUFFIXES

    return os.path.isfile(path) or "*" in path or path.lower().endswith(LOCAL_SUFFIXES)


def _refuse_broken_text(arguments: list[str]) -> None:
    """Raise UserError for bytes that are no text: no recipe and no record can name them."""
    for number, argument in enumerate(arguments[1:], 1):
        try:
            argument.encode()
        except UnicodeEncodeError:
            problem = f"argument {number} is not UTF-8 text: {argument!r}"
            hint = "rename the file, or type the argument anew"
            if sys.getfilesystemencoding() != "utf-8":
                hint = "this terminal is set to another encoding: PYTHONUTF8=1 llmpipe ..."
            raise UserError(problem, hint) from None


def main() -> None:
    """The console script: run the app, catch what a user can mend, set the exit code."""
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        from llmpipe.run.slurm import under_srun

        under_srun()
    if "RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        from llmpipe.ties import die_with_launcher

        die_with_launcher()
    # collections during the imports take a tenth of the front door's time; `make` turns them on
    gc.disable()
    open_terminal()
    if COMPLETING in os.environ:
        from typer.completion import completion_init

        completion_init()
    try:
        _refuse_broken_text(sys.argv)
        # typer takes a KeyboardInterrupt for itself, and returns its code
        if app(prog_name="llmpipe", standalone_mode=False) == SIGINT:
            raise KeyboardInterrupt
    except UserError as error:
        _refuse(error)
    except Stopped as stop:
        print(f"{stop.message}; the same command goes on from there", file=sys.stderr, flush=True)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(SIGINT)
    except typer.Abort:
        sys.exit(SIGINT)
    except Exception as error:
        # click's own usage errors print themselves
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            error.show()
            sys.exit(error.exit_code)
        fault = of_machine(error)
        if not fault and "--debug" not in sys.argv:
            traceback.print_exc()
        _refuse(fault or a_bug(error))
    sys.exit(exit_code())


def _refuse(error: UserError) -> NoReturn:
    """Show a mistake, and end with its code."""
    from llmpipe.secrets import redacted  # what was typed may hold one

    if "--debug" in sys.argv:
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    # several problems stand on lines of their own, each with its file
    start = "" if "\n" in error.message else screen.coloured("error: ", screen.RED, sys.stderr)
    print(redacted(f"{start}{error}"), file=sys.stderr, flush=True)
    sys.exit(error.code)
