"""What draws the rollouts of a training: an engine, and how it plays an environment's turns."""

from __future__ import annotations

from llmpipe.data.encode import encoder_of
from llmpipe.errors import UserError
from llmpipe.models.drawing.draw import Sampling
from llmpipe.recipe.reinforcement import RLRecipe
from llmpipe.rl.environment import Environments
from llmpipe.rl.lengths import Lengths
from llmpipe.rl.method import Ground
from llmpipe.rl.rewards import Rewards
from llmpipe.rl.rollout.engine import Engine, Terms
from llmpipe.rl.rollout.local import Local
from llmpipe.rl.rollout.vllm import PROBES, VLLM
from llmpipe.rl.sampling import Sampler
from llmpipe.rl.turns import Turns
from llmpipe.training.training import Training


def sampler_of(
    training: Training[RLRecipe], ground: Ground[RLRecipe], rewards: Rewards, lengths: Lengths
) -> Sampler:
    """Raises UserError (2) where the engine does not take the model, or the processes."""
    engine = _engine(training, ground, lengths)
    turns = _turns(training, rewards, lengths)
    return Sampler(engine, training.tokenizer, ground.world, turns)


def _engine(training: Training[RLRecipe], ground: Ground[RLRecipe], lengths: Lengths) -> Engine:
    recipe, rollout = training.recipe, training.recipe.rollout
    terms = Terms(
        ground.actors,
        training.tokenizer,
        training.hardware,
        Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_p, rollout.top_k),
        recipe.launch.rollout_batch_size,
        recipe.seed,
        training.say,
    )
    if rollout.engine == "local":
        return Local(terms)
    if ground.world.size > 1:
        problem = f"rollout.engine: vllm draws in one process, and there are {ground.world.size}"
        raise UserError(problem, "set launch.processes: 1")
    rows = training.train_rows()
    probe = [rows[i]["prompt_ids"] for i in range(min(PROBES, len(rows)))]
    return VLLM(terms, probe, lengths.prompt)


def _turns(training: Training[RLRecipe], rewards: Rewards, lengths: Lengths) -> Turns | None:
    """How episodes of several turns are played, where an environment takes part in them."""
    recipe = training.recipe
    source = recipe.plays
    if source is None or source.environment is None:
        return None
    return Turns(
        Environments(source.environment, rewards.files),
        encoder_of(training.folder / "tokenizer", training.preparation.template_kwargs),
        recipe.turns,
        recipe.rollout.max_new_tokens,
        lengths.context,
    )
