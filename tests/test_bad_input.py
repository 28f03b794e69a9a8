"""Bad input meets an error that says what was found, where, and what to do next; bad numbers never stop training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.errors import CaptureError, GradtraceError, GroupError, SelectionError, StoreError
from gradtrace.store.rows import Status

SAMPLES, TIME, FEATURES, OUTPUT = 7, 5, 11, 3
LABELS = ["SZ", "HC", "SZ", "SZ", "HC", "HC", "HC"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 13), nn.Tanh(), nn.Linear(13, OUTPUT))


def vectors(samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(1))


def mean_square(output: Tensor) -> Tensor:
    return output.square().mean()


def measure(labels: Any, **options: Any) -> Any:
    inputs = options.pop("inputs", vectors())
    return gt.spectra(options.pop("model", model()), inputs, options.pop("loss", mean_square), groups=labels, **options)


def complaint(error: type[GradtraceError], *words: str, labels: Any = LABELS, **options: Any) -> None:
    """Measuring so must fail with this error and these words."""
    with pytest.raises(error) as caught:
        measure(labels, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# Labels


def test_labels_of_the_wrong_length_name_both_lengths() -> None:
    complaint(GroupError, "6", "7", labels={"diagnosis": LABELS[:6]})


def test_groupings_of_different_lengths_are_refused() -> None:
    complaint(GroupError, "site", "6", "7", labels={"diagnosis": LABELS, "site": [0, 1, 0, 1, 0, 1]})


@pytest.mark.parametrize(
    "ages",
    [[18.5, 20.1, 33.3, 47.0, 52.9, 61.2, 64.0], torch.rand(SAMPLES), np.linspace(18, 65, SAMPLES)],
    ids=["list", "tensor", "array"],
)
def test_continuous_labels_are_refused_with_a_word_on_ranges(ages: Any) -> None:
    complaint(GroupError, "age", "numpy.digitize", labels={"age": ages})


def test_labels_per_position_are_refused() -> None:
    complaint(GroupError, "word", "(7, 5)", labels={"word": torch.zeros(SAMPLES, TIME, dtype=torch.long)})


def test_no_labels_at_all_are_one_group() -> None:
    assert measure(None)["0.weight"]["group"].values.tolist() == ["all"]


def test_a_bare_sequence_names_its_grouping_group() -> None:
    assert set(measure(LABELS)["0.weight"]["group"].values) == {"all", "group=SZ", "group=HC"}


def test_missing_labels_form_a_group_of_their_own() -> None:
    found = measure({"diagnosis": ["SZ", None, "SZ", float("nan"), "HC", "HC", "HC"]})["0.weight"]
    assert set(found["group"].values) == {"all", "diagnosis=SZ", "diagnosis=HC", "diagnosis=<missing>"}
    assert int(found["n_samples"].sel(group="diagnosis=<missing>")) == 2


# The sample axis


def test_an_ambiguous_sample_axis_asks_for_it() -> None:
    square = torch.randn(SAMPLES, SAMPLES, FEATURES)
    complaint(GradtraceError, "sample_dim", "(7, 7, 3)", inputs=square)
    assert "0.weight" in measure(LABELS, inputs=square, sample_dim=1).children


def test_a_sample_axis_of_another_length_is_refused() -> None:
    complaint(GradtraceError, "sample_dim", "5", "7", inputs=torch.randn(SAMPLES, TIME, FEATURES), sample_dim=1)


def test_an_output_without_the_samples_is_refused() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, OUTPUT)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(0)

    complaint(GradtraceError, "7", "(3,)", model=Pooled())


# The model and its loss


def test_a_model_without_trainable_parameters_is_refused() -> None:
    complaint(CaptureError, "requires_grad", model=model().requires_grad_(False))


def test_a_loss_that_does_not_depend_on_the_model_is_refused() -> None:
    complaint(CaptureError, "loss", loss=lambda output: torch.ones((), requires_grad=True))


def test_a_loss_without_a_graph_is_refused() -> None:
    complaint(CaptureError, "loss", loss=lambda output: output.detach().mean())


def test_a_loss_that_is_no_scalar_is_refused() -> None:
    complaint(CaptureError, "scalar", "(7, 3)", loss=lambda output: output.square())


def test_a_model_that_is_not_a_module_is_refused() -> None:
    complaint(GradtraceError, "Module", model=lambda x: x)


def test_a_measurement_switches_gradients_on_for_itself() -> None:
    with torch.no_grad():
        assert np.isfinite(measure(LABELS)["0.weight"]["gradient"].sel(group="all", component=0))


# What is asked for


def test_an_unknown_kind_lists_the_kinds() -> None:
    complaint(SelectionError, "gradients", "gradient", "activation", "adjoint", kinds=("gradients",))


def test_globs_that_match_nothing_show_near_names() -> None:
    complaint(SelectionError, "0.wieght", "0.weight", parameters=["0.wieght"])


def test_selected_parameters_alone_are_traced() -> None:
    assert set(measure(LABELS, parameters=["*.weight"]).children) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("keep", [0, -1, 2.5, "many"])
def test_a_keep_that_is_no_count_is_refused(keep: Any) -> None:
    complaint(GradtraceError, "keep", keep=keep)


# Steps


def test_a_step_without_backward_is_refused(tmp_path: Path) -> None:
    with (
        gt.record(model(), tmp_path / "run.zarr") as recorder,
        pytest.raises(CaptureError, match="backward"),
        recorder.step(groups=LABELS),
    ):
        pass


def test_a_step_within_a_step_is_refused(tmp_path: Path) -> None:
    with (
        gt.record(model(), tmp_path / "run.zarr") as recorder,
        pytest.raises(CaptureError, match="step"),
        recorder.step(groups=LABELS),
        recorder.step(groups=LABELS),
    ):
        pass


def test_a_step_after_close_is_refused(tmp_path: Path) -> None:
    with gt.record(model(), tmp_path / "run.zarr") as recorder:
        pass
    with pytest.raises(GradtraceError, match="closed"), recorder.step(groups=LABELS):
        pass


@pytest.mark.parametrize("every", [0, -3, 1.5])
def test_a_cadence_that_is_no_count_is_refused(every: Any, tmp_path: Path) -> None:
    with pytest.raises(GradtraceError, match="every"):
        gt.record(model(), tmp_path / "run.zarr", every=every)


def run_step(recorder: Any, network: nn.Module, inputs: Tensor, labels: Any) -> None:
    network.zero_grad()
    with recorder.step(groups=labels):
        mean_square(network(inputs)).backward()


def test_a_wrong_number_of_labels_in_a_step_is_refused_and_the_next_step_works(tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        with pytest.raises(GroupError, match="7"):
            run_step(recorder, network, vectors(), LABELS[:4])
        run_step(recorder, network, vectors(), LABELS)
    assert gt.open_run(tmp_path / "run.zarr").tree["0.weight"].sizes["step"] == 1


def test_labels_that_change_their_type_between_steps_are_refused(tmp_path: Path) -> None:
    """1 and "1" would be one group by name; the steps before are kept, and the next one works."""
    network = model()
    sites = [1, 2, 1, 2, 1, 2, None]
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        run_step(recorder, network, vectors(), sites)
        with pytest.raises(GroupError, match=r"string label '1' and.* the integer label 1\. Give all labels"):
            run_step(recorder, network, vectors(), [None if site is None else str(site) for site in sites])
        with pytest.raises(GroupError, match="integer label 1"):
            recorder.probe("val", [vectors()], lambda y, batch: mean_square(y), groups=["1"] * SAMPLES)
        run_step(recorder, network, vectors(), torch.tensor([2] * SAMPLES))
    tree = gt.open_run(tmp_path / "run.zarr").tree
    assert tree["0.weight"]["n_samples"].sel(group="group=2").values.tolist() == [3, 7]


def test_labels_of_two_types_in_one_batch_are_refused() -> None:
    with pytest.raises(GroupError, match=r"integer label 1 and.*string label 'Bern'"):
        measure(["Bern", 1, "Bern", "Bern", 1, 1, 1])


def test_a_gradient_that_is_not_finite_is_recorded_as_such_and_training_goes_on(tmp_path: Path) -> None:
    network = model()
    broken = vectors()
    broken[2, 3] = float("nan")
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        for inputs in (vectors(), broken, vectors()):
            run_step(recorder, network, inputs, LABELS)
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    assert node["status"].sel(group="all").values.tolist() == [Status.MEASURED, Status.NOT_FINITE, Status.MEASURED]
    assert np.isnan(node["gradient"].sel(group="all").isel(step=1)).all()
    assert np.isfinite(node["gradient"].sel(group="all").isel(step=2, component=0))


def test_a_group_absent_from_a_batch_is_no_error(tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        run_step(recorder, network, vectors(), LABELS)
        run_step(recorder, network, vectors(), ["HC"] * SAMPLES)
        run_step(recorder, network, vectors(), [*LABELS[:-1], "UNKNOWN"])
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    status = node["status"]
    assert status.sel(group="group=SZ").values.tolist() == [Status.MEASURED, Status.GROUP_ABSENT, Status.MEASURED]
    assert status.sel(group="group=UNKNOWN").values.tolist() == [0, 0, Status.MEASURED]
    assert node["n_samples"].sel(group="group=SZ").values.tolist() == [3, 0, 3]


def test_a_batch_of_one_is_measured(tmp_path: Path) -> None:
    found = measure(["SZ"], inputs=vectors(1))["0.weight"]["gradient"]
    assert found.sel(group="group=SZ").values == pytest.approx(found.sel(group="all").values, nan_ok=True)
    network = model()
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        for samples in (1, SAMPLES, 1, 2):
            run_step(recorder, network, vectors(samples), LABELS[:samples])
    gradient = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]["gradient"].sel(group="all", component=0)
    assert np.isfinite(gradient.values).all()


# Stores


def test_a_path_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not overwrite")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "data.csv").write_text("1,2,3")
    for path in (tmp_path / "thesis.txt", tmp_path / "folder"):
        with pytest.raises(StoreError, match=path.name), gt.record(model(), path):
            pass
    assert (tmp_path / "thesis.txt").read_text() == "do not overwrite"
    assert [child.name for child in (tmp_path / "folder").iterdir()] == ["data.csv"]


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    network = model()
    with gt.record(network, tmp_path / "run.zarr") as recorder:
        run_step(recorder, network, vectors(), LABELS)
    with pytest.raises(StoreError, match=r"run\.zarr"), gt.record(network, tmp_path / "run.zarr"):
        pass
    assert gt.open_run(tmp_path / "run.zarr").tree["0.weight"].sizes["step"] == 1


def test_opening_what_is_no_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "absent.zarr"):
        with pytest.raises(StoreError, match=path.name):
            gt.open_run(path)
