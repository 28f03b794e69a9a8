"""Patterns of names: exact names, globs, or regular expressions after `re:`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from gradtrace.errors import SelectionError, nearest

EXPRESSION = "re:"


def matching(what: str, patterns: Sequence[str], names: Iterable[str], *, patient: bool = False) -> tuple[str, ...]:
    """The names, in their own order, that any of the patterns matches; all of them when there is no pattern.

    A pattern that is no glob and no known name is an error, unless one is patient.
    """
    known = list(names)
    if not patterns:
        return tuple(known)
    missing = unknown(what, patterns, known)
    if missing and not patient:
        raise SelectionError(next(iter(missing.values())))
    chosen: set[str] = set()
    for pattern in patterns:
        chosen.update(_matches(pattern, known))
    return tuple(name for name in known if name in chosen)


def _matches(pattern: str, known: Sequence[str]) -> list[str]:
    if pattern in known or not _is_open(pattern):
        return [name for name in known if name == pattern]
    if not pattern.startswith(EXPRESSION):
        return [name for name in known if fnmatchcase(name, pattern)]
    try:
        expression = re.compile(pattern.removeprefix(EXPRESSION))
    except re.error as error:
        raise SelectionError(f"{pattern!r} is no regular expression: {error}. Correct it, or use a glob.") from None
    return [name for name in known if expression.search(name)]


def unknown(what: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """A sentence for each pattern that is one name, and not there."""
    known = list(names)
    missing = [pattern for pattern in patterns if pattern not in known and not _is_open(pattern)]
    where = "among these runs" if what == "run" else "in this run"
    return {name: f"There is no {what} {name!r} {where}. {nearest(name, known)}" for name in missing}


def _is_open(pattern: str) -> bool:
    """Whether several names may match."""
    return pattern.startswith(EXPRESSION) or any(character in pattern for character in "*?[")
