"""Writes the package of a new adapter: one that installs, and passes its tests, before a line of it is changed."""

from __future__ import annotations

import keyword
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from gradtrace import __version__
from gradtrace.errors import AdapterError

ENTRY_POINTS = "gradtrace.adapters"

# Template -> where it goes. Templates end in .txt: they are not Python until the names are filled in.
FILES = {
    "pyproject.txt": "pyproject.toml",
    "readme.txt": "README.md",
    "adapter.txt": "src/$module/__init__.py",
    "test_adapter.txt": "tests/test_adapter.py",
}
_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class Names:
    """What one name becomes: `acme-spline` is the distribution and the adapter, `acme_spline` the module to import."""

    name: str

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def adapter(self) -> str:
        """The name of the adapter's class."""
        words = "".join(word.capitalize() for word in self.name.split("-"))
        return f"{words.removesuffix('Adapter')}Adapter"

    def filled(self, text: str) -> str:
        """A template with the names in their places."""
        facts = {"name": self.name, "module": self.module, "adapter": self.adapter, "version": __version__}
        return Template(text).substitute(facts)


def checked_name(name: str) -> Names:
    """The names of a new package; AdapterError where `name` cannot be distribution, module and adapter at once."""
    if not _NAME.fullmatch(name):
        words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower())
        proposal = "-".join(words).lstrip("0123456789-") or "my-adapter"
        raise AdapterError(
            f"{name!r} cannot name a package: use lower-case letters, digits and single hyphens, a letter first. "
            f"Try {proposal!r}."
        )
    names = Names(name)
    _refuse_names_in_use(names)
    return names


def _refuse_names_in_use(names: Names) -> None:
    """An adapter is chosen by its name, and a package found by its module's: two of one name hide each other."""
    taken = {point.name: point for point in entry_points(group=ENTRY_POINTS)}.get(names.name)
    if taken is not None:
        origin = f"{taken.dist.name} {taken.dist.version}" if taken.dist else taken.value
        raise AdapterError(f"An adapter named {names.name!r} is installed already, by {origin}. Choose another name.")
    if keyword.iskeyword(names.module) or names.module in sys.stdlib_module_names or find_spec(names.module):
        raise AdapterError(
            f"`import {names.module}` means something else in this Python already. Choose another name: say whose "
            f"adapter it is, such as 'acme-{names.name}'."
        )


def write_package(names: Names, folder: Path) -> list[Path]:
    """The files written for a new package, at `folder`, which must not exist."""
    pages = render(names)
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError):
        raise AdapterError(
            f"{folder} cannot be made, because there is something already. Nothing was written: remove it, choose "
            "another name, or another place with --into DIR."
        ) from None
    written = []
    for path, text in pages.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written


def render(names: Names) -> Mapping[str, str]:
    """Path within the package -> what stands there."""
    templates = files(__name__) / "template"
    return {
        names.filled(path): names.filled((templates / source).read_text(encoding="utf-8"))
        for source, path in FILES.items()
    }
