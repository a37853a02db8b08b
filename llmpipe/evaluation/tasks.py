"""Score models on items: likelihoods, answers, pairs. What is scored is kept line by line and never scored again.

Items are scored in batches that do not depend on what is scored already, so that an evaluation that was killed and
started again ends with the same numbers. Sequences are padded on the left: what is scored is at their end, and logits
are made for that part alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpipe.data.formats import Rejected, taught_bytes
from llmpipe.data.kinds import rows
from llmpipe.data.template import shared_prefix
from llmpipe.errors import Say, UserError, near
from llmpipe.evaluation import scores
from llmpipe.evaluation.book import Book, Line
from llmpipe.evaluation.candidate import Candidate, Sequence_, batched, encoder_of
from llmpipe.evaluation.items import example_of
from llmpipe.evaluation.statistics import pass_at
from llmpipe.models.generate import Sampling, generate, isolated_rng
from llmpipe.recipe.sections import Recipe, Section
from llmpipe.run.progress import Progress, duration

SIDES = ("chosen", "rejected")


def score(
    model: Candidate,
    task: Section,
    name: str,
    items: list[Line] | None,
    book: Book,
    recipe: Recipe,
    say: Say,
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
                pieces, _ = rows.encode(encoder_of(model), example_of(item), {})
            except Rejected as error:
                raise UserError(
                    f"{item['at']}: {model.label}: {error.reason}: {error.detail}"
                ) from None
            ids, labels = pieces[0]
            ids, marks = ids.tolist(), (labels != -100).tolist()
            scored_bytes.append(taught_bytes(example_of(item)))
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
        sequences += [
            _continuation(model, item, context, (" " if bare else "") + c) for c in item["choices"]
        ]
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
        starts = [shared_prefix(prompt, whole) for prompt, whole in zip(prompts, ids, strict=True)]
        marked = [
            (whole, [i >= start for i in range(len(whole))])
            for whole, start in zip(ids, starts, strict=True)
        ]
        values = iter(model.scored(marked))
        scores = []
        for _ in batch:
            (chosen, n), (rejected, m) = next(values), next(values)
            scores.append(
                {"accuracy_sum": (chosen, rejected), "accuracy_mean": (chosen / n, rejected / m)}
            )
    for item, both in zip(batch, scores, strict=True):
        ranked = {name: float(c > r) + 0.5 * (c == r) for name, (c, r) in both.items()}
        shown = {
            "prompt": model.prompt(item),
            **{side: _answer_text(item[side]) for side in ("chosen", "rejected")},
        }
        lines.append({**shown, "values": both, "scores": ranked})
    return lines


def _paired(model: Candidate, item: Line, side: str) -> list[int]:
    """Tokens of a question with one of its answers, up to the end of the last turn, as in training."""
    if not (model.ranks or "text" in item["ask"] or model.tokenizer.chat_template):
        return model.ids(model.whole(item, item[side]), item)
    prompt = item["ask"].get("text") or item["ask"]["messages"]
    try:
        return encoder_of(model).answered(prompt, item[side], item.get("tools"))
    except Rejected as error:
        raise UserError(f"{item['at']}: {model.label}: {error.reason}: {error.detail}") from None


def _answer_text(answer: str | list[dict]) -> str:
    return answer if isinstance(answer, str) else "\n\n".join(turn["content"] for turn in answer)


def _answers(model: Candidate, task: Any, batch: list[Line], recipe: Recipe) -> list[Line]:
    """Answers to prompts, and their scores."""
    prompts = [model.prompt(item) for item in batch]
    n = task.samples
    sampling = Sampling(task.max_new_tokens, task.temperature, task.top_p, task.top_k)
    ids = [
        model.ids(text, item) for text, item in zip(prompts, batch, strict=True) for _ in range(n)
    ]
    # drawn from the seed and the batch's own content: not from what was drawn before
    seed = int(
        sha256(f"{recipe.seed} {[item['id'] for item in batch]}".encode()).hexdigest()[:8], 16
    )
    with isolated_rng(seed):
        flat = [a for i in range(0, len(ids), model.batch_size)
                for a in generate(model.model, model.tokenizer, ids[i : i + model.batch_size], sampling)]  # fmt: skip
    lines = []
    for i, item in enumerate(batch):
        own, reference = flat[i * n : (i + 1) * n], item.get("reference")
        each = [
            {k: v for kind in task.score if kind not in ("bleu", "chrf")
             for k, v in scores.score(kind, one.text, reference, task.pattern).items()}
            for one in own
        ]  # fmt: skip
        lines.append({
            "prompt": prompts[i], "reference": reference,
            "answers": [one.text for one in own], "ended": [one.ended for one in own],
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
            out |= {f"{name}@{k}": pass_at(k, len(values), int(sum(values))) for k in task.pass_at}
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
        raise UserError(
            f"{name}: the harness has no task '{unknown[0]}'{near(unknown[0], manager.all_tasks)}"
        )
    kwargs = {"chat_template_args": model.kwargs} if model.kwargs else {}
    wrapped = HFLM(
        pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.batch_size, **kwargs
    )
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
        return (
            ("" if [one] == task.tasks else f"{one}.")
            + metric
            + ("" if filtered == "none" else f".{filtered}")
        )

    lines, reported = [], {}
    for one, results in found["results"].items():
        count = found["n-samples"].get(one, {}).get("effective", 0)
        for key, value in results.items():
            metric, _, filtered = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr") and filtered:
                error = results.get(f"{metric}_stderr,{filtered}")
                reported[shown(one, metric, filtered)] = [
                    value,
                    error if isinstance(error, float) else None,
                    count,
                ]
        for sample in found["samples"].get(one, []):
            kind = sample["filter"]
            scores = {
                shown(one, m, kind): sample[m]
                for m in sample["metrics"]
                if isinstance(sample[m], int | float)
            }
            lines.append({"task": name, "model": model.label, "item": f"{one}/{sample['doc_id']:08}/{kind}",
                          "prompt": str(sample["arguments"])[:2000], "reference": str(sample["target"]),
                          "answers": [str(sample["filtered_resps"])[:2000]],
                          "scores": {name: float(value) for name, value in scores.items()}})  # fmt: skip
    lines.append({"task": name, "model": model.label, "item": "reported", "reported": reported})
    book.add(lines)
    say(f"{model.label} on {name}: {len(lines) - 1:,} items")
