"""What the fork server holds before it forks: the heavy libraries, frozen, so that no trial
collects them again; and what every trial would have to make anew."""

import gc
import os
from importlib import import_module

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    "llmpipe.front.cli",
    "llmpipe.front.worker",
    "llmpipe.models.publish",
    "llmpipe.rl.loop",
    "llmpipe.stages.sft",
    "llmpipe.training.conclude",
    "llmpipe.training.supervised",
    "tests.hooks",
    "tests.life",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
):
    import_module(name)
get_checkpoint_conversion_mapping("llama")  # a thousand patterns are compiled at the first model
os.fsync = lambda descriptor: None  # as in conftest.py
gc.collect()
gc.freeze()
