"""Writes ./texts/: the reference documentation that comes with Python itself (PSF licence), a file
per topic, half a megabyte. Something to pretrain on that needs no download.
"""

import pydoc_data.topics
from pathlib import Path

if __name__ == "__main__":
    folder = Path("texts")
    folder.mkdir(exist_ok=True)
    for name, text in sorted(pydoc_data.topics.topics.items()):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"{folder}: {len(pydoc_data.topics.topics)} documents")
