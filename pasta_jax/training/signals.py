"""SIGTERM and Ctrl-C while training: save at the next step, then leave."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from pasta_jax.processes.agreement import agreed, several

LOG = logging.getLogger("pasta_jax")


class Stopped(SystemExit):
    """The run was asked to stop, saved what it had trained, and can be resumed. Its status is the usual one."""

    def __init__(self, signal_number: int):
        super().__init__(128 + signal_number)


class StopRequest:
    """The signal that asked, or None, and whether it is done as asked.

    A launcher signals every process, some a little late. Once the request has been heeded, a late SIGTERM is
    ignored. After the block all processes have the same signal.
    """

    signal: int | None = None
    is_heeded = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or SIGINT into a request; a second one has its usual effect.

    Outside the main thread, where Python allows no handlers, signals keep their effect.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        _agree(request)
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, _: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, before[signal.Signals(number)])
        LOG.warning("%s: saving at the next step, then leaving.", signal.Signals(number).name)

    for number in before:
        signal.signal(number, ask)
    late = None
    try:
        yield request
        late = _agree(request)
    finally:
        for number, handler in before.items():
            is_late = request.is_heeded and several() and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if is_late else handler)
    if late:
        signal.raise_signal(late)


def _agree(request: StopRequest) -> int | None:
    """A signal to any process becomes that of all. Returns one that came too late for that."""
    (number,) = agreed(request.signal or 0)
    late = None if number else request.signal
    request.signal, request.is_heeded = number or None, bool(number)
    return late
