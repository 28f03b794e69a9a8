"""The graph of a study, as commands trace it."""

from __future__ import annotations

from typing import Any

from gradtrace.errors import StudyError


def graph_of_study(target: str) -> Any:
    """The OpGraph of the study's model on its first batch."""
    import gradtrace
    from gradtrace.study import load_study

    study = load_study(target)
    batch = next(iter(study.batches()), None)
    if batch is None:
        raise StudyError(f"The batches() of {target} yield nothing, so there is no input to trace. Yield a batch.")
    return gradtrace.trace(study.model(), study.inputs(batch))
