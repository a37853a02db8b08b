"""PPO's answers beside transformers' `generate` of the same batch.

    python benchmarks/draw.py --model DIR --pairs 4
    python benchmarks/draw.py --shape 1.7b --lora --answers 64 --tokens 128

What counts is a pair's ratio of answers' tokens per second: the sides alternate, after one call of
each that is left out, and printed as `first`, since a GPU records its token step in it. Nothing
ends early, so that both draw as many tokens; `generate` samples, and keeps the logits that
log-probabilities are made of, which PPO needs. `--shape`: random weights of SmolLM2's. On a GPU
`draw`, the form for CPUs, is shown as well. `--greedy`: the likeliest tokens, as eval asks for
them, and how many answers each side has in common with `generate`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from llmpipe import noise, upstream
from llmpipe.models.drawing.draw import Sampling, draw, left_padded
from llmpipe.models.drawing.replay import DEVICES, Replay

SHAPES = {
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def policy(args, device: str):
    """The model that draws: its frozen weights in bf16 beside an adapter on a GPU, else in fp32."""
    frozen = torch.bfloat16 if args.lora and device == "cuda" else torch.float32
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=frozen)
    else:
        shape = SHAPES[args.shape]
        config = LlamaConfig(vocab_size=49152, max_position_embeddings=8192, **shape)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=frozen)
    if args.lora:
        from peft import LoraConfig, get_peft_model

        adapter = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, adapter).get_base_model()
        for name, weight in model.named_parameters():
            weight.requires_grad = "lora_" in name
            if weight.requires_grad:
                weight.data = weight.data.float()
    return model.to(device).eval()


def timed(call: Callable[[], object]) -> float:
    """Seconds until all is computed."""
    begun = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def sides(args, model) -> dict[str, Callable[[], list[list[int]]]]:
    """What draws, by its name."""
    vocabulary = model.config.vocab_size
    numbers = torch.Generator().manual_seed(0)
    lengths = [8 + place * 7 % args.prompt for place in range(args.answers)]
    prompts = [torch.randint(5, vocabulary, (n,), generator=numbers).tolist() for n in lengths]
    luck = torch.rand(args.answers, args.tokens, generator=numbers, dtype=torch.float64)
    how = Sampling(args.tokens, temperature=float(not args.greedy), top_p=args.top_p)
    ids = left_padded(prompts, 0)
    mask = (torch.arange(-ids.shape[1], 0) >= -torch.tensor(lengths)[:, None]).long()
    ids, mask = ids.to(model.device), mask.to(model.device)
    sampled = {"do_sample": True, "top_k": 0, "top_p": args.top_p, "output_logits": True}
    sampling = GenerationConfig(
        max_new_tokens=args.tokens,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        **({"do_sample": False} if args.greedy else sampled),
    )
    replay = Replay(model, how, [], 0, print)

    @torch.no_grad()
    def generated() -> list[list[int]]:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=sampling)
        drawn = out.sequences[:, -args.tokens :]
        if not args.greedy:
            logits = torch.stack(out.logits, 1).float()
            logits.log_softmax(-1).gather(2, drawn[..., None]).tolist()
        return drawn.tolist()

    def replayed() -> list[list[int]]:
        with replay.rollout_begun():
            return [episode.response for episode in replay.draw(prompts, luck)]

    def plainly() -> list[list[int]]:
        return [episode.response for episode in draw(model, prompts, luck, how, [], 0)]

    plain = {"draw": plainly}
    if model.device.type in DEVICES:
        return {"generate": generated, "replayed": replayed, **plain}
    return {"generate": generated, **plain}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a causal language model")
    what.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--prompt", type=int, default=48, help="prompts differ by so many tokens")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--pairs", type=int, default=4)
    args = parser.parse_args()
    noise.silence()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = policy(args, device)
    half = torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()
    with upstream.generating(model), half:
        calls = sides(args, model)
        first = {name: timed(call) for name, call in calls.items()}
        seconds = {name: [] for name in calls}
        for _ in range(args.pairs):
            for name, call in calls.items():
                seconds[name].append(timed(call))
        answers = {name: call() for name, call in calls.items()} if args.greedy else {}
    for name, times in seconds.items():
        ratios = [beside / own for beside, own in zip(seconds["generate"], times, strict=True)]
        step = statistics.median(times) / args.tokens
        print(
            f"{name:9s} {1000 * step:7.2f} ms a token step, {args.answers / step:9,.0f} tok/s, "
            f"{statistics.median(ratios):.2f} of generate (first {first[name]:.2f} s)"
        )
    for name, said in answers.items():
        same = sum(map(list.__eq__, said, answers["generate"]))
        print(f"{name:9s} {same} of {args.answers} answers are those of generate")
    if device == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
