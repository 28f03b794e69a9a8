"""Everything that a reader can do with a store, within bounds of memory and time; and what may come of it."""

from __future__ import annotations

import contextlib
import functools
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
from click.testing import CliRunner

from gradtrace.cli import main
from gradtrace.errors import SelectionError, StoreError
from gradtrace.store.checking.verify import verify
from gradtrace.store.places.keys import Memory
from gradtrace.store.places.place import keys_at
from gradtrace.store.reading.opened import open_run
from gradtrace.store.reading.reader import Run
from tests.store.sound import make

SECONDS, BYTES = 20.0, 400 << 20  # that looking at a run of some kilobytes may take


class Hung(AssertionError):
    """It took too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes long by `Hung`; more memory than a small run needs is an AssertionError."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hung

    before, handler = _most_memory(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert _most_memory() - before < BYTES


def _most_memory() -> int:
    """The most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.cache
def small() -> dict[str, bytes]:
    """Key -> bytes of a run of three steps, two parameters and a probe."""
    make("memory://small", 3, flush_every=2).close()
    keys = Memory("small")
    return {key: keys.get(key) or b"" for key in keys.list()}


def put_in_memory(changed: dict[str, bytes]) -> str:
    held = Memory("hostile")._held
    held.clear()
    held.update({**small(), **changed})
    return "memory://hostile"


def explore(where: str | Path) -> set[str]:
    """What becomes of opening, reading and querying a store: "works", or the messages of the errors that may be."""
    said: set[str] = set()
    with bounded():
        for look in (_streams, _tree):
            try:
                look(open_run(where))
                said.add("works")
            except (StoreError, SelectionError) as error:
                said.add(str(error))
        with contextlib.suppress(StoreError):
            verify(keys_at(where))
        for command in (["ls"], ["info", "--json"], ["query", "--json"], ["query", "--metric", "cosine"], ["verify"]):
            done = CliRunner().invoke(main, [command[0], str(where), *command[1:]])
            assert done.exception is None or isinstance(done.exception, SystemExit), (command, repr(done.exception))
            assert done.exit_code in (0, 1, 3), (command, done.output)
    assert all(text == "works" or len(text) < 2000 for text in said), "a message that nobody reads"
    return said


def _streams(run: Run) -> None:
    """Every array through `Stream`."""
    assert len(repr(run)) > 0
    for probe in (None, *run.probe_names):
        stream = run.stream(probe)
        for name in ("loss", "epoch", "n_samples", "scalars", "cost"):
            assert len(stream.per_step(name)) == len(stream.steps)
        assert stream.groups is not None
        for parameter in stream.places:
            for variable in stream.variables(parameter):
                assert len(stream.read(parameter, variable)) == len(stream.steps)


def _tree(run: Run) -> None:
    """Every value through xarray."""
    for tree in (run.tree, *run.probes.values()):
        for node in tree.subtree:
            for variable in node.variables.values():
                assert np.asarray(variable.values).shape == variable.shape
