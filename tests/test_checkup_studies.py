"""What `examine` says of parameters without a gradient, of the batches, and of a study's own mistakes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradtrace.adapters as adapters_module
from gradtrace.checkup import Checkup, examine
from gradtrace.errors import CaptureError, GroupError, SelectionError, StudyError
from tests.trial_studies import FEATURES, HIDDEN, OUT, SAMPLES, Around, checked, perceptron, study_of


@pytest.fixture(autouse=True)
def same_draws_each_time() -> None:
    torch.manual_seed(0)


# ---------------------------------------------------------------------- parameters without a gradient


def test_why_a_parameter_got_no_gradient() -> None:
    def call(part: nn.Module, hidden: Tensor) -> Tensor:
        assert isinstance(part, nn.ModuleDict)
        part["aside"](hidden)
        return hidden

    part = {"aside": nn.Linear(HIDDEN, HIDDEN), "unused": nn.Linear(HIDDEN, HIDDEN)}
    found = examine(study_of(lambda: Around(nn.ModuleDict(part), call)))
    rows = {row.parameter: row for row in found.parameters}
    for name in ("part.aside.weight", "part.unused.bias"):
        assert (rows[name].rung, rows[name].verdict) == ("no gradient", "improvable")
    assert (
        "`torch.nn.functional.linear` used it, and no way leads from there to the loss"
        in rows["part.aside.weight"].advice[0]
    )
    assert "unused" in rows["part.unused.bias"].advice[0]
    assert found.ok
    assert found.factored_share == 1


def test_frozen_and_left_out_parameters_are_listed_with_the_reason() -> None:
    def frozen() -> nn.Module:
        model = perceptron()
        model.get_submodule("0").requires_grad_(False)
        return model

    rows = checked(frozen, options={"parameters": ["0.*", "2.weight"]})
    assert {name: row.rung for name, row in rows.items()} == {
        "0.weight": "excluded",
        "0.bias": "excluded",
        "2.weight": "factored",
        "2.bias": "excluded",
    }
    assert rows["0.weight"].reason == "does not require a gradient"
    assert rows["2.bias"].reason == "left out by parameters="
    assert rows["2.bias"].verdict == "-"
    with pytest.raises(SelectionError, match="matches no parameter"):
        checked(frozen, options={"parameters": "decoder.*"})


def test_a_gradient_of_zero_is_told_since_no_audit_could_see_anything() -> None:
    def zero_headed() -> nn.Module:
        model = perceptron()
        nn.init.zeros_(model.get_parameter("2.weight"))
        return model

    rows = checked(zero_headed)
    assert "exactly zero" in rows["0.weight"].advice[0]
    assert rows["2.weight"].advice == ()


# ---------------------------------------------------------------------- the batches


def test_a_loss_that_is_nan_fails_every_audit() -> None:
    found = examine(study_of(perceptron, loss=lambda output, batch: output.sum() * float("nan")))
    assert not found.ok
    assert np.isnan(found.loss)
    assert all(row.failed and "not finite" in row.advice[0] for row in found.parameters)
    assert found.notes[0].startswith("The loss of the first batch is nan")


def test_no_groups_are_told() -> None:
    for nothing in (None, {}):
        found = examine(study_of(perceptron, groups=lambda batch, groups=nothing: groups))
        assert found.ok
        assert found.groups == {"all": 7}
        assert "only `all` will be recorded" in found.notes[0]


def test_groups_that_the_first_batch_lacks_are_told() -> None:
    def batches() -> Iterable[Any]:
        for number in range(20):
            site = "Bern" if number == 0 else "Oslo"
            yield torch.randn(SAMPLES, FEATURES), [site] * 6 + [None]

    found = examine(study_of(perceptron, batches=batches))
    assert found.groups == {"all": 7, "site=Bern": 6, "site=<missing>": 1}
    (note,) = found.notes
    assert "site=Oslo has no sample in the first batch, and some in 7 of the first 8 batches" in note


def test_a_grouping_with_one_label_is_told() -> None:
    found = examine(study_of(perceptron, groups=lambda batch: {"site": ["Bern"] * SAMPLES}))
    assert "group site=Bern: there is nothing to compare by 'site'" in found.notes[0]


def test_one_sample_is_told() -> None:
    found = examine(study_of(perceptron, batches=lambda: [(torch.randn(1, FEATURES), ["Bern"])]))
    assert any("one sample" in note and "no layout can be learned" in note for note in found.notes)
    assert found.ok


def test_the_sample_axis_can_be_named() -> None:
    """As many samples as outputs: the graph tells which axis is which; one that is named wrongly is refused."""
    square = study_of(perceptron, batches=lambda: [(torch.randn(OUT, FEATURES), ["Bern", "Oslo"])])
    assert examine(square).ok
    assert examine(square, sample_dim=0).ok
    with pytest.raises(GroupError, match="sample_dim="):
        examine(square, sample_dim=2)


# ---------------------------------------------------------------------- the study's own mistakes


def _raise(*_: Any) -> Any:
    raise ValueError("no such site")


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            "model",
            r"model\(\) of the study trial.py failed: ValueError: no such site \(test_checkup_studies.py, line",
        ),
        ("batches", r"batches\(\) of the study trial.py failed: ValueError"),
        ("inputs", r"inputs\(batch\) of the study trial.py failed: ValueError"),
        ("groups", r"groups\(batch\) of the study trial.py failed: ValueError"),
        ("loss", r"loss\(output, batch\) of the study trial.py failed: ValueError"),
    ],
)
def test_an_exception_of_the_study_names_the_function_and_the_line(function: str, says: str) -> None:
    study = replace(study_of(perceptron), **{function: _raise})
    with pytest.raises(StudyError, match=says) as caught:
        examine(study)
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_forward_pass_that_fails_names_the_module() -> None:
    with pytest.raises(StudyError, match=r"forward pass of the model .* \(in Linear\(in_features=4, "):
        checked(lambda: nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Linear(4, OUT)))


def test_a_backward_pass_that_fails_is_told() -> None:
    def call(part: nn.Module, hidden: Tensor) -> Tensor:
        made = hidden.exp()
        return made + made.add_(1)  # exp's backward needs its result

    with pytest.raises(StudyError, match="the backward pass from loss"):
        checked(lambda: Around(None, call))


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        ({"batches": list}, "yielded nothing"),
        ({"batches": lambda: 3}, "cannot be looped over"),
        ({"loss": lambda output, batch: output}, r"loss\(output, batch\) .* a tensor shaped \(7, 2\)"),
        ({"model": lambda: "perceptron"}, "returned a str, not a torch.nn.Module"),
    ],
)
def test_what_a_study_returns_is_checked(functions: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        examine(replace(study_of(perceptron), **functions))


def test_lazy_parameters_are_told_with_the_remedy() -> None:
    with pytest.raises(StudyError, match=r"not initialised yet: 0.weight, 0.bias. Run one batch through the model in"):
        checked(lambda: nn.Sequential(nn.LazyLinear(HIDDEN), nn.Linear(HIDDEN, OUT)))


def test_a_loss_that_no_parameter_reaches_is_an_error() -> None:
    with pytest.raises(CaptureError, match="does not depend on the model"):
        checked(perceptron, loss=lambda output, batch: output.detach().sum())


# ---------------------------------------------------------------------- nothing is touched


def test_model_buffers_mode_and_random_state_are_left_alone() -> None:
    model = nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(), nn.Linear(HIDDEN, OUT)
    ).eval()
    seen: list[bool] = []
    model[2].register_forward_hook(lambda module, given, output: seen.append(module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    examine(study_of(lambda: model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not any(module.training for module in model.modules())
    assert seen
    assert all(seen), "the model is examined in the mode that training uses"


def test_what_is_found_is_frozen() -> None:
    found: Checkup = examine(study_of(perceptron))
    with pytest.raises(FrozenInstanceError):
        found.loss = 0.0  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        found.parameters[0].rung = "local"  # type: ignore[misc]


def test_plugins_that_cannot_be_used_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "wavelet (acme 1.0): ImportError: no module named pywt"
    entries = adapters_module._installed()[0]
    monkeypatch.setattr(adapters_module, "_installed", lambda: (entries, (broken,)))
    found = examine(study_of(perceptron))
    assert found.ok
    assert any(broken in note for note in found.notes)
