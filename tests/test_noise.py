"""What is dropped of other libraries' lines is still what they say, and nothing else is."""

import logging
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmpipe import noise


def test_silence(caplog):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise.silence()
        warnings.warn(
            "`gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning
        )
        warnings.warn("something else", FutureWarning)
    assert [str(warning.message) for warning in caught] == ["something else"]
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s", "no kernels")
    logger.warning("a line that matters")
    assert [record.getMessage() for record in caplog.records] == ["a line that matters"]


def test_canary_noise():
    for name, start in noise.NOISE.items():
        if spec := find_spec(name):  # some are of an extra
            assert start.split(": [")[0] in Path(spec.origin).read_text(), name


HEAVY = """
import sys
from llmpipe import noise
noise.silence()
assert not {"torch", "transformers"} & set(sys.modules)
from transformers.quantizers import quantizer_torchao
assert "torchao" in sys.modules
"""


@pytest.mark.skipif(not find_spec("torchao"), reason="pip install 'llmpipe[torchao]'")
def test_nothing_is_heard_of_torchao_while_it_is_imported():
    heard = subprocess.run([sys.executable, "-c", HEAVY], capture_output=True, text=True)
    assert (heard.returncode, heard.stdout, heard.stderr) == (0, "", "")
