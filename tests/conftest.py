"""One thread per test process, no Hub, nothing reported to anybody; set before any library reads
it."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LLMPIPE_DOCSTRINGS": "1",  # the tests read them; a command reads them for `schema` alone
}
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
if "LLMPIPE_TESTS_WITH_GPU" not in os.environ:
    # Tests compare the bits that a CPU computes, time what it does, and have doubles for GPUs: with
    # a real one they would try something else. `make gpu PARTS=tests` runs those that are for it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# What a power cut would take no test can see, and a third of a run's seconds here would go by
# waiting for the disk. tests/files/test_writing.py holds what is synced; real processes sync, too.
os.fsync = lambda descriptor: None

# A shell that starts something in the background lets it ignore SIGINT, and so its children do.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# how long an example takes is the machine's affair, which may have other work
settings.register_profile("anywhere", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("anywhere")


@pytest.fixture(scope="session", autouse=True)
def store(tmp_path_factory):
    """One folder for all processes of this run of the suite; see tests/store.py."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"
    home.mkdir(exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    os.environ["LLMPIPE_TEST_STORE"] = str(home)
