"""Overrides of TRL and transformers internals that are not a trainer's methods (`training`, `preference`).
`tests/test_upstream.py` fails when one of any of them moves.

On CPU an SFT step loses most of its time in two places, and both are mended by `speed_up` without changing the result:

- the head: TRL projects every position to the vocabulary unless the device runs Triton, folds the logits in a dozen
  fp32 passes and multiplies the gradients in fp32. `LogProbs` scores only the positions that have a label, and its
  forward pass leaves the gradients behind (the idea of Liger's fused cross-entropy, https://arxiv.org/abs/2410.10989);
- attention: a packed row [d1 d2 d3] costs (d1+d2+d3)^2 under one dense block mask, d1^2+d2^2+d3^2 document by document.
  `documents_attention` does the latter.

On CUDA both have better answers upstream (Triton kernels, flash-attention's varlen path), and nothing is changed.
"""

import logging
import warnings
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface

from llmpipe.kernels.cpu import DOCUMENTS, LogProbs, documents_attention, documents_mask


def speed_up(model, *, device_type: str) -> None:
    """On CPU: `model`'s sdpa document by document, and TRL's fused head through `LogProbs`. Elsewhere nothing.

    Call before training. A model that was loaded with another attention (or knows no sdpa) keeps it. The saved
    configuration names no attention, so nothing of this is left in the artifact.
    """
    if device_type != "cpu":
        return
    import trl.trainer.utils  # here, since it imports bitsandbytes, which `silence` has to precede

    AttentionInterface.register(DOCUMENTS, documents_attention)
    AttentionMaskInterface.register(DOCUMENTS, documents_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(DOCUMENTS)
    trl.trainer.utils._use_triton = lambda device: (
        device.type in ("cpu", "cuda", "xpu")
    )  # decides `compact`
    trl.trainer.utils._ChunkedLogProbFunction = LogProbs


@contextmanager
def contiguous_head(model):
    """Hand the head whole rows. transformers hands it a slice, the last positions; where the weight is frozen, a matmul
    of PyTorch on CPU then copies all of it once per row, 3.6 GB and 10 s for 64 rows of a vocabulary of 49,152."""
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def supported_attention(kind, wanted):
    """The attention that a model class can be loaded with: the wanted one, else sdpa, else eager."""
    flash = getattr(
        kind, "_compatible_flash_implementations", None
    )  # else transformers takes another kernel, of the Hub
    able = {
        "flash_attention_2": getattr(kind, "_supports_flash_attn", True)
        and (not flash or "flash_attention_2" in flash),
        "sdpa": getattr(kind, "_supports_sdpa", True),
    }
    return next(name for name in (wanted, "sdpa", "eager") if able.get(name, True))


def as_loaded(model) -> None:
    """Leave what only training computes with: an attention that may run in half precision alone, and the routing that
    a mixture of experts returns, by TRL's order in the configuration: with it a cached step of generation breaks."""
    model.set_attn_implementation(supported_attention(model, "sdpa"))
    forget_routing(model.config)


def forget_routing(config) -> None:
    if getattr(config.get_text_config(), "output_router_logits", False):
        config.get_text_config().output_router_logits = False


@contextmanager
def generating(model):
    """Compute padded batches with a cache: as a model is loaded, and with whole rows for the head."""
    attention, config = model.config._attn_implementation, model.config.get_text_config()
    routed = getattr(config, "output_router_logits", False)
    as_loaded(model)
    try:
        with contiguous_head(model):
            yield
    finally:
        model.set_attn_implementation(attention)
        if routed:
            config.output_router_logits = True


@contextmanager
def as_reward_model(kind):
    """Make reward models of causal ones, of the class `kind`, without a word of the head that is new and of the one
    that is left out. TRL has the same for heads called `lm_head` only; Pythia's is `embed_out`."""
    names = ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected")
    old = [getattr(kind, name) for name in names]
    for name, known, head in zip(names, old, (r"^score\.", r"^(lm_head|embed_out)\."), strict=True):
        setattr(kind, name, [*(known or []), head])
    try:
        yield
    finally:
        for name, known in zip(names, old, strict=True):
            setattr(kind, name, known)


def with_bias(model):
    """`model`; PEFT's wrapper of a tied head that learns new tokens lacks the `bias` that TRL's fused head reads."""
    head = model.get_output_embeddings()
    if head is not None and not hasattr(head, "bias"):
        head.bias = None
    return model


def keep_unpacked(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at a model's first evaluation on a CPU with AVX-512 BF16.

    That rounds the constants of the quantization to bf16, so that a model which was evaluated trains on other weights
    than one which was not, and a resumed run differs from a straight one.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


NOISE = {  # logger -> words of a line that is of no use to the user, and why
    # bitsandbytes probes an optional 4-bit kernel of the Hub at import; without it the built-in one runs
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # a tied head is in no checkpoint; that a checkpoint is whole is checked by its sums
    "transformers.trainer": "There were missing keys in the checkpoint model loaded: ['lm_head.weight']",
    # said for micro-batches of one, which cost nothing where documents are attended one by one
    "trl.trainer.sft_trainer": "You are using a per_device_train_batch_size of 1 with padding-free training",
}


def silence() -> None:
    """Drop the lines that say nothing to a user. Call before TRL's trainers, and so bitsandbytes, are imported."""
    for name, words in NOISE.items():
        logging.getLogger(name).addFilter(
            lambda record, words=words: words not in record.getMessage()
        )
    # TRL still spells `gradient_checkpointing` as transformers used to: no act of the user's
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    # and PEFT asks a model for it under its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    # and of experts held in one tensor it looks for the ranks among the modules, though it has set and heeds them
    warnings.filterwarnings(
        "ignore", r"The following .*_pattern keys .*\['[^',]*gate_up_proj'\]", RuntimeWarning
    )
    warnings.filterwarnings(
        "ignore", "Paged optimizers are not supported on CPU", UserWarning
    )  # said once, by `hardware`
