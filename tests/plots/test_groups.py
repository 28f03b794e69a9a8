"""The picture of group spectra: it shows the numbers it was given, and says what they are."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradtrace.errors import GradtraceError
from gradtrace.plots.groups import COMPONENTS, Panel, group_figure, smooth
from gradtrace.plots.look import require_matplotlib


def panel(factor: float = 4.0, steps: int = 21, components: int = 17) -> Panel:
    flat = np.exp(-np.arange(components) / 5) * np.ones((steps, 1))
    return Panel("recurrent", "gru.weight", np.arange(steps), {"gw": flat, "hcp": factor * flat}, {"one half": flat})


def test_lines_are_the_largest_singular_values() -> None:
    figure = group_figure([panel()], title="t", note="n")
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_allclose(drawn["gw"], 1.0)
    np.testing.assert_allclose(drawn["hcp"], 4.0)
    np.testing.assert_allclose(drawn["one half"], 1.0)


def test_the_heat_map_is_the_ratio_in_doublings() -> None:
    figure = group_figure([panel(factor=0.25)], title="t", note="n")
    (mesh,) = figure.axes[2].collections
    np.testing.assert_allclose(np.asarray(mesh.get_array()), -2.0)
    assert np.asarray(mesh.get_array()).size == COMPONENTS * 21
    assert mesh.get_clim() == (-2.0, 2.0)  # symmetric: white is equality


def test_axes_say_what_they_show() -> None:
    figure = group_figure([panel(), panel()], title="Two cohorts", note="no test was made")
    text = " ".join(axis.get_ylabel() for axis in figure.axes)
    assert "largest singular value" in text
    assert "mean gradient" in text
    assert "effective rank" in text
    assert "hcp ÷ gw" in text
    assert figure.get_suptitle() == "Two cohorts"
    assert figure.get_supxlabel() == "no test was made"


def test_an_absent_group_leaves_a_gap_and_no_warning(tmp_path: Path) -> None:
    shown = panel()
    shown.groups["gw"][3:15] = np.nan
    figure = group_figure([shown], title="t", note="n")
    figure.savefig(tmp_path / "gap.png")
    assert np.isnan(smooth(shown.groups["gw"][:, 0], width=3)).sum() == 10


def test_smoothing_is_a_running_median() -> None:
    np.testing.assert_array_equal(smooth(np.array([1.0, 9.0, 2.0, 3.0, np.nan]), width=3), [5.0, 2.0, 3.0, 2.5, 3.0])


def test_drawing_leaves_matplotlibs_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    group_figure([panel()], title="t", note="n")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GradtraceError, match=r'pip install "gradtrace\[plot\]"'):
        require_matplotlib()
