# python benchmarks/silence.py [--folder DIR] [--limit 3]
"""How long a command on a terminal says nothing: each runs in a terminal of 80 columns, and every
gap between two things that it writes is timed.

The commands are a toy's sft, dpo, evaluation and page, and sft of a random model of SmolLM2-135M's
shape, with held-out rows, answers before and after and a checkpoint, in 106 M weights. What is
printed: the gaps over the limit, each with what stood there. Ends with 1 where there is one. On a
machine that does other things, starting Python alone takes longer: its time is printed first.
"""

import argparse
import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "recipes" / "tiny"
LLMPIPE = [sys.executable, "-m", "llmpipe"]
MAKE = """
import sys
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    max_position_embeddings=2048, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
)
LlamaForCausalLM(config).save_pretrained(target)
tokenizer.save_pretrained(target)
"""


def gaps(command: list[str], limit: float) -> tuple[int, list[tuple[float, float, str]]]:
    """The exit code, and of every silence over the limit: when, how long, and what stood there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ.update(TERM="xterm", COLUMNS="80")
        os.execv(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    begun = last = time.monotonic()
    said = b""
    silences = []

    def heard(now: float) -> None:
        if now - last > limit:
            line = said.decode(errors="replace").replace("\r", "\n").strip().split("\n")[-1]
            silences.append((last - begun, now - last, line[-70:]))

    while True:
        try:
            read = os.read(terminal, 65536)
        except OSError:  # Linux, when the other end is closed
            read = b""
        heard(time.monotonic())
        if not read:
            break
        last, said = time.monotonic(), (said + read)[-4000:]
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), silences


def commands(folder: Path) -> dict[str, list[str]]:
    run, large = str(folder / "run"), folder / "model-135m"
    make = [sys.executable, "-c", MAKE, str(TINY / "model"), str(large)]
    if not large.exists():
        subprocess.run(make, check=True, cwd=ROOT)
    sizes = {"model": large, "optim.steps": 4, "optim.batch_size": 4, "checkpoint.every": 2}
    sizes |= {"evaluation.every": 2, "log.every": 2, "optim.learning_rate": 1e-5}
    sets = [text for name, value in sizes.items() for text in ("--set", f"{name}={value}")]
    return {
        "sft": ["sft", str(TINY / "sft.yaml"), "--run", run],
        "dpo": ["dpo", str(TINY / "dpo.yaml"), "--run", run],
        "report": ["report", run],
        "verify": ["verify", run],
        "sft of 106 M weights": ["sft", str(TINY / "sft.yaml"), "--run", f"{run}-large", *sets],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Silences of commands on a terminal.")
    parser.add_argument("--folder", type=Path, help="where to; a temporary one unless given")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        subprocess.run([*LLMPIPE, "--version"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        taken, load = time.monotonic() - begun, os.getloadavg()[0]
        print(f"llmpipe --version takes {taken:.1f} s, at a load of {load:.0f}", flush=True)
        failed = False
        for title, arguments in commands(folder).items():
            begun = time.monotonic()
            code, silences = gaps([*LLMPIPE, *arguments], args.limit)
            took = time.monotonic() - begun
            failed = failed or bool(silences) or code != 0
            print(f"{title}: exit {code}, {took:.0f} s, {len(silences)} silences", flush=True)
            for at, length, line in silences:
                print(f"  {length:.1f} s at {at:.0f} s: {line!r}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
