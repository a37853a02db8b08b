"""The trainer underneath is TRL's: the losses of the bare SFTTrainer, the same for every way to
cut a batch."""

import json

import pytest
import torch

from tests import life

STEPS = 10


def losses(artifact):
    lines = map(json.loads, (artifact.path / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def bare_trl(folder, dataset, packing):
    """`_bare_trl` in a process of its own, since llmpipe has changed TRL's head in this one."""
    folder.mkdir()
    dataset.save_to_disk(folder / "rows")
    process = life.forked(_bare_trl, str(folder), packing)
    process.join(120)
    return json.loads((folder / "losses.json").read_text())


def _bare_trl(folder, packing):
    """The losses of `STEPS` steps of TRL's SFTTrainer as it comes: its attention, its head, its
    loop."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0,  # whose first step would learn nothing
        max_steps=STEPS,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        seed=42,
        data_seed=42,
        gradient_checkpointing=False,
        max_length=128,
        packing=packing,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": torch.float32},
        dataset_kwargs={"skip_prepare_dataset": packing},
    )
    trainer = SFTTrainer(
        str(life.TINY / "model"),
        args=arguments,
        train_dataset=load_from_disk(f"{folder}/rows"),
        processing_class=AutoTokenizer.from_pretrained(life.TINY / "model"),
    )
    trainer.train()
    with open(f"{folder}/losses.json", "w") as file:
        json.dump([line["loss"] for line in trainer.state.log_history if "loss" in line], file)


def rows_for_trl():
    """The tiny rows as prompt and completion text: the one form in which TRL supervises the end
    of a turn by itself."""
    rows = [json.loads(line) for line in (life.TINY / "rows.jsonl").read_text().splitlines()]
    out = []
    for row in rows:
        *before, last = row["messages"]
        if (
            all(m["role"] in ("user", "assistant", "system") for m in before)
            and last["role"] == "assistant"
        ):
            prompt = "".join(f"{m['role']}: {m['content']}\n" for m in before) + "assistant:"
            out.append({"prompt": prompt, "completion": " " + last["content"]})
    return out


@pytest.mark.parametrize("packing", [False, True])
def test_losses_equal_bare_trl(tmp_path, packing):
    """Unpacked, TRL tokenizes by itself; packed, it gets our sequences, since it breaks ties of
    length at random."""
    from datasets import Dataset

    rows = rows_for_trl()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = life.command(
        life.write(
            tmp_path / "run",
            data={"train": [{"path": str(path)}], "max_length": 128, "packing": packing},
            evaluation={},
            optim__steps=STEPS,
            optim__warmup=0,
            log__every=1,
            launch__micro_batch_size=4,
            samples={},
        )
    )
    theirs = Dataset.from_list(rows)
    if packing:
        theirs = Dataset.from_file(
            str(next((tmp_path / "run" / ".prepared").glob("*/train.arrow")))
        )
    assert losses(mine) == pytest.approx(bare_trl(tmp_path / "trl", theirs, packing), abs=1e-4)


def probe_logits(artifact):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact.model).eval()
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("packing", [life.by_the_dozen(False), True])
def test_batch_cut_any_way_is_one_trajectory(tmp_path, packing):
    """8x1 = 4x2 = 1x8: losses and probe logits within 1e-4 after ten steps."""
    settings = {
        "optim__batch_size": 8,
        "optim__steps": STEPS,
        "log__every": 1,
        "data__packing": packing,
        "evaluation": {},
    }
    made = [
        life.command(
            life.write(tmp_path / f"run{micro}", **settings, launch__micro_batch_size=micro)
        )
        for micro in (8, 4, 1)
    ]
    logits = [probe_logits(artifact) for artifact in made]
    for artifact, found in zip(made[1:], logits[1:], strict=True):
        assert losses(artifact) == pytest.approx(losses(made[0]), abs=1e-4)
        assert (found - logits[0]).abs().max() < 1e-4
        assert abs(float((found - logits[0]).mean())) < 1e-5


def test_two_processes_are_the_same_trajectory(tmp_path):
    from tests.front.test_processes import PYTHON, run

    settings = {"optim__batch_size": 8, "optim__steps": STEPS, "log__every": 1, "evaluation": {}}
    one = life.command(life.write(tmp_path / "one", **settings, launch__micro_batch_size=8))
    path = life.write(tmp_path / "two", **settings, launch__micro_batch_size=4, launch__processes=2)
    code, out = run([*PYTHON, "sft", str(path)])
    assert code == 0, out
    two = type(one)(tmp_path / "two" / "sft")
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    assert (probe_logits(two) - probe_logits(one)).abs().max() < 1e-4


ADAPTER = {"stage": "lora", "adapter": {"rank": 4, "alpha": 8, "dropout": 0.5}}


KINDS = {False: "none", "auto": "none", "none": "none", "selective": "selective"}
KINDS |= {"full": "full", True: "full"}
"""What is used for what a recipe says: true is `full`, false `none`."""
FEW = ("none", "selective", "full")


@pytest.mark.parametrize(
    ("changes", "kinds"), [({}, tuple(KINDS)), (ADAPTER, FEW)], ids=["sft", "lora"]
)
def test_activation_checkpointing_changes_nothing(tmp_path, changes, kinds):
    """Bit by bit, also where something is dropped at random."""
    same = {"optim__steps": 4, "log__every": 1} | changes
    made = [
        life.command(
            life.write(tmp_path / f"run{i}", **same, launch__activation_checkpointing=kind)
        )
        for i, kind in enumerate(kinds)
    ]
    essences = [life.essence(artifact) for artifact in made]
    assert all(essence == essences[0] for essence in essences)
    used = [artifact.manifest().hardware["activation_checkpointing"] for artifact in made]
    assert used == [KINDS[kind] for kind in kinds]
