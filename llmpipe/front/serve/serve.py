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
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from llmpipe import screen
from llmpipe.errors import Say, UserError
from llmpipe.front.serve.agree import agree
from llmpipe.front.serve.named import Address, Served, key_in, served
from llmpipe.front.serve.server import running

PACKAGES = ("fastapi", "openai", "uvicorn")
"""What the server of transformers needs."""

OF_LLAMA_CPP = ("llama_cpp", "fastapi", "pydantic_settings", "sse_starlette", "starlette_context")
"""What that of llama-cpp-python needs."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    artifact: str
    host: str
    port: int
    api_key_from: str | None
    """The variable of the environment that holds the key."""


def serve(asked: Asked, say: Say) -> int:
    """Serve an artifact until a signal ends it; the exit code of that. Raises UserError."""
    key = key_in(asked.api_key_from)
    with TemporaryDirectory() as converted, Address(asked.host, asked.port) as address:
        model = served(asked.artifact, Path(converted), say)
        refuse_missing(model)
        if not key and not address.is_local:
            say(f"warning: whoever reaches {address.host} may ask: --api-key-from sets a key")
        with running(model, address, key) as server:
            with screen.doing(f"loading {model.name}"):
                precision = server.answers()
            with screen.doing("asking the questions of the probe"):
                agreed = agree(server.line, model, precision)
            say(f"probe: {precision}: {agreed}")
            server.let_in()
            say(f"{model.name}: ready at {address.url}/v1")
            return server.wait(say)


def refuse_missing(model: Served) -> None:
    """Raise UserError (2) where a package is not installed that the server needs."""
    packages = OF_LLAMA_CPP if model.gguf else PACKAGES
    extra = "llmpipe[serve,gguf]" if model.gguf else "llmpipe[serve]"
    if missing := [name for name in packages if not find_spec(name)]:
        problem = f"serve: needs {', '.join(missing)}, which {'are' if missing[1:] else 'is'} not"
        raise UserError(f"{problem} installed here", f"pip install '{extra}'")
