"""Which signals stop a run, and what is one of them and what two."""

import os
import signal

import pytest

from llmpipe.errors import SIGINT, SIGTERM, Stopped
from llmpipe.run.signals import Signals


@pytest.fixture
def clock():
    """Seconds that a test sets; the signals have the handlers of a command from a terminal, though
    the tests may run under nohup, and what they had is put back."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield [100.0]
    for number, handler in before.items():
        signal.signal(number, handler)


def installed(clock, deferred=True):
    signals = Signals(lambda: clock[0]).install()
    signals.deferred = deferred
    return signals


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, SIGINT), (signal.SIGTERM, SIGTERM), (signal.SIGHUP, SIGTERM)],
)
def test_a_signal_is_served_at_once_or_after_the_step(clock, number, code):
    signals = installed(clock)
    send(number)
    assert signals.code == code
    with pytest.raises(Stopped) as stopped:
        installed(clock, deferred=False)
        send(number)
    assert stopped.value.code == code


def test_one_ctrl_c_may_come_twice_and_a_second_one_ends_at_once(clock):
    """To every process of a group, and from the command as well."""
    signals = installed(clock)
    send(signal.SIGINT)
    clock[0] += 0.3
    send(signal.SIGINT)
    assert signals.code == SIGINT
    clock[0] += 0.4
    with pytest.raises(Stopped):
        send(signal.SIGINT)


def test_what_comes_while_one_is_served_changes_nothing(clock):
    installed(clock, deferred=False)
    with pytest.raises(Stopped):
        send(signal.SIGTERM)
    send(signal.SIGTERM)  # which the unwinding does not see
    send(signal.SIGHUP)
    clock[0] += 1
    with pytest.raises(Stopped):
        send(signal.SIGINT)


def test_under_nohup_a_hangup_is_ignored(clock):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = installed(clock)
    send(signal.SIGHUP)
    assert signals.code is None
