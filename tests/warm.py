"""What the fork server holds before it forks: the heavy libraries, frozen, so that no trial
collects them again."""

import gc
from importlib import import_module

for name in (
    "llmpipe.front.cli",
    "llmpipe.front.worker",
    "llmpipe.models.publish",
    "llmpipe.training.supervised",
    "trl.trainer.sft_trainer",
):
    import_module(name)
gc.collect()
gc.freeze()
