"""Score models on items: likelihoods, answers, pairs. What is scored is kept line by line and never scored again.

Items are scored in batches that do not depend on what is scored already, so that an evaluation that was killed and
started again ends with the same numbers. Sequences are padded on the left: what is scored is at their end, and logits
are made for that part alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe import rundir
from llmpipe.data.encode import Encoder
from llmpipe.data.formats import Rejected, taught_bytes
from llmpipe.data.templates import Choice as Chosen
from llmpipe.data.templates import shared
from llmpipe.engine import metrics, upstream
from llmpipe.engine.generate import Sampling, answer, own_rng, render
from llmpipe.engine.models import has_bf16, load_any, load_tokenizer, release_memory
from llmpipe.engine.progress import Progress, duration
from llmpipe.errors import INTEGRITY, NUMERIC, UserError
from llmpipe.recipe import Recipe, Section, near

Say = Callable[[str], None]
Line = dict[str, Any]
SIDES = ("chosen", "rejected")
Sequence_ = tuple[list[int], list[bool]]  # ids, and which of them are scored


class Book:
    """samples.jsonl: one line per item and model, appended batch by batch; a line cut off by a kill is dropped."""

    def __init__(self, path: Path, machine: dict[str, Any]):
        """`machine`: what the numbers also depend on; one evaluation is scored with one setting (3)."""
        self.path = path
        settings = path.with_name("settings.json")
        before = rundir.read_json(settings) if path.exists() else None
        if before not in (None, machine):
            changed = ", ".join(f"{k} {before.get(k)} there, {v} now" for k, v in machine.items() if before.get(k) != v)
            raise UserError(f"{path}: was begun with other settings: {changed}", "--fresh starts anew", INTEGRITY)
        rundir.write_json(settings, machine)
        self.lines: dict[tuple, Line] = {}
        whole = 0
        if path.exists():
            with path.open("rb") as file:
                for raw in file:
                    if not raw.endswith(b"\n"):
                        break
                    line = json.loads(raw)
                    self.lines[line["task"], line["model"], line["item"]] = line
                    whole += len(raw)
        with path.open("ab") as file:
            file.truncate(whole)

    def add(self, lines: list[Line]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
        self.lines |= {(line["task"], line["model"], line["item"]): line for line in lines}

    def of(self, task: str) -> list[Line]:
        return [line for key, line in self.lines.items() if key[0] == task]

    def close(self, tasks: list[str], models: list[str]) -> None:
        """Write the lines in a fixed order, each item of a model once."""
        rank = {name: i for i, name in enumerate([*tasks, *models])}
        order = sorted(self.lines.items(), key=lambda kv: (rank[kv[0][0]], rank[kv[0][1]], metrics.item_key(kv[1])))
        new = self.path.with_name(f".{self.path.name}")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for _, line in order)
        new.write_text(text, encoding="utf-8")
        new.rename(self.path)

    def missing(self, task: str, model: str, batches: list[list[Line]]) -> list[list[Line]]:
        """The batches of items that are not scored whole."""
        return [b for b in batches if any((task, model, item["id"]) not in self.lines for item in b)]


@dataclass
class Candidate:
    """A model that is measured."""

    label: str
    folder: Path
    model: PreTrainedModel
    tokenizer: Tokenizer
    ranks: bool
    """Whether it is a reward model, which gives a text one score."""
    kwargs: dict[str, Any]
    """`chat_template_kwargs` it was trained with."""
    batch_size: int

    def describe(self) -> dict[str, Any]:
        template = self.tokenizer.chat_template
        return {
            "template": template and sha256(template.encode()).hexdigest(),
            "stops_at": None if self.ranks else self.model.generation_config.eos_token_id,
            "vocab_size": len(self.tokenizer),
            "parameters": self.model.num_parameters(),
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def prompt(self, item: Line) -> str:
        """What the model sees of an item's question."""
        return render(self.tokenizer, item["ask"], self.kwargs, item.get("tools"))

    def ids(self, text: str, item: Line) -> list[int]:
        """Tokens of a rendered text: a template writes the first token itself."""
        special = "text" in item["ask"] or not self.tokenizer.chat_template
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def scored(self, sequences: list[Sequence_]) -> list[tuple[float, int]]:
        """`log_probs` in batches whose logits take a gigabyte at most."""
        return batched(self.log_probs, sequences, self.batch_size, 2**28 // len(self.tokenizer))

    @torch.no_grad()
    def log_probs(self, sequences: list[Sequence_]) -> list[tuple[float, int]]:
        """(sum of log-probabilities in nats, tokens) over the marked tokens of each sequence, one batch."""
        width = max(len(ids) for ids, _ in sequences)
        most = getattr(self.model.config, "max_position_embeddings", width)
        if width > most:
            raise UserError(f"{self.label}: an item has {width:,} tokens, the model takes {most:,}", "shorten it")
        pad = [width - len(ids) for ids, _ in sequences]
        first = [marks.index(True) if True in marks else len(marks) for _, marks in sequences]
        keep = width - min(at + p for at, p in zip(first, pad, strict=True)) + 1
        ids = torch.tensor([[0] * p + ids for (ids, _), p in zip(sequences, pad, strict=True)])
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in pad])
        marked = torch.tensor([[False] * p + marks for (_, marks), p in zip(sequences, pad, strict=True)])
        device = self.model.device
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with upstream.contiguous_head(self.model):
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=positions.to(device),
                logits_to_keep=min(keep, width),
                use_cache=False,
            )
        logits = out.logits[:, :-1].float()
        targets, marked = ids[:, -logits.shape[1] :].to(device), marked[:, -logits.shape[1] :].to(device)
        chosen = logits.gather(2, targets[..., None]).squeeze(2) - logits.logsumexp(2)
        sums = torch.where(marked, chosen, 0).double().sum(1).tolist()
        if not all(map(math.isfinite, sums)):
            raise UserError(f"{self.label}: a log-probability is not finite", "the model is broken", NUMERIC)
        return list(zip(sums, marked.sum(1).tolist(), strict=True))

    @torch.no_grad()
    def rewards(self, texts: list[list[int]]) -> list[float]:
        """The score of each text, one batch, padded on the right: reward models read up to the last token that is no
        pad token, which is one before the end of turn where the two are the same."""
        width = max(map(len, texts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids in texts], device=self.model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=self.model.device)
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def whole(self, item: Line, text: str | list[dict]) -> str:
        """A question with one answer to it, as the template writes the pair."""
        if isinstance(text, str) and "text" in item["ask"]:
            return item["ask"]["text"] + text
        turns = [{"role": "assistant", "content": text}] if isinstance(text, str) else text
        whole = {"messages": item["ask"]["messages"] + turns}
        return render(self.tokenizer, whole, self.kwargs, item.get("tools"), open_turn=False)


def machine(recipe: Recipe) -> dict[str, Any]:
    """What an evaluation's numbers depend on beside the recipe: in their last digits, and what is drawn by it."""
    bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and has_bf16())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"batch_size": recipe.launch.batch_size, "precision": "bf16" if bf16 else "fp32", "device": device}


@contextmanager
def candidate(label: str, folder: Path, base: Path | None, recipe: Recipe, say: Say) -> Iterator[Candidate]:
    """Load a model for measuring; its memory is free again afterwards."""
    bf16 = machine(recipe)["precision"] == "bf16"
    tokenizer = load_tokenizer(folder)
    model = load_any(folder, base, tokenizer, bf16=bf16)
    say(f"{label}: {model.num_parameters() / 1e6:,.1f} M parameters, {'bf16' if bf16 else 'fp32'}")
    if not tokenizer.chat_template:
        say(f"{label}: has no chat template: it sees prompts as bare text")
    kwargs, size = rundir.template_kwargs(folder), recipe.launch.batch_size
    made = Candidate(label, folder, model, tokenizer, rundir.ranks(folder), kwargs, size)
    try:
        yield made
    finally:
        made.model = model = None  # the caller still holds `made` while the next one is loaded
        release_memory()


def score(
    model: Candidate, task: Section, name: str, items: list[Line] | None, book: Book, recipe: Recipe, say: Say
) -> None:
    """Score what is missing of one task for one model."""
    if model.ranks and task.task != "preference":
        say(f"{model.label} on {name}: a reward model has no part in {task.task}")
        return
    if task.task == "harness":
        _harness(model, task, name, book, recipe, say)
        return
    tasks = {"perplexity": _perplexity, "choice": _choice, "preference": _preference}
    # items of a length together
    order = sorted(items or [], key=lambda item: -sum(len(str(value)) for value in item.values()))
    batches = [order[i : i + model.batch_size] for i in range(0, len(order), model.batch_size)]
    missing = book.missing(name, model.label, batches)
    progress, begun, done = Progress(say), time.monotonic(), 0
    total = sum(map(len, missing))
    for batch in missing:
        lines = tasks.get(task.task, _answers)(model, task, batch, recipe)
        book.add([{"task": name, "model": model.label, "item": item["id"], "at": item["at"], **line}
                  for item, line in zip(batch, lines, strict=True)])  # fmt: skip
        done += len(batch)
        rate = done / (time.monotonic() - begun)
        progress.note(
            f"{model.label} on {name}: {done}/{total}  {rate:.1f} items/s  ETA {duration((total - done) / rate)}"
        )
    progress.close()
    if total:
        say(f"{model.label} on {name}: {total:,} items in {duration(time.monotonic() - begun)}")


def batched(call: Callable, sequences: list, size: int, most: float = math.inf) -> list:
    """`call` on batches of at most `size` sequences of like length, `most` tokens; the results in the order given."""
    lengths = [len(s[0] if isinstance(s, tuple) else s) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda i: -lengths[i])
    out: list = [None] * len(sequences)
    while order:
        count = max(1, int(min(size, most // lengths[order[0]])))
        part, order = order[:count], order[count:]
        for i, value in zip(part, call([sequences[i] for i in part]), strict=True):
            out[i] = value
    return out


def _perplexity(model: Candidate, task: Any, batch: list[Line], recipe: Recipe) -> list[Line]:
    sequences, owner, scored_bytes = [], [], []
    for i, item in enumerate(batch):
        if "text" in item:
            start = _start(model.tokenizer)  # what every token has before it
            ids = model.tokenizer(item["text"], add_special_tokens=False)["input_ids"]
            ids, marks = [start, *ids], [False, *[True] * len(ids)]
            scored_bytes.append(len(item["text"].encode()))
        else:
            try:
                pieces, _ = encoder_of(model).row(item)
            except Rejected as error:
                raise UserError(f"{item['at']}: {model.label}: {error.reason}: {error.detail}") from None
            ids, labels = pieces[0]
            ids, marks = ids.tolist(), (labels != -100).tolist()
            scored_bytes.append(taught_bytes(item))
        for part in windows(ids, marks, task.window, task.stride):
            sequences.append(part)
            owner.append(i)
    nats, tokens = [0.0] * len(batch), [0] * len(batch)
    for i, (log_prob, count) in zip(owner, model.scored(sequences), strict=True):
        nats[i] -= log_prob
        tokens[i] += count
    return [
        {
            "text": _shown(item),
            "scores": {
                "perplexity": [n, count],
                "nats_per_token": [n, count],
                "bits_per_byte": [n / math.log(2), size],
            },
        }
        for item, n, count, size in zip(batch, nats, tokens, scored_bytes, strict=True)
    ]


def _start(tokenizer: Tokenizer) -> int:
    """The token in front of a text: the first token where the tokenizer writes one, else what ends documents."""
    first = tokenizer("a")["input_ids"][:1]
    written = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return first[0] if written or tokenizer.eos_token_id is None else tokenizer.eos_token_id


def windows(ids: list[int], marks: list[bool], window: int, stride: int) -> Iterator[Sequence_]:
    """A sequence in windows that overlap by `window - stride`; each marked token is scored once, in the first window
    that holds it."""
    done = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        fresh = [m and i >= done and i > begin for i, m in enumerate(marks[begin:end], begin)]
        if any(fresh):
            yield ids[begin:end], fresh
        done = end
        if end == len(ids):
            break


def encoder_of(model: Candidate) -> Encoder:
    """Conversations as training encodes them, uncut."""
    if not hasattr(model, "_encoder"):
        choice = Chosen(model.folder, "auto", model.kwargs)
        model._encoder = Encoder(model.folder, choice.ends, model.kwargs, choice.text_eos, 1 << 40, "assistant", 0)
    return model._encoder


def _shown(item: Line) -> str:
    text = item.get("text") or item.get("completion") or item["messages"][-1]["content"]
    return text if len(text) <= 200 else text[:197] + "..."


def _continuation(model: Candidate, item: Line, context: str, text: str) -> Sequence_:
    """Context and continuation as one sequence. White space at the end of the context belongs to the continuation, as
    in lm-evaluation-harness: a token may hold both."""
    bare = context.rstrip()
    text, context = context[len(bare) :] + text, bare
    before, whole = model.ids(context, item), model.ids(context + text, item)
    return whole, [i >= len(before) for i in range(len(whole))]


def _choice(model: Candidate, task: Any, batch: list[Line], recipe: Recipe) -> list[Line]:
    sequences = []
    for item in batch:
        bare = "text" in item["ask"] or not model.tokenizer.chat_template
        context = model.prompt(item)
        sequences += [_continuation(model, item, context, (" " if bare else "") + c) for c in item["choices"]]
    values = iter(model.scored(sequences))
    lines = []
    for item in batch:
        sums = [next(values)[0] for _ in item["choices"]]
        norms = [value / len(choice) for value, choice in zip(sums, item["choices"], strict=True)]
        picked, picked_norm = sums.index(max(sums)), norms.index(max(norms))
        lines.append({
            "prompt": model.prompt(item), "choices": item["choices"], "reference": item["choices"][item["answer"]],
            "answers": [item["choices"][picked]], "log_probs": sums,
            "scores": {"acc": float(picked == item["answer"]), "acc_norm": float(picked_norm == item["answer"])},
        })  # fmt: skip
    return lines


def _preference(model: Candidate, task: Any, batch: list[Line], recipe: Recipe) -> list[Line]:
    owners = [item for item in batch for _ in range(2)]
    ids = [_paired(model, item, side) for item in batch for side in SIDES]
    lines = []
    if model.ranks:
        values = iter(batched(model.rewards, ids, model.batch_size))
        scores = [{"accuracy": (next(values), next(values))} for _ in batch]
    else:
        # an answer begins where its rendering parts from the prompt's
        prompts = [model.ids(model.prompt(item), item) for item in owners]
        starts = [shared(prompt, whole) for prompt, whole in zip(prompts, ids, strict=True)]
        marked = [(whole, [i >= start for i in range(len(whole))]) for whole, start in zip(ids, starts, strict=True)]
        values = iter(model.scored(marked))
        scores = []
        for _ in batch:
            (chosen, n), (rejected, m) = next(values), next(values)
            scores.append({"accuracy_sum": (chosen, rejected), "accuracy_mean": (chosen / n, rejected / m)})
    for item, both in zip(batch, scores, strict=True):
        ranked = {name: float(c > r) + 0.5 * (c == r) for name, (c, r) in both.items()}
        shown = {"prompt": model.prompt(item), **{side: _answer_text(item[side]) for side in ("chosen", "rejected")}}
        lines.append({**shown, "values": both, "scores": ranked})
    return lines


def _paired(model: Candidate, item: Line, side: str) -> list[int]:
    """Tokens of a question with one of its answers, up to the end of the last turn, as in training."""
    if not (model.ranks or "text" in item["ask"] or model.tokenizer.chat_template):
        return model.ids(model.whole(item, item[side]), item)
    pair = {"tools": None, **item, "prompt": item["ask"].get("text") or item["ask"]["messages"]}
    try:
        return encoder_of(model).answered(pair, side)
    except Rejected as error:
        raise UserError(f"{item['at']}: {model.label}: {error.reason}: {error.detail}") from None


def _answer_text(answer: str | list[dict]) -> str:
    return answer if isinstance(answer, str) else "\n\n".join(turn["content"] for turn in answer)


def _answers(model: Candidate, task: Any, batch: list[Line], recipe: Recipe) -> list[Line]:
    """Answers to prompts, and their scores."""
    prompts = [model.prompt(item) for item in batch]
    n = task.samples
    sampling = Sampling(task.max_new_tokens, task.temperature, task.top_p, task.top_k)
    ids = [model.ids(text, item) for text, item in zip(prompts, batch, strict=True) for _ in range(n)]
    # drawn from the seed and the batch's own content: not from what was drawn before
    seed = int(sha256(f"{recipe.seed} {[item['id'] for item in batch]}".encode()).hexdigest()[:8], 16)
    with own_rng(seed):
        flat = [a for i in range(0, len(ids), model.batch_size)
                for a in answer(model.model, model.tokenizer, ids[i : i + model.batch_size], sampling)]  # fmt: skip
    lines = []
    for i, item in enumerate(batch):
        own, reference = flat[i * n : (i + 1) * n], item.get("reference")
        each = [
            {k: v for kind in task.score if kind not in ("bleu", "chrf")
             for k, v in metrics.score(kind, one["answer"], reference, task.pattern).items()}
            for one in own
        ]  # fmt: skip
        lines.append({
            "prompt": prompts[i], "reference": reference,
            "answers": [one["answer"] for one in own], "ended": [one["ended"] for one in own],
            "scores": _over_samples(each, task),
            "corpus": [kind for kind in task.score if kind in ("bleu", "chrf")],
        })  # fmt: skip
    return lines


def _over_samples(each: list[dict[str, float]], task: Any) -> dict[str, float]:
    """Scores of several answers to one prompt: pass@k of what is right or wrong, the mean of anything else."""
    out: dict[str, float] = {}
    for name in each[0]:
        values = [scores[name] for scores in each]
        if len(values) == 1:
            out[name] = values[0]
        elif all(value in (0, 1) for value in values) and not name.startswith("rouge"):
            out |= {f"{name}@{k}": metrics.pass_at(k, len(values), int(sum(values))) for k in task.pass_at}
        else:
            out[name] = sum(values) / len(values)
    return out


def _harness(model: Candidate, task: Any, name: str, book: Book, recipe: Recipe, say: Say) -> None:
    """lm-evaluation-harness itself on the loaded model; its own numbers are the ones that count."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if (name, model.label, "reported") in book.lines:
        return
    folder = str(Path(task.folder).expanduser()) if task.folder else None
    manager = TaskManager(include_path=folder, include_defaults=False) if folder else None
    if manager is None or not set(task.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # reads the thousands of tasks that come with it
    if unknown := sorted(set(task.tasks) - set(manager.all_tasks)):
        raise UserError(f"{name}: the harness has no task '{unknown[0]}'{near(unknown[0], manager.all_tasks)}")
    kwargs = {"chat_template_args": model.kwargs} if model.kwargs else {}
    wrapped = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.batch_size, **kwargs)
    found = simple_evaluate(
        wrapped,
        tasks=task.tasks,
        num_fewshot=task.fewshot,
        limit=task.limit,
        apply_chat_template=task.template == "auto",
        task_manager=manager,
        bootstrap_iters=100,
        random_seed=recipe.seed,
        numpy_random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
        fewshot_random_seed=recipe.seed,
    )

    def shown(one: str, metric: str, filtered: str) -> str:
        """The only task's metrics stand alone, those of a group's parts behind the part's name."""
        return ("" if [one] == task.tasks else f"{one}.") + metric + ("" if filtered == "none" else f".{filtered}")

    lines, reported = [], {}
    for one, results in found["results"].items():
        count = found["n-samples"].get(one, {}).get("effective", 0)
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr") and filtered:
                error = results.get(f"{metric}_stderr,{filtered}")
                reported[shown(one, metric, filtered)] = [value, error if isinstance(error, float) else None, count]
        for sample in found["samples"].get(one, []):
            kind = sample["filter"]
            scores = {shown(one, m, kind): sample[m] for m in sample["metrics"] if isinstance(sample[m], int | float)}
            lines.append({"task": name, "model": model.label, "item": f"{one}/{sample['doc_id']:08}/{kind}",
                          "prompt": str(sample["arguments"])[:2000], "reference": str(sample["target"]),
                          "answers": [str(sample["filtered_resps"])[:2000]],
                          "scores": {name: float(value) for name, value in scores.items()}})  # fmt: skip
    lines.append({"task": name, "model": model.label, "item": "reported", "reported": reported})
    book.add(lines)
    say(f"{model.label} on {name}: {len(lines) - 1:,} items")
