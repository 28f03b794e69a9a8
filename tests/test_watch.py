"""Watches tell of an onset once, in the thread that trains, and leave the training as it is."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradtrace as gt
from gradtrace.errors import GradtraceError, SelectionError, WatchWarning
from gradtrace.metrics import METRICS, WHOLE
from gradtrace.store.rows import ParameterRow, Status, StepRow
from gradtrace.watch import Collapse, Divergence, Event, Explosion, NotFinite, Watch, mean_sigma1

GROUPS = ("all", "site=a", "site=b")
LABELS = ["a", "b", "a", "a", "b", "b", "a"]
Sigma = Sequence[float]


def row(
    step: int,
    spectra: dict[str, Sequence[Sigma]],
    *,
    samples: Sequence[int] = (12, 8, 4),
    codes: Sequence[int] = (Status.MEASURED,) * 3,
    cosine: float = 1.0,
) -> StepRow:
    """Spectra of gradients, per parameter and group; the groups' cosine is that of the last two."""
    parameters = {}
    for name, sigma in spectra.items():
        values = np.where(np.array(codes)[:, None] == Status.MEASURED, np.array(sigma, dtype=float), np.nan)
        norms = METRICS["frobenius"](values)
        cosines = np.array([[1, 1, 1], [1, 1, cosine], [1, cosine, 1]])
        parameters[name] = ParameterRow(
            spectra={"gradient": values},
            metrics={"gradient": {metric: METRICS[metric](values) for metric in WHOLE}},
            status={"gradient": np.array(codes, np.uint8)},
            inner_product=np.outer(norms, norms) * cosines,
        )
    return StepRow(step, GROUPS, np.array(samples), parameters)


def one(step: int, *sigma: float, **more: object) -> StepRow:
    """The same spectrum for each group of one parameter."""
    return row(step, {"w": [sigma] * 3}, **more)  # type: ignore[arg-type]


def told(watch: Watch, rows: Iterable[StepRow]) -> list[Event]:
    return [event for each in rows for event in watch.events(each)]


FULL, POOR = (1.0, 1.0, 1.0, 1.0), (1.0, 0.0, 0.0, 0.0)


def test_a_collapse_is_told_once_and_again_only_after_it_was_over() -> None:
    spectra = [FULL, FULL, POOR, POOR, POOR, POOR, FULL, POOR, POOR, POOR, POOR]
    events = told(Collapse(0.5, steps=3), (one(step, *sigma) for step, sigma in enumerate(spectra)))
    assert [event.step for event in events] == [4, 9]
    first = events[0]
    assert (first.parameter, first.kind, first.group, first.what) == ("w", "gradient", "all", "collapse")
    assert (first.value, first.threshold) == (1.0, 2.0)
    assert str(first) == (
        "Step 4: the gradient of w has effective_rank 1, below 0.5 of its maximum 4, for 3 recorded steps."
    )


def test_values_near_the_threshold_are_told_once() -> None:
    def rank(wanted: float) -> tuple[float, ...]:
        return (1.0, wanted - 1, 0.0, 0.0)

    ranks = [4.0, 1.9, 2.05, 1.9, 2.05, 1.9]
    spectra = [FULL if wanted == 4 else rank(wanted) for wanted in ranks]
    events = told(Collapse(0.5, metric="nuclear", steps=1), (one(at, *sigma) for at, sigma in enumerate(spectra)))
    assert [event.step for event in events] == [1]


def test_a_step_in_which_there_is_no_value_changes_nothing() -> None:
    absent = (Status.GROUP_ABSENT,) * 3
    rows = [one(0, *FULL), one(1, *POOR), one(2, *POOR, codes=absent), one(3, *POOR)]
    assert [event.step for event in told(Collapse(steps=2), rows)] == [3]


def test_an_explosion_is_above_what_was_usual() -> None:
    sizes = [1.0, 2.0, 1.0, 0.0, 2.0, 1.0, 15.0, 16.0, 1.0, 25.0]
    events = told(Explosion(10, least=3), (one(step, size, 0.0) for step, size in enumerate(sizes)))
    assert [event.step for event in events] == [6, 9]
    assert (events[0].value, events[0].threshold) == (15.0, 10.0)
    assert "largest singular value of 15, 15 times its median 1" in str(events[0])


def test_a_group_of_another_size_is_no_explosion() -> None:
    def sized(step: int, of_a: int) -> StepRow:
        """The mean gradient of each group is one."""
        return row(step, {"w": [[1.0], [of_a / 120], [1 - of_a / 120]]}, samples=(120, of_a, 120 - of_a))

    watch = Explosion(2, least=1, groups="site=*")
    assert told(watch, (sized(step, of_a) for step, of_a in enumerate((1, 119, 3, 60)))) == []
    assert mean_sigma1(sized(0, 30), sized(0, 30).parameters["w"], "gradient", 1) == pytest.approx(1.0)


def test_groups_diverge_by_size() -> None:
    def step(number: int, ratio: float) -> StepRow:
        return row(number, {"w": [[1.0], [8 / 12], [ratio * 4 / 12]]})

    ratios = [1.0, 5.0, 0.1, 5.0, 5.0, 1.0]
    events = told(Divergence("site=a", "site=b", ratio=3, steps=3), map(step, range(6), ratios))
    assert [(event.step, event.group) for event in events] == [(3, "site=a / site=b")]
    assert events[0].value == pytest.approx(5)
    assert "(site=a / site=b) is not the same for both: they differ in size by a factor of 5, above 3" in str(events[0])


def test_groups_diverge_by_direction() -> None:
    cosines = [0.9, -0.5, -0.5, 0.9]
    rows = [one(at, 1.0, cosine=cosine) for at, cosine in enumerate(cosines)]
    events = told(Divergence("site=a", "site=b", distance=1, steps=2), rows)
    assert [(event.step, event.value) for event in events] == [(2, pytest.approx(1.5))]


def test_one_group_without_any_gradient_is_infinitely_far() -> None:
    rows = [row(0, {"w": [[1.0], [1.0], [0.0]], "zero": [[0.0]] * 3})]
    events = told(Divergence("site=a", "site=b", ratio=3, steps=1), rows)
    assert [(event.parameter, event.value) for event in events] == [("w", math.inf)]
    assert told(Divergence("site=a", "site=c", ratio=3, steps=1), rows) == []


def test_what_is_not_finite_is_told_per_parameter() -> None:
    bad = (Status.NOT_FINITE, Status.MEASURED, Status.NOT_FINITE)
    codes = [bad, bad, (Status.MEASURED,) * 3, bad]
    rows = [row(at, {"w": [[1.0]] * 3, "v": [[1.0]] * 3}, codes=code) for at, code in enumerate(codes)]
    assert [(e.step, e.parameter) for e in told(NotFinite(), rows)] == [(0, "w"), (0, "v"), (3, "w"), (3, "v")]
    found = told(NotFinite(parameters="w", groups=["site=*"]), rows)
    assert [(e.step, e.group) for e in found] == [(0, "site=b"), (3, "site=b")]
    assert "the gradient of w (site=b) is not finite." in str(found[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Collapse(1.5),
        lambda: Collapse(metric="sigma1"),
        lambda: Explosion(0.5),
        lambda: Explosion(least=60),
        lambda: Divergence("a", "b"),
        lambda: Divergence("a", "b", ratio=2, distance=1),
        lambda: NotFinite(steps=0),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(make: Callable[[], Watch]) -> None:
    with pytest.raises(SelectionError):
        make()


# ---------------------------------------------------------------------- in a training


class Every:
    """A condition of somebody's own: it tells of every row."""

    def events(self, row: StepRow) -> list[Event]:
        return [Event(row.step, "0.weight", "gradient", "all", "every", 1.0, 0.0, f"Step {row.step}.")]


def trained(
    path: Path, watching: Callable[[gt.Recorder], None] = lambda recorder: None, *, steps: int = 5, **options: object
) -> list[torch.Tensor]:
    """The parameters after a training whose loss is infinite in step 3."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gt.record(model, path, **options) as recorder:  # type: ignore[arg-type]
        watching(recorder)
        for number in range(steps):
            with recorder.step(groups={"site": LABELS}):
                loss = model(torch.randn(7, 5)).square().mean()
                (loss * (torch.inf if number == 3 else 1)).backward()
            if number != 3:
                optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("behind", [False, True])
def test_calls_are_made_in_the_thread_that_trains(tmp_path: Path, behind: bool) -> None:
    events: list[Event] = []
    threads: set[int] = set()

    def call(event: Event) -> None:
        events.append(event)
        threads.add(threading.get_ident())

    def watching(recorder: gt.Recorder) -> None:
        recorder.watch(gt.watch.NotFinite(), call)
        recorder.watch(Every(), call)

    watched = trained(tmp_path / "watched.zarr", watching, behind=behind)
    plain = trained(tmp_path / "plain.zarr", behind=behind)
    assert all(torch.equal(one, other) for one, other in zip(watched, plain, strict=True))
    assert threads == {threading.get_ident()}
    assert [event.step for event in events if event.what == "every"] == [0, 1, 2, 3, 4]
    bad = [event for event in events if event.what == "not finite"]
    assert {event.step for event in bad} == {3}
    assert len(bad) == len({event.parameter for event in bad}) == 4


def test_by_default_one_warning_a_step_names_what_was_found(tmp_path: Path) -> None:
    with pytest.warns(WatchWarning) as found:
        trained(tmp_path / "run.zarr", lambda recorder: recorder.watch(gt.watch.NotFinite()))
    assert [str(warning.message) for warning in found] == [
        "Step 3: the gradient of 0.weight is not finite. The same of 3 more: 0.bias, 2.weight, 2.bias."
    ]
    assert found[0].filename == __file__


@pytest.mark.parametrize("behind", [False, True])
def test_what_a_callback_raises_stops_the_training_and_the_step_is_stored(tmp_path: Path, behind: bool) -> None:
    def stop(event: Event) -> None:
        if event.step == 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough") as raised:
        trained(tmp_path / "run.zarr", lambda recorder: recorder.watch(Every(), stop), steps=50, behind=behind)
    assert raised.value.__notes__[0] == "Raised by a callback of recorder.watch, called for: Step 2."
    run = gt.open_run(tmp_path / "run.zarr")
    assert run.closed
    assert 3 <= len(run.stream().steps) <= 6


@pytest.mark.parametrize("behind", [False, True])
def test_a_condition_that_fails_says_which_and_the_rows_are_stored(tmp_path: Path, behind: bool) -> None:
    class Broken:
        def events(self, row: StepRow) -> list[Event]:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as raised:
        trained(tmp_path / "run.zarr", lambda recorder: recorder.watch(Broken()), steps=50, behind=behind)
    assert "Raised by the condition <" in raised.value.__notes__[0]
    assert len(gt.open_run(tmp_path / "run.zarr").stream().steps) >= 1


def test_a_warning_can_be_made_to_stop_the_training(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        with pytest.raises(WatchWarning, match="Step 3"):
            trained(tmp_path / "run.zarr", lambda recorder: recorder.watch(gt.watch.NotFinite()))


def test_calls_that_wait_are_made_at_flush_and_close(tmp_path: Path) -> None:
    model, seen = nn.Linear(5, 3), list[int]()
    with gt.record(model, tmp_path / "run.zarr", behind=True, every=3) as recorder:
        recorder.watch(Every(), lambda event: seen.append(event.step))
        for _ in range(4):
            with recorder.step():
                model(torch.randn(7, 5)).square().mean().backward()
        recorder.flush()
        assert seen == [0, 3]
        for _ in range(3):
            with recorder.step():
                model(torch.randn(7, 5)).square().mean().backward()
    assert seen == [0, 3, 6]


def test_a_probe_is_watched_apart_from_the_training(tmp_path: Path) -> None:
    model, seen = nn.Linear(5, 3), list[tuple[str, int]]()
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        recorder.watch(Every(), lambda event: seen.append(("training", event.step)))
        recorder.watch(Every(), lambda event: seen.append(("val", event.step)), probe="val")
        with recorder.step():
            model(torch.randn(7, 5)).square().mean().backward()
        recorder.probe("val", [torch.randn(7, 5)], lambda output, batch: output.square().mean())
        recorder.probe("other", [torch.randn(7, 5)], lambda output, batch: output.square().mean())
    assert seen == [("training", 0), ("val", 1)]


def test_hidden_groups_are_not_told_of(tmp_path: Path) -> None:
    seen: list[Event] = []
    trained(
        tmp_path / "run.zarr",
        lambda recorder: recorder.watch(gt.watch.NotFinite(groups="site=*"), seen.append),
        min_samples=5,
    )
    assert seen == []


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (gt.watch.Collapse, "is no condition.*gt.watch.Collapse\\(0.5\\)"),
        (None, "is no condition"),
        (gt.watch.Collapse(parameters="0.wieght"), "Nearest: '0.weight'"),
        (gt.watch.Collapse(kinds="adjoint"), "does not record the kind 'adjoint'"),
    ],
)
def test_what_cannot_be_watched_is_refused(tmp_path: Path, condition: object, words: str) -> None:
    def watching(recorder: gt.Recorder) -> None:
        with pytest.raises(GradtraceError, match=words):
            recorder.watch(condition)  # type: ignore[arg-type]
        with pytest.raises(GradtraceError, match="cannot be called"):
            recorder.watch(gt.watch.NotFinite(), 3)  # type: ignore[arg-type]

    trained(tmp_path / "run.zarr", watching, steps=1, kinds=("gradient",))


def test_watches_need_no_torch() -> None:
    code = "import sys, gradtrace as gt; gt.watch.Collapse(0.5); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
