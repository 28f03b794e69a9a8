"""Work that goes on behind the training: in order, on a thread of its own, a few pieces at a time.

On an accelerator it has a stream of its own there, so that waiting for its results does not wait for the training's.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch

from gradtrace.schedule import helpers, idle_cores, one_thread_each

AHEAD = 2  # pieces that may be unfinished: then whoever hands over the next one waits


class Behind:
    """One thread that does what it is handed, in order.

    What a piece raises is raised to whoever hands over the next one, or waits, and else told when the interpreter ends;
    pieces after it are not begun.
    workers: threads that a piece may share its work with, itself among them: as many as torch leaves cores idle.
    """

    def __init__(self, device: torch.device) -> None:
        self.workers = max(idle_cores(), 1) if device.type == "cpu" else 1
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread: ThreadPoolExecutor | None = None
        self._room = threading.Semaphore(AHEAD)
        self._last: Future[None] | None = None
        self._error: BaseException | None = None
        self._told = False

    def hand_over(self, work: Callable[[], None]) -> float:
        """Seconds waited for room; `work` is done later, and must read nothing that changes meanwhile."""
        began = time.perf_counter()
        self._check()
        self._room.acquire()
        waited = time.perf_counter() - began
        if self._error is not None:
            self._room.release()
        self._check()
        if self._thread is None:
            self._thread = one_thread_each(1, "gradtrace behind")
            atexit.register(self._tell)
            if self.workers > 1:  # made here, since a new thread takes over the number of whoever made it
                helpers(self.workers - 1, os.getpid())
        ready = None if self._stream is None else torch.cuda.current_stream(self._stream.device).record_event()
        self._last = self._thread.submit(self._do, work, ready)
        return waited

    def wait(self) -> None:
        """Returns when everything handed over is done."""
        if self._last is not None:
            self._last.result()
        self._check()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            atexit.unregister(self._tell)

    def _do(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        try:
            if self._error is None:
                with torch.no_grad(), self._on_stream(ready):
                    work()
                if self._stream is not None:
                    self._stream.synchronize()  # the training may take over the memory that is given back now
        except BaseException as error:
            self._error = error
        finally:
            self._room.release()

    def _on_stream(self, ready: torch.cuda.Event | None) -> AbstractContextManager[object]:
        """Inside, work is put on our own stream, after what was put on the training's before it was handed over."""
        if self._stream is None or ready is None:
            return nullcontext()
        self._stream.wait_event(ready)
        return torch.cuda.stream(self._stream)

    def _check(self) -> None:
        if self._error is not None:
            self._told = True
            raise self._error

    def _tell(self) -> None:
        """At the end of the interpreter: who neither went on nor closed would not know."""
        if self._error is not None and not self._told:
            what = f"{type(self._error).__name__}: {self._error}"
            warnings.warn(
                f"A step behind the training failed; it and later ones are not recorded: {what}", stacklevel=1
            )
