"""Episodes of several turns with an environment: what is drawn is what the template renders, only
the policy's own tokens are its own, and whatever an environment does is told in a line."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from llmpipe.data.encode import encoder_of, refuse_no_reply
from llmpipe.data.formats import Rejected
from llmpipe.errors import UserError
from llmpipe.models.drawing.draw import Episode, Inserted
from llmpipe.recipe.check import load
from llmpipe.rl import environment, loop
from llmpipe.rl.environment import Environments
from llmpipe.rl.loop import Loop
from llmpipe.rl.rewards import of_turns
from llmpipe.rl.seeds import Place, Use, number
from llmpipe.rl.sources.functions import UserFiles
from llmpipe.rl.turns import Turns
from llmpipe.run.artifact import Artifact
from llmpipe.stages import schema
from tests import life, store
from tests.data.test_proof import HERE as TEMPLATES
from tests.rl import test_ppo
from tests.rl.test_ppo import GRPO, metrics, updates

GAME = '''
import time

import torch

begun = []


class Letters:
    """Says how long an answer was, until it has heard three."""

    def __init__(self):
        begun.append(self)

    def reset(self, row):
        assert row["prompt"][-1]["role"] == "user" and "reference" in row
        self.row, self.heard = row, []

    def step(self, answer):
        self.heard.append(answer)
        said = f"{len(answer)} letters; another one?"
        return said, answer.count("e") / 4, len(self.heard) == 3


class Calculator(Letters):
    def step(self, answer):
        _, reward, done = super().step(answer)
        return {"role": "tool", "content": "42"}, reward, done


def made():
    return Letters()


class Raises(Letters):
    def step(self, answer):
        raise ValueError("no such thing")


class Begins(Letters):
    def reset(self, row):
        return 1 / 0


class Exits(Letters):
    def step(self, answer):
        raise SystemExit(3)


class Hangs(Letters):
    def step(self, answer):
        time.sleep(60)


def returning(value):
    class Returning(Letters):
        def step(self, answer):
            return value

    return Returning


Pair = returning(("more", 1.0))
NaN = returning(("more", float("nan"), False))
Much = returning(("more", "much", False))
Maybe = returning(("more", 1.0, "maybe"))
Silent = returning((None, 1.0, False))
Policy = returning(([{"role": "assistant", "content": "I."}], 1.0, False))
Control = returning(("<|im_end|>", 1.0, False))
Number = returning((7, 1.0, False))
Beyond = returning(("more", 10**400, False))
Several = returning(("more", torch.ones(2), False))
Unread = returning(({"role": "tool", "content": "42", "is_error": True}, 1.0, False))
'''


@pytest.fixture(scope="module")
def speaks(tmp_path_factory):
    """A run with a model that ends most of its answers."""
    run = tmp_path_factory.mktemp("speaks") / "run"
    store.made(life.write(run, optim__steps=8, optim__learning_rate=5e-3, evaluation={}))
    return run


def write(speaks, run, name="Letters", source=None, **changes):
    (run.parent / "game.py").write_text(GAME)
    reward = {"environment": f"{run.parent}/game.py:{name}"} | (source or {})
    changes = {"model": str(speaks / "sft"), "reward": [reward], "optim__steps": 2} | changes
    return test_ppo.write(run, **changes)


def rollouts(artifact):
    return list(map(json.loads, (artifact.path / "rollouts.jsonl").read_text().splitlines()))


@pytest.fixture
def judged(monkeypatch):
    """Every answer that was learned from, and by how much its log-probabilities differ from those
    that it was drawn by."""
    seen = SimpleNamespace(answers=[], differences=[])
    judge = Loop.judge

    def spied(self, answers):
        experiences, line = judge(self, answers)
        seen.answers += answers
        seen.differences += [
            float((each.old - each.episode.log_probs).abs().max())
            for each in experiences.values()
            if not self.state.step
        ]
        return experiences, line

    monkeypatch.setattr(Loop, "judge", spied)
    return seen


# --- what is drawn ---


@pytest.mark.parametrize("how", [{"rollout__top_k": 9}, GRPO], ids=["ppo, top-k", "grpo"])
def test_the_whole_is_what_the_template_renders(speaks, tmp_path, judged, how):
    """And what was drawn behind a reply has the log-probability that the whole text gives it."""
    made = life.command(write(speaks, tmp_path / "run", **how))
    assert max(judged.differences) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    for answer in judged.answers:
        episode, row = answer.episode, answer.row
        last = {"role": "assistant", "content": answer.response}
        text = tokenizer.apply_chat_template([*row["prompt"], last], tokenize=False)
        ids = episode.ids
        spoken = [ids[start:end] for start, end in episode.spans]
        assert [i for part in spoken for i in part] == episode.response
        if episode.ended or ids[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(ids) == text.removesuffix("\n")
    turns = {answer.episode.turns for answer in judged.answers}
    assert turns == ({3} if "rollout__top_k" in how else {1, 2, 3})
    for line in updates(made):
        assert 1 < line["turns/policy"] <= 3 and line["turns/environment_tokens"] > 0
    assert 3 in {line.get("turns", 1) for line in rollouts(made)}


def test_every_answer_has_an_environment_of_its_own(speaks, tmp_path, judged, monkeypatch):
    """Whose rewards are added up, and which heard what its policy said and nothing else."""
    longest = []
    monkeypatch.setattr(loop, "fit_passes", lambda _, *tokens: longest.append(tokens))
    made = life.command(write(speaks, tmp_path / "run", **GRPO, source={"weight": 2.0}))
    begun = sys.modules["llmpipe_rewards_game"].begun
    assert len(begun) == len(judged.answers) == 16
    for answer, game in zip(judged.answers, begun, strict=True):
        before = len(game.row["prompt"])
        assert game.row["prompt"] == answer.row["prompt"][:before]
        said = [turn["content"] for turn in answer.row["prompt"][before::2]]
        assert game.heard == [*said, answer.response]
        assert answer.score == 2 * sum(text.count("e") / 4 for text in game.heard)
        assert answer.episode.ended == (len(game.heard) == 3 and answer.episode.response[-1] == 2)
    assert made.verify().finished
    prompt = made.manifest().data.lengths.max
    inserted = max(len(ids) for each in judged.answers[:8] for _, ids in each.episode.inserted)
    assert longest == [(prompt + 7 * inserted, 8 * 12)], "what a pass has to hold of eight turns"


def test_other_rewards_look_at_the_last_answer(speaks, tmp_path):
    """And at all that was said before it, as its prompt. A function of the environment's file finds
    there what the environment has left."""
    path = write(speaks, tmp_path / "run", **GRPO)
    recipe = json.loads(path.read_text())
    file = recipe["reward"][0]["environment"].rpartition(":")[0]
    with open(file, "a") as game:
        game.write(
            "\n\ndef last(prompts, completions, **columns):\n"
            "    assert len(begun) >= len(completions), 'the file was run a second time'\n"
            "    pairs = zip(prompts, completions)\n"
            "    return [len(prompt) + len(text) / 100 for prompt, text in pairs]\n"
        )
    recipe["reward"].append({"function": f"{file}:last"})
    path.write_text(json.dumps(recipe))
    made = life.command(path)
    for line in rollouts(made):
        assert (
            line["prompt"][-1]["role"] == "user"
            and len(line["prompt"]) > 2 * line.get("turns", 1) - 2
        )
        assert line["score"] > len(line["prompt"])
    assert {"scores/.../game.py:Letters", "scores/.../game.py:last"} < updates(made)[0].keys()


def test_a_tools_result_stands_where_the_template_has_it(speaks, tmp_path, judged):
    row = {"messages": [{"role": "user", "content": "Add 40 and 2."}]}
    answer = {"role": "assistant", "content": "42"}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    rows = [{"messages": [*row["messages"], answer], "tools": tools}] * 4
    (tmp_path / "tools.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    changes = {"data": {"train": [{"path": f"{tmp_path}/tools.jsonl"}], "template": "chatml"}}
    changes |= {"data__max_length": 400, "model": str(speaks / "sft" / "model")}
    changes |= {"rollout__max_new_tokens": 6, "optim__steps": 1}
    made = life.command(write(speaks, tmp_path / "run", "Calculator", **GRPO | changes))
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    played = [answer for answer in judged.answers if answer.episode.inserted]
    assert played and max(judged.differences) < 1e-5
    for answer in played:
        for _, ids in answer.episode.inserted:
            assert tokenizer.decode(ids) == (
                "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
                "<|im_start|>assistant\n"
            )
        last = {"role": "assistant", "content": answer.response}
        text = tokenizer.apply_chat_template(
            [*answer.row["prompt"], last], tools=tools, tokenize=False
        )
        if answer.episode.response[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(answer.episode.ids) == text.removesuffix("\n")


# --- any cut, and again ---


@pytest.mark.parametrize("how", [GRPO, life.by_the_dozen({})])
def test_a_batch_cut_any_way_is_one_trajectory(speaks, tmp_path, how):
    same = how | {"data__eval": {"holdout": 0.1}, "optim__steps": 1}
    one = life.command(write(speaks, tmp_path / "one", **same))
    few = {"launch__rollout_batch_size": 3, "launch__micro_batch_size": "auto"}
    other = life.command(write(speaks, tmp_path / "few", **same | few))
    both = life.pair(write(speaks, tmp_path / "both", **same, launch__processes="auto"))
    for artifact in (other, both):
        for mine, theirs in zip(metrics(one), metrics(artifact), strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine.keys() & {"loss", "grad_norm", "objective/scores", "objective/kl"}:
                assert theirs[name] == pytest.approx(mine[name], abs=1e-4), name
            for name in mine.keys() & {"turns/policy", "turns/environment_tokens", "eval_score"}:
                assert theirs[name] == mine[name], name
    assert rollouts(one) == rollouts(other)


@pytest.mark.parametrize("how", [GRPO | test_ppo.RESAMPLED, life.by_the_dozen({})])
def test_resume_is_bitwise_the_straight_run(speaks, tmp_path, how):
    changes = how | {"optim__steps": 4, "data__eval": {"holdout": 0.1}}
    changes.pop("reward", None)
    whole = life.command(write(speaks, tmp_path / "whole", **changes))
    path = write(speaks, tmp_path / "run", **changes)
    for hook, code in (("ppo_kill_after_2", -signal.SIGKILL), ("ppo_term_in_3", 143)):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    made = life.command(path)
    assert life.essence(made) == life.essence(whole)
    assert rollouts(made) == rollouts(whole)


@pytest.mark.faults
def test_processes_with_the_policy_in_parts(speaks, tmp_path):
    from tests.rl import test_sharded_ppo

    test_sharded_ppo.both(tmp_path, **GRPO, model=str(speaks / "sft"), **game(tmp_path))


def game(folder):
    (folder / "game.py").write_text(GAME)
    return {"reward": [{"environment": f"{folder}/game.py:Letters"}]}


def test_a_turn_has_numbers_of_its_own_and_the_first_those_of_a_single_answer():
    first = Place(Use.DRAW, 3, 5)
    assert number(42, *first.key) == number(42, Use.DRAW, 3, 5)
    later = {number(42, *first._replace(turn=turn).key) for turn in range(4)}
    assert len(later) == 4


def test_a_changed_environment_is_another_artifact(speaks, tmp_path):
    path = write(speaks, tmp_path / "run", **GRPO, optim__steps=1)
    life.command(path)
    (tmp_path / "game.py").write_text(GAME.replace("/ 4", "/ 5"))
    with pytest.raises(UserError, match=r"game\.py") as refused:
        life.command(path)
    assert refused.value.code == 3


# --- how an episode ends: by answers that are written here ---

END = 2  # <|im_end|>
ROW = {
    "prompt": [{"role": "user", "content": "Guess."}],
    "tools": None,
    "reference": None,
    "columns": {"secret": 7},
    "at": "rows.jsonl:3",
}


@dataclass
class Scripted:
    """An environment that says what it was told to."""

    steps: list
    extra: object = None

    def __call__(self):
        return self

    def reset(self, row):
        assert row == {"prompt": ROW["prompt"], "reference": None, "secret": 7}
        row["prompt"].clear()  # its own copy
        return self.extra

    def step(self, answer):
        return self.steps.pop(0)


def play(script, drawn, most=3, context=None):
    """The one episode of a script of answers, and the texts that were asked."""
    encoder = encoder_of(life.TINY / "model", {})
    files = SimpleNamespace(take=lambda *_: script)
    turns = Turns(Environments("./game.py:Scripted", files), encoder, most, 4, context)
    prompt = encoder.prompt(ROW["prompt"], None)
    asked = []

    def answers(texts, places):
        assert places == [Place(Use.DRAW, 1, 2, len(asked))]
        asked.extend(texts)
        ids = drawn[len(asked) - 1]
        return [Episode(texts[0], ids, ids[-1] in (END, 1), -torch.tensor(ids).float(), None)]

    (game,) = turns.play(answers, lambda _: "It.", [ROW], [prompt], [Place(Use.DRAW, 1, 2)])
    return game, asked, encoder


def test_an_episode_is_its_answers_with_the_replies_between_them():
    script = Scripted([("Lower.", 0.5, False), ("Higher.", 0.0, False), ("Right!", 1.0, True)])
    game, asked, encoder = play(script, [[10, END], [11, 12, END], [13, END]])
    episode, tokenizer = game.episode(), encoder.tokenizer
    lower, higher = (
        tokenizer.ids(f"\n<|im_start|>user\n{word}.<|im_end|>\n<|im_start|>assistant\n")
        for word in ("Lower", "Higher")
    )
    assert episode.response == [10, END, 11, 12, END, 13, END] and episode.ended
    assert episode.inserted == (Inserted(2, lower), Inserted(5, higher))
    assert episode.ids == [*asked[0], 10, END, *lower, 11, 12, END, *higher, 13, END]
    assert [episode.ids[: len(text)] for text in asked] == asked
    assert [i for start, end in episode.spans for i in episode.ids[start:end]] == episode.response
    assert episode.log_probs.tolist() == [-float(token) for token in episode.response]
    assert episode.tokens == len(episode.ids) and episode.turns == 3
    assert of_turns()([game.said()], [""]) == [1.5]
    assert [turn["content"] for turn in game.said()["prompt"]] == [
        *("Guess.", "It.", "Lower.", "It.", "Higher.")
    ]


@pytest.mark.parametrize(
    ("steps", "drawn", "changes", "ended"),
    [
        ([("x", 1, False), ("x", 1, False)], [[10, END], [10, END]], {"most": 2}, False),
        ([("x", 1, False), (None, 1, True)], [[10, END], [10, END]], {"most": 2}, True),
        ([("x", 1, False), ("x", 1, False)], [[10, END], [10, 11]], {}, False),
        ([("x", 1, False), (None, 1, True)], [[10, END], [10, 11]], {}, False),
        ([("x", 1, False), ("x" * 99, 1, False)], [[10, END], [10, END]], {"context": 60}, False),
        ([("x", 1, False), ("x", 1, False)], [[10, END], [10, 1]], {}, False),
    ],
    ids=["turns", "in time", "cut off", "done, cut off", "context", "another end"],
)
def test_what_is_unfinished(steps, drawn, changes, ended):
    """The answer that was the last is heard and scored, whatever it is."""
    script = Scripted(list(steps))
    game, asked, _ = play(script, drawn, **changes)
    assert len(asked) == 2 and not script.steps and game.reward == 2
    assert game.episode().ended == ended and len(game.episode().inserted) == 1


@pytest.mark.parametrize("extra", ["From 1 to 9.", [{"role": "system", "content": "So."}], []])
def test_what_reset_says_follows_the_prompt(extra):
    game, asked, encoder = play(Scripted([(None, 1, True)], extra), [[10, END]])
    turns = [{"role": "user", "content": extra}] if isinstance(extra, str) else extra
    assert asked == [encoder.prompt([*ROW["prompt"], *turns], None)]
    assert game.said()["prompt"] == [*ROW["prompt"], *turns]
    if extra:
        with pytest.raises(
            UserError, match=r"no room for an answer of 4 in .* 20, at rows.jsonl:3"
        ):
            play(Scripted([], extra), [], context=20)


# --- templates ---


@pytest.mark.parametrize(
    ("name", "role", "says"),
    [
        ("qwen", "user", "leaves out what they think"),
        ("deepseek", "user", "opens a block of thought where an answer begins"),
        ("mistral", "user", "changes what it writes of the turns before"),
        ("gemma", "tool", "drops"),
        ("gemma", "user", None),
        ("llama", "user", None),
        ("llama", "tool", None),
        ("qwen", "tool", None),
    ],
)
def test_templates_that_cannot_append_are_refused(tmp_path, name, role, says):
    """Qwen leaves out thoughts before the last question, and keeps them while tools answer."""
    from llmpipe.data.template import choose

    choice = choose(life.TINY / "model", str(TEMPLATES / f"{name}.jinja"), {})
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    encoder = encoder_of(tmp_path / "saved", {})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    asked = (ROW["prompt"], [[{"role": role, "content": "42"}]], tools if role == "tool" else None)
    if says:
        with pytest.raises(Rejected, match=says):
            encoder.reply(*asked)
        return
    reply = encoder.reply(*asked)
    answer = {"role": "assistant", "content": "Yes."}
    before = encoder.prompt(asked[0], asked[2])
    after = encoder.prompt([*asked[0], answer, *asked[1][0]], asked[2])
    said = encoder.tokenizer.ids("Yes.")
    assert [*before, *said, reply.end, *reply.ids] == after


def test_what_learned_to_think_in_single_answers_takes_no_turns(tmp_path):
    """Its template opens the thought of the answer that begins, and writes the turns before as the
    row has them: without the tag, which the model saw."""
    from llmpipe.data.template import choose

    choice = choose(life.TINY / "model", "chatml", {}, thinks=True)
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    encoder = encoder_of(tmp_path / "saved", {})
    with pytest.raises(Rejected, match="it opens a block of thought where an answer begins"):
        encoder.reply(ROW["prompt"], [[{"role": "user", "content": "42"}]])


@pytest.mark.parametrize("name", ["qwen", "gemma", "llama", "deepseek", "mistral"])
def test_a_template_that_appends_nobodys_turn_is_refused_ahead(tmp_path, name):
    """No model is loaded, and no answer has to end first. Who appends a tool's turn alone, or a
    user's, is tried."""
    from llmpipe.data.template import choose

    choice = choose(life.TINY / "model", str(TEMPLATES / f"{name}.jinja"), {})
    choice.tokenizer.save(tmp_path / "saved", choice.template)
    if name in ("qwen", "gemma", "llama"):
        return refuse_no_reply(encoder_of(tmp_path / "saved", {}))
    changes = GRPO | {"data__template": str(TEMPLATES / f"{name}.jinja")}
    path = write(tmp_path, tmp_path / "run", **changes, model=str(life.TINY / "model"))
    with pytest.raises(UserError, match="takes turns, and the chat template cannot append") as no:
        life.command(path, only_prepare=True)
    assert no.value.code == 2


def test_a_template_that_cannot_append_ends_the_training(speaks, tmp_path):
    changes = GRPO | {"model": str(speaks / "sft" / "model")}
    changes |= {"data__template": str(TEMPLATES / "qwen.jinja"), "optim__batch_size": 64}
    path = write(speaks, tmp_path / "run", **changes)
    with pytest.raises(UserError, match=r"template cannot append a turn.* at rows.jsonl:\d+") as no:
        life.command(path)
    assert no.value.code == 2 and not Artifact(tmp_path / "run" / "grpo").finished


# --- what users get wrong ---


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("Raises", 2, "line 37: ValueError: no such thing"),
        ("Begins", 2, "line 42: ZeroDivisionError"),
        ("Exits", 2, "line 47: SystemExit: 3"),
        ("Hangs", 2, "did not return within 0.2 seconds"),
        ("Pair", 2, r"step returned \('more', 1.0\), not \(turn, reward, done\)"),
        ("NaN", 4, "step gave nan as reward"),
        ("Much", 2, "step gave 'much' as reward"),
        ("Maybe", 2, "step gave 'maybe' for done"),
        ("Silent", 2, "step gave no turn, and the episode is not done"),
        ("Policy", 2, "a turn of the assistant's"),
        ("Number", 2, "turn is a number, not a list of messages"),
        ("Beyond", 2, "step gave 10000.* as reward"),
        ("Several", 2, r"step gave tensor\(\[1., 1.\]\) as reward"),
        ("Unread", 2, "step: gave is_error of messages, which no template"),
    ],
)
def test_an_environment_that_fails(tmp_path, monkeypatch, name, code, words):
    (tmp_path / "game.py").write_text(GAME)
    monkeypatch.setattr(environment, "SECONDS", 0.2)
    environments = Environments(f"{tmp_path}/game.py:{name}", UserFiles())
    message = rf"^reward: .*game.py:{name}: .*{words}.*, at rows.jsonl:3$"
    with pytest.raises(UserError, match=message) as refused:
        game, _ = environments.begin(ROW)
        environments.step(ROW, game, "It.")
    assert refused.value.code == code and "\n" not in refused.value.message


@pytest.mark.parametrize("name", ["Raises", "Control"])
def test_both_processes_end_where_one_fails(speaks, tmp_path, name):
    path = write(speaks, tmp_path / "run", name, **GRPO, launch__processes="auto")
    for code, text in life.ranks(path):
        assert code == 2, text
        assert f"game.py:{name}: " in text and ", at rows.jsonl:" in text


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({}, {"rollout__engine": "vllm"}, "vllm draws single answers"),
        ({}, {"rollout__think": True}, "rollout.think opens a block"),
        ({"environment": "reasoning_gym/sums", "turns": 3}, {}, "turns are for an environment of"),
        ({"questions": 3}, {}, "are for an environment by name"),
        ({"environment": "./game.py"}, {}, "should match pattern"),
        ({}, {"data": {}}, "data.train: required, but missing"),
    ],
)
def test_recipes(tmp_path, source, changes, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, tmp_path / "run", source=source, **GRPO, **changes), schema("grpo"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Letter", "the file has no attribute 'Letter'; did you mean 'Letters'"),
        ("begun", "line 6: begun is no class"),
        ("Half", "line 2: Half has no method step"),
        ("Later", "line 6: Later.step is async"),
    ],
)
def test_what_a_file_tells_ahead(tmp_path, name, message):
    half = "\nclass Half:\n    def reset(self, row): ...\n"
    later = "\nclass Later:\n    async def step(self, answer): ...\n    def reset(self, row): ...\n"
    path = write(tmp_path, tmp_path / "run", name, **GRPO, model=str(life.TINY / "model"))
    if name in ("Half", "Later"):
        (tmp_path / "game.py").write_text(half + later)
    with pytest.raises(UserError, match=rf"reward.0.environment: .*game.py:{name}: {message}"):
        life.command(path)


def test_a_function_may_make_it_and_texts_are_no_conversation(speaks, tmp_path):
    rows = [{"prompt": "What is 1 + 1?", "completion": "2"}] * 3
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write(speaks, tmp_path / "run", "made", **GRPO, optim__steps=1)
    recipe = json.loads(path.read_text())
    assert life.command(path).finished
    recipe["data"]["train"] = [{"path": f"{tmp_path}/texts.jsonl", "format": "prompt-completion"}]
    path.write_text(json.dumps(recipe | {"run": str(tmp_path / "texts")}))
    with pytest.raises(UserError, match="no conversation: the environment takes turns"):
        life.command(path)
