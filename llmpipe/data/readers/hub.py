"""A data set of the Hugging Face Hub. The number of a row counts from 1."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from urllib.parse import urlsplit

from llmpipe.data.readers.row import Reading, Row
from llmpipe.errors import DATA, UserError
from llmpipe.faults import misread
from llmpipe.recipe.places import nearest_here
from llmpipe.recipe.sections import Rows


def hub_key(source: Rows) -> str:
    """What a Hub data set's commit is kept under."""
    return f"{source.path}@{source.revision or ''}"


def hub_revision(source: Rows) -> str:
    """The commit that a Hub data set's revision means.

    Raises UserError, and at once where there is no network.
    """
    name = source.path
    near = nearest_here(name)
    hint = f"did you mean {near}?" if near else "a local path starts with ./"
    if kept_offline():
        raise UserError(f"{name}: is a Hub data set, and HF_HUB_OFFLINE is set", hint)
    if not is_reachable():
        raise UserError(f"{name}: is a Hub data set, and the Hub cannot be reached", hint)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = huggingface_hub.HfApi()
    try:
        commit: str = api.dataset_info(name, revision=source.revision, timeout=30).sha
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise misread(error, name, "a data set of the Hub", hint, DATA) from None
    return commit


def read(source: Rows, revision: str | None, stream: bool) -> Reading:
    """The rows, downloaded once and memory-mapped by `datasets`, or streamed. Raises UserError."""
    import datasets

    try:
        rows = datasets.load_dataset(
            source.path,
            source.subset,
            split=source.split or "train",
            revision=revision,
            streaming=stream,
        )
        for number, columns in enumerate(rows, 1):
            yield Row(number, columns), 0
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = "see subset, split and revision"
        raise misread(error, source.path, hint=hint, code=DATA) from None


def kept_offline() -> bool:
    """Whether the environment says not to ask the Hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in names)


def is_reachable(seconds: float = 1.5) -> bool:
    """Whether a connection to the Hub, or to the proxy in front of it, can be opened.

    Looking up a name has no time limit of its own, so this waits for a thread.
    """
    from urllib.request import getproxies, proxy_bypass  # slow to import

    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    opened = threading.Event()

    def connect() -> None:
        port = url.port or {"https": 443, "http": 80}.get(url.scheme, 1080)
        with socket.create_connection((url.hostname, port), seconds):
            opened.set()

    def try_to_connect() -> None:
        with contextlib.suppress(OSError):
            connect()

    thread = threading.Thread(target=try_to_connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return opened.is_set()
