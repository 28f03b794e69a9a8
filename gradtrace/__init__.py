"""gradtrace: see how a network learns, and for whom. Public names are resolved lazily: queries start without torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradtrace.errors import GradtraceError

if TYPE_CHECKING:
    from gradtrace import bounds, func, metrics, watch
    from gradtrace.graph import OpGraph
    from gradtrace.inference.comparison import compare
    from gradtrace.inputs import Inputs
    from gradtrace.measure import spectra, trace
    from gradtrace.planning.plan import plan
    from gradtrace.planning.planned import Plan
    from gradtrace.recorder import Recorder
    from gradtrace.recording import record
    from gradtrace.store.reading.opened import open_run
    from gradtrace.store.reading.reader import Run

__version__ = "0.1.0"

_HOMES = {
    "Inputs": "gradtrace.inputs",
    "OpGraph": "gradtrace.graph",
    "Plan": "gradtrace.planning.planned",
    "Recorder": "gradtrace.recorder",
    "Run": "gradtrace.store.reading.reader",
    "compare": "gradtrace.inference.comparison",
    "open_run": "gradtrace.store.reading.opened",
    "plan": "gradtrace.planning.plan",
    "record": "gradtrace.recording",
    "spectra": "gradtrace.measure",
    "trace": "gradtrace.measure",
}

_MODULES = ("bounds", "func", "metrics", "watch")

__all__ = [
    "GradtraceError",
    "Inputs",
    "OpGraph",
    "Plan",
    "Recorder",
    "Run",
    "__version__",
    "bounds",
    "compare",
    "func",
    "metrics",
    "open_run",
    "plan",
    "record",
    "spectra",
    "trace",
    "watch",
]


def __getattr__(name: str) -> Any:
    # No module may bear a public function's name (`plan`, `record`, `spectra`, ...): its import would shadow it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"gradtrace.{name}")
    raise AttributeError(f"module 'gradtrace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(__all__) | set(globals()))
