"""Lines of libraries that say nothing to a user, and are dropped.

It imports none of them: some speak while they are imported, and are silenced before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NOISE = {  # logger -> words of a line that is of no use to the user, and why
    # under ZeRO, where the trainer tells DeepSpeed alone
    "accelerate.accelerator": "Gradient accumulation steps mismatch",
    # a model that is given to it rounds by itself, inside: see `zero.computing`
    "DeepSpeed": "torch.autocast is enabled outside DeepSpeed",
    # bitsandbytes probes an optional 4-bit kernel of the Hub at import; the built-in one runs
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # kernels for other devices, which torchao tries to load of them all
    "torchao": "Failed to load",
    # of classes of torchao's
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    # of every layer, each time that it computes
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    # a tied head is in no checkpoint; that a checkpoint is whole is checked by its sums
    "transformers.trainer": (
        "There were missing keys in the checkpoint model loaded: ['lm_head.weight']"
    ),
    # of new embeddings and of a head with new rows: said in a line of ours, where it is news
    "transformers.modeling_utils": "will be initialized from a multivariate normal distribution",
    # of a text that is then cut into windows, by the length that is the tokenizer's own
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
    # what is written in place is not among what selective checkpointing keeps
    "torch._higher_order_ops.wrap": "Detected that context_fn is passed to torch.utils.checkpoint",
    # of micro-batches of one, which cost nothing where documents are attended one by one
    "trl.trainer.sft_trainer": (
        "You are using a per_device_train_batch_size of 1 with padding-free training"
    ),
}

WARNINGS: list[tuple[str, type[Warning]]] = [
    # TRL still spells `gradient_checkpointing` as transformers used to: no act of the user's
    ("`gradient_checkpointing(_enable|_disable)?` is deprecated", FutureWarning),
    # and PEFT asks a model for it under its old name
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # of experts held in one tensor PEFT looks for the ranks among the modules, though it has set
    # and heeds them
    (r"The following .*_pattern keys .*\['[^',]*gate_up_proj'\]", RuntimeWarning),
    # PEFT sets what GPT-2's layers need by itself, and says so of each
    ("fan_in_fan_out is set to False but the target module is `Conv1D`", UserWarning),
    # of embeddings that learn beside a head of the same weights: said once, by `load`
    ("Model has `tie_word_embeddings=True` and a tied layer is part of the adapter", UserWarning),
    ("Input and output embeddings are no longer tied after merging", UserWarning),
    # said once, by `hardware`
    ("Paged optimizers are not supported on CPU", UserWarning),
]


def silence() -> None:
    """Drop the lines that say nothing to a user. Call before transformers is imported, which
    imports torchao where it is installed, and before TRL's trainers, which import bitsandbytes.
    """
    for logger, words in NOISE.items():
        logging.getLogger(logger).addFilter(_without(words))
    for message, category in WARNINGS:
        warnings.filterwarnings("ignore", message, category)


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Drop the line of one logger that says nothing to a user: also where `silence` was not called,
    in a chat or when an adapter is merged."""
    drop = _without(NOISE[logger])
    logging.getLogger(logger).addFilter(drop)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(drop)


def _without(words: str) -> Callable[[logging.LogRecord], bool]:
    """A filter of lines that hold these words."""
    return lambda record: words not in record.getMessage()
