"""Commands, processes, signals, the terminal.

Every process of llmpipe that computes comes in through here, before any library is imported: native
code is never fetched from the Hub. transformers, TRL and bitsandbytes do so through the package
`kernels` where that is installed, some of them at import and without a word; its place is taken.
"""

import sys

KERNELS = "kernels"

sys.modules[KERNELS] = None  # type: ignore[assignment]  # the import system reads it as: not here
