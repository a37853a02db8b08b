"""Put a fault of tests/hooks.py into one rank of a real process tree: FAULT="1 kill_now".

Python imports this when the folder is on its path, before all else.
"""

import os

_rank, _, _hook = os.environ.get("FAULT", "").partition(" ")
if _rank == os.environ.get("RANK", "no rank"):
    import tests.hooks

    getattr(tests.hooks, _hook)()
