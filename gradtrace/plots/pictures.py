"""The pictures of a run by name: what each takes of it, how that is summed up, and the caption that says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from gradtrace.errors import SelectionError
from gradtrace.plots.curves import Curve, Panel, difference_figure, trajectory_figure
from gradtrace.plots.heat import Field, map_figure, naming, spectra_figure
from gradtrace.plots.legend import MOST_GROUPS
from gradtrace.plots.matrices import Matrix, matrix_figure
from gradtrace.plots.measures import Products, Spectrum
from gradtrace.plots.network import graph_figure
from gradtrace.plots.reading import GroupChoice, NothingToDraw, Series, Want, apart, pair, read, several, whole
from gradtrace.plots.request import Picture, Request
from gradtrace.plots.scales import Scale
from gradtrace.plots.scree import Scree, scree_figure
from gradtrace.plots.significance import significant_steps
from gradtrace.plots.summaries import BAND_WORDS, band, doublings, joint_cosines, mean, median, smooth
from gradtrace.plots.words import ALL, LOGARITHMIC, between, listed, matrix, metric_words, ordinal
from gradtrace.store.places.keys import Keys
from gradtrace.store.queries.query import cosines_of
from gradtrace.store.queries.selection import COSINE, OF_PRODUCTS, Query

MOST_PANELS = 6  # parameters with a panel of their own
MOST_SCREES = 3
MOST_BANDS = 3  # groups whose bands can be told apart on top of each other
MOST_FIELDS = 12


def map_picture(keys: Keys, request: Request) -> Picture:
    """A metric of every parameter over training; of several groups, one map each."""
    series = read(keys, request.query, request.want(whole), request.runs)
    fields = [
        Field(group if len(series.groups) > 1 else "", series.values[0, ..., at])
        for at, group in enumerate(series.groups)
    ]
    every, count = naming(len(series.parameters)), len(series.parameters)
    named = f"Every {ordinal(every)} of {count} parameters is named." if every > 1 else ""
    gaps = "Grey: not measured." if np.isnan(series.values).any() else ""
    caption = request.caption(series, _lead(request, series, "of each parameter at each step"), named, gaps)
    scale, sheet = request.scale(series.groups), request.sheet(caption)
    figure = map_figure(fields, series.steps, series.parameters, scale=scale, sheet=sheet, along=request.along)
    return Picture(figure, caption)


def spectra_picture(keys: Keys, request: Request) -> Picture:
    """Singular values by size over training, one heat map per parameter and group."""
    series = _spectra(keys, request, whole, most=MOST_PANELS)
    if len(series.parameters) * len(series.groups) > MOST_FIELDS:
        raise SelectionError(
            f"{len(series.parameters)} parameters of {len(series.groups)} groups are more than the {MOST_FIELDS} heat "
            "maps that a page can hold. Choose fewer groups by --group, or parameters by PATTERN."
        )
    fields = [
        Field(name, series.values[0, p, :, g].T, group if len(series.groups) > 1 else "")
        for p, name in enumerate(series.parameters)
        for g, group in enumerate(series.groups)
    ]
    caption = request.caption(series, _at_most(series, "over training"), _group(series), scaled=True)
    scale, sheet = _spectral(request, series), request.sheet(caption)
    return Picture(spectra_figure(fields, series.steps, scale=scale, sheet=sheet, along=request.along), caption)


def scree_picture(keys: Keys, request: Request) -> Picture:
    """Singular values by size, early and late."""
    series = _spectra(keys, request, few(apart), most=MOST_SCREES)
    some = max(1, len(series.steps) // 10)
    ends = {"early": slice(0, some), "late": slice(-some, None)} if len(series.steps) > 1 else {"": slice(None)}
    times = {_when(word, series.steps[rows]): rows for word, rows in ends.items()}
    screes = [
        Scree(name, {when: _groups(series, series.values[0, p, rows]) for when, rows in times.items()})
        for p, name in enumerate(series.parameters)
    ]
    steps = f"Line: median, band: {BAND_WORDS} of the {some} steps above each panel." if some > 1 else ""
    caption = request.caption(series, _at_most(series, "by size"), steps, scaled=True)
    return Picture(scree_figure(screes, scale=_spectral(request, series), sheet=request.sheet(caption)), caption)


def trajectory_picture(keys: Keys, request: Request) -> Picture:
    """A metric over training per group; of several runs, with a band over them."""
    want = request.want(few(apart), single=False)
    series = read(keys, request.query, want, request.runs)
    width = _width(request, series)
    lines = {group: series.values[..., at] for at, group in enumerate(series.groups)}
    parts = _panels(series, lines, width)
    caption = request.caption(
        series, _lead(request, series, "over training"), *_summed(series, width, len(series.groups))
    )
    scale, sheet = request.scale(series.groups), request.sheet(caption)
    return Picture(trajectory_figure(parts, series.steps, scale=scale, sheet=sheet, along=request.along), caption)


def difference_picture(keys: Keys, request: Request) -> Picture:
    """A metric of one group beside that of another, over training: their ratio, or, of ranks, the difference."""
    if request.metric == COSINE:
        raise SelectionError(
            "A cosine is between two groups already. Draw it as trajectory, or choose another --metric."
        )
    series = read(keys, request.query, request.want(pair, single=False), request.runs)
    width = _width(request, series)
    ratio, word = request.metric in LOGARITHMIC, metric_words(request.metric)
    values = doublings(series.values) if ratio else series.values[..., 0] - series.values[..., 1]
    what = between(series.groups, "÷" if ratio else "−")
    said = f"{'Ratio' if ratio else 'Difference'} of the {word} of the {request.kind}, {what}."
    marked, test = None, "Descriptive: of so many parameters together no test was made."
    if len(series.parameters) <= MOST_PANELS and request.metric not in OF_PRODUCTS:
        marked, test = significant_steps(keys, request, series)
    caption = f"{request.caption(series, said, *_summed(series, width))} {test}"
    figure = difference_figure(
        _panels(series, {what: values}, width), series.steps, scale=Scale(f"{word}\n{what}", log=ratio),
        sheet=request.sheet(caption), along=request.along, significant=marked,
    )  # fmt: skip
    return Picture(figure, caption)


def cosine_picture(keys: Keys, request: Request) -> Picture:
    """Median cosine between the gradients of every two groups."""
    said = "Cosine between the gradients of two groups, median over {count:,} steps; 1: same direction, −1: opposite."
    scale = Scale("cosine of the gradients", diverging=True, limits=(-1, 1))
    return _matrices(keys, request, said, scale, lambda cosines: median(cosines, axis=0))


def conflict_picture(keys: Keys, request: Request) -> Picture:
    """How often the gradients of two groups point against each other."""
    said = "Share of {count:,} steps in which the gradients of two groups point against each other (cosine < 0)."
    scale = Scale("share of steps in conflict", limits=(0, 1))
    return _matrices(keys, request, said, scale, lambda c: mean(np.where(np.isnan(c), np.nan, c < 0), axis=0))


def graph_picture(keys: Keys, request: Request) -> Picture:
    """The ops of the model, coloured by the median of a metric."""
    if request.graph is None:
        raise SelectionError("A store holds no graph of ops. Add --study STUDY: the study that was trained.")
    series = read(keys, request.query, request.want(whole), request.runs)
    if len(series.groups) > 1:
        raise SelectionError(f"A graph shows one group, and these are selected: {listed(series.groups, 8)}.")
    found = dict(zip(series.parameters, median(series.values[0, ..., 0], axis=1).tolist(), strict=True))
    values = {
        op: next((found[name] for name in data["parameters"].split(", ") if name in found), np.nan)
        for op, data in request.graph.nodes(data=True)
    }
    if not np.isfinite(list(values.values())).any():
        raise SelectionError(
            "No op of the study has a parameter of the run. Give the study that was trained, or other patterns. "
            f"The run has {listed(series.parameters)}."
        )
    said = _lead(request, series, f"of the first parameter of each op, median over {len(series.steps):,} steps")
    grey = "Grey: not measured." if np.isnan(list(values.values())).any() else ""
    caption = request.caption(series, said, grey)
    scale, sheet = request.scale(series.groups), request.sheet(caption)
    return Picture(graph_figure(request.graph, values, scale=scale, sheet=sheet), caption)


PICTURES: Mapping[str, Callable[[Keys, Request], Picture]] = {
    "spectra": spectra_picture,
    "trajectory": trajectory_picture,
    "scree": scree_picture,
    "difference": difference_picture,
    "map": map_picture,
    "cosine": cosine_picture,
    "conflict": conflict_picture,
    "graph": graph_picture,
}


def few(choice: GroupChoice) -> GroupChoice:
    """No more groups than colours tell apart."""

    def chosen(groups: Sequence[str], query: Query) -> Sequence[str]:
        found = choice(groups, query)
        if len(found) > MOST_GROUPS:
            raise SelectionError(
                f"Colours tell {MOST_GROUPS} groups apart, and there are {len(found)}: {listed(found, 8)}. "
                f"Choose some: --group {found[0]!r} --group {found[1]!r}."
            )
        return found

    return chosen


def _spectra(keys: Keys, request: Request, groups: GroupChoice, *, most: int) -> Series:
    """Singular values, without the places where no parameter has any."""
    want = Want(Spectrum(request.components, request.own_mean), groups, most=most)
    series = read(keys, request.query, want, request.runs)
    known = np.flatnonzero(~np.isnan(series.values).all(axis=(0, 1, 2, 3)))
    return replace(series, values=series.values[..., : known[-1] + 1])


def _matrices(
    keys: Keys, request: Request, said: str, scale: Scale, summed: Callable[[np.ndarray], np.ndarray]
) -> Picture:
    """One matrix per parameter; of many parameters, one of their gradients taken together."""
    series = read(keys, request.query, Want(Products(), several), request.runs)
    count, inner = len(series.parameters), series.values[0]
    if count <= MOST_PANELS:
        found = [Matrix(n, summed(cosines_of(v))) for n, v in zip(series.parameters, inner, strict=True)]
        together = ""
    else:
        found = [Matrix(f"{count} parameters", summed(joint_cosines(inner)))]
        together = f"Of the gradients of {count} parameters, taken together as one."
    if all(np.isnan(each.values[np.tril_indices_from(each.values, -1)]).all() for each in found):
        raise NothingToDraw(f"no two of the groups {listed(series.groups)} were measured in the same step")
    caption = request.caption(series, said.format(count=len(series.steps)), together, scaled=False)
    return Picture(matrix_figure(found, series.groups, scale=scale, sheet=request.sheet(caption)), caption)


def _panels(series: Series, lines: Mapping[str, np.ndarray], width: int) -> list[Panel]:
    """A panel per parameter, of few; else one, of all. lines: name -> (runs, parameters, steps)."""
    names, count = series.parameters, len(series.parameters)
    if count <= MOST_PANELS:
        found = [Panel(name, {g: _curve(v[:, p], width) for g, v in lines.items()}) for p, name in enumerate(names)]
    elif series.is_merged:
        found = [Panel(f"{count} parameters", {g: _curve(median(v, axis=1), width) for g, v in lines.items()})]
    else:
        found = [Panel(f"{count} parameters", {g: _smoothed(_summary(v[0]), width) for g, v in lines.items()})]
    return found if len(lines) <= MOST_BANDS else [_bare(panel) for panel in found]


def _bare(panel: Panel) -> Panel:
    """Without what would hide other groups' lines."""
    return replace(panel, curves={group: Curve(curve.line) for group, curve in panel.curves.items()})


def _curve(values: np.ndarray, width: int) -> Curve:
    """Of runs, (runs, steps): one as it is, below its running median; of several what these have in the middle."""
    if len(values) == 1:
        return Curve(smooth(values[0], width=width), under=values[0] if width > 1 else None)
    return _summary(np.stack([smooth(each, width=width) for each in values]))


def _summary(values: np.ndarray) -> Curve:
    """The median of the lines, with a band."""
    return Curve(median(values, axis=0), *band(values, axis=0))


def _smoothed(curve: Curve, width: int) -> Curve:
    known = {name: values for name, values in vars(curve).items() if values is not None}
    return replace(curve, **{name: smooth(values, width=width) for name, values in known.items()})


def _groups(series: Series, values: np.ndarray) -> dict[str, Curve]:
    """Group -> its median spectrum over the steps. values: (steps, groups, components)."""
    known = [(group, values[:, at]) for at, group in enumerate(series.groups)]
    return {group: Curve(each[0]) if len(each) == 1 else _summary(each) for group, each in known}


def _width(request: Request, series: Series) -> int:
    """Steps of the running median, an odd number."""
    width = len(series.steps) // 15 if request.smooth is None else request.smooth
    return max(1, width // 2 * 2 + 1) if width > 1 else 1


def _summed(series: Series, width: int, groups: int = 1) -> list[str]:
    """What lines and bands are, in sentences."""
    count, each = len(series.parameters), f"running medians over {width} steps" if width > 1 else "values"
    drawn = f"Line: median, band: {BAND_WORDS}" if groups <= MOST_BANDS else "Median"
    if series.is_merged:
        said = [f"{drawn} over {len(series.runs)} runs of their {each}."]
        return [*said, f"Of each run, the median over {count} parameters."] if count > MOST_PANELS else said
    if count > MOST_PANELS:
        return [f"{drawn} over {count} parameters{f', as {each}' if width > 1 else ''}."]
    thin = "Thin: every step shown; thick: " if groups <= MOST_BANDS else ""
    return [f"{thin}{each}.".capitalize()] if width > 1 else []


def _spectral(request: Request, series: Series) -> Scale:
    what = matrix(request.kind, own_mean=request.own_mean, groups=series.groups)
    return Scale(f"singular values ({what})", log=True, decades=5)


def _lead(request: Request, series: Series, where: str) -> str:
    """What is shown, and of whom."""
    label = request.scale(series.groups).label
    between = f"Between {series.groups[0]}." if request.metric == COSINE else _group(series)
    return f"{label[0].upper()}{label[1:]} {where}. {between}".strip()


def _group(series: Series) -> str:
    return f"Group: {series.groups[0]}." if len(series.groups) == 1 and series.groups[0] != ALL else ""


def _at_most(series: Series, where: str) -> str:
    return f"The {series.values.shape[-1]} largest singular values {where}, of those that were kept."


def _when(word: str, steps: np.ndarray) -> str:
    place = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"
    return f"{word}: {place}" if word else place
