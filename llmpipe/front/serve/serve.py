"""`llmpipe serve ARTIFACT`, from top to bottom.

1. The artifact is verified, every file by its sha256, and so is what lies under an adapter.
2. The address is taken, before anything is loaded.
3. The server loads the model, in a process that ends with this one.
4. It is asked the questions of the probe by its own interface, and is refused where it answers
   otherwise than the model did when it was published.
5. Others are let in, until a signal comes: what has begun is answered, as far as time allows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmpipe import screen
from llmpipe.errors import Say
from llmpipe.front.serve.agree import agree
from llmpipe.front.serve.engines import engine_for
from llmpipe.front.serve.named import Address, key_in, served
from llmpipe.front.serve.server import running


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    artifact: str
    engine: str
    """`auto`, or a name of `engines`."""
    host: str
    port: int
    api_key_from: str | None
    """The variable of the environment that holds the key."""


def serve(asked: Asked, say: Say) -> int:
    """Serve an artifact until a signal ends it; the exit code of that. Raises UserError."""
    key = key_in(asked.api_key_from)
    with TemporaryDirectory() as converted, Address(asked.host, asked.port) as address:
        model = served(asked.artifact, Path(converted), say)
        engine = engine_for(model, asked.engine)
        if not key and not address.is_local:
            say(f"warning: whoever reaches {address.host} may ask: --api-key-from sets a key")
        with running(model, engine, address, key, asked.api_key_from) as server:
            with screen.doing(f"loading {model.name}"):
                precision = server.answers()
            with screen.doing("asking the questions of the probe"):
                agreed = agree(server.line, model, precision)
            model.tell_context(say)
            numbers = precision if model.rounded == "fp32" else f"{model.rounded} in {precision}"
            say(f"probe: {engine.name}, {numbers}: {agreed}")
            server.let_in()
            say(f"{model.name}: ready at {address.url}/v1")
            return server.wait(say)
