"""One thread per test process, no Hub, nothing reported to anybody; set before any library reads it."""

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LLMPIPE_DOCSTRINGS": "1",  # the tests read them; a command reads them for `schema` alone
}
os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
