"""The overrides in `llmpipe.upstream` change no result, and what they hold on to is still there."""

import copy
import inspect
import json
import os
import re
import shutil
import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import transformers.masking_utils
import trl.trainer.utils
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    core_model_loading,
    modeling_utils,
)
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.distributed import DistributedConfig, fsdp
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llmpipe import upstream
from llmpipe.errors import UserError
from llmpipe.kernels import cpu
from llmpipe.models.pretrained import load_model
from llmpipe.training import policy, preferences
from llmpipe.training.laid import EndToEnd
from llmpipe.upstream import few_bits, gguf, later
from llmpipe.upstream.attention import DOCUMENTS
from llmpipe.upstream.head import LogProbs, read_predictors
from tests import ggufs, life

LENGTHS = (5, 1, 9, 17)
OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of the fused head
OF_DPO = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """Give TRL its own names back after each test."""
    for name in ("_use_triton", "_ChunkedLogProbFunction"):
        monkeypatch.setattr(trl.trainer.utils, name, getattr(trl.trainer.utils, name))


def tiny() -> LlamaForCausalLM:
    """A random Llama: two layers, four heads that share two keys."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).train()


def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The same model as it is, and sped up."""
    plain = tiny()
    fast = copy.deepcopy(plain)
    upstream.speed_up(fast, device_type="cpu")
    assert (
        fast.config._attn_implementation == DOCUMENTS
        and plain.config._attn_implementation == "sdpa"
    )
    return plain, fast


def rows(seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 101, (n,), generator=generator).tolist() for n in LENGTHS]
    return [
        {"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids
    ]


def batch(padding_free: bool) -> dict:
    return DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(rows())


def inputs(collated: dict) -> dict:
    return {name: value for name, value in collated.items() if name != "labels"}


def grads(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_packed_row_equals_the_dense_block_mask():
    plain, fast = pair()
    packed = inputs(batch(padding_free=True))
    expected, found = (model(**packed, use_cache=False).logits for model in (plain, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(grads(fast), grads(plain), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "keep", [{"input_ids", "position_ids"}, None], ids=["position_ids alone", "TRL's collator"]
)
def test_documents_do_not_see_each_other(keep):
    _, fast = pair()
    packed = inputs(batch(padding_free=True))
    packed = {name: value for name, value in packed.items() if keep is None or name in keep}
    other = packed | {"input_ids": packed["input_ids"].clone()}
    other["input_ids"][0, : LENGTHS[0]] = 7
    before, after = (fast(**given, use_cache=False).logits[0] for given in (packed, other))
    assert (before[: LENGTHS[0]] != after[: LENGTHS[0]]).any()
    assert (before[LENGTHS[0] :] == after[LENGTHS[0] :]).all()


def test_mask_is_lengths_none_or_dense():
    _, fast = pair()
    embeds, config = torch.zeros(1, 6, 32), fast.config
    causal = transformers.masking_utils.create_causal_mask
    positions = torch.tensor([[0, 1, 0, 1, 2, 0]])
    assert causal(config, embeds, None, None, positions).tolist() == [2, 3, 1]
    assert causal(config, embeds, None, None, torch.arange(6)[None]) is None
    assert causal(config, embeds, torch.tensor([[1, 1, 1, 1, 0, 0]]), None) is None
    assert causal(config, embeds, torch.tensor([[0, 0, 1, 1, 1, 1]]), None).shape == (1, 1, 6, 6)
    assert causal(config, torch.zeros(2, 6, 32), None, None, positions.expand(2, -1)).shape == (
        2,
        1,
        6,
        6,
    )
    window = copy.deepcopy(config)
    window.sliding_window = 3
    slide = transformers.masking_utils.create_sliding_window_causal_mask
    assert slide(window, embeds, None, None, positions).shape == (1, 1, 6, 6)
    window.sliding_window = 6
    assert slide(window, embeds, None, None, positions).tolist() == [2, 3, 1]


def test_padded_batches_are_equal_where_there_are_tokens():
    plain, fast = pair()
    padded = inputs(batch(padding_free=False))
    real = padded["attention_mask"].bool()
    expected, found = (model(**padded, use_cache=False).logits[real] for model in (plain, fast))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_generation_from_left_padding_is_equal():
    plain, fast = pair()
    ids = torch.tensor([[0, 0, 0, 5, 6], [9, 8, 7, 6, 5]])
    asked = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "max_new_tokens": 8,
        "do_sample": False,
    }
    expected, found = (model.eval().generate(**asked) for model in (plain, fast))
    assert expected.tolist() == found.tolist()


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("items", [None, 37])
def test_head_equals_trls(padding_free, items, monkeypatch):
    plain, fast = pair()
    given = batch(padding_free)
    with monkeypatch.context() as bare:
        bare.setattr(trl.trainer.utils, "_use_triton", lambda _: False)
        bare.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", ChunkedLogProbFunction)
        trl.trainer.utils.add_fused_lm_head(plain, outputs=OUTPUTS)
        expected = plain(**given, num_items_in_batch=items, fused_lm_head=True)
        expected.loss.backward()
    trl.trainer.utils.add_fused_lm_head(fast, outputs=OUTPUTS)
    found = fast(**given, num_items_in_batch=items, fused_lm_head=True)
    found.loss.backward()
    for name in ("loss", "log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads(fast), grads(plain), atol=1e-5, rtol=1e-4)


def test_head_of_a_batch_that_says_where_it_learns():
    """What no device is asked: the same numbers, of the places that learn alone, in any shape."""
    plain, fast = pair()
    plain_batch = batch(padding_free=True)
    trl.trainer.utils.add_fused_lm_head(plain, outputs=OUTPUTS)
    trl.trainer.utils.add_fused_lm_head(fast, outputs=OUTPUTS)
    read_predictors(fast, ("entropy", "is_top1"))
    shaped = EndToEnd(lambda _: dict(plain_batch), pad_token_id=0, longest=32, tokens=64)([])
    expected = plain(**plain_batch, fused_lm_head=True, use_cache=False)
    scored = fast(**shaped, fused_lm_head=True, use_cache=False)
    learned = expected.label_mask
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        torch.testing.assert_close(scored[name], expected[name][learned], atol=1e-5, rtol=1e-5)
    expected.log_probs.sum().backward()
    scored.log_probs.sum().backward()
    torch.testing.assert_close(grads(fast), grads(plain), atol=2e-5, rtol=1e-4)


def call(function, hidden, weight, targets, outputs=OUTPUTS, bias=None):
    return function.apply(hidden, weight, bias, targets, 1.0, 64, None, 1.0, outputs)


@pytest.mark.parametrize("outputs", [OUTPUTS, OF_DPO, ("log_probs",)])
@pytest.mark.parametrize("autocast", [False, True])
def test_log_probs_with_a_factor_per_token_and_across_tiles(autocast, outputs, monkeypatch):
    """As DFT's loss has it: every token's gradient is scaled differently."""
    monkeypatch.setattr(cpu, "TILE", 4)
    monkeypatch.setattr(cpu, "CACHED", 3 * 101)  # three rows of a tile at once
    torch.manual_seed(0)
    targets, factor = torch.randint(0, 101, (11,)), torch.rand(11)
    results = []
    for function in (ChunkedLogProbFunction, LogProbs):
        torch.manual_seed(1)
        hidden, weight = (
            torch.randn(11, 32, requires_grad=True),
            torch.randn(101, 32, requires_grad=True),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = call(function, hidden, weight, targets, outputs)
        (found[0] * factor).sum().backward()
        results.append((found, (hidden.grad, weight.grad)))
    tolerance = 3e-2 if autocast else 1e-5
    assert [value is None for value in results[1][0]] == [value is None for value in results[0][0]]
    known = [tuple(value for value in found if value is not None) for found, _ in results]
    torch.testing.assert_close(known[1], known[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=tolerance, rtol=tolerance)


def test_log_probs_edges():
    hidden, weight = torch.randn(3, 32, requires_grad=True), torch.randn(101, 32)
    nothing = call(LogProbs, hidden[:0], weight, torch.empty(0, dtype=torch.long))[0]
    nothing.sum().backward()
    assert hidden.grad.abs().sum() == 0
    targets = torch.tensor([1, 2, 3])
    call(LogProbs, hidden, weight, targets)[0].sum().backward()  # a frozen head, as under LoRA
    assert hidden.grad.abs().sum() > 0
    with torch.no_grad():
        assert not call(LogProbs, hidden, weight, targets)[0].requires_grad
    for outputs in (
        (*OUTPUTS, "log_sum_sq_probs"),
        ("log_probs", "log_sum_sq_probs"),
    ):  # WPO's stays TRL's
        functions = ChunkedLogProbFunction, LogProbs
        expected, found = (
            call(function, hidden, weight, targets, outputs) for function in functions
        )
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_saved_config_names_no_attention(tmp_path):
    _, fast = pair()
    fast.save_pretrained(tmp_path)
    assert "llmpipe" not in (tmp_path / "config.json").read_text()
    assert not any("attn_impl" in key for key in json.loads((tmp_path / "config.json").read_text()))
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_heads_of_other_devices_and_other_attentions_are_left_alone():
    before = trl.trainer.utils._use_triton, trl.trainer.utils._ChunkedLogProbFunction
    model = tiny()
    upstream.speed_up(model, device_type="cuda")
    assert (trl.trainer.utils._use_triton, trl.trainer.utils._ChunkedLogProbFunction) == before
    model.set_attn_implementation("eager")
    upstream.speed_up(model, device_type="cpu")
    assert model.config._attn_implementation == "eager"


# Canaries: what the overrides hold on to. A failure here says that upstream moved, and that
# upstream.py has to follow.


def test_canary_weights_are_loaded_into_models_of_their_size(tmp_path):
    """transformers builds without memory what a configuration describes; then it makes room."""
    shutil.copytree(life.TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text()) | {"vocab_size": 50_000_000}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"describes a model of [\d.]+ GB"):
        load_model(tmp_path / "model")
    load_model(life.TINY / "model")  # and nothing of it is left


def test_canary_what_is_offloaded_is_loaded_to_the_host(monkeypatch):
    """By both ways that transformers has, one tensor after the other; and pinned by FSDP2."""
    places = (core_model_loading, modeling_utils)
    kept = core_model_loading._dtensor_from_local_like
    for before in (None, "0"):
        if before:
            monkeypatch.setenv(upstream.NOT_AHEAD, before)
        with upstream.to_host():
            assert all(place._dtensor_from_local_like is not kept for place in places)
            assert os.environ[upstream.NOT_AHEAD] == "1"
        assert all(place._dtensor_from_local_like is kept for place in places)
        assert os.environ.get(upstream.NOT_AHEAD) == before
    readers = (
        core_model_loading.set_param_for_module,
        PreTrainedModel._move_missing_keys_from_meta_to_device,
    )
    for reader in readers:
        assert "_dtensor_from_local_like(" in inspect.getsource(reader)
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert f'is_env_variable_true("{upstream.NOT_AHEAD}")' in source
    (policy,) = fsdp._get_fsdp_policy_kwargs(DistributedConfig(fsdp_cpu_offload=True)).values()
    assert policy == CPUOffloadPolicy(pin_memory=True), "or there is nothing to unpin"


def test_canary_what_is_gathered_outlives_its_use():
    """FSDP2 keeps it for the next layer, unless it is gathered as `parts.looking` has it be."""
    source = inspect.getsource(FSDPParamGroup.wait_for_unshard)
    assert "async_op = self._all_gather_result.all_gather_work is not None" in source
    kept = re.search(r"if \(([^)]*)\):\s*(?:#.*\s*)+self\.comm_ctx\.all_gather_state = ", source)
    assert kept and "not async_op" in kept[1]


def test_canary_no_kernels_without_the_package():
    """What `llmpipe.front` takes away is all that transformers asks for."""
    from transformers.utils import import_utils

    source = inspect.getsource(import_utils.is_kernels_available)
    assert '_is_package_available("kernels"' in source
    assert "find_spec" in inspect.getsource(import_utils._is_package_available)


def test_canary_fused_head():
    source = inspect.getsource(trl.trainer.utils.add_fused_lm_head)
    assert (
        source.count("_use_triton(") == 1
        and "compact = _use_triton(hidden_states.device)" in source
    )
    assert source.count("_ChunkedLogProbFunction.apply(") == 1
    assert (
        inspect.getsource(trl.trainer.utils).count("_use_triton") == 2
    )  # its import and `compact`
    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters)[1:] == [
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ]
    sft = inspect.getsource(trl.SFTTrainer)
    assert 'outputs=("log_probs", "entropy", "is_top1")' in sft
    assert "outputs.entropy.detach()" in sft  # so the entropy needs no gradient


def test_canary_attention():
    needed = {
        "batch_size",
        "q_length",
        "kv_length",
        "q_offset",
        "mask_function",
        "attention_mask",
        "local_size",
        "use_vmap",
        "allow_is_causal_skip",
        "device",
    }
    assert needed <= set(inspect.signature(transformers.masking_utils.sdpa_mask).parameters)
    expected = ["module", "query", "key", "value", "attention_mask", "dropout", "scaling"]
    assert list(inspect.signature(sdpa_attention_forward).parameters)[:7] == expected
    source = inspect.getsource(transformers.masking_utils.create_causal_mask)
    packed = source.split("if packed_sequence_mask is not None:")[1].split("if block_sequence_ids")[
        0
    ]
    assert (
        "allow_is_causal_skip = False" in packed
    )  # how `documents_mask` knows a packed row from a plain one
    assert callable(AttentionInterface.register) and callable(AttentionMaskInterface.register)


def test_canary_trainers_of_pairs():
    """What `training/preferences.py`, `reference.py`, `policy.py` and `reference_free.py` override
    or lean on."""
    from trl import DPOTrainer, RewardTrainer

    for trainer in (RewardTrainer, DPOTrainer):
        assert {"_prepare_dataset", "_set_signature_columns_if_needed", "compute_loss"} <= set(
            vars(trainer)
        )
        assert "num_items_in_batch" in inspect.signature(trainer.compute_loss).parameters
    source = inspect.getsource(DPOTrainer)
    assert (
        'model.add_adapter("ref", default_config)' in source
        and '.replace(".default.", ".ref.")' in source
    )
    assert 'adapter_name="ref" if "ref" in' in source
    assert (
        "(args.precompute_ref_log_probs and not self.is_fsdp_enabled):" in source
    )  # no second model
    assert (
        '{"completion_mask", "ref_chosen_logps", "ref_rejected_logps"}' in source
    )  # all else goes to the model
    assert (
        "per_token_logps = outputs.log_probs[:, -seq_len:]" in source
        and "loss += per_sequence_loss.mean()" in source
    )
    assert list(inspect.signature(DPOTrainer._compute_loss).parameters) == [
        "self",
        "model",
        "inputs",
        "return_outputs",
    ]
    assert "self._compute_loss(model, inputs, return_outputs)" in inspect.getsource(
        DPOTrainer.compute_loss
    )
    assert "if self.precompute_ref_logps:" in inspect.getsource(DPOTrainer._compute_loss)
    parameters = inspect.signature(DPOTrainer._precompute_ref_logps).parameters
    assert list(parameters)[:2] == ["self", "dataset"]
    precompute = inspect.getsource(DPOTrainer._precompute_ref_logps)
    assert "dataset._fingerprint" in precompute
    assert "dataset._get_cache_file_path(fingerprint)" in precompute
    assert "outputs.logits.squeeze(-1), chunks=2" in inspect.getsource(RewardTrainer.compute_loss)
    scaling = inspect.getsource(transformers.Trainer.training_step)
    assert "loss / self.current_gradient_accumulation_steps" in scaling


def test_canary_durable_trainers():
    """What `training/hosted.py` overrides, and what `training/resume.py` reads and puts back."""
    from trl import DPOTrainer, RewardTrainer, SFTTrainer

    loop = inspect.getsource(transformers.Trainer)
    for method in (
        "_defer_fsdp_gradient_reduction",
        "_evaluate",
        "_get_grad_norm",
        "_get_output_dir",
        "_get_train_sampler",
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_prepare_for_training",
        "_prepare_inputs",
        "_save_checkpoint",
        "create_scheduler",
    ):
        assert f"self.{method}" in loop and f"def {method}(" in loop, method
    assert "self._tr_loss +=" in loop and "self._globalstep_last_logged" in loop
    for trainer in (SFTTrainer, RewardTrainer, DPOTrainer):
        source = inspect.getsource(trainer)
        assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source
        assert "self._total_train_tokens = 0" in source


def test_canary_of_files_of_checkpoints():
    """transformers and PEFT write what `upstream.writing_by` catches, and PyTorch's reader of parts
    asks for the one word that `parallel` writes beside them.
    """
    from peft import peft_model
    from torch.distributed.checkpoint import _hf_utils, hf_storage

    for place in (modeling_utils.PreTrainedModel.save_pretrained, peft_model.PeftModel):
        assert "safe_save_file(" in inspect.getsource(place)
    reader = inspect.getsource(hf_storage.HuggingFaceStorageReader)
    asked = set(re.findall(r"\b[A-Z_]+_KEY\b", reader))
    assert asked == {"CUSTOM_METADATA_KEY", "SAVED_OFFSETS_KEY"}
    assert _hf_utils.CUSTOM_METADATA_KEY == "DCP_SHARDING_INFO"
    assert _hf_utils.SAVED_OFFSETS_KEY == "saved_offsets"
    name = _hf_utils._gen_file_name(1, 1, 3)
    assert name == "shard-00003-model-00001-of-00001.safetensors"
    writer = inspect.getsource(hf_storage.HuggingFaceStorageWriter.finish)
    assert "if self.save_distributed and not self.enable_consolidation:" in writer
    saving = inspect.getsource(transformers.Trainer._save_optimizer_and_scheduler)
    for name in ("optimizer", "lr_scheduler"):
        assert f"torch.save(self.{name}.state_dict(), os.path.join(output_dir, " in saving


def test_canary_zero():
    """What `parallel.zero` and `training/sharded.py` hold on to of Trainer's way to DeepSpeed."""
    from accelerate import Accelerator
    from transformers.integrations import deepspeed

    prepare = inspect.signature(transformers.Trainer._prepare_for_training)
    assert [*prepare.parameters][1:] == ["max_steps", "train_dataloader", "resume_from_checkpoint"]
    source = inspect.getsource(transformers.Trainer._prepare_for_training)
    assert "deepspeed_load_checkpoint" in source and "self.model_wrapped = model" in source
    devices = inspect.getsource(transformers.TrainingArguments)
    assert "DistributedType.DEEPSPEED" in devices and '"use_configured_state"' in devices
    assert "self.deepspeed_engine_wrapped" in inspect.getsource(Accelerator.free_memory)
    config = deepspeed.HfTrainerDeepSpeedConfig.trainer_config_process
    assert '"gradient_clipping"' in inspect.getsource(config)
    deepspeed.unset_hf_deepspeed_config()
    assert not deepspeed.is_deepspeed_zero3_enabled()


def test_canary_of_deepspeed():
    """Its names for what a process holds, and where it is told not to compile."""
    pytest.importorskip("deepspeed", exc_type=ImportError)
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2

    from llmpipe.parallel.zero import SHARED_MEMORY

    assert ShareMemCommBuilder.NAME == SHARED_MEMORY
    assert hasattr(deepspeed.ops, "__compatible_ops__")
    second = inspect.getsource(stage_1_and_2.DeepSpeedZeroOptimizer)
    assert "self.single_partition_of_fp32_groups.append" in second
    assert "self.bit16_groups.append" in second
    third = inspect.getsource(stage3.DeepSpeedZeroOptimizer_Stage3)
    assert "self.fp32_partitioned_groups_flat.append" in third
    in_parts = inspect.getsource(partition_parameters.InsertPostInitMethodToModuleSubClasses)
    assert "torch.nn.functional.linear = zero3_linear_wrap" in in_parts


class TwoProcesses:
    """What an accelerator of two processes that have the same gathers."""

    def gather(self, tensor):
        return torch.stack([tensor, tensor]) if tensor.ndim == 0 else tensor.repeat(2)

    def gather_for_metrics(self, tensor):
        assert isinstance(tensor, torch.Tensor)
        return self.gather(tensor)


@pytest.mark.parametrize("even", [True, False])
def test_what_is_gathered_is_read_later(even):
    """A metric per pair is left alone where processes have other numbers of them."""
    accelerator, pairs = TwoProcesses(), torch.ones(3)
    with later.reading_later(accelerator, even=even):
        assert accelerator.gather_for_metrics(torch.tensor(1.0)).value.tolist() == [1, 1]
        assert accelerator.gather(pairs).value.shape == (6 if even else 3,)
        assert accelerator.gather_for_metrics(later.Later(pairs)).value.sum() == 3 * (1 + even)
    assert accelerator.gather(pairs).shape == (6,)
    assert not vars(accelerator)


def test_who_is_alone_stays_alone():
    accelerator = TwoProcesses()
    with upstream.alone(accelerator):
        with later.reading_later(accelerator, even=True):
            assert accelerator.gather(torch.ones(3)).value.shape == (3,)
        assert accelerator.gather(torch.ones(3)).shape == (3,)
    assert accelerator.gather(torch.ones(3)).shape == (6,)


def test_numbers_of_later_are_those_of_now():
    """In the arithmetic of TRL's metrics, with the precision that it has there."""
    value, mask = torch.rand(4, 3), torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    late = later.Later(value)
    chosen, rejected = late[:, -3:].chunk(2, dim=0)
    theirs = value[:2][mask].sum().item() / mask.sum().item()
    ours = chosen[mask].sum().item() / later.Later(mask.sum()).item()
    assert ours.value.dtype == torch.float64
    assert ours.value.item() == pytest.approx(theirs, rel=1e-7)
    ratio = (value.sum() / mask.sum()).item()
    assert (late.sum() / later.Later(mask.sum())).item().value.item() == ratio
    assert rejected.max().item().value.item() == value[2:].max().item()
    assert (late.min().value, late.mean().value) == (value.min(), value.mean())
    assert (7 + later.Later(torch.tensor(5)) // 2).value == 9
    nothing = later.Later(torch.tensor(0))
    assert nothing > 0 and (nothing / nothing).value == 0


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_metrics_read_later_are_trls(tmp_path, monkeypatch, stage):
    """And what is learned is the same to the bit."""
    written = (life.TINY / f"{stage}.yaml").read_text().replace("artifact:sft", "MODEL")
    written = written.replace("./recipes/tiny", str(life.TINY))
    written = written.replace("MODEL", str(life.TINY / "model"))
    sets = ["optim.steps=4", "log.every=2", "launch.micro_batch_size=4"]

    def made(name):
        path = tmp_path / f"{name}.yaml"
        path.write_text(written.replace("runs/tiny", str(tmp_path / name)))
        return life.essence(life.command(path, sets))

    ours = made("ours")
    monkeypatch.setattr(preferences, "reading_later", lambda *_, **__: nullcontext())
    monkeypatch.setattr(policy, "with_later_logits", lambda model: model)
    theirs = made("theirs")
    assert ours["files"] == theirs["files"]
    for mine, trls in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert mine == pytest.approx(trls, rel=1e-6)


def test_a_quantized_model_says_the_same_before_and_after_its_first_evaluation():
    """bitsandbytes still repacks 4-bit weights on some CPUs, and asks this attribute first."""
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    few_bits.keep_unpacked(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


def test_a_tied_head_that_learns_tokens_has_a_bias_to_read():
    """PEFT's wrapper forwards `weight` alone, and TRL's fused head reads `weight` and `bias`."""
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(
            target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=[3]
        )
        model = get_peft_model(LlamaForCausalLM(config), lora)
    assert not hasattr(model.get_output_embeddings(), "bias"), (
        "upstream mended it: `with_bias` can go"
    )
    assert upstream.with_bias(model).get_output_embeddings().bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generating_copies_no_head(dtype):
    """Without it the weight is copied for every row of the batch; when it no longer is,
    `generating` can do less.
    """

    def copies(model) -> int:
        with torch.no_grad(), torch.profiler.profile(record_shapes=True) as seen:
            out = model(input_ids=torch.arange(3, 15).view(3, 4), logits_to_keep=1)
        assert out.logits.shape == (3, 1, 101)
        return sum(
            event.name == "aten::bmm" and any(101 in shape for shape in event.input_shapes)
            for event in seen.events()
        )

    model = tiny().to(dtype).requires_grad_(False)
    upstream.speed_up(model, device_type="cpu")
    assert copies(model) == 1
    with upstream.generating(model):
        assert copies(model) == 0
    assert model.config._attn_implementation == DOCUMENTS and copies(model) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_switched_and_what_learns_is_not():
    """PEFT's layers still read these two attributes, and its own switch still freezes."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    ids = torch.tensor([[5, 6, 7]])

    def logits(adapter: str | None) -> torch.Tensor:
        with upstream.using_adapter(model, adapter, otherwise="default"), torch.no_grad():
            return model(ids).logits

    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    by_name = {name: logits(name) for name in ("default", "other", None)}
    after = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == after and learns
    with torch.no_grad():
        assert torch.equal(model(ids).logits, by_name["default"])
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, by_name[None])
        model.set_adapter("other")
        assert torch.equal(model(ids).logits, by_name["other"])
    assert not torch.equal(by_name["default"], by_name["other"])


def test_canary_activation_checkpointing():
    """Layers still ask their own training mode whether to compute their activations again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    source = inspect.getsource(GradientCheckpointingLayer)
    assert "if self.gradient_checkpointing and self.training" in source
    assert "forward_with_checkpointing" in source, "inside the hooks of a layer"
    model = tiny().eval()
    upstream.recompute(model, True)
    modes = {module.training for module in model.model.layers}
    assert modes == {True} and not model.training and not model.model.layers[0].mlp.training


def products_and_memory(kind):
    """Matrix products and attentions of a step, bytes that its forward pass keeps, and its
    gradients, by what is computed again.
    """
    from torch.profiler import profile
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.counts = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.counts[func.name()] += 1
            return func(*args, **(kwargs or {}))

    model = tiny().train()
    if kind != "none":
        upstream.checkpoint_layers(model, kind)
    ids = torch.arange(64)[None] % model.config.vocab_size
    with Counting() as counting:
        with profile(profile_memory=True) as watched:
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
    kept = sum(event.self_cpu_memory_usage for event in watched.events())
    attended = counting.counts["aten::_scaled_dot_product_flash_attention_for_cpu"]
    products = sum(counting.counts[f"aten::{name}"] for name in ("mm", "addmm", "bmm"))
    gradients = [weight.grad for weight in model.parameters()]
    return products, attended, kept, [loss.detach(), *gradients]


def test_selective_checkpointing_keeps_products_and_attention():
    products, attended, kept, learned = zip(
        *map(products_and_memory, ("none", "selective", "full")), strict=True
    )
    assert products[0] == products[1] < products[2]
    assert attended[0] == attended[1] and attended[2] == 2 * attended[0]
    assert kept[0] > 1.2 * kept[1] > 1.2 * kept[2]
    for changed in learned[1:]:
        for one, other in zip(learned[0], changed, strict=True):
            assert torch.equal(one, other)


WRITING = {
    # scores on their way through a view, of which torch does not see that they are kept
    "falcon": {},
    # sums of experts, of which it does
    "gpt_oss": {
        "intermediate_size": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 4,
    },
}


@pytest.mark.parametrize("kind", WRITING)
def test_layers_may_write_to_what_is_kept(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, **WRITING[kind])
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
    selective = copy.deepcopy(plain)
    upstream.checkpoint_layers(selective, "selective")
    ids = torch.arange(24).reshape(2, 12)
    for model in (plain, selective):
        model(ids, labels=ids, use_cache=False).loss.backward()
    pairs = zip(plain.parameters(), selective.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs if one.grad is not None)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_by_blocks_is_kept_where_layers_may_write():
    from torch.nn.attention.flex_attention import flex_attention

    from llmpipe.upstream.checkpointing import contexts

    keeping, again = contexts()
    states, others = torch.randn(2, 1, 1, 128, 16)
    with keeping:
        attended = flex_attention(states, states, states)
    with again:
        once_more = flex_attention(others, others, others)
    assert torch.equal(once_more, attended), "what was kept"


def compiled_backward(kind):
    """Matrix products in the backward graph of a compiled layer, and the gradients."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    counts = Counter()

    def count(graph, _):
        counts.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=count,
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    model = tiny().train()
    if kind != "none":
        upstream.checkpoint_layers(model, kind)
    for layer in model.model.layers[:1]:
        layer.compile(backend=backend, dynamic=False)
    ids = torch.arange(64)[None] % model.config.vocab_size
    model(ids, labels=ids, use_cache=False).loss.backward()
    return counts["aten.mm.default"], [weight.grad for weight in model.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's own tracing
def test_compiled_layers_checkpoint_selectively_too():
    kinds = ("none", "selective", "full")
    products, learned = zip(*map(compiled_backward, kinds), strict=True)
    assert 0 < products[0] == products[1] < products[2]
    for changed in learned[1:]:
        for one, other in zip(learned[0], changed, strict=True):
            torch.testing.assert_close(one, other)


def test_what_selective_checkpointing_keeps():
    """Nothing that writes to what it was given, and nothing that drops at random: what is drawn
    after it would be other numbers.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    from llmpipe.kernels import cuda
    from llmpipe.upstream.checkpointing import KEPT, policy

    aten = torch.ops.aten
    one = torch.ones(1, 1, 1, 8)
    flash = aten._scaled_dot_product_flash_attention_for_cpu.default
    kept = {
        name: policy(None, operation, *arguments) is CheckpointPolicy.MUST_SAVE
        for name, operation, arguments in (
            ("product", aten.mm.default, (one, one)),
            ("product into", aten.mm.out, (one, one)),
            ("activation", aten.silu.default, (one,)),
            ("attention", flash, (one, one, one)),
            ("attention that drops", flash, (one, one, one, 0.1)),
            ("rows", cuda.attend_rows._opoverload, ()),
            ("blocks", torch.ops.higher_order.flex_attention, ()),
        )
    }
    assert [name for name, is_kept in kept.items() if is_kept] == [
        *("product", "attention", "rows", "blocks")
    ]
    names = [name.split("::")[1] for name in KEPT if name.startswith("aten::")]
    assert all(hasattr(aten, name) for name in names), "of this PyTorch"


def test_another_kind_of_checkpointing_takes_the_place_of_the_first():
    from llmpipe.upstream.checkpointing import contexts

    model = tiny().train()
    functions = []
    for kind in ("selective", "full", "selective"):
        upstream.checkpoint_layers(model, kind)
        functions.append(model.model.layers[0]._gradient_checkpointing_func)
    assert [each.keywords.get("context_fn") for each in functions] == [*(contexts, None, contexts)]
    model.activation_checkpointing_disable()
    model.activation_checkpointing_enable({"use_reentrant": False})  # as TRL does
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["context_fn"]


def dropping(kind):
    """A tiny model whose layers drop activations in their own code."""
    from transformers import AutoModelForCausalLM, FalconConfig, OPTConfig

    torch.manual_seed(0)
    if kind == "llama":
        return tiny()
    if kind == "opt":
        config = OPTConfig(
            vocab_size=64,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            dropout=0.5,
        )
    else:
        config = FalconConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            hidden_dropout=0.5,
        )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["opt", "falcon", "llama"])
def test_layers_that_recompute_drop_nothing(kind):
    """As they would in training mode, and would again, otherwise, in the backward pass."""
    model = dropping(kind).eval()
    ids = torch.arange(12)[None]
    plain = model(ids, labels=ids, use_cache=False)
    plain.loss.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    upstream.recompute(model, True)
    passes = Counter()
    products = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for product in products:
        product.register_forward_hook(lambda module, *_: passes.update([module]))
    recomputed = model(ids, labels=ids, use_cache=False)
    assert torch.equal(recomputed.logits, plain.logits)
    recomputed.loss.backward()
    assert sorted(set(passes.values())) == [1, 2], "the head once, what is in layers again"
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(weight.grad, gradient)
    upstream.recompute(model, False)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("kind", ["opt", "falcon"])
def test_a_model_that_trains_without_dropout(kind, recomputes):
    model = dropping(kind)
    ids = torch.arange(12)[None]
    plain = model.eval()(ids, use_cache=False).logits
    if recomputes:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    upstream.without_dropout(model, "lm_head", recomputes)
    assert model.training and model.lm_head.training, "asked for"
    assert torch.equal(model(ids, use_cache=False).logits, plain)
    model.eval()
    upstream.without_dropout(model, "lm_head", recomputes)
    assert not any(module.training for module in model.modules())


def test_supported_attention():
    class Model:
        _supports_sdpa = True
        _supports_flash_attn = True
        _compatible_flash_implementations = None

    assert upstream.supported_attention(Model, "flash_attention_2") == "flash_attention_2"
    Model._compatible_flash_implementations = ["kernels-community/another"]
    assert upstream.supported_attention(Model, "flash_attention_2") == "sdpa"
    Model._supports_sdpa = False
    assert upstream.supported_attention(Model, "flash_attention_2") == "eager"
    assert upstream.supported_attention(Model, "eager") == "eager"


def test_canary_attributes_of_model_classes():
    """What `supported_attention` and `as_reward_model` read and set."""
    from transformers import PreTrainedModel

    for name in (
        "_supports_sdpa",
        "_supports_flash_attn",
        "_compatible_flash_implementations",
        "_keys_to_ignore_on_load_missing",
        "_keys_to_ignore_on_load_unexpected",
    ):
        assert hasattr(PreTrainedModel, name), name


def test_debugging_ends_with_the_training():
    model = tiny()
    model.lm_head.register_forward_hook(lambda *_: None)
    DebugUnderflowOverflow(model)
    model.lm_head = copy.copy(model.lm_head)
    with pytest.raises(KeyError):
        model(torch.tensor([[1, 2, 3]]))
    upstream.forget_debugging(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 1
    model(torch.tensor([[1, 2, 3]]))


def test_a_compiler_for_a_gpu_does_not_ask_what_the_processor_knows(monkeypatch):
    from torch._inductor import config, cpu_vec_isa

    def build(*_):
        raise AssertionError("a program was compiled and run")

    monkeypatch.setattr(cpu_vec_isa.VecISA, "check_build", build)
    asks = cpu_vec_isa.VecAVX2()
    with pytest.raises(AssertionError):
        bool(asks)
    model = tiny()
    with config.patch({"deterministic": False, "cpp.vec_isa_ok": None}):
        upstream.compile_layers(model, dynamic=True)
        assert config.cpp.vec_isa_ok is None  # whose kernels are for this very processor
        monkeypatch.setattr(type(next(model.parameters())), "is_cuda", True, raising=False)
        upstream.compile_layers(model, dynamic=True)
        assert bool(asks)


def test_how_far_a_gguf_is_read(tmp_path):
    """Each tensor is told of once, and the vocabulary, which takes longest, is parsed once."""
    from gguf import GGUFReader
    from transformers import AutoTokenizer, GgufConfig, core_model_loading
    from transformers import modeling_gguf_pytorch_utils as ggufs_of_transformers

    path = ggufs.write(life.TINY / "model", tmp_path / "m.gguf")
    bars = ggufs_of_transformers.tqdm, core_model_loading.tqdm
    source = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": path.name}
    shares, parsed = [], []
    with pytest.MonkeyPatch.context() as patch:
        init = GGUFReader.__init__
        patch.setattr(GGUFReader, "__init__", lambda *args: parsed.append(init(*args)))
        with gguf.reading_gguf(shares.append):
            AutoTokenizer.from_pretrained(**source)
            dequantized = GgufConfig(dequantize=True)
            model = LlamaForCausalLM.from_pretrained(**source, quantization_config=dequantized)
    assert len(parsed) == 1
    assert shares == sorted(set(shares)) and shares[-1] == 1.0
    assert len(shares) == len(list(model.parameters()))
    assert (ggufs_of_transformers.tqdm, core_model_loading.tqdm) == bars
    text = inspect.getsource(ggufs_of_transformers.load_gguf_checkpoint)
    assert "from gguf import GGUFReader, dequantize" in text and "in tqdm(reader.tensors," in text
    text = inspect.getsource(ggufs_of_transformers.get_gguf_hf_weights_map)
    assert "from gguf import MODEL_ARCH_NAMES, get_tensor_name_map" in text


def test_what_the_server_of_transformers_leaves_open():
    """Each is what `upstream.serving` settles; where one is settled there, its line here goes."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from transformers.cli.serving import chat_completion, completion, model_manager, utils

    turns = [
        {"role": "assistant", "content": "I look.", "tool_calls": []},
        {"role": "tool", "name": "look", "content": "1", "tool_call_id": "a"},
    ]
    of = utils.BaseHandler.get_processor_inputs_from_messages
    called, heard = of(turns, utils.Modality.LLM)
    assert called["content"] == "" and "name" not in heard
    text = inspect.getsource(utils.BaseHandler._build_generation_config)
    assert "do_sample = False" in text and "do_sample = True" not in text
    text = inspect.getsource(chat_completion.ChatCompletionHandler._build_generation_config)
    assert "{(int(k),): v for k, v in" in text  # a bias that is no float
    assert 'repetition_penalty = 1.0 + float(body["frequency_penalty"])' in text
    assert "logit_bias" not in inspect.getsource(completion.CompletionHandler)
    assert {"n", "logprobs"} <= chat_completion.UNUSED_CHAT_COMPLETION_FIELDS
    text = inspect.getsource(utils.CBGenerateManager)
    assert "temperature" not in text.partition("def init_cb")[2]  # of each request
    parameters = inspect.signature(model_manager.TimedModel).parameters
    assert list(parameters) == ["model", "timeout_seconds", "processor", "on_unload"]


def test_canary_server_of_llama_cpp():
    """What `upstream.llama_cpp_server` takes hold of is there, and still as it settles it."""
    for package in ("llama_cpp", "sse_starlette", "starlette_context", "pydantic_settings"):
        pytest.importorskip(package)
    from llama_cpp import Llama
    from llama_cpp.server import app, settings, types
    from sse_starlette.sse import AppStatus

    from llmpipe.upstream import llama_cpp_server

    for kind in (types.CreateCompletionRequest, types.CreateChatCompletionRequest):
        asked = kind(prompt="x") if "prompt" in kind.model_fields else kind(messages=[])
        assert asked.model_dump().items() >= llama_cpp_server.DEFAULTS.items()
    assert settings.ServerSettings.model_fields["interrupt_requests"].default is True
    assert "CONFIG_FILE" in inspect.getsource(app.create_app)
    taken = "model_alias n_ctx n_gpu_layers n_threads_batch logits_all chat_template_kwargs"
    assert set(taken.split()) <= settings.ModelSettings.model_fields.keys()
    assert callable(AppStatus.disable_automatic_graceful_drain)
    proxy = inspect.getsource(app.get_llama_proxy)
    assert "_llama_proxy" in vars(app) and "_llama_proxy" in proxy
    made = inspect.getsource(Llama.__init__)
    assert "self._chat_handlers" in made and "self.chat_handler = " in made
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    meant = llama_cpp_server._meant({"role": "assistant", "tool_calls": [call]})
    assert meant["tool_calls"][0]["function"]["arguments"] == {"a": 1}


def test_canary_bars_of_compressed_tensors():
    """The bars that `upstream.show_no_bars` takes away are where it takes them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.offload import dispatch
    from compressed_tensors.quantization.lifecycle import apply

    for module, function in ((dispatch, "dispatch_with_map"), (apply, "apply_quantization_config")):
        assert "in tqdm(" in inspect.getsource(getattr(module, function))
    upstream.show_no_bars()
    for module in (dispatch, apply):
        assert module.tqdm([1, 2], desc="x", disable=False, position=0) == [1, 2]


@pytest.mark.parametrize(("flags", "are_laid_out"), [("avx2 amx_tile", False), ("avx2", True)])
def test_llama_cpp_leaves_weights_as_in_the_file_where_amx_is(
    tmp_path, monkeypatch, flags, are_laid_out
):
    llama_cpp = pytest.importorskip("llama_cpp").llama_cpp
    from llmpipe.upstream import llama_cpp_weights

    latest = llama_cpp.llama_model_default_params
    original = getattr(latest, "__wrapped__", latest)  # a test before may have loaded a model
    monkeypatch.setattr(llama_cpp, "llama_model_default_params", lambda: original())
    (tmp_path / "cpuinfo").write_text(f"flags: {flags}\n")
    monkeypatch.setattr(llama_cpp_weights, "PROCESSOR", tmp_path / "cpuinfo")
    llama_cpp_weights.leave_as_in_file.__wrapped__()
    assert llama_cpp.llama_model_default_params().use_extra_bufts is are_laid_out
