"""A recipe, or those of a pipeline, made into artifacts.

Light, as the commands are: what makes one is imported once it is known to be right.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from llmpipe import screen
from llmpipe.faults import refuse_no_folder
from llmpipe.front.asked import LOOKING, obeying_launcher
from llmpipe.front.terminal import say

if TYPE_CHECKING:
    from llmpipe.recipe.check import Located, Pipeline


def make_stages(
    asked: Pipeline, *, fresh: bool = False, inexact: bool = False, debug: bool = False
) -> None:
    """Make the stages of a pipeline in order, once all that can be known ahead is right."""
    from dataclasses import replace

    from llmpipe.front import ahead
    from llmpipe.run.artifact import artifact_of
    from llmpipe.run.machine import rank

    asked = replace(asked, stages=[each and obeying_launcher(each) for each in asked.stages])
    with screen.doing(LOOKING), ahead.others_hear():
        ahead.check(asked.stages, fresh=fresh, pipeline=asked)
    stages = [located for located in asked.stages if located]
    for i, located in enumerate(stages, 1):
        recipe = located.recipe
        say(f"stage {i} of {len(stages)}: {recipe.stage} -> {artifact_of(recipe).path}")
        make(located, fresh=fresh, inexact=inexact, debug=debug)
    if stages and rank() == 0:  # others of a launcher may be here before it has published
        from llmpipe.report.closing import closing

        made = [artifact_of(located.recipe) for located in stages]
        for line in closing(Path(stages[0].recipe.run), made):
            say(line)


def make(
    located: Located,
    *,
    fresh: bool = False,
    inexact: bool = False,
    debug: bool = False,
    only_prepare: bool = False,
) -> None:
    """Make one artifact, alone or as one of an outside launcher's processes."""
    from llmpipe.front.lines import with_lines
    from llmpipe.front.session import Session
    from llmpipe.run.machine import outside
    from llmpipe.run.machine_paths import said_in_full

    refuse_no_folder()
    gc.enable()
    session = Session(located.recipe, say, fresh, inexact, debug, only_prepare)
    with with_lines(located), said_in_full(session.artifact):
        if outside():
            from llmpipe.front.outside import make_together
            from llmpipe.run.launcher import take_out

            take_out()
            make_together(session)
        else:
            session.make()
