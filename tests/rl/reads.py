"""A double for a GPU's host reads: what makes the host wait for a tensor's values there."""

import sys
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# what attends on a CPU, where lengths are read for nothing; a GPU attends without a mask
ON_A_CPU = {"documents_mask", "documents_attention", "attend_documents"}
ON_ANY = {"shuffled"}  # what is on the CPU everywhere
METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}
OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "_unique2",
    "unique_consecutive",
}


def on_the_host() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in ON_A_CPU | ON_ANY:
            return True
        frame = frame.f_back
    return False


class Methods(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in METHODS and not on_the_host():
            self.reads.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._schema.name.removeprefix("aten::")
        picks = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if (name in OPERATORS or picks) and not on_the_host():
            self.reads.append(name)
        return operator(*args, **(kwargs or {}))


@contextmanager
def counted():
    """What the host reads meanwhile, by name."""
    reads: list[str] = []
    with Operators(reads), Methods(reads):
        yield reads
