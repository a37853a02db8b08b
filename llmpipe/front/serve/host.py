"""`python -m llmpipe.front.serve.host`: the process in which the server runs.

It is told what to do by its standard input: an `Order`, and later to let others in. What it ends
with for somebody to mend it says by its standard output, as JSON; all that libraries print goes to
standard error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmpipe import noise
from llmpipe.ties import PARENT, die_with_parent

if TYPE_CHECKING:
    from llmpipe.front.serve.gate import Gate
    from llmpipe.front.serve.server import Order


def main() -> int:
    """The exit code."""
    report = os.dup(1)
    os.dup2(2, 1)
    from llmpipe.errors import DONE, UserError
    from llmpipe.faults import of_machine
    from llmpipe.front.serve.server import Order

    order = Order(**json.loads(sys.stdin.readline()))
    try:
        _serve(order)
    except Exception as error:
        fault = error if isinstance(error, UserError) else of_machine(error)
        if fault is None:
            raise
        said = {"message": fault.message, "hint": fault.hint, "code": fault.code}
        os.write(report, json.dumps(said).encode())
        return fault.code
    return DONE


def _serve(order: Order) -> None:
    """Answer until a signal comes; then what has begun, as far as `GRACE` allows."""
    import uvicorn

    from llmpipe.front.serve.gate import GRACE, Gate

    app, precision = application(order)
    gate = Gate(app, order.key, order.word, precision)
    threading.Thread(target=_obey, args=(gate,), daemon=True).start()
    config = uvicorn.Config(
        gate,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=order.descriptor)])


def _obey(gate: Gate) -> None:
    """Let others in when the command says so."""
    from llmpipe.front.serve.gate import LET_IN

    if sys.stdin.readline().strip() == LET_IN:
        gate.is_open = True


def application(order: Order) -> tuple[Any, str]:
    """What answers, and what it computes in. Raises UserError."""
    return _of_llama_cpp(order) if order.gguf else _of_transformers(order)


def _of_llama_cpp(order: Order) -> tuple[Any, str]:
    """The application of llama-cpp-python's server, and what its keys and values are."""
    from llmpipe.errors import INTEGRITY, UserError
    from llmpipe.run.gguf import check_gguf
    from llmpipe.run.machine import gpus
    from llmpipe.upstream import llama_cpp_server

    file = Path(order.gguf or "")
    try:
        app = llama_cpp_server.application(
            file=str(file),
            name=order.name,
            template_kwargs=order.template_kwargs,
            context=check_gguf(file).context,
            on_gpu=bool(gpus()),
        )
    except (ValueError, RuntimeError) as error:
        problem = f"serve: {file}: llama.cpp does not load it: {error}"
        raise UserError(problem, code=INTEGRITY) from None
    return app, "float16"


def _of_transformers(order: Order) -> tuple[Any, str]:
    """The application of `transformers serve` around the artifact, loaded as `chat` loads it, and
    what it computes in. Raises UserError."""
    from transformers.utils import logging

    noise.silence()
    logging.set_verbosity_error()  # a line for each request
    logging.disable_progress_bar()
    from llmpipe.models.device import has_bf16
    from llmpipe.models.load import load_any
    from llmpipe.models.pretrained import load_tokenizer
    from llmpipe.upstream.serving import Terms, application

    folder = Path(order.folder)
    base = Path(order.base) if order.base else None
    tokenizer = load_tokenizer(folder)
    model = load_any(folder, base, tokenizer, bf16=has_bf16(), alone=True)
    terms = Terms(order.name, order.template_kwargs, order.stops, order.writes_calls)
    precision = str(next(model.parameters()).dtype).removeprefix("torch.")
    return application(model, tokenizer, terms), precision


if __name__ == "__main__":
    die_with_parent(int(os.environ[PARENT]))
    sys.exit(main())
