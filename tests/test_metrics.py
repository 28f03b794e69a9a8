"""Metrics are a registry: anybody's are stored or computed like our own, and a bad one stops nothing."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import gradtrace as gt
from gradtrace.cli import main
from gradtrace.errors import GradtraceError, MetricWarning
from gradtrace.metrics import BUILT_IN, METRICS, TAKEN, WHOLE, Metric, Spectra, described, register, stored
from gradtrace.store import verify
from gradtrace.store.forms import ALWAYS, SOMETIMES
from gradtrace.store.names import RESERVED
from gradtrace.store.queries.selection import OF_PRODUCTS
from gradtrace.store.rows import KINDS
from gradtrace.store.schema import status_variable

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"
Cli = Callable[..., Result]


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """Leaves the metrics as they were."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def metric(name: str = "tail", compute: Callable[[Spectra], np.ndarray] | None = None, **more: bool) -> Metric:
    """The share of the power that is not in the first singular value, or another function of spectra."""
    return Metric(name, "1 - sigma1^2 / sum sigma^2", "[0, 1)", "ours", compute or (lambda s: 1 - 1 / s.power), **more)


def recorded(path: Path, **options: object) -> gt.Run:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    with gt.record(model, path, **options) as recorder:  # type: ignore[arg-type]
        for _ in range(3):
            with recorder.step(groups={"site": ["a", "a", "b", "b", "b", "a", "b"]}):
                model(torch.randn(7, 5)).square().mean().backward()
    return gt.open_run(path)


def asked(path: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["query", str(path), *map(str, arguments)], catch_exceptions=False)


def values(path: Path, name: str, *arguments: object) -> np.ndarray:
    result = asked(path, "weight", "--kind", "gradient", "--metric", name, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return np.array([np.nan if row["value"] is None else row["value"] for row in json.loads(result.stdout)], float)


def test_a_whole_metric_is_stored_of_the_spectrum_before_it_is_cut(tmp_path: Path) -> None:
    register(metric(whole=True))
    whole, cut = recorded(tmp_path / "whole.zarr", keep=None), recorded(tmp_path / "cut.zarr", keep=1)
    node = cut.parameter("weight")
    np.testing.assert_array_equal(node["tail"], whole.parameter("weight")["tail"])
    np.testing.assert_allclose(node["tail"], 1 - 1 / node["stable_rank"], rtol=1e-5)
    np.testing.assert_allclose(node["adjoint_tail"], 1 - 1 / node["adjoint_stable_rank"], rtol=1e-5)
    assert cut.attrs["metrics"] == {"tail": {"definition": metric().definition, "range": "[0, 1)", "source": "ours"}}
    assert values(tmp_path / "cut.zarr", "tail") == pytest.approx(node["tail"].values.ravel(), rel=1e-6)


def test_other_metrics_are_computed_from_what_is_stored(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run.zarr", keep=2)
    assert "metrics" not in run.attrs
    register(Metric("gap", "sigma1 / sigma2", "[1, inf]", "ours", lambda s: s.sigma[..., 0] / s.sigma[..., 1]))
    assert "gap" not in stored()
    sigma = run.parameter("weight")["gradient"].values
    found = values(tmp_path / "run.zarr", "gap")
    assert found == pytest.approx((sigma[..., 0] / sigma[..., 1]).ravel(), rel=1e-6)
    said = asked(tmp_path / "run.zarr", "--metric", "gap").stderr
    assert "gap (sigma1 / sigma2) is computed from the stored singular values, the 2 largest." in said


def test_a_whole_metric_that_was_not_recorded_cannot_be_had(tmp_path: Path) -> None:
    recorded(tmp_path / "run.zarr")
    register(metric(whole=True))
    result = asked(tmp_path / "run.zarr", "--metric", "tail")
    assert result.exit_code == 1
    assert "did not record the metric 'tail'" in result.stderr
    assert "It needs whole spectra" in result.stderr


def test_a_stored_metric_that_nobody_knows_is_read_by_its_name(tmp_path: Path) -> None:
    known = register(metric(whole=True))
    recorded(tmp_path / "run.zarr")
    before = values(tmp_path / "run.zarr", "tail")
    del METRICS[known.name]
    np.testing.assert_array_equal(values(tmp_path / "run.zarr", "tail"), before)
    result = asked(tmp_path / "run.zarr", "--metric", "tial")
    assert result.exit_code == 1
    assert "Nearest: 'tail'" in result.stderr
    assert asked(tmp_path / "run.zarr", "--metric", "residual").exit_code == 1
    code = (
        "import sys, gradtrace as gt; print(gt.open_run(sys.argv[1]).stream().read('weight', 'tail').shape, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.zarr")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(3, 3) False"


BAD: dict[str, tuple[Callable[[Spectra], np.ndarray], str]] = {
    "raises": (lambda s: s.sigma[..., 10**6], "IndexError"),
    "gives_one_value": (lambda s: np.float64(1.0), "it gave values \\(\\)"),
    "gives_components": (lambda s: s.sigma, "it gave values"),
    "gives_words": (lambda s: np.full(s.top.shape, "large"), "ValueError"),
    "writes": (lambda s: np.add(s.sigma, 1, out=s.sigma)[..., 0], "ValueError"),
    "writes_what_others_use": (lambda s: np.add(s.relative, 1, out=s.relative)[..., 0], "ValueError"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("behind", [False, True])
def test_a_bad_metric_is_nan_and_told_once(tmp_path: Path, name: str, behind: bool) -> None:
    recorded(tmp_path / "without.zarr", keep=None)
    compute, words = BAD[name]
    register(metric(name, compute, whole=True))
    with pytest.warns(MetricWarning, match=f"The metric '{name}' failed and is NaN: .*{words}") as warned:
        run = recorded(tmp_path / "run.zarr", keep=None, behind=behind)
    assert len(warned) == 1
    assert np.isnan(run.parameter("weight")[name]).all()
    np.testing.assert_array_equal(
        run.parameter("weight")["gradient"], gt.open_run(tmp_path / "without.zarr").parameter("weight")["gradient"]
    )
    assert np.isnan(values(tmp_path / "run.zarr", name)).all()
    register(metric(name, compute), replace=True)
    with pytest.warns(MetricWarning):
        assert np.isnan(metric(name, compute).leniently(Spectra(np.ones((4, 3))))).all()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frobenius", "There is a metric 'frobenius' already.*Choose another name\\."),
        ("cosine", "cannot be called 'cosine'"),
        ("status", "cannot be called"),
        ("adjoint_tail", "cannot be called"),
        ("Tail", "cannot be called"),
        ("", "cannot be called"),
        ("two words", "cannot be called"),
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str, words: str) -> None:
    with pytest.raises(GradtraceError, match=words):
        register(metric(name), replace=True)


def test_a_name_that_is_taken_is_refused_unless_it_is_to_be_replaced() -> None:
    first = register(metric())
    assert register(first) is first
    with pytest.raises(GradtraceError, match=r"already.*replace=True"):
        register(metric(whole=True))
    assert register(metric(whole=True), replace=True).whole
    assert stored() == (*WHOLE, "tail")
    with pytest.raises(GradtraceError, match="is no metric"):
        register(lambda s: s.top)  # type: ignore[arg-type]


def test_everything_that_a_store_names_is_taken() -> None:
    names = {*RESERVED, *KINDS, *ALWAYS, *SOMETIMES, *OF_PRODUCTS}
    assert names - TAKEN == set()
    assert {status_variable(kind) for kind in KINDS} - {"status"} == {"activation_status", "adjoint_status"}


def test_installed_metrics_are_found(tmp_path: Path) -> None:
    about = tmp_path / "acme-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[gradtrace.metrics]\ntop = acme:top\nbroken = acme:nothing\n")
    (tmp_path / "acme.py").write_text(
        "from gradtrace.metrics import Metric\n"
        "top = Metric('acme_top', 'sigma1', '', '', lambda s: s.top, whole=True)\n"
    )
    code = (
        "import sys, gradtrace as gt; print(gt.metrics.stored()[-1], gt.metrics.find('acme_top').definition, "
        "'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.stdout.strip() == "acme_top sigma1 False"
    assert "The metric broken (acme:nothing): AttributeError" in done.stderr


def test_the_page_lists_every_metric_as_it_is_defined() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    ours = [METRICS[name] for name in METRICS if name in BUILT_IN]
    assert rows == [(m.name, m.definition, m.range, m.source, "yes" if m.whole else "no") for m in ours]


def test_what_is_said_in_a_run_is_only_of_metrics_that_are_not_built_in() -> None:
    assert described() == {}


def exported(path: Path, *arguments: str) -> list[dict[str, str]]:
    """The table of metrics, as a CSV file has it."""
    target = path.with_suffix(".csv")
    command = ["export", str(path), str(target), "--table", "metrics", *arguments]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
    return list(csv.DictReader(target.read_text().splitlines()))


def test_a_run_with_a_metric_that_nobody_knows_is_whole_and_exported_with_it(tmp_path: Path) -> None:
    known = register(metric(whole=True))
    recorded(tmp_path / "run.zarr")
    before = values(tmp_path / "run.zarr", "tail")
    del METRICS[known.name]
    assert verify(tmp_path / "run.zarr") == []
    rows = exported(tmp_path / "run.zarr", "weight", "--kind", "gradient")
    assert [float(row["tail"]) for row in rows] == pytest.approx(before.tolist(), rel=1e-6)


def test_a_metric_that_is_nan_everywhere_is_exported(tmp_path: Path) -> None:
    register(metric("nothing", lambda s: s.top * np.nan, whole=True))
    recorded(tmp_path / "run.zarr")
    assert {row["nothing"] for row in exported(tmp_path / "run.zarr", "--metric", "nothing")} == {""}


def test_groups_are_compared_by_a_metric_of_ones_own(tmp_path: Path) -> None:
    runs = [recorded(tmp_path / f"{number}.zarr", keep=None) for number in range(3)]
    register(Metric("gap", "sigma1 / sigma2", "[1, inf]", "ours", lambda s: s.sigma[..., 0] / s.sigma[..., 1]))
    found = gt.compare({str(at): run for at, run in enumerate(runs)}, "site", kinds=["gradient"], metrics=["gap"])
    node = runs[0].parameter("weight")["gradient"]
    gaps = (node[..., 0] / node[..., 1]).mean("step")
    assert found.columns["parameter"].tolist() == ["weight"]
    assert found.columns["mean"][0] == pytest.approx(float(gaps.sel(group="site=a")), rel=1e-5)
