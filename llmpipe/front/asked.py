"""What a command is asked for: a recipe, with what is set beside it on the line, looked at ahead.

Light, as the commands are: what reads a recipe is imported where one is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe import screen
from llmpipe.errors import UserError, near
from llmpipe.front.terminal import say
from llmpipe.stages import STAGES

if TYPE_CHECKING:
    from llmpipe.recipe.check import Located

LOOKING = "looking at what the recipe names"

KNOWN_STAGES = f"there are: {', '.join(STAGES)}"


def read_recipe(
    name: str,
    path: Path | None,
    run: str | None,
    sets: list[str] | None,
    *,
    fresh: bool = False,
    only_prepare: bool = False,
) -> Located:
    """The recipe of stage `name` with its lines, and what can be known ahead is right: a file, or
    recipes/NAME.yaml where none is named."""
    from llmpipe.recipe.check import locate
    from llmpipe.stages import schema

    if path is None:
        path = Path("recipes", f"{name}.yaml")
        if not path.exists():
            hint = f"llmpipe {name} RECIPE, or llmpipe init DIR"
            raise UserError(f"no recipe named, and there is no {path} here", hint)
        say(f"no recipe named: using {path}")
    located = obeying_launcher(locate(path, schema(name), overrides(sets, run)))
    from llmpipe.front import ahead  # not for a recipe that is not valid

    with screen.doing(LOOKING), ahead.others_hear():
        ahead.check([located], fresh=fresh, only_prepare=only_prepare)
    return located


def stage_in(recipe: Path, command: str) -> str:
    """The stage that a recipe names. Raises UserError (2) for a pipeline, and for none."""
    from llmpipe.recipe.check import refuse_foreign
    from llmpipe.recipe.yaml import read

    values, where = read(recipe)
    refuse_foreign(values, recipe)
    if not isinstance(values, dict):
        raise UserError(f"{recipe}:1: a recipe is a mapping of keys to values")
    if "stages" in values:
        problem = f"{where[('stages',)]}: this is a pipeline of several stages"
        raise UserError(problem, f"{command} takes the recipe of one stage")
    name = values.get("stage")
    if not isinstance(name, str) or name not in STAGES:
        problem = (
            f"'{name}' is no stage{near(str(name), STAGES)}" if name else "required, but missing"
        )
        raise UserError(f"{where.get(('stage',), f'{recipe}:1')}: stage: {problem}", KNOWN_STAGES)
    return name


def overrides(sets: list[str] | None, run: str | None) -> list[str]:
    """What was given with `--set` and `--run`, as KEY=VALUE."""
    given = list(sets or [])
    if run is not None:
        given.append(f"run={json.dumps(run)}")
    return given


def obeying_launcher(located: Located) -> Located:
    """A recipe with what an outside launcher was configured to do with the model."""
    if "ACCELERATE_USE_FSDP" not in os.environ:
        return located
    from dataclasses import replace

    from llmpipe.run.launcher import obeyed

    recipe = obeyed(located.recipe)
    if recipe is not located.recipe:
        name = getattr(recipe.launch, "strategy", "")  # of a stage that trains, as obeyed
        say(f"accelerate: FSDP: launch.strategy is {name}, and the model is loaded in parts")
    return replace(located, recipe=recipe)
