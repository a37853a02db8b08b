"""What the fork server holds before it forks: the heavy libraries, frozen, so that no trial
collects them again."""

import gc
import os
from importlib import import_module

for name in (
    "llmpipe.front.cli",
    "llmpipe.front.worker",
    "llmpipe.models.publish",
    "llmpipe.training.supervised",
    "trl.trainer.sft_trainer",
):
    import_module(name)
os.fsync = lambda descriptor: None  # as in conftest.py
gc.collect()
gc.freeze()
