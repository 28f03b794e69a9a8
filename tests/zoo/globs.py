"""Many names in few patterns: repeated layers by a star, alternatives in braces."""

from __future__ import annotations

from collections.abc import Iterable


def patterns(names: Iterable[str]) -> list[str]:
    """Patterns that stand for exactly the names given, if every numbered layer has the same ones."""
    paths = dict.fromkeys(tuple("*" if part.isdigit() else part for part in name.split(".")) for name in names)
    found = list(paths)
    for place in reversed(range(max(map(len, found), default=0))):
        found = _merged(found, place)
    return [".".join(path) for path in found]


def _merged(paths: list[tuple[str, ...]], place: int) -> list[tuple[str, ...]]:
    """Paths that differ in one part alone become one, with that part's alternatives in braces."""
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, None]] = {}
    for path in paths:
        if place < len(path):
            alike.setdefault((path[:place], path[place + 1 :]), {})[path[place]] = None
        else:
            alike[path, ()] = {}
    return [(*before, *([_braced(list(parts))] if parts else []), *after) for (before, after), parts in alike.items()]


def _braced(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else "{" + ",".join(part.strip("{}") for part in parts) + "}"
