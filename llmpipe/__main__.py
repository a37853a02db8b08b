"""`python -m llmpipe`, and `accelerate launch llmpipe` from a checkout, which runs this folder."""

import sys
from pathlib import Path

# run as a script: python put this folder itself on sys.path; its parent makes `llmpipe` importable
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from llmpipe.front.cli import main

if __name__ == "__main__":
    main()
