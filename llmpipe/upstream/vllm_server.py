"""`vllm serve` around one model, in the Python that has vLLM, which may be another one than
llmpipe's.

Run by its path: nothing of llmpipe is imported, but the gate that stands before every server here
and the tie to the command, each of which needs Python alone; they are loaded as files. As
`front.serve.host` does, it is told what to do by its standard input, an order and later to let
others in, and says by its standard output, as JSON, what it ends with for somebody to mend it.

The key stands in the gate, so that vLLM is given none, and no path of it but those of the gate
is anybody's: it has some that load and unload adapters, that reset caches and that show metrics.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # nobody is told
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as its own command has it
}
CACHE_ON_CPU = "VLLM_CPU_KVCACHE_SPACE"  # GB; unless told, it takes nearly all of the memory
CODE = 5  # llmpipe.errors.RESOURCES


def loaded(name: str) -> Any:
    """A module of llmpipe by its file, without the package."""
    path = PACKAGE / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"llmpipe_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(order: dict[str, Any]) -> list[str]:
    """Of `vllm serve`."""
    name, folder, base = order["name"], order["folder"], order["base"]
    asked = [base or folder, "--tokenizer", folder]
    if base:
        rank = str(loaded("upstream/vllm_reader").room_for(folder))
        asked += ["--served-model-name", f"{name}-base", "--enable-lora"]
        asked += ["--lora-modules", f"{name}={folder}", "--max-lora-rank", rank]
    else:
        asked += ["--served-model-name", name]
    if order["template_kwargs"]:
        kwargs = json.dumps(order["template_kwargs"])
        asked += ["--default-chat-template-kwargs", kwargs]
    # without a parser vLLM refuses tools; what is no call in JSON it leaves in the text
    asked += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    asked += ["--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"]
    return asked


def stand_before(order: dict[str, Any], gate: Any) -> str:
    """Make a middleware of the `gate`, a module; by which name vLLM finds it."""

    class Door:
        """The gate around vLLM's application."""

        def __init__(self, app: Any):
            self.gate = gate.Gate(app, order["key"], order["word"], "")
            threading.Thread(target=self._obey, daemon=True).start()

        def _obey(self) -> None:
            """Let others in when the command says so."""
            if sys.stdin.readline().strip() == gate.LET_IN:
                self.gate.is_open = True

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if not self.gate.precision and "app" in scope:
                config = scope["app"].state.engine_client.model_config
                self.gate.precision = str(config.dtype).removeprefix("torch.")
            await self.gate(scope, receive, send)

    module = type(sys)("llmpipe_door")
    module.Door = Door  # type: ignore[attr-defined]
    sys.modules["llmpipe_door"] = module
    return "llmpipe_door.Door"


def serve(order: dict[str, Any]) -> None:
    """Answer until a signal comes; then what has begun, as far as the time allows."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    gate = loaded("front/serve/gate")
    listening = socket.socket(fileno=order["descriptor"])
    host, port, *_ = listening.getsockname()
    asked = [*arguments(order), "--middleware", stand_before(order, gate)]
    asked += ["--host", host, "--port", str(port), "--shutdown-timeout", str(gate.GRACE)]
    if current_platform.is_cpu():
        asked += ["--enforce-eager"]  # to compile takes minutes there
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(asked)
    args.model = args.model_tag
    validate_parsed_serve_args(args)
    signal.signal(signal.SIGTERM, _interrupt)  # until the server has its own
    more = {"timeout_graceful_shutdown": gate.GRACE}
    uvloop.run(run_server_worker(f"{host}:{port}", listening, args, **more))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt  # by which vLLM ends its processes


def main() -> None:
    """Raises what is a bug."""
    report = os.dup(1)
    os.dup2(2, 1)
    order = json.loads(sys.stdin.readline())
    try:
        serve(order)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:  # whatever vLLM thinks of a model or a machine
        (first, *_) = str(error).splitlines() or [""]
        message = f"serve: vLLM does not serve it: {type(error).__name__}: {first}"
        hint = "what it printed above says more; --engine transformers takes any model"
        said = {"message": message, "hint": hint, "code": CODE}
        os.write(report, json.dumps(said).encode())
        sys.exit(CODE)


if __name__ == "__mp_main__":  # a process of vLLM's, which would outlive a server that is killed
    loaded("ties").die_with_parent()

if __name__ == "__main__":
    sys.path[0:1] = []  # the folder of this file, whose names are none of vLLM's
    loaded("ties").die_with_parent(int(os.environ["LLMPIPE_PARENT"]))
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault(CACHE_ON_CPU, "4")
    main()
