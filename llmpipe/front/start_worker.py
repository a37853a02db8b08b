"""`python -m llmpipe.front.start_worker ACTION FOLDER`: a worker, tied before anything is imported.

What it does is `llmpipe.front.worker`'s.
"""

from __future__ import annotations

import sys

from llmpipe.ties import die_with_command

if __name__ == "__main__":
    die_with_command()
    from llmpipe.front.early import wait_for_work
    from llmpipe.front.worker import main

    sys.exit(main(wait_for_work(sys.argv[1:])))
