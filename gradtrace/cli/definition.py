"""Options that say what a group's part is, shared by the commands that measure a study."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def definition_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --coupling and --sample-dim, in the order of the help text."""
    coupling = click.option(
        "--coupling",
        type=click.Choice(["rows", "loss"]),
        default="rows",
        show_default=True,
        help="What a group's part is where samples see each other.",
    )
    axis = "The sample axis of the output, where lengths leave a doubt."
    return coupling(click.option("--sample-dim", type=int, metavar="AXIS", help=axis)(command))
