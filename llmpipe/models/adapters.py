"""Low-rank adapters (LoRA, Hu 2021): begin one, put one on its base, merge it, publish it and prove what was published.

An adapter is published without its base; the manifest names the base with its hash, and `plan` refuses any other. What
follows the adapter everywhere: tokenizer, chat template, and the generation configuration with its stop tokens.
"""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from llmpipe import upstream
from llmpipe.errors import INTEGRITY, UserError
from llmpipe.models.pretrained import load_model
from llmpipe.recipe.sections import Adapter, Quantization

WEIGHTS = "adapter_model.safetensors"


def frozen(
    folder: Path,
    wanted: Quantization | None,
    dtype: torch.dtype,
    attention: str = "sdpa",
    scores: bool = False,
) -> PreTrainedModel:
    """A base to train an adapter on: in `dtype`, or as bitsandbytes holds it: NF4 with double quantization (Dettmers
    2023) or 8 bits, with norms and embeddings in fp32. `scores`: as a reward model."""
    if wanted is None:
        return load_model(folder, attention, dtype, scores=scores)
    from peft import prepare_model_for_kbit_training

    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": wanted.double,
        "bnb_4bit_compute_dtype": dtype,
    }
    config = (
        BitsAndBytesConfig(**four) if wanted.bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    )
    model = load_model(folder, attention, dtype, config, scores)
    upstream.keep_unpacked(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _ends(model: PreTrainedModel) -> list[str]:
    """Names of the embeddings and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    ]


def begin(model: PreTrainedModel, wanted: Adapter, new_tokens: list[int], seed: int) -> Any:
    """A fresh adapter on `model`, which is frozen. Raises UserError when no layer has the names in `targets`."""
    from peft import LoraConfig, get_peft_model

    embeddings = {}
    if wanted.embeddings == "all":
        embeddings = {"modules_to_save": _ends(model)}
    elif wanted.embeddings == "new" and new_tokens:
        embeddings = {"trainable_token_indices": new_tokens}
        head = model.get_output_embeddings()
        if (
            head is not None and model.get_input_embeddings().weight is not head.weight
        ):  # the head has its own rows
            embeddings = {"trainable_token_indices": dict.fromkeys(_ends(model), new_tokens)}
    config = LoraConfig(
        task_type="CAUSAL_LM" if model.can_generate() else "SEQ_CLS",
        r=wanted.rank,
        lora_alpha=wanted.alpha,
        lora_dropout=wanted.dropout,
        target_modules=wanted.targets,
        use_rslora=wanted.rslora,
        use_dora=wanted.dora,
        init_lora_weights={"default": True, "pissa": "pissa_niter_16"}.get(
            wanted.init, wanted.init
        ),
        **embeddings,
    )
    torch.manual_seed(seed)
    try:
        made = upstream.with_bias(get_peft_model(model, config))
    except ValueError as error:
        raise UserError(
            f"adapter: {str(error).splitlines()[0]}", "see adapter.targets and adapter.init"
        ) from None
    upcast_trained(made)
    if wanted.rewrites:
        made.began_with = {name: tensor.clone() for name, tensor in tensors_of(made).items()}
    return made


def upcast_trained(model: Any) -> bool:
    """Bring what learns beside low-rank matrices, a head or embeddings, to fp32, as PEFT does with the matrices only;
    returns whether there is any. A whole layer casts what goes in, or what comes out of embeddings."""
    found = False
    for module in list(model.modules()):
        whole, rows = (
            getattr(module, name, None) for name in ("modules_to_save", "trainable_tokens_delta")
        )
        for part in (whole, rows):
            if isinstance(part, torch.nn.Module):
                part.float()
                found = True
        for layer in whole.values() if isinstance(whole, torch.nn.ModuleDict) else ():
            outside = module.original_module.weight.dtype
            if layer._forward_hooks or layer._forward_pre_hooks:
                continue  # was here before
            if isinstance(layer, torch.nn.Embedding):
                layer.register_forward_hook(
                    lambda layer, args, out, outside=outside: out.to(outside)
                )
            else:
                layer.register_forward_pre_hook(
                    lambda layer, args: (args[0].to(layer.weight.dtype), *args[1:])
                )
    return found


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors as a file has them."""
    from peft import get_peft_model_state_dict

    return {
        k: v.detach().cpu()
        for k, v in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of tensors and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def plain(model: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The adapter as tensors and configuration for the base's own weights. One that began with a part of them, B0 A0,
    has changed them by B A - B0 A0 = [B, -B0] [A; A0], an adapter of twice the rank."""
    tensors, config = tensors_of(model), copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # whose order is another one in every process
        config.target_modules = sorted(config.target_modules)
    if began := getattr(model, "began_with", None):
        for name in tensors:
            if "lora_A" in name:
                tensors[name] = torch.cat([tensors[name], began[name]])
            elif "lora_B" in name:
                tensors[name] = torch.cat([tensors[name], -began[name]], dim=1)
        config.init_lora_weights, config.r = True, 2 * config.r
        config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    return tensors, config


def same_shape(model: Any, wanted: Adapter) -> None:
    """Refuse a recipe that asks for another adapter than the one that is trained on (3)."""
    has = model.peft_config["default"]
    there = {
        "rank": has.r,
        "alpha": has.lora_alpha,
        "dropout": has.lora_dropout,
        "rslora": has.use_rslora,
    }
    there["dora"] = has.use_dora
    if "all" in (learned := "all" if has.modules_to_save else "new", wanted.embeddings):
        there["embeddings"] = learned
    other = {name: value for name, value in there.items() if getattr(wanted, name) != value}
    targets, ends = _targets(model), wanted.targets
    asked = {
        name: ends == "all-linear" or any(f".{name}".endswith(f".{end}") for end in ends)
        for name in targets
    }
    if asked != targets:
        other["targets"] = sorted(
            {name.rpartition(".")[2] for name, adapted in targets.items() if adapted}
        )
    if other:
        words = ", ".join(
            f"{name} {value} there, {getattr(wanted, name)} in the recipe"
            for name, value in other.items()
        )
        hint = "write the adapter's own numbers, or set adapter.continue: false to merge it and start a new one"
        raise UserError(f"adapter: the one that is trained on is another: {words}", hint, INTEGRITY)


def _targets(model: Any) -> dict[str, bool]:
    """Linear layers of the model under an adapter, the head apart, and whether they are adapted."""
    from transformers.pytorch_utils import Conv1D

    inside = ("lora_", "base_layer", "modules_to_save", "original_module")
    head = model.get_output_embeddings()
    return {
        name: hasattr(module, "lora_A")
        for name, module in model.get_base_model().named_modules()
        if (isinstance(module, torch.nn.Linear | Conv1D) or hasattr(module, "lora_A")) and module is not head
        and not any(part in name for part in inside)
    }  # fmt: skip


def put_on(model: PreTrainedModel, folder: Path, trainable: bool = False) -> Any:
    """`model` with the adapter in `folder`. Raises UserError (3) when their tensors do not fit one another."""
    from peft import PeftModel, set_peft_model_state_dict

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors, which are refused below
            both = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, local_files_only=True
            )
            if upcast_trained(both):
                set_peft_model_state_dict(both, load_file(folder / WEIGHTS))  # unrounded
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{folder}: the adapter does not fit its base: {reason}", code=INTEGRITY
        ) from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        there = set(file.keys())
    wanted = set(tensors_of(both))
    if there != wanted:
        odd = sorted(there ^ wanted)
        raise UserError(
            f"{folder / WEIGHTS}: {odd[0]} {'is left over' if odd[0] in there else 'is missing'}",
            code=INTEGRITY,
        )
    return upstream.with_bias(both)
