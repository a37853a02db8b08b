"""Batches whose rows lie end to end: the same rows in few shapes, and all that is asked of them."""

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from llmpipe import upstream
from llmpipe.training.laid import FEWEST, Counted, EndToEnd


def rows(lengths):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [
        {"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]}
        for ids in drawn
    ]


def collated(lengths, **shapes):
    """Documents of these lengths in one row."""
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    if not shapes:
        return collate(rows(lengths))
    return EndToEnd(Counted(collate), pad_token_id=0, **shapes)(rows(lengths))


def test_a_batch_is_filled_with_documents_that_teach_nothing():
    plain = collated([5, 30, 1, 17])
    batch = collated([5, 30, 1, 17], longest=32, tokens=128)
    assert batch["tokens"] == 53
    for name in ("input_ids", "labels", "position_ids"):
        assert batch[name].shape == (1, 128) and batch[name].dtype == plain[name].dtype
        assert torch.equal(batch[name][:, :53], plain[name])
    assert (batch["labels"][0, 53:] == -100).all()
    ends = batch["cu_seq_lens_q"]
    assert ends.dtype == torch.int32 and len(ends) == FEWEST
    assert ends[:8].tolist() == [0, 5, 35, 36, 53, 85, 117, 128] and (ends[8:] == 128).all()
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert starts.tolist() == ends[:7].tolist()
    assert ends.diff().max() <= batch["max_length_q"] == batch["max_length_k"] == 32
    assert "seq_idx" not in batch  # of other architectures


def test_what_predicts_is_what_learns():
    batch = collated([5, 30, 1, 17], longest=32, tokens=128)
    labels = batch["labels"][0]
    assert batch["predictors"].tolist() == [
        place - 1 for place in range(1, 128) if labels[place] != -100
    ]
    assert not set(batch["cu_seq_lens_q"].tolist()) & set((batch["predictors"] + 1).tolist())


def test_experts_are_balanced_by_what_is_real():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
        output_router_logits=True,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    upstream.speed_up(model, device_type="cpu")
    add_fused_lm_head(model, outputs=("entropy",))
    batches = (
        collated([5, 30, 1, 17]),
        collated([5, 30, 1, 17], longest=32, tokens=128, balances=True),
    )
    losses = []
    for batch in batches:
        asked = {name: batch[name] for name in batch if name not in ("tokens", "predictors")}
        out = model(**asked, fused_lm_head=True)
        losses.append(torch.stack([out.log_probs.sum(), out.aux_loss]))
    torch.testing.assert_close(losses[1], losses[0])


def test_shapes_are_few():
    shapes = {
        (len(batch["cu_seq_lens_q"]), batch["input_ids"].shape[1], batch["max_length_q"])
        for count in range(1, 60)
        for batch in [collated([2] * count, longest=8, tokens=128)]
    }
    assert shapes == {(32, 128, 8), (64, 128, 8)}
    many = collated([100], longest=2048, tokens=8192)
    assert len(many["cu_seq_lens_q"]) == 64  # as it has with 62 documents


def test_a_full_row_stays_as_it_is():
    plain = collated([16, 16])
    batch = collated([16, 16], longest=16, tokens=32)
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert batch["cu_seq_lens_q"].unique().tolist() == [0, 16, 32]


def test_padded_rows_are_counted_alone():
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    batch = EndToEnd(Counted(collate), pad_token_id=0, longest=32, tokens=128)(rows([5, 30]))
    assert batch["input_ids"].shape == (2, 30) and batch["tokens"] == 35
    assert "predictors" not in batch
