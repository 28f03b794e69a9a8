"""One writer at a time: a key that says who writes, for as long as it lasts, and gives a sign of life now and then.

Whose process it is says a digest: no name of a host or a user stands in a store.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gradtrace.errors import StoreError
from gradtrace.store.places.keys import ROOT_KEY, Keys

LOCK_KEY = "gradtrace.lock"
BEAT = 10.0  # seconds between two signs of life
SILENCE = 60.0  # seconds after which a writer that nobody can ask counts as dead


@dataclass(frozen=True)
class Holder:
    """Who writes. machine: a digest that is the same for processes that see each other's numbers."""

    token: str
    machine: str
    process: int
    started: float  # of the process, in whatever unit the machine counts; 0 where it does not say
    beat: float  # seconds since 1970

    @classmethod
    def here(cls) -> Holder:
        """This process, under a new token."""
        return cls(uuid.uuid4().hex, _machine(), os.getpid(), _started(os.getpid()), time.time())

    @classmethod
    def read(cls, data: bytes) -> Holder | None:
        """What a lock says; None where it is no lock of ours."""
        try:
            found = cls(**json.loads(data))
        except (ValueError, TypeError):
            return None
        typed = isinstance(found.token, str) and isinstance(found.process, int) and isinstance(found.beat, int | float)
        return found if typed else None

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def silence(self) -> float:
        """Seconds since the last sign of life."""
        return max(0.0, time.time() - self.beat)

    @property
    def alive(self) -> bool:
        """Whether the process is there, where it can be asked; else whether it gave a sign of life lately."""
        if self.machine != _machine() or os.name == "nt":
            return self.silence < SILENCE
        return _is_running(self.process) and _started(self.process) == self.started

    def __str__(self) -> str:
        ago = f"last sign of life {self.silence:.0f} s ago"
        if self.machine != _machine():
            return f"a process on another machine ({ago})"
        if self.process == os.getpid():
            return "this process"
        return f"process {self.process} of this machine ({ago})"


class Lock:
    """The right to write, held by this process from `acquire` to `release`."""

    def __init__(self, keys: Keys, holder: Holder) -> None:
        self._keys, self._holder = keys, holder

    @classmethod
    def acquire(cls, keys: Keys) -> Lock:
        """The lock of a store, also where a dead writer left it; a StoreError where a live one has it."""
        for _ in range(8):
            held = keys.get(LOCK_KEY)
            if held is not None:
                refuse(keys, Holder.read(held))
                keys.swap(LOCK_KEY, held, None)  # whoever comes second finds another one there, or none
            mine = Holder.here()
            if keys.put_new(LOCK_KEY, mine.to_bytes()):
                return cls(keys, mine)
        raise StoreError(f"Cannot lock {keys.name!r}: several processes try at once. Start one after the other.")

    @property
    def due_in(self) -> float:
        """Seconds until the next sign of life."""
        return max(0.0, BEAT - self._holder.silence)

    def check(self) -> None:
        """None, or a StoreError where another writer has taken over, which took this one for dead."""
        held = self._keys.get(LOCK_KEY)
        if held is None and self._keys.get(ROOT_KEY) is None:
            raise FileNotFoundError(errno.ENOENT, "no run is there any more")
        if held != self._holder.to_bytes():
            raise StoreError(
                f"Another process has taken over the writing of {self._keys.name!r}: this one gave no sign of life for "
                "longer than a minute, or its lock was deleted. Nothing more is written here; resume the run where it "
                "should go on."
            )

    def beat(self) -> None:
        """A sign of life, or the StoreError of `check`."""
        self.check()
        now = replace(self._holder, beat=time.time())
        self._keys.put(LOCK_KEY, now.to_bytes())  # in one move: a moment without a lock would be somebody else's
        self._holder = now

    def release(self) -> None:
        """Let others write."""
        with contextlib.suppress(OSError):  # whoever comes next sees that this process is gone
            self._keys.swap(LOCK_KEY, self._holder.to_bytes(), None)


def writer_of(keys: Keys) -> Holder | None:
    """Who writes a store now, or None."""
    held = keys.get(LOCK_KEY)
    holder = None if held is None else Holder.read(held)
    return holder if holder is not None and holder.alive else None


def refuse(keys: Keys, holder: Holder | None) -> None:
    """Raises a StoreError where a writer is alive, which says what can be done."""
    if holder is None or not holder.alive:
        return
    if holder.machine != _machine():
        what = f"If that process is gone, wait until {SILENCE:.0f} s have passed since then"
    elif holder.process == os.getpid():
        what = "Close the other recorder first (recorder.close())"
    else:
        what = "Wait for it, or end it"
    raise StoreError(f"{keys.name!r} is being written by {holder}. {what}, or record into another path.")


def _machine() -> str:
    """A digest of what processes that can ask after each other have in common."""
    parts = [platform.node(), _text("/proc/sys/kernel/random/boot_id")]
    with contextlib.suppress(OSError):  # another container counts its processes by itself
        parts.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and somebody else's
        return True
    return _status(process)[:1] != ["Z"]  # ended, and not yet asked how


def _started(process: int) -> float:
    """When a process began: numbers are given again."""
    status = _status(process)
    return float(status[19]) if len(status) > 19 else 0.0


def _status(process: int) -> list[str]:
    """What Linux says of a process, from its state on; empty elsewhere."""
    return _text(f"/proc/{process}/stat").rpartition(")")[2].split()


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
