"""What a run holds already, for a writer that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradtrace.errors import StoreError
from gradtrace.store.metadata import CHECKSUM, ArraySpec
from gradtrace.store.places.keys import ROOT_KEY, Keys
from gradtrace.store.schema import MAIN_STREAM, SCHEMA, STEP


class Past:
    """The last commit of a run, as far as it is kept: everything, or the rows before a step.

    attributes: the root's. members: path -> zarr metadata of everything below it. rows: stream -> rows kept.
    """

    def __init__(self, keys: Keys, before: int | None) -> None:
        from gradtrace.store.reading.reader import open_keys

        run = open_keys(keys)
        version = tuple(map(int, run.schema.split(".")))
        if version[1] > SCHEMA[1]:
            raise StoreError(
                f"{keys.name!r} has schema {run.schema}, and this gradtrace writes {'.'.join(map(str, SCHEMA))}: it "
                "would leave out what is new there. Install a newer gradtrace, or record into another path."
            )
        document = json.loads(keys.get(ROOT_KEY) or b"{}")
        self.attributes: dict[str, Any] = document["attributes"]
        self.members: Mapping[str, Mapping[str, Any]] = document["consolidated_metadata"]["metadata"]
        self._group = run.group
        self.steps = {path: self._kept(path, int(n), before) for path, n in self.attributes["committed"].items()}

    def _kept(self, path: str, committed: int, before: int | None) -> np.ndarray:
        """The steps of a stream that stay: a probe made when `before` steps were done belongs to what is kept."""
        steps = self.array(f"{path}/{STEP}", 0, committed)
        return steps if before is None else steps[(steps < before) | ((path != MAIN_STREAM) & (steps == before))]

    @property
    def rows(self) -> dict[str, int]:
        """Stream -> the number of rows that are kept."""
        return {path: len(steps) for path, steps in self.steps.items()}

    @property
    def is_rewound(self) -> bool:
        """Whether rows are given up."""
        return self.rows != self.attributes["committed"]

    @property
    def next_step(self) -> int:
        """The step that follows the last one that is kept."""
        steps = self.steps[MAIN_STREAM]
        return int(steps[-1]) + 1 if len(steps) else 0

    @property
    def last_steps(self) -> dict[str, int]:
        """Stream -> the last step that is kept, of streams with any."""
        return {path: int(steps[-1]) for path, steps in self.steps.items() if len(steps)}

    def spec(self, path: str) -> ArraySpec | None:
        """What an array is like, if it is there."""
        document = self.members.get(path)
        if document is None or document["node_type"] != "array":
            return None
        chunks = document["chunk_grid"]["configuration"]["chunk_shape"]
        dims, attributes = tuple(document["dimension_names"]), document["attributes"]
        checksum = any(codec["name"] == CHECKSUM for codec in document["codecs"])
        return ArraySpec(path, dims, str(document["data_type"]), tuple(chunks), attributes, checksum)

    def inner(self, path: str) -> tuple[int, ...]:
        """The lengths of an array's axes after the first."""
        return tuple(self.members[path]["shape"][1:])

    def below(self, path: str) -> list[str]:
        """The names of what lies directly below a group."""
        return [m.rpartition("/")[2] for m in self.members if m.rpartition("/")[0] == path]

    def names(self, path: str) -> Sequence[str]:
        """A coordinate of strings."""
        return [str(name) for name in self._array(path)[...]] if path in self.members else []

    def array(self, path: str, start: int, stop: int) -> np.ndarray:
        """Rows of an array."""
        return np.asarray(self._array(path)[start:stop])

    def _array(self, path: str) -> Any:
        try:
            return self._group[path]
        except KeyError:
            raise StoreError(f"The run lacks the array {path!r}: it is damaged. See `gradtrace verify`.") from None
