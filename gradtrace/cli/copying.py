"""What commands that write archives show: how far they are, on stderr, and what a store takes up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from gradtrace.store.archives.archive import Size


@contextmanager
def copying() -> Iterator[Callable[[str, int, int], None]]:
    """Takes what is being done and how many bytes of how many; shows it as one bar after the other."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        lines = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what)
            bar.update(lines[what], completed=done, total=total)

        yield tell


def told(size: Size | None) -> str:
    """What a store takes up, as people read it."""
    if size is None:
        return "of unknown size"
    return f"{size.files} {'file' if size.files == 1 else 'files'}, {decimal(size.bytes)}"
