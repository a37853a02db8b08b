"""Models and tokenizers: choose for the hardware, load, adapt to the tokenizer, convert."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import launch, rundir
from llmpipe.engine import upstream
from llmpipe.errors import DATA, INTEGRITY, UserError
from llmpipe.recipe import Adapter, Training

Say = Callable[[str], None]
PEAK = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10": 125, "4090": 165}


@dataclass(frozen=True)
class Hardware:
    """What this process trains on, and how the recipe's `auto`s were decided."""

    device: str
    processes: int
    threads: int
    micro_batch_size: int
    accumulation: int
    bf16: bool
    attention: str

    def frozen_dtype(self, adapter: Adapter) -> torch.dtype:
        """Of weights that are not trained. What an adapter is taken out of is not rounded, or it would not fit back."""
        return torch.bfloat16 if self.bf16 and not adapter.rewrites else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)

    def describe(self) -> dict[str, Any]:
        name = torch.cuda.get_device_name() if self.device == "cuda" else torch.backends.cpu.get_cpu_capability()
        return {**vars(self), "device_name": name}

    def resume_key(self) -> dict[str, Any]:
        """What must be equal for a resumed run to be bitwise the straight one."""
        return {k: v for k, v in vars(self).items() if k != "accumulation"}


def hardware(recipe: Training, say: Say, folder: Path | None = None) -> Hardware:
    """Decide device, precision, attention and micro-batch, and say why. `folder`: of the model, or of its base."""
    on_gpu = torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or launch.thread_count(recipe.launch, processes)
    torch.set_num_threads(threads)
    wanted = recipe.optim.precision
    fast = has_bf16()
    if wanted == "bf16" and not fast and on_gpu:
        raise UserError("optim.precision: bf16: this GPU has no bf16", "set optim.precision: fp32")
    bf16 = wanted == "bf16" or (wanted == "auto" and fast)
    why = "the recipe asks for it" if wanted != "auto" else f"the hardware has {'it' if bf16 else 'no fast bf16'}"
    attention, attention_why = upstream.choose_attention("cuda" if on_gpu else "cpu", recipe.data.packing)
    kind = architecture(folder) if folder else None
    if (known := upstream.attention_of(kind, attention)) != attention:
        attention, attention_why = known, f"{kind.__name__} has no {attention}"
    micro = launch.micro_batch_size(recipe, processes, on_gpu)
    found = Hardware(
        device="cuda" if on_gpu else "cpu",
        processes=processes,
        threads=threads,
        micro_batch_size=micro,
        accumulation=recipe.batch_size // (micro * processes),
        bf16=bf16,
        attention=attention,
    )
    cut = f"; batch {recipe.batch_size} = {micro} x {found.accumulation} accumulated x {processes}"
    say(f"hardware: {processes} x {found.device}, {threads} threads each{cut * (recipe.stage != 'ppo')}")
    say(f"precision: {'bf16 arithmetic' if bf16 else 'fp32'}, fp32 master weights ({why})")
    say(f"attention: {attention} ({attention_why})")
    if recipe.optim.optimizer.startswith("paged") and not on_gpu:
        say(f"optimizer: {recipe.optim.optimizer}: a CPU has nothing to page to, the moments stay where they are")
    return found


def has_bf16() -> bool:
    """bf16 matrix products in hardware (a GPU's, AVX-512 BF16 or AMX); elsewhere they are slower than fp32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def load_tokenizer(folder: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def architecture(folder: Path, ranks: bool = False) -> type[PreTrainedModel]:
    """The class that transformers has for a model in `folder`; `ranks`: for a reward model. Raises UserError (2)."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}", code=DATA) from error
    known = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if ranks else MODEL_FOR_CAUSAL_LM_MAPPING
    kind = known.get(type(config), None)
    if kind is None:
        what = "reward model" if ranks else "language model"
        raise UserError(f"{folder}: transformers has no {what} of the kind {config.model_type}", code=DATA)
    return kind


def load_model(
    folder: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32, quantization: Any = None,
    scores: bool = False,
) -> PreTrainedModel:  # fmt: skip
    """A model from safetensors: a reward model where the folder holds one or where it `scores`, which gives any other
    a head with random weights; else a causal language model. Raises UserError (3) when a tensor is missing or left
    over."""
    ranked = rundir.ranks(folder)
    kind = architecture(folder, ranked or scores)
    try:
        # the head that is left out and the one that is new are no news; any other difference is refused below
        with upstream.ranking(kind) if scores and not ranked else nullcontext():
            model, report = kind.from_pretrained(
                folder,
                **({"num_labels": 1} if scores else {}),
                dtype=dtype,
                quantization_config=quantization,
                attn_implementation=upstream.attention_of(kind, attention),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded: {first}", code=DATA) from error
    problems = {k: sorted(map(str, v)) for k, v in report.items() if v and k != "error_msgs"}
    if problems or report.get("error_msgs"):
        what = "; ".join(f"{k.replace('_', ' ')}: {', '.join(v[:3])}" for k, v in problems.items())
        raise UserError(f"{folder}: the weights do not fit the model ({what or report['error_msgs']})", code=INTEGRITY)
    upstream.unrouted(model.config)
    return model


def load_any(folder: Path, base: Path | None, tokenizer: Tokenizer, *, bf16: bool) -> Any:
    """A model to look at, alone or as adapter on its `base`, on the GPU where there is one."""
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16 if bf16 else torch.float32
    # not cast later: positions are computed in fp32
    model = load_model(base or folder, dtype=dtype, scores=bool(base) and rundir.ranks(folder))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"{folder}: the tokenizer has neither a pad nor an end token", "set eos_token in its config")
    model.config.pad_token_id = tokenizer.pad_token_id
    if base:
        from llmpipe.engine import adapters

        fit(model, tokenizer, generation=folder)
        model = adapters.put_on(model, folder)
    return model.to(device).eval()


def fit(model: PreTrainedModel, tokenizer: Tokenizer, *, generation: Path | None = None) -> int:
    """Embeddings at least as wide as the tokenizer; returns how many rows there were. `generation`: a folder whose
    generation configuration, with its stop tokens, the model takes over."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        # mean_resizing draws new rows from the old ones' distribution (Hewitt 2021), so that they start out harmless
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=True)
    if generation and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(generation)
    return rows


def load(
    folder: Path, base: Path | None, tokenizer: Tokenizer, found: Hardware, recipe: Training, prepared: dict, say: Say,
    scores: bool = False,
) -> Any:  # fmt: skip
    """The model to train, its embeddings as wide as the tokenizer, its stop tokens as the template ends turns.

    All weights: fp32. With `adapter:` the model is frozen, in the precision of the arithmetic or quantized, and its
    adapter is a new one, or the one in `folder` where that is an adapter on `base`. `scores`: a reward model.
    """
    from llmpipe.engine import adapters

    dtype = found.frozen_dtype(recipe.adapter) if recipe.adapter else torch.float32
    if rundir.ranks(base or folder) and not scores:
        raise UserError(f"model: {recipe.model}: a reward model, which gives no answers", code=INTEGRITY)
    if base and recipe.adapter.rewrites:
        raise UserError(
            f"adapter.init: {recipe.adapter.init}: the adapter is there already", "set adapter.continue: false"
        )
    torch.manual_seed(recipe.seed)  # of a new head
    model = adapters.frozen(base or folder, recipe.quantization, dtype, found.attention, scores)
    rows = fit(model, tokenizer)
    if len(tokenizer) > rows:
        say(f"embeddings: {rows} -> {len(tokenizer)} rows, new ones drawn from the distribution of the old")
    model = ready(model, tokenizer, found, prepared, say)
    if recipe.adapter is None:
        return model
    count = model.num_parameters()
    if base:
        model = adapters.put_on(model, folder, trainable=True)
        adapters.same_shape(model, recipe.adapter)
    else:
        added = tokenizer.convert_tokens_to_ids(prepared["added_tokens"])
        model = adapters.begin(model, recipe.adapter, added, recipe.seed)
    # or PEFT looks the base up, on the Hub too, whenever a checkpoint is saved
    model.peft_config["default"].base_model_name_or_path = model.get_base_model().name_or_path = ""
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = f"{recipe.quantization.bits} bits" if recipe.quantization else str(dtype).removeprefix("torch.")
    say(f"model: {count / 1e6:,.1f} M parameters in {how}, frozen; adapter of {learned / 1e6:,.2f} M trained")
    return model


def ready(model: PreTrainedModel, tokenizer: Tokenizer, found: Hardware, prepared: dict, say: Say) -> PreTrainedModel:
    """`model` with its special tokens and generation as the template has them, and fast on this hardware."""
    if model.can_generate():
        stop_ids = tokenizer.convert_tokens_to_ids(prepared["stop_tokens"])
        generation = model.generation_config
        generation.eos_token_id = stop_ids if len(stop_ids) > 1 else stop_ids[0]
        generation.pad_token_id = tokenizer.pad_token_id
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    upstream.speed_up(model, device_type=found.device)
    say(f"model: {type(model).__name__}, {model.num_parameters() / 1e6:,.1f} M parameters")
    return model


def build(recipe: Any, tokenizer: Tokenizer, found: Hardware, prepared: dict, say: Say) -> PreTrainedModel:
    """A model with random weights, as the recipe's `architecture` describes it. Raises UserError when transformers
    refuses the shape."""
    wanted, context = recipe.architecture, recipe.data.max_length
    wide = wanted.ffn or (4 * wanted.width if wanted.kind == "gpt2" else 64 * math.ceil(wanted.width * 8 / 3 / 64))
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "tie_word_embeddings": wanted.tied, "use_cache": True}
    common |= {"bos_token_id": tokenizer.bos_token_id}
    if wanted.kind == "gpt2":
        shape = {"n_layer": wanted.layers, "n_embd": wanted.width, "n_head": wanted.heads, "n_inner": wide}
        shape |= {"n_positions": context, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        shape = {"num_hidden_layers": wanted.layers, "hidden_size": wanted.width, "intermediate_size": wide}
        shape |= {"num_attention_heads": wanted.heads, "num_key_value_heads": wanted.kv_heads or wanted.heads}
        shape |= {"max_position_embeddings": context, "head_dim": wanted.width // wanted.heads}
        shape |= {"rope_parameters": {"rope_type": "default", "rope_theta": wanted.rope_theta, **wanted.rope_scaling}}
    try:
        config = AutoConfig.for_model(wanted.kind, **common, **shape)
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=found.attention)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"architecture: {str(error).strip().splitlines()[0]}") from error
    return ready(model, tokenizer, found, prepared, say)


def convert_gguf(file: Path, folder: Path) -> None:
    """A GGUF file as safetensors in fp32 with its tokenizer: dequantized once, then a model folder like any other."""
    upstream.silence()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UserError(f"{file}: cannot be read as GGUF: {str(error).strip().splitlines()[0]}") from error
    with rundir.publishing(folder) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps the pages of small tensors, a gigabyte of them in training."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Operations that a token costs in training (Chowdhery 2022, appendix B): 2 per weight forward, 2 for the gradient
    of what it multiplies, 2 for its own where it is trained, and 12 x layers x width x context for the attention."""
    embeddings, head, config = (
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        model.config.get_text_config(),
    )
    looked_up = 0 if head and embeddings.weight is head.weight else embeddings.weight.numel()  # it multiplies nothing
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = 12 * config.num_hidden_layers * config.hidden_size * context
    return 4 * (model.num_parameters() - looked_up) + 2 * trained + attention


def peak_flops() -> float | None:
    """Dense bf16 operations per second of this GPU by its maker's data sheet, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for part, peak in PEAK.items() if part in name), None)


def memory_gb() -> float:
    """Peak memory so far: of the GPU when there is one, else resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
