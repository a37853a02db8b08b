"""LoRA and QLoRA: the adapter that is published is the trained one, on the base it was trained on
and on no other.
"""

import json
import shutil
import signal
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from llmpipe.errors import UserError
from llmpipe.files.json import write_json
from llmpipe.files.tables import table
from llmpipe.models.adapters import updates_of
from llmpipe.recipe.check import load
from llmpipe.recipe.places import portable
from llmpipe.recipe.sections import Adapter
from llmpipe.run.artifact import SCRATCH, Artifact
from llmpipe.run.manifest import Base
from llmpipe.run.plan import decide
from llmpipe.run.whereabouts import note
from llmpipe.stages import CHECKPOINTS, schema
from llmpipe.sums import fingerprint
from tests import life, store

KINDS = {
    "lora": {"adapter": {"rank": 4, "alpha": 8}, "optim__precision": "fp32"},
    "qlora": {
        "adapter": {"rank": 4, "alpha": 8},
        "quantization": {"bits": 4},
        "optim__precision": "bf16",
    },
}


def write(run, stage="lora", **changes):
    return life.write(
        run, **{"stage": stage, "optim__learning_rate": 1e-2, **KINDS[stage], **changes}
    )


@pytest.fixture(scope="module", params=["lora", "qlora"])
def straight(request, tmp_path_factory):
    """An adapter made without interruption."""
    return store.made(write(tmp_path_factory.mktemp(request.param) / "run", request.param))


def test_the_artifact(straight):
    manifest = straight.verify()
    assert manifest.kind == "adapter" and manifest.stage == straight.name
    assert manifest.base.reference == portable(str(life.TINY / "model"))
    assert {p.name for p in straight.model.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert manifest.final["eval_loss"] < manifest.final["eval_loss_before"]
    assert manifest.verified["max_logit_difference"] == 0
    assert manifest.verified["merged_difference"] < 1e-4
    assert ("quantized_to_merged_difference" in manifest.verified) == (straight.name == "qlora")


def test_only_the_adapter_is_trained_and_in_fp32(straight):
    import torch
    from safetensors.torch import load_file

    tensors = load_file(straight.model / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2, "A and B of seven linear layers in two blocks"
    for name, tensor in tensors.items():
        assert "lora_A" in name or "lora_B" in name
        assert tensor.dtype == torch.float32 and float(tensor.abs().max()) > 0, (
            f"{name} did not move"
        )
        assert bool((tensor != tensor.bfloat16().float()).any()), f"{name} was rounded to bf16"


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers under an old name
def test_plain_peft_loads_it_and_merging_changes_nothing(straight):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
    ids = AutoTokenizer.from_pretrained(straight.model)(
        "What colour is grass?", return_tensors="pt"
    )["input_ids"]
    model = PeftModel.from_pretrained(base, straight.model).eval()
    with torch.no_grad():
        on = model(ids).logits
        with model.disable_adapter():
            off = model(ids).logits
        assert float((on - off).abs().max()) > 1e-2
        assert float((model.merge_and_unload()(ids).logits - on).abs().max()) < 1e-4


@pytest.mark.parametrize("stage", ["lora", life.by_the_dozen("qlora")])
def test_resume_is_bitwise_the_straight_run(stage, tmp_path):
    """R1, R5: killed after a checkpoint, then told to stop inside a save."""
    whole = life.command(write(tmp_path / "whole", stage))
    path = write(tmp_path / "run", stage)
    for hook, code in (
        ("kill_after_checkpoint_3", -signal.SIGKILL),
        ("term_in_step_5", 143),
        ("term_in_save_9", 143),
    ):
        trial = life.Trial(path, hook=hook)
        assert trial.wait() == code, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


@pytest.mark.parametrize("init", ["pissa", life.by_the_dozen("olora")])
@pytest.mark.parametrize("rslora", [life.by_the_dozen(False), True])
def test_an_adapter_taken_out_of_the_base_fits_the_base_as_it_was(tmp_path, init, rslora):
    """Begins where the base is, trains other weights, and is published for the base that nobody
    touched (Meng 2024).
    """
    import torch
    from safetensors.torch import load_file

    adapter = {"rank": 4, "alpha": 8, "init": init, "rslora": rslora}
    path = write(tmp_path / "run", adapter=adapter)
    trial = life.Trial(path, hook="term_in_step_5")
    assert trial.wait() == 143, trial.text()
    made = life.command(path)
    manifest, plain = made.verify(), life.command(write(tmp_path / "plain", optim__steps=1))
    assert manifest.final["eval_loss_before"] == pytest.approx(
        plain.manifest().final["eval_loss_before"], abs=1e-5
    )
    assert manifest.final["eval_loss"] < manifest.final["eval_loss_before"] - 0.3
    assert (
        manifest.verified["max_logit_difference"] < 1e-4
        and manifest.asked.recipe["adapter"]["init"] == init
    )
    config = json.loads((made.model / "adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True
    tensors = load_file(made.model / "adapter_model.safetensors")
    deltas = [
        tensors[name.replace("lora_A", "lora_B")] @ tensor
        for name, tensor in tensors.items()
        if "lora_A" in name
    ]
    assert all(float(delta.abs().max()) > 1e-4 for delta in deltas), "every layer learned"
    ranks = {int(torch.linalg.matrix_rank(delta)) for delta in deltas}
    assert max(ranks) > 4, "the difference of two products of rank 4"
    assert life.essence(made) == life.essence(
        life.command(write(tmp_path / "whole", adapter=adapter))
    )


@pytest.mark.parametrize(
    "optimizer", [*map(life.by_the_dozen, ("adamw_8bit", "paged_adamw")), "paged_adamw_8bit"]
)
def test_optimizers_resume_exactly(tmp_path, optimizer):
    whole = life.command(write(tmp_path / "whole", optim__optimizer=optimizer))
    assert whole.manifest().final["eval_loss"] < whole.manifest().final["eval_loss_before"] - 0.3
    said = (whole.path / "log.txt").read_text()
    assert ("a CPU has nothing to page to" in said) == optimizer.startswith("paged")
    path = write(tmp_path / "run", optim__optimizer=optimizer)
    trial = life.Trial(path, hook="term_in_step_5")
    assert trial.wait() == 143, trial.text()
    assert life.essence(life.command(path)) == life.essence(whole)


def test_lora_is_sft_with_an_adapter(straight):
    """One identity: either command finds the other's work done."""
    name = straight.name
    path = straight.run.parent / "as-sft.yaml"
    path.write_text(
        json.dumps(life.recipe(straight.run, name=name, optim__learning_rate=1e-2, **KINDS[name]))
    )
    made = load(path, schema("sft"))
    assert decide(straight, made, ("model", "adapter"), CHECKPOINTS).action == "skip"


def test_adapters_on_adapters(tmp_path):
    """sft -> lora -> lora continued -> lora anew: each with the right base, each better on what it
    saw.
    """
    run = tmp_path / "run"
    life.command(life.write(run, optim__steps=4, evaluation={}))
    one = life.command(write(run, name="one", model="artifact:sft", evaluation={}))
    two = life.command(write(run, name="two", model="artifact:one", evaluation={}, optim__steps=4))
    new = {"rank": 2, "alpha": 4, "continue": False, "merge": True}
    three = life.command(
        write(run, name="three", model="artifact:two", adapter=new, evaluation={}, optim__steps=4)
    )
    bases = [artifact.verify().base for artifact in (one, two, three)]
    sft = Artifact(run / "sft").manifest().fingerprint
    identity = {"artifact": "sft", "fingerprint": sft}
    base = Base(kind="artifact", reference="artifact:sft", identity=identity, folder="../sft/model")
    assert bases[0] == bases[1] == base
    assert bases[2].kind == "merged" and bases[2].reference == "artifact:two"
    assert [a.manifest().parents[0].name for a in (one, two, three)] == ["sft", "one", "two"]

    # two starts where one ended, and three where two ended
    first = [
        json.loads((a.path / "metrics.jsonl").read_text().splitlines()[0])
        for a in (one, two, three)
    ]
    assert all("eval_loss" in line for line in first)
    for before, after in ((one, two), (two, three)):
        last = before.manifest().final["eval_loss"]
        assert after.manifest().final["eval_loss_before"] == pytest.approx(last, abs=2e-5)

    told = [
        json.loads((a.model / "adapter_config.json").read_text())["base_model_name_or_path"]
        for a in (one, two, three)
    ]
    assert told == ["artifact:sft", "artifact:sft", "artifact:two"]
    merged = Artifact(run / "three-merged")
    assert merged.verify().kind == "model"
    full = life.command(
        life.write(run, name="full", model="artifact:three", optim__steps=2, evaluation={})
    )
    assert full.manifest().final["eval_loss_before"] == pytest.approx(
        three.manifest().final["eval_loss"], abs=2e-5
    )

    # all of them can be measured; adapter and merged model say the same
    tasks = [{"task": "perplexity", "data": [{"path": str(life.TINY / "rows.jsonl")}]}]
    models = {"two": "artifact:two", "three": "artifact:three", "merged": "artifact:three-merged"}
    values = {
        "stage": "eval",
        "run": str(run),
        "models": models,
        "tasks": tasks,
        "precision": "fp32",
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(values | {"launch": {"threads": 1}}))
    measured = life.command(tmp_path / "eval.yaml")
    cells = json.loads((measured.path / "results.json").read_text())["tasks"]["perplexity"][
        "metrics"
    ]["nats_per_token"]
    assert cells["three"]["value"] == pytest.approx(cells["merged"]["value"], abs=1e-5)
    assert cells["three"]["value"] != pytest.approx(cells["two"]["value"], abs=1e-3)


LOOKED_AT = {
    "lora": {},
    "dora": {"adapter": {"rank": 4, "alpha": 8, "dora": True}},
    "rslora": {"adapter": {"rank": 4, "alpha": 8, "rslora": True}},
    "embeddings": {"adapter": {"rank": 4, "alpha": 8, "embeddings": "all"}},
    "new tokens": {"data__template": "chatml"},
}


@pytest.mark.parametrize(
    "kind",
    [kind if kind in ("lora", "new tokens") else life.by_the_dozen(kind) for kind in LOOKED_AT],
)
def test_one_that_is_looked_at_in_fp32_is_merged_and_answers_the_same(tmp_path, kind):
    """Greedily, to each of a hundred prompts, text for text."""
    import torch

    from llmpipe.models.adapters import on_base
    from llmpipe.models.drawing.draw import Sampling
    from llmpipe.models.generate import generate
    from llmpipe.models.load import load_any
    from llmpipe.models.pretrained import load_model, load_tokenizer

    made = store.made(write(tmp_path / "run", evaluation={}, **LOOKED_AT[kind]))
    base, tokenizer = life.TINY / "model", load_tokenizer(made.model)
    merged = load_any(made.model, base, tokenizer, bf16=False)
    assert not any("lora" in name for name, _ in merged.named_modules())
    apart = on_base(load_model(base), made.model, tokenizer).eval()
    rows = [json.loads(line) for line in (life.TINY / "rows.jsonl").read_text().splitlines()]
    asked = [turns["messages"][0]["content"] for turns in rows]
    asked = [f"{prompt} {more}".strip() for prompt in asked for more in ("", "Say why.")][:100]
    prompts = [tokenizer(prompt)["input_ids"] for prompt in asked]
    assert len(prompts) == 100
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        logits = [model(ids).logits for model in (merged, apart, load_model(base))]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-4
    if kind != "new tokens":  # for which the base has no rows
        assert float((logits[1] - logits[2]).abs().max()) > 1e-2
    sampling = Sampling(max_new_tokens=12)
    texts = [
        [response.text for response in generate(model, tokenizer, prompts, sampling)]
        for model in (merged, apart)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 5, "one that answers all alike proves little"

    in_bf16 = load_any(made.model, base, tokenizer, bf16=True)
    assert any("lora" in name for name, _ in in_bf16.named_modules()), "a sum would be rounded"


def test_a_quantized_base_takes_no_update(tmp_path):
    import torch

    from llmpipe.models.adapters import load_frozen, merged, on_base
    from llmpipe.models.pretrained import load_tokenizer
    from llmpipe.recipe.sections import Quantization

    made = store.made(write(tmp_path / "run", evaluation={}))
    base = load_frozen(life.TINY / "model", Quantization(bits=4), torch.bfloat16)
    adapted = on_base(base, made.model, load_tokenizer(made.model))
    assert merged(adapted) is adapted


@pytest.mark.parametrize(
    ("begun", "wanted", "words"),
    [
        ({}, {"rank": 8}, "rank 4 there, 8 in the recipe"),
        (
            {},
            {"targets": ["q_proj"]},
            r"targets \['down_proj', .*\] there, \['q_proj'\] in the recipe",
        ),
        ({"targets": ["q_proj"]}, {}, r"targets \['q_proj'\] there, all-linear in the recipe"),
        ({}, {"embeddings": "all"}, "embeddings new there, all in the recipe"),
        ({"targets": ["q_proj"]}, {"targets": ["q_proj"]}, ""),
    ],
)
def test_another_shape_than_the_adapters_own_is_refused(tmp_path, begun, wanted, words):
    run, same = tmp_path / "run", {"rank": 4, "alpha": 8}
    life.command(write(run, adapter=same | begun, optim__steps=1, evaluation={}))
    path = write(
        run, name="b", model="artifact:lora", adapter=same | wanted, optim__steps=1, evaluation={}
    )
    if words == "":
        assert life.command(path).finished
        return
    with pytest.raises(UserError, match=words) as refused:
        life.command(path)
    assert refused.value.code == 3


def test_an_adapter_without_a_manifest_is_refused(tmp_path):
    run = tmp_path / "run"
    adapter = life.command(write(run, optim__steps=1, evaluation={}))
    shutil.copytree(adapter.model, tmp_path / "alone")
    with pytest.raises(UserError, match="whose base no manifest names") as refused:
        life.command(
            write(run, name="b", model=str(tmp_path / "alone"), optim__steps=1, evaluation={})
        )
    assert refused.value.code == 3


def test_fresh_takes_the_merged_model_along(tmp_path):
    run = tmp_path / "run"
    path = write(run, adapter={"rank": 4, "alpha": 8, "merge": True}, optim__steps=1, evaluation={})
    life.command(path)
    before = Artifact(run / "lora-merged").verify().fingerprint
    life.command(path, ["seed=9"], fresh=True)
    assert Artifact(run / "lora-merged.old-1").verify().fingerprint == before
    assert Artifact(run / "lora-merged").verify().merged_from == "lora"


def test_what_became_of_the_merged_model_is_said(tmp_path, capsys):
    """The same command, once there is nothing more to do for the adapter itself."""
    path = write(
        tmp_path / "run",
        adapter={"rank": 4, "alpha": 8, "merge": True},
        optim__steps=1,
        evaluation={},
    )
    merged = life.command(path).merged
    life.command(path)
    assert "skip: finished, same recipe and inputs\n" in capsys.readouterr().out
    config = (merged.model / "config.json").read_text()
    for hurt, named in (
        (lambda: (merged.model / "config.json").write_text(config + " "), "model/config.json: "),
        (lambda: (merged.path / "manifest.json").unlink(), "manifest.json: missing"),
    ):
        hurt()
        with pytest.raises(UserError) as refused:
            life.command(path)
        assert refused.value.code == 3
        assert str(refused.value).startswith(f"{merged.path}/{named}")
    shutil.rmtree(merged.path)
    life.command(path)
    assert f"same recipe and inputs; {merged.path} is gone" in capsys.readouterr().out


def publish_wrongly(adapter, hurt):
    """As if the adapter had been published with a tensor `missing`, or `renamed`."""
    from safetensors.torch import load_file, save_file

    file = adapter.model / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if "layers.0" in name)
    tensor = tensors.pop(name)
    save_file(
        tensors | ({name.replace("layers.0", "layers.9"): tensor} if hurt == "renamed" else {}),
        file,
    )
    manifest = adapter.document() | {"files": table(adapter.path, SCRATCH | {"checkpoints"})}
    write_json(adapter.path / "manifest.json", manifest | {"fingerprint": fingerprint(manifest)})


def other_weights(folder):
    """The same shape and tokenizer, other numbers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


@pytest.mark.parametrize("hurt", ["weights", "tokenizer", "missing", "renamed"])
def test_another_base_is_refused(tmp_path, hurt):
    """R12: exit 3, both values shown; a wrong adapter file as well. That this machine has seen the
    same base elsewhere is no excuse.
    """
    shutil.copytree(life.TINY / "model", tmp_path / "base")
    path = write(tmp_path / "run", model=str(tmp_path / "base"), optim__steps=1, evaluation={})
    adapter = life.command(path)
    note(adapter.manifest().base.identity, life.TINY / "model")
    if hurt == "weights":
        other_weights(tmp_path / "base")
    elif hurt == "tokenizer":
        (tmp_path / "base" / "tokenizer_config.json").write_text("{}")
    else:
        publish_wrongly(adapter, hurt)
    with pytest.raises(UserError) as refused:
        life.command(
            write(
                tmp_path / "run", name="next", model="artifact:lora", optim__steps=1, evaluation={}
            )
        )
    assert refused.value.code == 3, refused.value
    words = {
        "weights": "not the one it was trained on",
        "tokenizer": "not the one it was trained on",
        "missing": "is missing",
        "renamed": "layers.",
    }
    assert words[hurt] in str(refused.value)


def test_new_tokens_get_trained_embeddings(tmp_path):
    """A base model without a template: its markers are added, their embeddings learned, and all is
    there again.
    """
    import torch
    from safetensors.torch import load_file

    shutil.copytree(life.TINY / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    path = write(
        tmp_path / "run",
        model=str(tmp_path / "base"),
        data__template="llama3",
        data__max_length=128,
        adapter={"rank": 4, "merge": True},
        evaluation={},
    )
    adapter = life.command(path)
    added = adapter.manifest().data.added_tokens
    names = [
        name for name in load_file(adapter.model / "adapter_model.safetensors") if "token" in name
    ]
    assert len(added) >= 3 and len(names) >= 1
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "lora-merged" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "lora-merged" / "model")
    rows = merged.get_input_embeddings().weight
    assert rows.shape[0] >= len(tokenizer)
    assert all(
        bool(torch.isfinite(rows[tokenizer.convert_tokens_to_ids(token)]).all()) for token in added
    )


def test_embeddings_that_learn_apart_from_their_head(tmp_path):
    """It is said in a line of ours, and the merged model has both."""
    import torch
    from transformers import AutoModelForCausalLM

    adapter = {"rank": 2, "embeddings": "all", "merge": True}
    made = life.command(write(tmp_path / "run", adapter=adapter, optim__steps=2, evaluation={}))
    assert "learn apart from it" in (made.path / "log.txt").read_text()
    merged = AutoModelForCausalLM.from_pretrained(made.merged.model)
    base = AutoModelForCausalLM.from_pretrained(life.TINY / "model")
    rows = merged.get_input_embeddings().weight
    assert base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert not torch.equal(rows, merged.get_output_embeddings().weight)
    assert not torch.equal(rows, base.get_input_embeddings().weight)


def longer_tokenizer(folder):
    """The tiny model with three tokens that its embeddings have no rows for."""
    import tokenizers

    shutil.copytree(life.TINY / "model", folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<|one|>", "<|two|>", "<|three|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return range(rows, rows + 3)


def rows_in(adapter):
    """The embeddings that an adapter brings along."""
    from safetensors.torch import load_file

    tensors = load_file(adapter.model / "adapter_model.safetensors")
    (name,) = [name for name in tensors if "token" in name]
    return tensors[name]


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT asks transformers under an old name
def test_rows_that_the_base_lacked_are_published_with_the_adapter(tmp_path, monkeypatch):
    """A stranger draws other rows for them, or PEFT fails with an IndexError."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    made = longer_tokenizer(tmp_path / "base")
    monkeypatch.chdir(tmp_path)  # PEFT looks for a base from there
    shared = {"model": "./base", "evaluation": {}, "optim__steps": 4}
    adapter = {"rank": 4, "merge": True}
    learned = life.command(write(tmp_path / "run", name="learned", adapter=adapter, **shared))
    adapter = {"rank": 4, "embeddings": "none"}
    kept = life.command(write(tmp_path / "run", name="kept", adapter=adapter, **shared))

    config = json.loads((kept.model / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == list(made)
    torch.manual_seed(0)  # as `resize_embeddings` does
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(made.stop, mean_resizing=True)
    drawn = base.get_input_embeddings().weight[made.start :]
    assert torch.equal(rows_in(kept), drawn)
    assert not torch.isclose(rows_in(learned), drawn).all(1).any(), "every row learned"

    ids = torch.tensor([[*made, 5, 6, 7]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "learned-merged" / "model")
    with torch.no_grad():
        expected = merged(ids).logits
        for seed in (7, 8):
            torch.manual_seed(seed)
            stranger = AutoPeftModelForCausalLM.from_pretrained(learned.model).eval()
            assert float((stranger(ids).logits - expected).abs().max()) < 1e-4


def test_rows_that_are_not_saved_are_seen_when_it_is_verified(tmp_path, monkeypatch):
    from llmpipe.models import adapters

    longer_tokenizer(tmp_path / "base")
    monkeypatch.setattr(adapters, "_trained_embeddings", lambda *_: {})
    with pytest.raises(UserError, match=r"differ by .* after reloading") as refused:
        life.command(
            write(tmp_path / "run", model=str(tmp_path / "base"), evaluation={}, optim__steps=1)
        )
    assert refused.value.code == 3


def test_an_adapter_that_was_begun_without_new_tokens_cannot_take_them_up(tmp_path):
    run, texts = tmp_path / "run", tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Grass is green."}\n{"text": "Snow is white."}\n')
    shutil.copytree(life.TINY / "model", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    shared = {"evaluation": {}, "optim__steps": 2, "data__eval": {}}
    life.command(
        write(run, model=str(tmp_path / "base"), data__train=[{"path": str(texts)}], **shared)
    )
    path = write(
        run,
        name="b",
        model="artifact:lora",
        data__template="llama3",
        data__max_length=128,
        **shared,
    )
    with pytest.raises(UserError, match=r"tokens are new.*\n.*adapter.continue: false") as refused:
        life.command(path)
    assert refused.value.code == 2


def test_the_manifest_knows_the_way_to_a_base_that_only_the_run_has_a_name_for(tmp_path, straight):
    assert straight.manifest().base.folder is None, "its reference can be followed"
    run = tmp_path / "run"
    life.command(life.write(run, optim__steps=2, evaluation={}))
    life.command(write(run, name="one", model="artifact:sft", evaluation={}, optim__steps=2))
    new = {"rank": 2, "alpha": 4, "continue": False}
    two = life.command(
        write(run, name="two", model="artifact:one", adapter=new, evaluation={}, optim__steps=2)
    )
    run.rename(tmp_path / "moved")
    for name, base in (("one", "sft/model"), ("two", None)):
        artifact = Artifact(tmp_path / "moved" / name)
        folder = (artifact.path / artifact.manifest().base.folder).resolve()
        assert (folder / "config.json").exists()
        assert base is None or folder == (tmp_path / "moved" / base).resolve()
    said = (tmp_path / "moved" / two.name / "log.txt").read_text()
    assert "for PEFT its base is ../.prepared/merged-" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": None}, "adapter"),
        ({"adapter": {"rank": 0}}, "adapter.rank"),
        ({"adapter": {"rnak": 4}}, "did you mean 'rank'?"),
        ({"adapter": {"contineu": True}}, "did you mean 'continue'?"),
        ({"quantization": {"bits": 3}}, "quantization.bits"),
    ],
)
def test_recipes(tmp_path, changes, message):
    with pytest.raises(UserError) as refused:
        load(write(tmp_path / "run", **changes), schema("lora"))
    assert message in str(refused.value)
    with pytest.raises(UserError, match="add `adapter:`"):
        load(life.write(tmp_path / "run", quantization={"bits": 4}), schema("sft"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qproj", r"no linear layer is called qproj; did you mean 'q_proj'\?.* up_proj, v_proj"),
        ("embed_tokens", "no linear layer is called embed_tokens"),
        ("norm", "no linear layer is called norm"),
    ],
)
def test_no_linear_layer_has_the_name(tmp_path, name, words):
    """Nor is one passed over beside another that is there: PEFT says nothing of it then."""
    with pytest.raises(UserError, match=words) as refused:
        life.command(write(tmp_path / "run", adapter={"targets": ["v_proj", name]}))
    assert refused.value.code == 2


def test_a_name_of_several_parts_is_of_the_layers_that_end_so():
    layers = [f"layers.{i}.attn.{name}" for i in (0, 1) for name in ("q", "k")]
    for targets, of in ((["attn.q"], [0, 2]), (["1.attn.k", "q"], [0, 2, 3])):
        adapter = Adapter(targets=targets)
        adapter.check_targets(layers)
        assert [i for i, layer in enumerate(layers) if adapter.is_on(layer)] == of


def test_what_an_adapter_adds_is_known_of_every_weight():
    """Of experts as well, whose weights are no layers'."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    base = AutoModelForCausalLM.from_config(config)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    adapter = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):  # of PEFT's own patterns for experts
        model = get_peft_model(base, adapter)
    updates = updates_of(model)
    after = model.merge_and_unload().state_dict()
    sums = {name: (after[name] - before[name]).bfloat16() for name in before}
    assert updates.keys() == {name for name, difference in sums.items() if difference.any()}
    assert {name.rpartition(".")[2] for name in updates} >= {"gate_up_proj", "down_proj"}
    assert all(torch.equal(update, sums[name]) for name, update in updates.items())
