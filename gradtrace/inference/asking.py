"""What somebody asks of a comparison, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradtrace.errors import SelectionError, nearest
from gradtrace.inference.correction import CORRECTIONS
from gradtrace.inference.evidence import CLUSTER
from gradtrace.inference.procedures import TESTS, Settings
from gradtrace.store.queries.selection import OF_PRODUCTS, Span
from gradtrace.store.reading.reader import Run

AUTO = "auto"  # of probes: the only one that has the groups, if there is one
MISSING = "=<missing>"
LEAST_DRAWS = 100

Groups = Mapping[str, Mapping[str | None, Sequence[str]]]  # run -> probe, or None -> its groups
Range = Span | tuple[float | None, float | None] | float | None


def groups_of(run: Run) -> dict[str | None, tuple[str, ...]]:
    """Probe, or None for the training -> its groups."""
    return {name: run.stream(name).groups for name in (None, *run.probe_names)}


def group_names(asked: Sequence[str], every: Groups) -> list[str]:
    """The groups that are meant: names, or groupings, which stand for all their groups that have a label."""
    known = list(dict.fromkeys(name for of in every.values() for groups in of.values() for name in groups))
    found = dict[str, None]()
    for name in asked:
        of_grouping = [one for one in known if one.startswith(f"{name}=") and not one.endswith(MISSING)]
        if name not in known and not of_grouping:
            raise SelectionError(f"There is no group {name!r} in this run. {nearest(name, known)}")
        found |= dict.fromkeys([name] if name in known else of_grouping)
    if len(found) < 2:
        what = f"Only {next(iter(found))!r} was given" if found else "No group was given"
        raise SelectionError(f"{what}; a comparison is of two groups or more. {nearest('', known)}")
    return list(found)


def check_metrics(metrics: Sequence[str]) -> None:
    """A SelectionError where a metric is not of one group's spectrum."""
    if {*OF_PRODUCTS} & {*metrics}:
        raise SelectionError("Cosine and share are of groups together; `gradtrace query --metric cosine` shows them.")
    if not metrics:
        raise SelectionError("No metric was given: there is nothing to compare.")


def probe_of(asked: str | None, names: Sequence[str], every: Groups) -> str | None:
    """The probe that is meant, None for the training; by default the only one that has all the groups."""
    if asked != AUTO:
        known = list(dict.fromkeys(probe for of in every.values() for probe in of if probe is not None))
        if asked is not None and asked not in known:
            raise SelectionError(f"There is no probe {asked!r} in this run. {nearest(asked, known)}")
        return asked
    having = [
        {probe for probe, groups in of.items() if probe is not None and {*names} <= {*groups}} for of in every.values()
    ]
    common = set.intersection(*having)
    return common.pop() if len(common) == 1 else None


def checked_test(test: str | None, correction: str, runs: int, settings: Settings) -> str:
    """The test that is meant, or a SelectionError that says why it cannot be had."""
    chosen = test or ("paired" if runs > 1 else CLUSTER)
    if chosen not in (*TESTS, CLUSTER):
        raise SelectionError(f"There is no test {chosen!r}. {nearest(chosen, (*TESTS, CLUSTER))}")
    if correction not in CORRECTIONS:
        raise SelectionError(f"There is no correction {correction!r}. {nearest(correction, CORRECTIONS)}")
    if runs == 1 and chosen != CLUSTER:
        raise SelectionError(
            f"The test {chosen!r} is over several training runs, and this is one, whose steps depend on each other. "
            "Give several runs (seeds or folds; `gradtrace merge`), or choose the test 'cluster'."
        )
    if (chosen == "resampled") != (settings.overlap is not None):
        raise SelectionError(
            "The resampled test and its overlap go together: test samples for each training sample of a fold, which is "
            "1 / (k - 1) for k folds."
        )
    if correction == "max" and (chosen not in ("permutation", CLUSTER) or runs == 1):
        raise SelectionError("The correction by the largest statistic is for permutation and cluster tests over runs.")
    if settings.overlap is not None and not settings.overlap > 0:
        raise SelectionError("The overlap is a ratio of numbers of samples: more than 0.")
    if settings.draws < LEAST_DRAWS:
        raise SelectionError(f"{settings.draws} permutations are too few for a p-value. Draw {LEAST_DRAWS} or more.")
    return chosen


def span_of(given: Range) -> Span | None:
    """(first, last), both included, or one number."""
    if given is None or isinstance(given, Span):
        return given
    return Span(*given) if isinstance(given, tuple) else Span(given, given)
