"""Where the rows of a training go: a store, whose troubles are told and do not stop the training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from gradtrace.errors import StoreError, StoreWarning
from gradtrace.store.rows import ParameterInfo, StepRow
from gradtrace.store.schema import MAIN_STREAM
from gradtrace.store.writing.writer import RunWriter


class Sink:
    """Rows for a `RunWriter`. What fails for good switches it off, with a warning; what may pass is waited for.

    failure: why it is off, or None.
    """

    def __init__(self, writer: RunWriter) -> None:
        self._writer = writer
        self._infos: dict[str, ParameterInfo] = {}
        self._told: str | None = None
        self.failure: StoreError | None = None

    def append(self, row: StepRow, stream: str = MAIN_STREAM) -> float:
        """Seconds waited for the disk."""
        if self.failure is not None:
            return 0.0
        try:
            waited = self._writer.append(row, stream)
        except StoreError as error:
            self._switch_off(error)
            return 0.0
        trouble = self._writer.trouble
        if trouble is not None and self._told is None:
            _warn(f"{trouble} Training goes on, and recording when that has passed.")
        self._told = trouble
        return waited

    def describe(self, found: Iterable[ParameterInfo]) -> None:
        """Makes parameters known, and what has changed about them."""
        for info in found:
            if self._infos.get(info.name) == info or self.failure is not None:
                continue
            try:
                self._writer.add_parameter(info)
            except StoreError as error:
                self._switch_off(error)
            self._infos[info.name] = info

    def knows(self, name: str) -> bool:
        """Whether something was said of a parameter."""
        return name in self._infos

    def update_attrs(self, attrs: Mapping[str, Any]) -> None:
        """Adds to what is said about the run."""
        if self.failure is None:
            try:
                self._writer.update_attrs(attrs)
            except StoreError as error:
                self._switch_off(error)

    def flush(self) -> None:
        """Returns when every row is committed; a StoreError where they cannot be."""
        if self.failure is not None:
            raise self.failure
        self._writer.flush()

    def close(self) -> None:
        """Commits what there is and closes the store; a warning where that fails, since the training is over."""
        if self.failure is not None:
            return
        lost = self._writer.lost
        try:
            self._writer.close()
        except StoreError as error:
            self._switch_off(error)
        if lost:
            _warn(f"{lost} rows were lost while {self._writer.path!r} could not be written.")

    def _switch_off(self, error: StoreError) -> None:
        """Tells of a store that cannot be written any more; other errors are the caller's."""
        if not self._writer.failed:
            raise error
        self.failure = error
        _warn(f"{error} Training goes on, and is not recorded any more.")


def _warn(text: str) -> None:
    warnings.warn(text, StoreWarning, stacklevel=4)
