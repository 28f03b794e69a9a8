"""The examples of docs/reference/store.md run, and its tables name what there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zarr

from gradtrace.store.rows import Status
from gradtrace.store.writing.writer import RunWriter
from tests.store.samples import step_row

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "store.md"
NAMES = ("fc1.weight", "blocks/0.weight")


@pytest.fixture
def run_path(new_writer: Callable[..., RunWriter], monkeypatch: pytest.MonkeyPatch) -> Path:
    with new_writer(NAMES) as writer:
        for step in range(3):
            writer.append(step_row(step, NAMES, scalars={"lr": 0.1}))
            writer.append(step_row(step, NAMES), stream="probe/val")
    monkeypatch.chdir(Path(writer.path).parent)
    return Path(writer.path)


def test_the_examples_run(run_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        names: dict[str, object] = {}
        exec(example, names)
        assert {"run", "tree"} & set(names)


def test_every_array_and_attribute_is_documented(run_path: Path) -> None:
    text = PAGE.read_text()
    root = zarr.open_group(run_path, mode="r")
    arrays = [(path, array) for path, array in root.members(max_depth=None) if isinstance(array, zarr.Array)]
    assert len(arrays) > 20
    for path, array in arrays:
        name = path.rpartition("/")[2]
        assert f"`{name}`" in text
        assert "string" in text if str(array.dtype).startswith("StringDType") else f"| {array.dtype} |" in text
    for attribute in root.attrs:
        assert f"`{attribute}`" in text
    for code, name in enumerate(Status.NAMES):
        assert f"| {code} | {name} |" in text
