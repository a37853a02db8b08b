"""The token step of a GPU, computed on a CPU: what `draw` draws, with nothing read on the way."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from llmpipe import upstream
from llmpipe.models.drawing import replay as replays
from llmpipe.models.drawing import token_step
from llmpipe.models.drawing.draw import Sampling, draw
from llmpipe.models.drawing.replay import NoRecording, Replay, rounded_up
from llmpipe.models.drawing.rounded import RoundedWeights
from llmpipe.models.drawing.token_step import TokenStep
from tests.rl.reads import counted

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZE | {"num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "llama": lambda: LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZE),
    "a window": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "two masks, eager": lambda: Gemma2Config(
        **GROUPED, sliding_window=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=16
    ),
}
SAMPLINGS = {
    "plain": Sampling(37, temperature=1.0),
    "cool": Sampling(5, temperature=0.6),
    "partial": Sampling(35, top_k=9, top_p=0.9, temperature=1.3),
    "greedy": Sampling(36),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where steps are recorded, or are not
CLOSE = 1e-4 if DEVICE == "cuda" else 1e-5
ENDS = [2, 5, *range(44, 52)]
PROMPTS = [[7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18], [20, 21, 22], [23], [3, 4, 30, 31], [40]]


def model_of(kind, adapted=False):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](), dtype=torch.float32).eval()
    if adapted:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        with warnings.catch_warnings(action="ignore"):  # PEFT asks transformers under an old name
            model = get_peft_model(model, lora).eval().get_base_model()
    return model.to(DEVICE)


def numbers(sampling, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(PROMPTS), sampling.max_new_tokens)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def drawn_both_ways(model, sampling, replay, bf16=False):
    """By `draw`, and by the step."""
    luck = numbers(sampling)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16), upstream.generating(model):
        expected = draw(model, PROMPTS, luck, sampling, ENDS, 0)
        with replay.rollout_begun():
            return expected, replay.draw(PROMPTS, luck)


class Tape(TorchDispatchMode):
    """A double for a graph of CUDA's: the kernels of one step, on tensors that stay where they are.

    What Python decides is decided once, and each result lies where the first one lay.
    """

    def __init__(self, step):
        super().__init__()
        self.calls = []
        self.replayed = 0
        for _ in range(replays.EAGER_STEPS):
            step.advance()
        with self:
            step.advance()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:  # of memory that is written to again
            self.calls.append((operator, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self):
        self.replayed += 1
        for operator, args, kwargs, results in self.calls:
            again = tree_leaves(operator(*args, **kwargs))
            for kept, new in zip(results, again, strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded and replayed, as on a GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(Replay, "_records", True)
        monkeypatch.setattr(Replay, "_recorded", lambda self, step: Tape(step))


def same(expected, drawn, most=CLOSE):
    for one, other in zip(expected, drawn, strict=True):
        assert (one.prompt, one.response, one.ended) == (other.prompt, other.response, other.ended)
        assert other.log_probs.dtype == torch.float32
        assert (one.log_probs - other.log_probs).abs().max() < most
        assert (one.allowed is None) == (other.allowed is None)
        for ids, others in zip(one.allowed or [], other.allowed or [], strict=True):
            assert torch.equal(ids, others)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", SAMPLINGS)
def test_the_step_draws_what_draw_draws(kind, how):
    """Unequal prompts, some responses that end early, windows shorter than the texts."""
    said = []
    model, sampling = model_of(kind), SAMPLINGS[how]
    replay = Replay(model, sampling, ENDS, 0, said.append)
    expected, drawn = drawn_both_ways(model, sampling, replay)
    assert replay.serves and not said
    same(expected, drawn)
    assert any(episode.ended for episode in drawn) or how in ("cool", "greedy")


def test_adapters_are_computed_beside_the_base():
    model, sampling = model_of("llama", adapted=True), SAMPLINGS["partial"]
    same(*drawn_both_ways(model, sampling, Replay(model, sampling, ENDS, 0, pytest.fail)))


def as_said(model, drawn):
    """The log-probabilities are those of a plain forward pass under autocast, within rounding."""
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        for episode in drawn:
            ids = torch.tensor([episode.prompt + episode.response], device=DEVICE)
            logits = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
            said = logits[len(episode.prompt) - 1 : -1].gather(
                1, ids[0, len(episode.prompt) :, None]
            )
            assert (said[:, 0].cpu() - episode.log_probs).abs().max() < 0.15


@pytest.mark.parametrize("adapted", [False, True])
def test_in_half_precision_it_draws_from_what_the_model_says(adapted):
    """Rounding moves a token now and then, and not what is said of it."""
    model, sampling = model_of("llama", adapted), SAMPLINGS["plain"]
    replay = Replay(model, sampling, ENDS, 0, pytest.fail)
    _, drawn = drawn_both_ways(model, sampling, replay, bf16=True)
    as_said(model, drawn)
    (step,) = replay.steps.values()
    assert {layer.keys.dtype for layer in step.cache.layers} == {torch.bfloat16}


@pytest.mark.parametrize("adapted", [False, True])
def test_weights_are_rounded_once_as_autocast_rounds_them(adapted):
    """Logits are equal bit by bit, and the weights are themselves afterwards, tied ones too."""
    model = model_of("llama", adapted)
    before = dict(model.named_parameters())
    ids = torch.tensor([PROMPTS[0]], device=DEVICE)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        expected = model(ids).logits
        weights = RoundedWeights(model)
        with weights.in_place():
            assert model.lm_head.weight.dtype == torch.bfloat16
            assert model.get_input_embeddings().weight.dtype == torch.float32
            assert torch.equal(model(ids).logits, expected)
        assert weights.bytes
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in before.items()) and len(after) == len(
        before
    )
    assert not RoundedWeights(model).layers, "in fp32 there is nothing to round"


def test_what_is_recorded_follows_the_weights(recorded):
    """A recording is used again from rollout to rollout; what an optimizer moves in place is seen,
    rounded or not."""
    for bf16 in (False, True):
        model, sampling = model_of("qwen3"), SAMPLINGS["plain"]
        replay = Replay(model, sampling, ENDS, 0, pytest.fail)
        drawn_both_ways(model, sampling, replay, bf16)
        (step,) = replay.steps.values()
        graph = step.graph
        assert graph is not None
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.2)
        expected, drawn = drawn_both_ways(model, sampling, replay, bf16)
        assert list(replay.steps.values()) == [step] and step.graph is graph
        if bf16:
            as_said(model, drawn)
        else:
            same(expected, drawn)
        replay.release()
        assert not replay.steps and replay.weights is None


def test_memory_goes_to_the_learner_where_much_would_be_kept(monkeypatch):
    """The steps that were used longest ago go first, the weights with the last."""
    model, sampling = model_of("llama"), SAMPLINGS["cool"]
    replay = Replay(model, sampling, ENDS, 0, pytest.fail)

    def drawn(*sizes):
        half = torch.autocast(DEVICE, torch.bfloat16)
        with half, upstream.generating(model), replay.rollout_begun():
            for size in sizes:
                assert len(replay.draw(PROMPTS[:size], numbers(sampling)[:size])) == size
        return [rows for rows, _ in replay.steps]

    assert drawn(5, 2, 5) == [4, 6]
    (small, large), weights = replay.steps.values(), replay.weights
    assert small.bytes < large.bytes and weights.bytes
    monkeypatch.setattr(replays, "room", lambda device: large.bytes + weights.bytes)
    assert drawn(5) == [6] and replay.steps[6, 64] is large and replay.weights is weights
    assert drawn(2, 5) == [6]
    monkeypatch.setattr(replays, "room", lambda device: weights.bytes)
    assert drawn(2, 5) == [] and replay.weights is None
    monkeypatch.undo()
    assert drawn(2) == [4]


def test_a_step_reads_nothing_and_stops_once_all_have_ended(monkeypatch):
    model, sampling = model_of("llama"), Sampling(90, temperature=1.0, top_k=20)
    ends, advanced, advance = list(range(40)), [], TokenStep.advance

    def spied(step):
        with counted() as reads:
            advance(step)
        advanced.append(reads)

    monkeypatch.setattr(TokenStep, "advance", spied)
    with torch.no_grad(), upstream.generating(model):
        step = TokenStep(model, len(PROMPTS), 128, sampling, ends)
        step.begin(PROMPTS, numbers(sampling), 0)
        drawn = token_step.respond(step, PROMPTS, ends)
    assert not any(advanced)
    assert max(len(episode.response) for episode in drawn) <= token_step.UNREAD
    assert len(advanced) == token_step.UNREAD - 1, "an end is every other token"


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("how", ["plain", "partial", "greedy"])
def test_a_step_can_be_recorded(recorded, kind, how):
    """Nothing in it is decided in Python by what came before. Every response is replayed from its
    second token on, also the first batch's."""
    model, sampling = model_of(kind, adapted=kind == "llama"), SAMPLINGS[how]
    replay = Replay(model, sampling, ENDS, 0, pytest.fail)
    counts = []
    for _ in range(2):
        expected, drawn = drawn_both_ways(model, sampling, replay)
        same(expected, drawn)
        (step,) = replay.steps.values()
        counts.append(getattr(step.graph, "replayed", None))
    if DEVICE == "cpu":
        assert counts[1] == 2 * counts[0]
        assert counts[0] >= max(len(episode.response) for episode in drawn) - 1


def test_a_token_of_draw_reads_one_tensor():
    for how in ("plain", "partial"):
        model, sampling = model_of("llama"), SAMPLINGS[how]
        steps = sampling.max_new_tokens
        with upstream.generating(model), counted() as reads:
            drawn = draw(model, PROMPTS, numbers(sampling), sampling, [], 0)
        assert all(len(episode.response) == steps for episode in drawn)
        # transformers asks its mask whether there is padding
        reads = [name for name in reads if name != "_local_scalar_dense"]
        tokens_and_log_probs, ids = steps + 1, -(-steps // 16) * 3
        assert len(reads) <= tokens_and_log_probs + (ids if how == "partial" else 0)


def test_what_cannot_be_served_is_drawn_step_by_step(monkeypatch):
    """Said once: what has no attention, dynamic RoPE, and what says something else in slots."""
    sampling = SAMPLINGS["cool"]
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    mamba = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4)
    configs = {
        "not every layer": mamba,
        "dynamic RoPE": LlamaConfig(**GROUPED, rope_parameters=dynamic),
        "fixed slots": LlamaConfig(**GROUPED),
    }
    monkeypatch.setattr(replays, "slots_differ", lambda model: 0.3)
    for words, config in configs.items():
        said = []
        model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE)
        replay = Replay(model, sampling, ENDS, 0, said.append)
        if words == "not every layer":
            with replay.rollout_begun():
                assert not replay.serves
        else:
            for _ in range(2):
                same(*drawn_both_ways(model, sampling, replay))
        assert len(said) == 1 and words in said[0]


def test_a_miniature_tells_whether_slots_say_the_same(monkeypatch):
    model = model_of("a window")
    assert token_step.slots_differ(model) < 1e-4
    monkeypatch.setattr(
        token_step, "layer_windows", lambda model: [("sliding_attention", None)] * 2
    )
    assert token_step.slots_differ(model) > replays.AGREEMENT, "without its window"


def test_where_nothing_is_recorded_the_same_is_drawn(monkeypatch):
    def refused(self, step):
        raise NoRecording("operation not permitted when stream is capturing")

    monkeypatch.setattr(Replay, "_records", True)
    monkeypatch.setattr(Replay, "_recorded", refused)
    said = []
    model, sampling = model_of("llama"), SAMPLINGS["plain"]
    replay = Replay(model, sampling, ENDS, 0, said.append)
    for _ in range(2):
        same(*drawn_both_ways(model, sampling, replay), 1e-9)
    assert len(said) == 1 and "not permitted" in said[0]


def test_sizes_are_few():
    sizes = {rounded_up(number, 64) for number in range(1, 1025)}
    assert sorted(sizes) == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(number <= rounded_up(number, 64) for number in range(1, 1025))


@pytest.mark.parametrize("how", ["lora", "full"])
def test_a_training_draws_with_it(tmp_path, monkeypatch, how):
    """What a GPU does, on a CPU: the same updates, and memory given back at the end."""
    from tests import life
    from tests.rl.test_ppo import HOW, updates, write

    released = []
    lines = []
    for devices in ({"cuda"}, {"cpu"}):
        monkeypatch.setattr(replays, "DEVICES", devices)
        monkeypatch.setattr(Replay, "release", lambda self: released.append(len(self.steps)))
        rollout = {"max_new_tokens": 12, "top_p": 0.9}
        path = write(tmp_path / min(devices), **HOW[how], rollout=rollout, optim__steps=3)
        lines.append(updates(life.command(path)))
    assert released == [1], "of one size, used again"
    for one, other in zip(*lines, strict=True):
        for name in ("loss", "objective/kl", "objective/scores", "grad_norm"):
            assert other[name] == pytest.approx(one[name], abs=1e-4)
