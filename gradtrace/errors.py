"""The errors users see. Each message says what was found, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GradtraceError(Exception):
    """Base of everything gradtrace raises on purpose; the command line prints it without a traceback."""


class GroupError(GradtraceError):
    """Labels that cannot be matched to samples."""


class CaptureError(GradtraceError):
    """A forward or backward pass that cannot be traced as asked."""


class AdapterError(GradtraceError):
    """An adapter that is missing, claimed twice, or wrong."""


class StoreError(GradtraceError):
    """A run store that is missing, foreign, newer than this version, damaged, or in use."""


class StoreWarning(UserWarning):
    """Recording is in trouble, or has ended before its time; the training is not touched by that."""


class MetricWarning(UserWarning):
    """A metric that somebody registered fails: its values are NaN."""


class WatchWarning(UserWarning):
    """What a watch found: a rank that collapsed, groups that part, and their like."""


class SelectionError(GradtraceError):
    """A query for a parameter, group, kind, metric or step that is not in the store."""


class StudyError(GradtraceError):
    """A study file that lacks what `gradtrace train` needs."""


def nearest(name: str, choices: Iterable[str], *, most: int = 5) -> str:
    """A sentence naming the valid choices closest to `name`, or the first few of all when none is close."""
    known = list(dict.fromkeys(choices))
    if not known:
        return "There are none to choose from."
    close = get_close_matches(name, known, n=most, cutoff=0.5)
    if close:
        return f"Nearest: {', '.join(repr(c) for c in close)}."
    shown = ", ".join(repr(c) for c in known[:most])
    return f"Valid: {shown}{f' and {len(known) - most} more' if len(known) > most else ''}."
