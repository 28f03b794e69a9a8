"""Ctrl-C and the request to end (SIGINT, SIGTERM) wait until the step under way is whole.

Only where nobody else answers these signals: whoever has a handler of their own, to save a checkpoint say, keeps it.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

USUAL: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupts:
    """Between `install` and `remove`, a signal that comes within `whole` takes effect at its end; a second one at once.

    SIGINT is a KeyboardInterrupt, as ever; SIGTERM ends the program as `sys.exit` does, with the code that shells give
    to it, so that `with` blocks and what is registered for the end of the interpreter close what is open. Several
    at a time share one handler.
    """

    _users = 0
    _inside = 0
    _pending: int | None = None
    _process = 0

    def __init__(self) -> None:
        self._ended: weakref.finalize[[], Any] | None = None

    def install(self) -> None:
        """Answer the signals, in the main thread, as far as nobody does."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, usual in USUAL.items():
            if signal.getsignal(number) == usual:
                signal.signal(number, _handle)
        Interrupts._process = os.getpid()
        Interrupts._users += 1
        self._ended = weakref.finalize(self, _leave)  # also of a recorder that nobody closes

    def remove(self) -> None:
        """Leave them as they were, unless somebody else needs them answered, or answers them by now."""
        if self._ended is not None:
            self._ended()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is inside is brought to its end."""
        Interrupts._inside += 1
        try:
            yield
        finally:
            Interrupts._inside -= 1
            if Interrupts._pending is not None and not Interrupts._inside:
                pending, Interrupts._pending = Interrupts._pending, None
                _end(pending)


def _leave() -> None:
    Interrupts._users -= 1
    if threading.current_thread() is not threading.main_thread():
        return
    for number, usual in USUAL.items():
        if not Interrupts._users and signal.getsignal(number) == _handle:
            signal.signal(number, usual)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != Interrupts._process:  # a forked worker, which has nothing to close
        signal.signal(number, USUAL[signal.Signals(number)])
        os.kill(os.getpid(), number)
    elif Interrupts._inside and Interrupts._pending is None:
        Interrupts._pending = number
    else:
        Interrupts._pending = None
        _end(number)


def _end(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
