"""docs/reference/cli.md names every option of the commands it is about."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click
import pytest

from gradtrace.metrics import METRICS

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"


@pytest.mark.parametrize("name", ["ls", "info", "query", "graph"])
def test_every_option_is_documented(name: str) -> None:
    text = PAGE.read_text()
    command: click.Command = import_module(f"gradtrace.cli.{name}").command
    options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
    assert "--format" in options
    assert f"`gradtrace {name}" in text
    assert [option for option in options if option not in text] == []


def test_every_metric_is_documented() -> None:
    text = PAGE.read_text()
    assert [name for name in METRICS if f"`{name}`" not in text] == []
