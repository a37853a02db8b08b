"""What the fork server holds before it forks: the heavy libraries, frozen, so that no trial collects them again."""

import gc

import llmpipe.front.cli
import llmpipe.front.worker
import llmpipe.models.publish
import llmpipe.training.supervised  # noqa: F401

gc.collect()
gc.freeze()
