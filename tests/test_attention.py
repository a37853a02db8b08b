"""Attention document by document: what it computes is what a dense mask computes, forward and
backward, of every form that attention has here.
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)
from transformers.models.mllama import MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from llmpipe import upstream
from llmpipe.kernels import apart, cpu, cuda
from llmpipe.kernels.apart import Weighing
from llmpipe.upstream.attention import DOCUMENTS
from tests.training.test_laid import collated

LENGTHS = [5, 30, 1, 17]
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
KINDS = {
    "llama": LlamaConfig(**SIZE, **GROUPED),
    "qwen3": Qwen3Config(**SIZE, **GROUPED),
    "mistral": MistralConfig(**SIZE, **GROUPED, sliding_window=8),
    "gemma2": Gemma2Config(
        **SIZE, **GROUPED, **BOTH, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
    ),
    "gemma3": Gemma3TextConfig(**SIZE, **GROUPED, **BOTH, query_pre_attn_scalar=8),
    "gpt_neox": GPTNeoXConfig(**SIZE),
}


def by_device(monkeypatch, device):
    """Let a CPU take the way of a GPU whose kernel for rows of documents does not fit."""
    if device == "cuda":

        def on_the_host(query, key, value, ends, how):
            longest = int(ends.diff().max())
            return apart.attend_documents(query, key, value, ends, longest, how)

        monkeypatch.setattr(upstream.attention, "_on_the_host", on_the_host)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_equal_the_dense_mask(kind, device, monkeypatch):
    if (kind, device) == ("gemma2", "cuda"):
        pytest.skip("bounded products are computed as on a CPU")
    by_device(monkeypatch, device)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(KINDS[kind], attn_implementation="eager")
    fast = copy.deepcopy(plain)
    if kind != "gemma2":  # whose class knows no sdpa
        fast.set_attn_implementation("sdpa")
    upstream.speed_up(fast, device_type="cpu")
    assert fast.config._attn_implementation == DOCUMENTS
    batch = collated(LENGTHS)
    batch.pop("labels")
    expected = plain(**batch, use_cache=False).logits
    response = fast(**batch, use_cache=False).logits
    torch.testing.assert_close(response, expected, atol=2e-5, rtol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (response * weights).sum().backward()
    for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=2e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_and_padded_batches_are_as_they_were(kind):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(KINDS[kind], attn_implementation="eager")
    fast = copy.deepcopy(plain)
    if kind != "gemma2":
        fast.set_attn_implementation("sdpa")
    upstream.speed_up(fast, device_type="cpu")
    rows = []
    embeddings = fast.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    ids = torch.randint(3, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    weights = torch.randn(2, 20, 64)
    for how in ({}, {"attention_mask": mask}, {"attention_mask": mask.flip(1)}):
        seen = how.get("attention_mask", torch.ones_like(ids))
        expected, response = (model(ids, **how, use_cache=False).logits for model in (plain, fast))
        real = seen.bool()
        torch.testing.assert_close(response[real], expected[real], atol=2e-5, rtol=1e-5)
        for logits, model in ((expected, plain), (response, fast)):
            model.zero_grad()
            (logits * weights * seen[..., None]).sum().backward()
        for (name, one), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, atol=2e-4, rtol=1e-4, msg=name)
    assert rows == [(2, 20), (1, 32), (1, 32)]  # no layer sees padding


BACK = [
    GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
    OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32),
]
BOTH_WAYS = [
    BertConfig(**SIZE),
    DogeConfig(**SIZE),
    Gemma3TextConfig(**SIZE, **GROUPED, use_bidirectional_attention=True),
]


@pytest.mark.parametrize("config", [*BACK, *BOTH_WAYS], ids=lambda config: config.model_type)
def test_reward_models_score_padded_rows_as_they_did(config):
    """Those that look both ways, or weigh by their own masks, are left as they are."""
    torch.manual_seed(0)
    config.num_labels = 1
    plain = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    plain.eval()
    fast = copy.deepcopy(plain)
    upstream.speed_up(fast, device_type="cpu")
    assert (fast.config._attn_implementation == DOCUMENTS) == (config in BACK)
    ids = torch.randint(3, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = ids[1, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    kinds = [{"token_type_ids": mask}] if config.model_type in ("bert", "gpt2") else []
    for more in ({}, *kinds):
        scores, expected = (model(**batch, **more).logits for model in (fast, plain))
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)


def test_a_body_without_a_name_keeps_its_mask():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = MllamaTextConfig(
        **SIZE, num_key_value_heads=2, cross_attention_layers=[], rope_parameters=rope
    )
    plain = MllamaForCausalLM._from_config(text, attn_implementation="sdpa").eval()
    fast = copy.deepcopy(plain)
    upstream.speed_up(fast, device_type="cpu")
    ids = torch.randint(3, 64, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    expected, response = (
        model(ids, attention_mask=mask, use_cache=False).logits for model in (plain, fast)
    )
    torch.testing.assert_close(response[mask == 1], expected[mask == 1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("empty", [2, 16], ids=["in a padded batch", "under a mask"])
@pytest.mark.parametrize("how", [Weighing(), Weighing(scaling=0.3), Weighing(window=4)])
def test_documents_together_and_one_by_one(how, empty, monkeypatch):
    """Also with documents of no tokens, as rows are filled with."""
    computed = []
    monkeypatch.setattr(
        apart,
        "scaled_dot_product_attention",
        lambda query, *rest, **more: (
            computed.append(query.shape) or scaled_dot_product_attention(query, *rest, **more)
        ),
    )
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 20, 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 7, 8, 8, 20, *[20] * empty], dtype=torch.int32)
    one = cpu.attend_documents(query, key, value, [7, 1, 12], how)
    other = apart.attend_documents(query, key, value, ends, 13, how)
    assert computed == ([(6, 4, 13, 8)] if empty == 2 else [(1, 4, 20, 8)])
    torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(one)
    grads = [
        torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in (one, other)
    ]
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-5)


def test_what_the_kernel_for_rows_is_asked(monkeypatch):
    """A double of it that computes by its documentation stands in for it on a CPU."""

    def attend_rows(query, key, value, ends, longest, scaling, back):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16 and longest == 16
        rows = [tensor.float().transpose(0, 1)[None] for tensor in (query, key, value)]
        how = Weighing(scaling=scaling, window=None if back < 0 else back + 1)
        return cpu.attend_documents(*rows, ends.diff().tolist(), how)[0].bfloat16(), None

    monkeypatch.setattr(cuda, "attend_rows", attend_rows)
    monkeypatch.setattr(cuda, "_is_recent", lambda device: True)
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 20, 8) for heads in (4, 2, 2))
    value = value.bfloat16()  # beside what a rotation in fp32 made of the others
    ends = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    for how in (Weighing(), Weighing(scaling=0.3, window=4)):
        expected = apart.attend_documents(query, key, value, ends, 16, how)
        attended = cuda.attend_documents(query, key, value, ends, 16, how)
        torch.testing.assert_close(attended, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("dtype", "width", "how"),
    [
        (torch.float32, 8, Weighing()),
        (torch.bfloat16, 12, Weighing()),
        (torch.bfloat16, 264, Weighing()),
        (torch.bfloat16, 8, Weighing(dropout=0.5)),
    ],
    ids=["fp32", "an odd width", "a great width", "dropout"],
)
def test_what_the_kernel_for_rows_refuses_goes_another_way(dtype, width, how, monkeypatch):
    monkeypatch.setattr(cuda, "attend_rows", None)
    monkeypatch.setattr(cuda, "_is_recent", lambda device: True)
    tensors = [torch.randn(1, 2, 20, width, dtype=dtype) for _ in range(3)]
    ends = torch.tensor([0, 7, 20], dtype=torch.int32)
    assert cuda.attend_documents(*tensors, ends, 16, how).shape == (1, 20, 2, width)


def test_what_no_kernel_knows_is_refused():
    tensors = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    lengths = torch.tensor([1, 3])
    for name in ("position_bias", "s_aux"):
        with pytest.raises(ValueError, match=name):
            upstream.attention.documents_attention(
                torch.nn.Module(), *tensors, lengths, **{name: torch.ones(1)}
            )


def test_shapes_of_the_kernel_for_rows():
    """As a compiler sees them, which runs nothing; the kernel itself needs a GPU."""
    with FakeTensorMode():
        query = torch.empty(20, 4, 8, dtype=torch.bfloat16, requires_grad=True)
        key, value = (torch.empty(20, 2, 8, dtype=torch.bfloat16) for _ in range(2))
        ends = torch.empty(4, dtype=torch.int32)
        attended, log_sums = cuda.attend_rows(query, key, value, ends, 16, None, -1)
        assert attended.shape == query.shape and attended.dtype == torch.bfloat16
        assert log_sums.shape == (4, 20) and log_sums.dtype == torch.float32
        attended.sum().backward()
        assert query.grad.shape == query.shape


def test_a_warning_is_not_enough_for_the_backward_pass():
    def asked():
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return torch.are_deterministic_algorithms_enabled(), warns

    before = asked()
    try:
        for enabled, warns, inside in (
            (True, True, (True, False)),
            (True, False, (True, False)),
            (False, False, (False, False)),
        ):
            torch.use_deterministic_algorithms(enabled, warn_only=warns)
            with cuda._strictly():
                assert asked() == inside
            assert asked() == (enabled, warns)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for rows runs on a GPU")
@pytest.mark.parametrize(
    ("heads", "shared", "width", "how"),
    [
        (8, 8, 64, Weighing()),
        (8, 2, 128, Weighing()),
        (8, 2, 64, Weighing(window=100)),
        (4, 4, 64, Weighing(scaling=0.2)),
    ],
)
def test_the_kernel_for_rows_itself(heads, shared, width, how):
    """Beside fp32, and twice: the same bits, since PyTorch is asked for them."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 700, 701, 701, 1500, 2048, 2048], dtype=torch.int32, device="cuda")
    tensors = [
        torch.randn(1, count, 2048, width, device="cuda", requires_grad=True)
        for count in (heads, shared, shared)
    ]
    expected = apart.attend_documents(*tensors, ends, 1024, how)
    weights = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weights).sum(), tensors)
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        runs = []
        for _ in range(2):
            attended = cuda.attend_documents(*half, ends, 1024, how)
            runs.append(torch.autograd.grad((attended.float() * weights).sum(), half))
    finally:
        torch.use_deterministic_algorithms(False)
    assert apart_by(attended, expected) < 1e-2
    assert all(apart_by(one, other) < 1e-2 for one, other in zip(runs[0], grads, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def apart_by(one, other):
    return float((one.float() - other).norm() / other.norm())


def test_bounded_products_on_a_gpu_are_another_kernels():
    """flash-attention's or a compiler's, which know them, and not one document after the other."""
    model = AutoModelForCausalLM.from_config(KINDS["gemma2"], attn_implementation="eager")
    upstream.speed_up(model, device_type="cuda")
    assert model.config._attn_implementation == "eager"
    assert upstream.fits(type(model), model.config, "eager", "cpu")
    assert not upstream.fits(type(model), model.config, "eager", "cuda")
