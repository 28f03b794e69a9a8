"""Runs on disk and in buckets. From here, what the commands of the same names do with whole runs:

`compact(source, target)`, `merge(sources, target)`, `repair(run)` and `verify(run)`, of paths or URLs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradtrace.store.archives.compact import compact
    from gradtrace.store.archives.merge import merge
    from gradtrace.store.checking.repair import repair
    from gradtrace.store.checking.verify import verify

_HOMES = {"compact": "archives", "merge": "archives", "repair": "checking", "verify": "checking"}

__all__ = ["compact", "merge", "repair", "verify"]


def __getattr__(name: str) -> Any:
    # No package or module in here may bear one of these names: its import would shadow the function.
    if name in _HOMES:
        return getattr(import_module(f"gradtrace.store.{_HOMES[name]}.{name}"), name)
    raise AttributeError(f"module 'gradtrace.store' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
