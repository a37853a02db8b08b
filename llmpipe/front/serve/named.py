"""What the command line of `serve` names: an artifact, the variable of a key, an address."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from llmpipe import screen
from llmpipe.data.tokenizer import own_template
from llmpipe.errors import INTEGRITY, RESOURCES, Say, UserError
from llmpipe.files.json import read_json
from llmpipe.front.readable import make_readable
from llmpipe.recipe.names import ARTIFACT
from llmpipe.run.artifact import Artifact, is_artifact
from llmpipe.run.exported import Exported, exported
from llmpipe.run.gguf import check_gguf
from llmpipe.run.manifest import Manifest
from llmpipe.run.probe import Probe
from llmpipe.run.reference import Model, Use, model_folder, resolve

EVERYWHERE = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}
"""Addresses that stand for every one of a machine, and where it reaches itself."""

CALL = re.compile(r'<tool_call>\s*\{"name": "get_weather"')
"""As a template writes that of the question of the probe which holds one."""

LOCAL = ("127.", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A verified model, and what it said when it was published."""

    name: str
    """By which clients ask for it."""
    folder: Path
    """Of the model, of the adapter, whose tokenizer is the one of training, or of the file."""
    base: Path | None
    """What lies under the adapter."""
    gguf: Path | None = None
    """The file for llama.cpp, which has its tokenizer."""
    rounded: str = "fp32"
    """To which kind of numbers an export rounded the weights."""
    as_exported: int | None = None
    """Answers that an export's readers gave as the model did, where the fewest were."""
    probe: Probe
    has_template: bool
    """Whether it takes conversations."""
    template_kwargs: dict[str, Any]
    """Variables of the chat template in training."""

    @property
    def writes_calls(self) -> bool:
        """Whether the template has calls of tools in `<tool_call>` and JSON."""
        return any(CALL.search(said.text) for said in self.probe.said if said.text)

    @cached_property
    def layers(self) -> int:
        if self.gguf:
            return check_gguf(self.gguf).layers
        config = read_json((self.base or self.folder) / "config.json")
        config = config if isinstance(config, dict) else {}
        text = config.get("text_config", config)
        layers = text.get("num_hidden_layers", 1)
        return layers if isinstance(layers, int) else 1

    def tell_context(self, say: Say) -> None:
        """Say where llama.cpp has memory for fewer tokens than the model takes."""
        if self.gguf and (header := check_gguf(self.gguf)).context < header.longest:
            say(f"context: {header.context:,} of the {header.longest:,} tokens that it takes")


def served(name: str, converted: Path, say: Say) -> Served:
    """A finished artifact that gives answers, or a format of an export, verified and readable.

    `converted`: for what has to be made readable first. Raises UserError (2), and (3) for one that
    is not finished, is damaged, or was never asked the probe.
    """
    if name.startswith(ARTIFACT):
        hint = f"give its path, such as runs/NAME/{name.removeprefix(ARTIFACT)}"
        raise UserError(f"serve: {name}: is of a run, and serve knows of none", hint)
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if not path.exists():
        raise UserError(f"serve: {name}: no such artifact", "give its folder: runs/NAME/sft")
    with screen.doing("verifying the model"):
        part = exported(name, "serve")
        if part is not None:
            return _of_export(name, part, converted, say)
        if not is_artifact(path):
            raise _no_artifact(name, path)
        model = resolve(str(path), Use("serve", ("model", "adapter")), Path())
    return _of_artifact(name, Artifact(path), model, converted, say)


def _of_artifact(name: str, artifact: Artifact, model: Model, converted: Path, say: Say) -> Served:
    """An artifact, as its manifest has it."""
    manifest = artifact.manifest()
    folder, base = _readable(model, converted, say)
    return Served(
        name=manifest.name,
        folder=folder,
        base=base,
        probe=_probe_of(name, manifest),
        has_template=own_template(folder) is not None,
        template_kwargs=manifest.asked.chat_template_kwargs,
    )


def _of_export(name: str, part: Exported, converted: Path, say: Say) -> Served:
    """A format of an export, which answers by the probe of the model that was exported."""
    manifest, export = part.manifest, part.export
    parents = [parent.name.partition("@")[0] for parent in manifest.parents]
    gguf = part.model.folder if part.kind == "gguf" else None
    if gguf:
        folder, base = part.folder, None
        has_template = check_gguf(gguf).has_template
    else:
        folder, base = _readable(part.model, converted, say, few_bits=True)
        has_template = own_template(folder) is not None
    return Served(
        name=parents[0] if parents else manifest.name,
        folder=folder,
        base=base,
        gguf=gguf,
        rounded=export.format.rpartition("-")[2] if part.kind != "adapter" else "fp32",
        as_exported=min(one.agreement.equal_answers for one in (export.reading, *export.also)),
        probe=_probe_of(name, manifest),
        has_template=has_template,
        template_kwargs=export.template_kwargs,
    )


def _readable(
    model: Model, converted: Path, say: Say, *, few_bits: bool = False
) -> tuple[Path, Path | None]:
    """The folder of a model, and that of what lies under an adapter."""
    folder = make_readable(model, converted, say, few_bits=few_bits)
    is_adapter = model.base is not None and model.is_adapter
    return folder, model_folder(model.base, converted) if model.base and is_adapter else None


def _probe_of(name: str, manifest: Manifest) -> Probe:
    """What a model says. Raises UserError (3) where nobody has asked it."""
    if manifest.probe is None or not manifest.probe.asked:
        problem = f"serve: {name}: its manifest does not say what the model answers"
        hint = "an older llmpipe published it, or its context is too short: make it again"
        raise UserError(problem, hint, INTEGRITY)
    return manifest.probe


def _no_artifact(name: str, path: Path) -> UserError:
    """What to say of a folder that is no finished artifact."""
    if (path / "recipe.yaml").exists():
        hint = "the command that began it goes on with it"
        return UserError(f"serve: {name}: is not finished", hint, INTEGRITY)
    hint = "served is what llmpipe has made and finished, such as runs/NAME/sft"
    return UserError(f"serve: {name}: is no artifact: it has no manifest.json", hint)


def key_in(variable: str | None) -> str | None:
    """The key that a variable of the environment holds. Raises UserError (2) where it is empty."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        # what was typed may be the key itself, and is not said again
        problem = "serve: --api-key-from: the environment has no such variable, or it is empty"
        raise UserError(problem, "name a variable: LLMPIPE_KEY=... llmpipe serve ...")
    if not key.isascii() or any(character.isspace() for character in key):
        raise UserError("serve: --api-key-from: a key is of ASCII characters, without blanks")
    return key


class Address:
    """Where the server listens: taken before anything is loaded, and handed to the server."""

    def __init__(self, host: str, port: int):
        """`port`: 0 takes any that is free. Raises UserError (2) for a host that is none of this
        machine's, and (5) where somebody listens there already."""
        self.host = host
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self.socket = socket.create_server((host, port), family=family, backlog=2048)
        except OSError as error:
            raise _not_taken(host, port, error) from None
        self.port: int = self.socket.getsockname()[1]

    @property
    def is_local(self) -> bool:
        """Whether this machine alone reaches it."""
        return self.host.startswith(LOCAL)

    @property
    def near(self) -> str:
        """The host as this machine reaches it."""
        return EVERYWHERE.get(self.host, self.host)

    @property
    def url(self) -> str:
        host = f"[{self.near}]" if ":" in self.near else self.near
        return f"http://{host}:{self.port}"

    def release(self) -> None:
        """Leave it to somebody else's process."""
        self.socket.close()

    def __enter__(self) -> Address:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _not_taken(host: str, port: int, error: OSError) -> UserError:
    import errno

    if error.errno == errno.EADDRINUSE:
        hint = "take another one with --port, or end what listens there"
        return UserError(f"serve: port {port} of {host} is taken", hint, RESOURCES)
    if error.errno == errno.EACCES:
        hint = "take one from 1024 on with --port"
        return UserError(f"serve: port {port} is not yours to take", hint, RESOURCES)
    hint = "127.0.0.1 is this machine alone, 0.0.0.0 every network that it is in"
    reason = error.strerror or str(error)
    return UserError(f"serve: --host {host}: {reason}", hint)
