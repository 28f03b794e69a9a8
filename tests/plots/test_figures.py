"""Figures show the numbers they are given, name what they show, and stay legible at the width of a column."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
import pytest

from gradtrace.plots.curves import Curve, Panel, difference_figure, trajectory_figure
from gradtrace.plots.heat import MOST_NAMES, Field, edges, map_figure, spectra_figure
from gradtrace.plots.legend import style
from gradtrace.plots.look import COLOURS, NOT_THERE
from gradtrace.plots.matrices import Matrix, matrix_figure
from gradtrace.plots.network import MOST_LEVELS, graph_figure, layout
from gradtrace.plots.scales import Scale
from gradtrace.plots.scree import Scree, scree_figure
from gradtrace.plots.sheet import DPI, FORMATS, WIDTHS, Sheet, encoded
from gradtrace.plots.words import short_names

STEPS = np.arange(0, 34, 2)
SHEET = Sheet("column", "What is shown.")
SCALE = Scale("effective rank (gradient)")
NAMES = [f"encoder.layers.{at}.self_attn.out_proj.weight" for at in range(413)]
rng = np.random.default_rng(3)


def mesh(axis: Any) -> Any:
    (found,) = axis.collections
    return found


def bounds(figure: Any, texts: Sequence[Any]) -> list[Any]:
    figure.draw_without_rendering()
    return [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]


def test_a_map_holds_its_values_and_names_its_rows() -> None:
    values = rng.random((5, len(STEPS)))
    figure = map_figure([Field("", values)], STEPS, list("abcde"), scale=SCALE, sheet=SHEET, along="training step")
    np.testing.assert_array_equal(np.asarray(mesh(figure.axes[0]).get_array()), values)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abcde")
    low, high = figure.axes[0].get_ylim()
    assert low > high, "the first row is on top"
    assert figure.axes[0].get_xlabel() == "training step"
    assert figure.axes[-1].get_ylabel().split() == SCALE.label.split()
    assert figure.get_supxlabel() == "What is shown."


def test_of_many_rows_so_many_are_named_that_their_names_do_not_overlap() -> None:
    values = rng.random((413, len(STEPS)))
    figure = map_figure([Field("", values)], STEPS, NAMES, scale=SCALE, sheet=SHEET, along="step")
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) <= MOST_NAMES
    assert len({label.get_text() for label in labels}) == len(labels)
    boxes = sorted(bounds(figure, labels), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))
    assert figure.axes[0].get_window_extent().width > 0.35 * figure.bbox.width, "names leave room for the map"
    assert np.asarray(mesh(figure.axes[0]).get_array()).shape == (413, len(STEPS))


def test_what_was_not_measured_is_grey_and_zero_is_below_a_logarithmic_scale() -> None:
    values = np.array([[1.0, 10.0, 100.0], [np.nan, 0.0, 5.0]])
    scale = Scale("largest singular value", log=True)
    figure = map_figure([Field("", values)], np.arange(3), ["a", "b"], scale=scale, sheet=SHEET, along="step")
    image = mesh(figure.axes[0])
    colours = image.cmap(image.norm(image.get_array()))
    from matplotlib.colors import to_rgba

    np.testing.assert_allclose(colours[1, 0], to_rgba(NOT_THERE))
    np.testing.assert_allclose(colours[1, 1], image.cmap.get_under())


def test_the_cells_of_steps_end_half_way() -> None:
    np.testing.assert_array_equal(edges(np.array([0, 2, 8])), [-1, 1, 5, 11])
    np.testing.assert_array_equal(edges(np.array([7])), [6.5, 7.5])


def test_spectra_have_as_many_rows_as_there_are_values() -> None:
    few = np.full((6, len(STEPS)), np.nan)
    few[:2] = rng.random((2, len(STEPS)))
    fields = [Field("a.weight", rng.random((6, len(STEPS)))), Field("b.weight", few)]
    figure = spectra_figure(fields, STEPS, scale=Scale("singular values", log=True), sheet=SHEET, along="step")
    first, second = figure.axes[:2]
    np.testing.assert_array_equal(np.asarray(mesh(second).get_array()), few[:2])
    assert mesh(first).get_clim() == mesh(second).get_clim(), "one scale for all"
    assert second.get_ylim() == (2.5, 0.5)


def test_a_trajectory_draws_lines_and_bands_in_the_groups_colours() -> None:
    line, width = rng.random(len(STEPS)) + 1, 0.25
    curves = {"dx=HC": Curve(line, line - width, line + width), "dx=SZ": Curve(2 * line, under=line)}
    figure = trajectory_figure([Panel("fc1.weight", curves)], STEPS, scale=SCALE, sheet=SHEET, along="step")
    axis = figure.axes[0]
    drawn = {(each.get_color(), each.get_linewidth()): each.get_ydata() for each in axis.lines}
    np.testing.assert_array_equal(drawn[COLOURS[0], 1.3], line)
    np.testing.assert_array_equal(drawn[COLOURS[1], 1.3], 2 * line)
    np.testing.assert_array_equal(drawn[COLOURS[1], 0.4], line)
    (band,) = axis.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == (line - width).min()
    assert corners[:, 1].max() == (line + width).max()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["HC", "SZ"]
    assert legend.get_title().get_text() == "dx"
    assert axis.get_ylabel().replace("\n", " ") == SCALE.label


def test_groups_of_another_grouping_have_other_dashes() -> None:
    groups = ["all", "dx=HC", "dx=SZ", "site=1"]
    assert style("dx=HC", groups)["ls"] == style("dx=SZ", groups)["ls"] != style("site=1", groups)["ls"]
    assert len({style(group, groups)["color"] for group in groups}) == 4


def test_single_outlying_steps_do_not_flatten_the_rest() -> None:
    line = np.ones(400)
    line[200] = 1e6
    figure = trajectory_figure([Panel("a", {"all": Curve(line)})], np.arange(400), scale=SCALE, sheet=SHEET, along="s")
    assert figure.axes[0].get_ylim()[1] < 10


def test_a_difference_is_named_in_times_and_marks_what_is_significant() -> None:
    doublings = np.linspace(-1, 1, len(STEPS))
    significant = np.zeros(len(STEPS), dtype=bool)
    significant[[3, 4, 9]] = True
    figure = difference_figure(
        [Panel("a", {"HC ÷ SZ": Curve(doublings)})], STEPS, scale=Scale("σ\nHC ÷ SZ", log=True), sheet=SHEET,
        along="step", significant=significant,
    )  # fmt: skip
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.lines[1].get_ydata(), doublings)
    (marks,) = axis.collections
    spans = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in marks.get_paths()]
    assert spans == [(5, 7), (7, 9), (17, 19)]
    assert {"0.5×", "1×", "2×"} <= {label.get_text() for label in axis.get_yticklabels()}


def test_without_a_test_nothing_is_marked_and_each_panel_may_have_its_own_marks() -> None:
    panels = [Panel(name, {"HC − SZ": Curve(np.zeros(len(STEPS)))}) for name in ("a", "b")]
    plain = difference_figure(panels, STEPS, scale=SCALE, sheet=SHEET, along="step")
    assert [len(axis.collections) for axis in plain.axes] == [0, 0]
    marked = np.zeros((2, len(STEPS)), dtype=bool)
    marked[1, 2] = True
    figure = difference_figure(panels, STEPS, scale=SCALE, sheet=SHEET, along="step", significant=marked)
    assert [len(axis.collections) for axis in figure.axes] == [0, 1]


def test_scree_plots_show_each_time_on_one_axis_down_to_rounding() -> None:
    sigma = np.array([10.0, 1.0, 0.1, 1e-9])
    times = {"early": {"all": Curve(sigma)}, "late": {"all": Curve(sigma / 2)}}
    figure = scree_figure([Scree("fc1.weight", times)], scale=Scale("singular values", log=True), sheet=SHEET)
    early, late = figure.axes
    np.testing.assert_array_equal(early.lines[0].get_ydata(), sigma)
    np.testing.assert_array_equal(late.lines[0].get_xdata(), [1, 2, 3, 4])
    assert early.get_ylim() == late.get_ylim()
    assert early.get_ylim()[0] > 1e-3


def test_matrices_show_each_pair_once_with_its_number() -> None:
    values = np.array([[1, 0.5, -0.25], [0.5, 1, np.nan], [-0.25, np.nan, 1]])
    scale = Scale("cosine", diverging=True, limits=(-1, 1))
    figure = matrix_figure([Matrix("a", values)], ["s=1", "s=2", "s=3"], scale=scale, sheet=SHEET)
    axis = figure.axes[0]
    assert [text.get_text() for text in axis.texts] == ["0.50", "−0.25", "–"]
    drawn = np.ma.filled(np.ma.asarray(mesh(axis).get_array()).reshape(2, 2), np.nan)
    np.testing.assert_array_equal(drawn, [[0.5, np.nan], [-0.25, np.nan]])
    assert mesh(axis).get_clim() == (-1, 1)
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "3"]


def test_a_graph_flows_down_and_goes_on_in_the_next_column() -> None:
    chain = nx.DiGraph([(f"op{at}", f"op{at + 1}") for at in range(MOST_LEVELS + 4)])
    chain.add_edge("op0", "side")
    place, levels, columns = layout(chain)
    assert (levels, columns) == (MOST_LEVELS, 3)
    assert place["op0"] == (0, 0)
    assert place[f"op{MOST_LEVELS}"] == (2, 0)
    assert len(set(place.values())) == len(chain)
    figure = graph_figure(chain, {"op1": 2.0, "op2": 4.0}, scale=SCALE, sheet=SHEET)
    points = figure.axes[0].collections[0]
    known = dict(zip(chain, np.ma.filled(points.get_array(), np.nan), strict=True))
    assert (known["op1"], known["op2"]) == (2.0, 4.0)
    assert np.isnan(known["op3"])


@pytest.mark.parametrize("width", WIDTHS)
def test_titles_and_names_stay_on_the_sheet_and_apart(width: str) -> None:
    panels = [Panel(name, {"all": Curve(rng.random(len(STEPS)))}) for name in NAMES[:6]]
    figure = trajectory_figure(panels, STEPS, scale=SCALE, sheet=Sheet(width, "word " * 60), along="training step")
    titles = bounds(figure, [axis._left_title for axis in figure.axes])
    for at, box in enumerate(titles):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width + 1
        assert not any(box.overlaps(other) for other in titles[:at])
    (note,) = bounds(figure, [figure._supxlabel])
    assert note.x1 <= figure.bbox.width
    assert note.y1 <= min(axis.get_tightbbox().y0 for axis in figure.axes) + 1
    assert figure.get_figwidth() == WIDTHS[width]


def test_no_font_is_smaller_than_five_points_and_no_line_is_a_hair() -> None:
    from matplotlib.text import Text

    figure = map_figure([Field("", rng.random((99, 3)))], np.arange(3), NAMES[:99], scale=SCALE, sheet=SHEET, along="s")
    assert min(text.get_fontsize() for text in figure.findobj(Text)) >= 5


def test_names_are_cut_to_fit_and_stay_apart() -> None:
    assert short_names(["fc1.weight", "fc2.weight"], 12) == ["fc1.weight", "fc2.weight"]
    cut = short_names(NAMES[:40], 26)
    assert max(map(len, cut)) <= 26
    assert len(set(cut)) == 40
    assert cut[7] == "…7…out_proj.weight"
    assert len(short_names(["a" * 50, "a" * 50], 9)[0]) == 9


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_figure_gives_the_same_file_in_every_format(form: str) -> None:
    def once() -> bytes:
        values = np.arange(12.0).reshape(3, 4)
        figure = map_figure([Field("", values)], np.arange(4), list("abc"), scale=SCALE, sheet=SHEET, along="step")
        return encoded(figure, form)

    data = once()
    assert data == once()
    assert data.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[form])


def test_a_picture_in_dots_is_as_wide_as_the_column() -> None:
    figure = map_figure([Field("", np.ones((2, 2)))], np.arange(2), ["a", "b"], scale=SCALE, sheet=SHEET, along="s")
    (width,) = struct.unpack(">I", encoded(figure, "png")[16:20])
    assert width == round(WIDTHS["column"] * DPI)
