"""`llmpipe ARGS` as a user types it, in the test's own process; and a Hub that it finds."""

import sys

import huggingface_hub
import pytest

from llmpipe.front import cli, launch
from tests import life
from tests.stand_in import Hub, environment


@pytest.fixture
def llmpipe(monkeypatch, capsys):
    """`llmpipe ARGS` in this process: (exit code, standard output, standard error)."""
    monkeypatch.setattr(launch, "start", life.start_here)
    monkeypatch.setattr(launch, "begun_early", life.nobody_early)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmpipe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return call


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, and a process that is logged in there."""
    with Hub().serving() as stand_in:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        for name, value in environment(stand_in).items():
            monkeypatch.setenv(name, value)
        yield stand_in
    huggingface_hub.close_session()
