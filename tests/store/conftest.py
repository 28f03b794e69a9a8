from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradtrace.store.rows import KINDS
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import infos


@pytest.fixture
def new_writer(tmp_path: Path) -> Callable[..., RunWriter]:
    """Makes a writer of a new run below the test's directory."""

    def make(names: Any = ("fc1.weight", "fc1.bias"), **options: Any) -> RunWriter:
        path = options.pop("path", tmp_path / "run.zarr")
        defaults = {"attrs": {"seed": 7}, "kinds": KINDS, "keep": 64, "parameters": infos(names)}
        return RunWriter(path, **{**defaults, **options})

    return make
