"""`python -m llmpipe`, and `accelerate launch llmpipe` from a checkout, which runs this folder as a script."""

import sys
from pathlib import Path

if (
    not __package__
):  # python put this folder itself on sys.path; its parent is what makes `llmpipe` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llmpipe.front.cli import main

if __name__ == "__main__":
    main()
