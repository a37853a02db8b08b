"""PPO beside TRL's, of the last release that had it: trl 1.12.0, `trl.experimental.ppo`, in an
environment of its own.

    python -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.12.0 peft==0.21.2
    python benchmarks/ppo.py speed --peer peer/bin/python --model DIR --rows alpaca.json \\
        --pairs 4 [--lora]
    python benchmarks/ppo.py curve --peer peer/bin/python --seeds 10 --plot curve.svg

`speed`: episodes per second and peak memory above the bare imports. Both sides get the same
prompts, model, reward model (a random head on the same body), precision, epochs, minibatches and
lengths; each measurement is a fresh process, the sides alternate, the first update is left out, and
what counts is the ratio within a pair. With `--lora` TRL's critic is a model that is trained whole,
as its trainer has it, and llmpipe's an adapter: that is part of what is compared. An update's
seconds hold no saving on either side. `--rows`: a JSON list of rows with an `instruction`. `curve`:
score against KL of a tiny random model whose words have values, over seeds; both sides start from
the same weights, and so do the critics, but for their random heads. What counts is the difference
of scores at the same KL.
"""

import argparse
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

EPOCHS, MINIBATCHES, KL = 2, 2, 0.05
# One-sided 90 % quantile of Student's t, by degrees of freedom; the last from there on, which is on
# the safe side.
T90 = [math.inf, 3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383]
BARE = (
    "import torch, transformers, trl, peft, resource; "
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
)


def peer(told: dict) -> None:
    """One training by TRL, in its own environment; the last line printed is what was seen."""
    import torch
    from clock import Clock
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        set_seed,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(told["threads"])
    set_seed(told["seed"])
    tokenizer = AutoTokenizer.from_pretrained(told["model"], padding_side="left")
    load = AutoModelForCausalLM.from_pretrained
    classify = AutoModelForSequenceClassification.from_pretrained
    policy, value = (
        load(told["model"], dtype=torch.float32),
        classify(told["critic"], dtype=torch.float32),
    )
    judge = (
        summing(told["table"]) if "table" in told else classify(told["critic"], dtype=torch.float32)
    )
    lora = (
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        if told["lora"]
        else None
    )
    reference = None if lora else load(told["model"], dtype=torch.float32)
    lines: list[dict] = []

    def note(logs):
        if "objective/scores" in logs:
            lines.append({"kl": logs["objective/kl"], "score": logs["objective/scores"]})

    clock = Clock(note)
    with tempfile.TemporaryDirectory() as out:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=out,
                seed=told["seed"],
                use_cpu=True,
                bf16=told["bf16"],
                report_to="none",
                save_strategy="no",
                per_device_train_batch_size=told["batch"],
                gradient_accumulation_steps=1,
                num_ppo_epochs=EPOCHS,
                num_mini_batches=MINIBATCHES,
                kl_coef=KL,
                total_episodes=told["batch"] * told["updates"],
                local_rollout_forward_batch_size=told["batch"],
                response_length=told["tokens"],
                temperature=1.0,
                learning_rate=told["rate"],
                adam_epsilon=1e-5,
                stop_token="eos",
                num_sample_generations=0,
                logging_steps=1,
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=judge,
            value_model=value,
            peft_config=lora,
            callbacks=[clock],
            train_dataset=Dataset.from_dict(
                {"input_ids": [tokenizer(text)["input_ids"] for text in told["prompts"]]}
            ),
            eval_dataset=Dataset.from_dict(
                {"input_ids": [tokenizer(told["prompts"][0])["input_ids"]]}
            ),
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": clock.seconds, "peak": peak, "lines": lines}))


def summing(values: list[float]):
    """A reward model for TRL whose score is the sum of its tokens' values."""
    import torch

    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.values = torch.nn.Parameter(torch.tensor(values))

        def forward(self, input_ids, attention_mask, **_):
            return SimpleNamespace(
                hidden_states=[(self.values[input_ids] * attention_mask).cumsum(1)[..., None]]
            )

    class Judge(torch.nn.Module):
        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = Body(), torch.nn.Identity()

    return Judge()


def own(told: dict, home: Path, python: str) -> dict:
    """The same by `llmpipe ppo`, the whole command."""
    rows, run = home / "prompts.jsonl", home / f"run-{told['seed']}"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in told["prompts"]))
    reward = {"model": told["critic"]}
    if "table" in told:
        reward = {"function": f"{home}/rewards.py:look"}
        (home / "rewards.py").write_text(REWARD.format(table=told["words"]))
    recipe = {
        "stage": "ppo",
        "run": str(run),
        "model": told["model"],
        "seed": told["seed"],
        "data": {"train": [{"path": str(rows)}], "max_length": 256},
        "reward": [reward],
        "reference": {"coefficient": KL},
        "rollout": {"max_new_tokens": told["tokens"]},
        "algorithm": {"epochs": EPOCHS, "minibatches": MINIBATCHES},
        "optim": {
            "learning_rate": told["rate"],
            "batch_size": told["batch"],
            "steps": told["updates"],
            "warmup": 0,
            "precision": "bf16" if told["bf16"] else "fp32",
            "max_grad_norm": 0,
        },
        "log": {"every": 1},
        "checkpoint": {"every": 10**6},
        "launch": {"processes": 1, "threads": told["threads"]},
    } | ({"adapter": {"rank": 8, "alpha": 16}} if told["lora"] else {})
    path = home / "ppo.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = subprocess.run(
        [python, "-m", "llmpipe", "ppo", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"llmpipe failed:\n{done.stdout}{done.stderr}")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    lines = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "objective/scores" in line]
    return {
        "seconds": [told["batch"] / line["episodes_per_second"] for line in lines],
        "peak": peak * 1024 if peak > before else math.nan,
        "lines": [
            {"kl": line["objective/kl"], "score": line["objective/scores"]} for line in lines
        ],
    }


REWARD = """
TABLE = {table!r}


def look(prompts, completions, **_):
    return [sum(TABLE[word] for word in text.split()) for text in completions]
"""


def fresh(python: str, *arguments: str, told: dict) -> dict:
    """This script in a process of its own."""
    done = subprocess.run(
        [python, __file__, *arguments], input=json.dumps(told), capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{python} {arguments} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def speed(args) -> None:
    """Pairs of TRL and llmpipe, one after the other."""
    import torch
    from training import lower_bound
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    imports = {}
    for side, python in {"peer": args.peer, "llmpipe": sys.executable}.items():
        imports[side] = (
            int(subprocess.run([python, "-c", BARE], capture_output=True, text=True).stdout) * 1024
        )
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        torch.manual_seed(0)
        ranker = AutoModelForSequenceClassification.from_pretrained(
            args.model, num_labels=1, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ranker.config.pad_token_id = tokenizer.pad_token_id
        ranker.save_pretrained(home / "critic")
        tokenizer.save_pretrained(home / "critic")
        del ranker
        rows = json.loads(Path(args.rows).read_text())[: args.batch * args.updates]
        told = {
            "model": args.model,
            "critic": str(home / "critic"),
            "prompts": [row["instruction"] for row in rows],
            "batch": args.batch,
            "tokens": args.tokens,
            "updates": args.updates,
            "rate": 1e-5 if args.lora else 1e-6,
            "lora": args.lora,
            "bf16": args.precision == "bf16",
            "threads": os.cpu_count(),
            "seed": 0,
        }
        ratios, memory = [], []
        for pair in range(args.pairs):
            seen = {
                "peer": fresh(args.peer, "peer", told=told),
                "llmpipe": fresh(sys.executable, "own", told=told),
            }
            rate = {
                side: args.batch * (args.updates - 1) / sum(found["seconds"][1:])
                for side, found in seen.items()
            }
            peak = {side: (found["peak"] - imports[side]) / 2**30 for side, found in seen.items()}
            ratios.append(rate["llmpipe"] / rate["peer"])
            memory.append(peak["llmpipe"] / peak["peer"])
            print(
                f"pair {pair + 1}: episodes/s peer {rate['peer']:.3f}, "
                f"llmpipe {rate['llmpipe']:.3f}, "
                f"ratio {ratios[-1]:.2f}; "
                f"GiB peer {peak['peer']:.2f}, llmpipe {peak['llmpipe']:.2f}, "
                f"ratio {memory[-1]:.2f}",
                flush=True,
            )
    print(
        f"episodes/s: median ratio {statistics.median(ratios):.2f}, "
        f"95 % lower bound {lower_bound(ratios):.2f}"
    )
    print(f"peak memory: median ratio {statistics.median(memory):.2f}, highest {max(memory):.2f}")


WORDS = [f"w{i}" for i in range(24)]
ASKED = [f"p{i}" for i in range(8)]


def tiny(folder: Path, seed: int) -> dict:
    """A model that says words, a critic with its body, and what the words are worth."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PhiConfig,
        PhiForCausalLM,
        PhiForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *ASKED, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>"
    )
    torch.manual_seed(seed)
    config = PhiConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=1,
        pad_token_id=0,
    )
    policy = PhiForCausalLM(config)
    policy.lm_head.bias.data[
        0
    ] = -1e4  # never draws a pad token: TRL would score nothing that comes after it
    config.num_labels = 1
    critic = PhiForSequenceClassification(config)
    critic.model.load_state_dict(policy.model.state_dict())
    torch.nn.init.normal_(critic.score.weight, std=1 / math.sqrt(64 + 1))
    for name, model in {"model": policy, "critic": critic}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    chance = random.Random(seed)
    words = {word: chance.random() / 8 if word in WORDS else 0.0 for word in vocabulary}
    return {
        "model": str(folder / "model"),
        "critic": str(folder / "critic"),
        "table": list(words.values()),
        "words": words,
        "prompts": [" ".join(chance.choices(ASKED, k=2)) for _ in range(64)],
        "batch": 64,
        "tokens": 8,
        "updates": 60,
        "rate": 1e-3,
        "lora": False,
        "bf16": False,
        "threads": 1,
        "seed": seed,
    }


def at_equal_kl(curves: dict[str, list[dict]]) -> float:
    """llmpipe's score less TRL's, averaged over quarters of the KL that both reached."""
    reached = min(max(line["kl"] for line in smooth(lines)) for lines in curves.values())

    def score(lines: list[dict], kl: float) -> float:
        before = {"kl": 0.0, "score": lines[0]["score"]}
        for line in smooth(lines):
            if line["kl"] >= kl:
                share = (kl - before["kl"]) / max(line["kl"] - before["kl"], 1e-9)
                return before["score"] + share * (line["score"] - before["score"])
            before = line
        return before["score"]

    levels = [reached * share for share in (0.25, 0.5, 0.75, 1.0)]
    return statistics.mean(
        score(curves["llmpipe"], kl) - score(curves["peer"], kl) for kl in levels
    )


def smooth(lines: list[dict], width: int = 5) -> list[dict]:
    """Running means over `width` updates."""
    windows = [lines[max(0, i - width + 1) : i + 1] for i in range(len(lines))]
    return [
        {key: statistics.mean(line[key] for line in window) for key in ("kl", "score")}
        for window in windows
    ]


def curve(args) -> None:
    """Both sides over seeds, and the difference of their scores at equal KL."""
    apart, drawn = [], {"peer": [], "llmpipe": []}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            told = fresh(sys.executable, "tiny", told={"folder": folder, "seed": seed})
            told["updates"] = args.updates
            seen = {
                "peer": fresh(args.peer, "peer", told=told),
                "llmpipe": fresh(sys.executable, "own", told=told),
            }
        curves = {side: found["lines"] for side, found in seen.items()}
        apart.append(at_equal_kl(curves))
        last = {side: smooth(lines)[-1] for side, lines in curves.items()}
        for side, lines in curves.items():
            drawn[side].append(smooth(lines))
        ends = ", ".join(
            f"{side} {line['score']:.3f} at {line['kl']:.2f} nats" for side, line in last.items()
        )
        starts = " and ".join(f"{lines[0]['score']:.3f}" for lines in curves.values())
        print(f"seed {seed}: from {starts}: {ends}; at equal KL {apart[-1]:+.3f}", flush=True)
    mean, error = statistics.mean(apart), statistics.stdev(apart) / math.sqrt(len(apart))
    bound = mean - T90[min(len(apart), len(T90)) - 1] * error
    print(
        f"score at equal KL, llmpipe less TRL: {mean:+.4f}, one-sided 90 % lower bound {bound:+.4f}"
    )
    if args.plot:
        plot(drawn, Path(args.plot))


def plot(drawn: dict[str, list[list[dict]]], path: Path) -> None:
    """Score against KL, a line per seed, as SVG."""
    most = max(line["kl"] for curves in drawn.values() for lines in curves for line in lines)
    x, y = lambda kl: 50 + 520 * kl / most, lambda score: 350 - 320 * score
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 400" '
        'font-family="sans-serif" font-size="12">'
    ]
    parts.append(
        '<rect width="620" height="400" fill="white"/>'
        '<path d="M50 30V350H570" stroke="black" fill="none"/>'
    )
    for i in range(6):
        parts.append(f'<text x="20" y="{y(i / 5) + 4:.0f}">{i / 5:.1f}</text>')
        parts.append(f'<text x="{x(most * i / 5) - 8:.0f}" y="368">{most * i / 5:.1f}</text>')
    for at, (side, colour) in enumerate({"peer": "#c62", "llmpipe": "#26c"}.items()):
        for lines in drawn[side]:
            points = " ".join(f"{x(line['kl']):.1f},{y(line['score']):.1f}" for line in lines)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-opacity="0.6"/>'
            )
        name = {"peer": "trl 1.12.0", "llmpipe": "llmpipe"}[side]
        parts.append(f'<text x="470" y="{300 + 18 * at}" fill="{colour}">{name}</text>')
    parts.append(
        '<text x="230" y="390">KL from the parent, nats per answer</text>'
        '<text x="10" y="20">score</text>'
    )
    parts.append("</svg>")
    path.write_text("\n".join(parts) + "\n")


def main() -> None:
    if sys.argv[1:] == ["peer"]:
        peer(json.load(sys.stdin))
        return
    if sys.argv[1:] == ["own"]:
        with tempfile.TemporaryDirectory() as home:
            print(json.dumps(own(json.load(sys.stdin), Path(home), sys.executable)))
        return
    if sys.argv[1:] == ["tiny"]:
        told = json.load(sys.stdin)
        print(json.dumps(tiny(Path(told["folder"]), told["seed"])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True)
    timed = kinds.add_parser("speed")
    timed.add_argument("--model", required=True, help="folder of a causal language model")
    timed.add_argument("--rows", required=True)
    timed.add_argument("--lora", action="store_true")
    timed.add_argument(
        "--precision", default="bf16", choices=("bf16", "fp32"), help="fp32 where bf16 is slow"
    )
    timed.add_argument("--pairs", type=int, default=4)
    timed.add_argument("--batch", type=int, default=16, help="answers per update")
    timed.add_argument("--tokens", type=int, default=32, help="longest answer")
    timed.add_argument("--updates", type=int, default=3)
    timed.set_defaults(do=speed)
    drawn = kinds.add_parser("curve")
    drawn.add_argument("--seeds", type=int, default=10)
    drawn.add_argument("--updates", type=int, default=60)
    drawn.add_argument("--plot", help="an SVG file to write")
    drawn.set_defaults(do=curve)
    for kind in (timed, drawn):
        kind.add_argument(
            "--peer", required=True, help="the python of an environment with trl 1.12.0"
        )
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
