"""Operations that training takes, and that a GPU has a second."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

# 1e12 dense bf16 operations a second, by the data sheets; the first name that fits counts
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
    "4090": 165,
}


def peak_flops() -> float | None:
    """Dense bf16 operations per second of this GPU by its maker's data sheet, where it is known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def flops_per_token(model: PreTrainedModel, context: int) -> float:
    """Operations that a token costs in training (Chowdhery 2022, appendix B).

    2 per weight forward, 2 for the gradient of what it multiplies, 2 for its own where it is
    trained, and 12 x layers x width x context for the attention.
    """
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = head is not None and embeddings.weight is head.weight
    looked_up = 0 if tied else embeddings.weight.numel()  # untied embeddings multiply nothing
    multiplied = model.num_parameters() - looked_up
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = 12 * config.num_hidden_layers * config.hidden_size * context
    return float(4 * multiplied + 2 * trained + attention)
