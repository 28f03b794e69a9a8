"""Training under a recorder is training: bit for bit the same parameters, buffers, random state and hook calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradtrace as gt
from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, Case, Problem, call, labels
from tests.models import BY_NAME, CASES
from tests.oracles import SEED, Gradients, group_loss_gradients, group_row_gradients, spectrum
from tests.snapshot import Snapshot

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
HANDFUL = [
    BY_NAME[name]
    for name in (
        *("mlp_sequences", "reused_module", "batch_norm2d", "residual_network", "lstm_dropout", "gru_packed"),
        *("tied_language_model", "encoder_layer_dropout", "checkpoint_reentrant_dropout", "spectral_norm"),
        *("checkpoint_non_reentrant_dropout", "top_k_experts", "custom_function", "position_table_dropped"),
    )
]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def train(problem: Problem, steps: int, *, recorder: Any = None, optimizer: str = "sgd") -> list[float]:
    """The losses of some steps of training from the fixed random state."""
    torch.manual_seed(SEED)
    learner = OPTIMIZERS[optimizer](problem.model.parameters())
    losses = []
    for _ in range(steps):
        with nullcontext() if recorder is None else recorder.step(groups=problem.labels):
            loss = problem.loss_fn(call(problem.model, problem.inputs))
            loss.backward()
        learner.step()
        learner.zero_grad()
        losses.append(loss.item())
    return losses


def assert_training_is_untouched(case: Case, path: Path, steps: int, *, every: int = 1, optimizer: str = "sgd") -> None:
    plain, traced = case.build(torch.float32), case.build(torch.float32)
    losses = train(plain, steps, optimizer=optimizer)
    expected = Snapshot.of(plain.model)
    with gt.record(traced.model, path, every=every, **traced.options) as recorder:
        assert train(traced, steps, recorder=recorder, optimizer=optimizer) == losses
    assert Snapshot.of(traced.model).changes_since(expected) == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_few_traced_steps_are_those_untraced(case: Case, tmp_path: Path) -> None:
    assert_training_is_untouched(case, tmp_path / "run.zarr", 5)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", HANDFUL, ids=str)
def test_twenty_traced_steps_are_those_untraced(case: Case, optimizer: str, every: int, tmp_path: Path) -> None:
    assert_training_is_untouched(case, tmp_path / "run.zarr", 20, every=every, optimizer=optimizer)


@pytest.mark.parametrize("case", HANDFUL, ids=str)
def test_the_store_holds_what_the_oracles_say(case: Case, tmp_path: Path) -> None:
    problem = case.build()
    with gt.record(problem.model, tmp_path / "run.zarr", keep=None, **problem.options) as recorder:
        train(problem, 1, recorder=recorder)
    oracle = (group_row_gradients if case.coupled else group_loss_gradients)(case, torch.float64)
    tree = gt.open_run(tmp_path / "run.zarr").tree
    for name, whole in oracle["all"].items():
        for group, gradients in oracle.items():
            expected = spectrum(gradients[name]).numpy()
            found = tree[name]["gradient"].sel(group=group).isel(step=0).dropna("component").values
            found = np.pad(found, (0, len(expected) - len(found)))
            rounding = 1e-6 * max(spectrum(whole)[0].item(), expected[0])  # values are stored in float32
            assert found == pytest.approx(expected, rel=0, abs=rounding + 1e-9), (name, group)


VARYING = [
    BY_NAME[name]
    for name in (
        *("mlp_sequences", "reused_module", "conv2d", "transposed2d", "lstm_packed", "gru_time_first", "rnn_cell"),
        *("attention_batch_first", "class_token", "tied_language_model", "weight_norm", "spectral_norm", "orthogonal"),
        *("checkpoint_non_reentrant", "top_k_experts", "windows_major_folding", "boolean_mask", "chunked_batch"),
        *("custom_function", "position_table_as_long_as_the_batch", "selective_scan", "siamese", "embedding_bag"),
    )
]
BATCHES = [(0, 1, 2, 3, 4, 5, 6), (6, 3), (4,), (5, 0, 2, 1, 3), (2, 4, 1, 0, 6, 5, 3)]


@pytest.mark.parametrize("case", VARYING, ids=str)
def test_every_step_is_right_as_weights_data_and_batch_sizes_change(case: Case, tmp_path: Path) -> None:
    """What was learned of a model in one step is not trusted where it no longer holds."""
    traced = case.build()
    learner = torch.optim.SGD(traced.model.parameters(), lr=0.05)
    expected = []
    options = {"sample_dim": 0, **traced.options}  # some batch is as long as a sequence
    with gt.record(traced.model, tmp_path / "run.zarr", keep=None, **options) as recorder:
        for number, samples in enumerate(BATCHES):
            batch = case.build(draw=number).of(samples)
            state = copy.deepcopy(traced.model.state_dict())
            expected.append(shares(case, number, samples, state))
            with recorder.step(groups=batch.labels):
                batch.loss_fn(call(traced.model, batch.inputs)).backward()
            learner.step()
            learner.zero_grad()
    tree = gt.open_run(tmp_path / "run.zarr").tree
    for number, groups in enumerate(expected):
        largest = max(gradient.norm().item() for gradient in groups["all"].values())
        for group, gradients in groups.items():
            for name, gradient in gradients.items():
                sigma = spectrum(gradient).numpy()
                found = tree[name]["gradient"].sel(group=group).isel(step=number).dropna("component").values
                found = np.pad(found, (0, max(0, len(sigma) - len(found))))[: len(sigma)]
                allowed = 1e-6 * max(spectrum(groups["all"][name])[0].item(), sigma[0]) + 1e-9 * largest
                assert np.abs(found - sigma).max() <= allowed, (number, name, group)


def test_a_sample_axis_once_told_from_the_others_stays(tmp_path: Path) -> None:
    """A last batch that happens to be as long as another axis does not end a training run."""
    case = BY_NAME["mlp_sequences"]
    model = case.build().model
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        for samples in (range(7), range(5), range(3)):
            batch = case.build().of(list(samples))
            with recorder.step(groups=batch.labels):
                batch.loss_fn(model(batch.inputs)).backward()
            model.zero_grad()
    assert gt.open_run(tmp_path / "run.zarr").tree["0.weight"]["n_samples"].sel(group="all").values.tolist() == [
        7,
        5,
        3,
    ]


def shares(case: Case, draw: int, samples: tuple[int, ...], state: dict[str, Tensor]) -> Gradients:
    """Gradient of every group's share of the loss, for these weights and this batch."""
    result: Gradients = {}
    given = case.build(draw=draw).of(samples).labels
    members = {"all": [True] * len(samples)}
    for grouping, values in given.items():
        listed = values.tolist() if isinstance(values, Tensor) else list(values)
        members |= {f"{grouping}={label}": [label == other for other in listed] for label in set(listed)}
    for group, mask in members.items():
        problem = case.build(draw=draw).of(samples)
        problem.model.load_state_dict(state)
        per_sample = problem.per_sample(call(problem.model, problem.inputs))
        (per_sample[torch.tensor(mask)].sum() / len(samples)).backward()
        result[group] = {name: p.grad for name, p in problem.model.named_parameters() if p.grad is not None}
    return result


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(7)
    layers = (nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, OUTPUT))
    return nn.Sequential(*layers).to(dtype)


def vectors(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SAMPLES, FEATURES, dtype=dtype, generator=torch.Generator().manual_seed(11))


Events = list[tuple[Any, ...]]


def attach_hooks(model: nn.Module, events: Events) -> None:
    """Every kind of hook that a user may have set, each noting its call and what it was given."""
    note = lambda kind, name, value: events.append((kind, name, float(value.detach().double().norm())))  # noqa: E731
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda m, args, n=name: note("pre", n, args[0]))
        module.register_forward_hook(lambda m, args, out, n=name: note("forward", n, out))
        module.register_full_backward_pre_hook(lambda m, out, n=name: note("backward pre", n, out[0]))
        module.register_full_backward_hook(lambda m, into, out, n=name: note("backward", n, out[0]))
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, n=name: note("tensor", n, grad))
        parameter.register_post_accumulate_grad_hook(lambda p, n=name: note("accumulated", n, p.grad))


def hooked_steps(recorder: Any, model: nn.Module, events: Events, steps: int = 3) -> None:
    attach_hooks(model, events)
    learner = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        with nullcontext() if recorder is None else recorder.step(groups=labels()):
            hidden = model[1](model[0](vectors().requires_grad_()))
            hidden.register_hook(lambda grad: events.append(("activation", float(grad.norm()))))
            output = model[3](model[2](hidden))
            output.square().mean().backward()
        learner.step()
        learner.zero_grad()


def test_hooks_of_the_user_fire_exactly_as_often(tmp_path: Path) -> None:
    plain, traced = mlp(), mlp()
    expected: Events = []
    events: Events = []
    hooked_steps(None, plain, expected)
    with gt.record(traced, tmp_path / "run.zarr") as recorder:
        hooked_steps(recorder, traced, events)
    assert events == expected
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []


def test_a_hook_that_changes_the_gradient_is_no_false_alarm(tmp_path: Path) -> None:
    """The audit compares with what autograd produced, before the user's hooks."""
    model = mlp(torch.float64)
    model[0].weight.register_hook(lambda grad: 0.5 * grad)
    with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=labels()):
        model(vectors(torch.float64)).square().mean().backward()
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    assert float(node["residual"].isel(step=0)) < 1e-12


def accumulate(model: nn.Module, step: Any, parts: list[slice]) -> None:
    given = {name: list(values) for name, values in labels().items()}
    for part in parts:
        here = {name: values[part] for name, values in given.items()}
        with nullcontext() if step is None else step.batch(groups=here):
            (model(vectors()[part]).square().sum() / SAMPLES).backward()


def test_accumulated_batches_add_up(tmp_path: Path) -> None:
    """Three micro-batches give the spectra of the whole batch; the same step untraced gives the same gradients."""
    build = lambda: nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUT))  # noqa: E731
    torch.manual_seed(5)
    plain = build()
    traced, whole = copy.deepcopy(plain), copy.deepcopy(plain)
    parts = [slice(0, 2), slice(2, 6), slice(6, 7)]
    accumulate(plain, None, parts)
    with gt.record(traced, tmp_path / "run.zarr", keep=None) as recorder, recorder.step() as step:
        accumulate(traced, step, parts)
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []
    tree = gt.open_run(tmp_path / "run.zarr").tree
    expected = gt.spectra(whole, vectors(), lambda out: out.square().sum() / SAMPLES, groups=labels(), keep=None)
    for name, _ in plain.named_parameters():
        for group in ("all", "diagnosis=SZ", "diagnosis=HC", "site=0", "site=1", "site=2"):
            found = tree[name]["gradient"].sel(group=group).isel(step=0).dropna("component").values
            right = expected[name]["gradient"].sel(group=group).dropna("component").values
            assert found[: len(right)] == pytest.approx(right, rel=1e-4, abs=1e-6)


def test_autocast_to_bfloat16(tmp_path: Path) -> None:
    plain, traced = mlp(), mlp()
    for model, path in ((plain, None), (traced, tmp_path / "run.zarr")):
        with nullcontext() if path is None else gt.record(model, path) as recorder:
            for _ in range(5):
                with nullcontext() if recorder is None else recorder.step(groups=labels()):
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = model(vectors()).float().square().mean()
                    loss.backward()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []
    node = gt.open_run(tmp_path / "run.zarr").tree["3.weight"]
    assert float(node["residual"].max()) < 1e-2
    assert bool(np.isfinite(node["gradient"].sel(group="all").isel(component=0)).all())


def test_a_closed_recorder_leaves_a_model_that_pickles_and_copies(tmp_path: Path) -> None:
    model = mlp()
    before = Snapshot.of(model)
    with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=labels()):
        model(vectors()).square().mean().backward()
    model.zero_grad()
    changed = Snapshot.of(model).changes_since(before)
    assert all(name.startswith("buffer 2.") for name in changed), changed
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again(vectors()), copy.deepcopy(model)(vectors()))


def test_an_error_in_a_step_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    model = mlp()
    hooks = {name for name in Snapshot.of(model).facts if "hooks" in name}
    before = Snapshot.of(model)
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        with pytest.raises(ZeroDivisionError), recorder.step(groups=labels()):
            model(vectors()).mul_(1 // 0)
        assert hooks.isdisjoint(Snapshot.of(model).changes_since(before))
        with recorder.step(groups=labels()):
            model(vectors()).square().mean().backward()
    tree = gt.open_run(tmp_path / "run.zarr").tree
    assert tree["0.weight"]["gradient"].sizes["step"] == 1


def test_validation_inside_a_step_is_not_mistaken_for_training(tmp_path: Path) -> None:
    """A forward pass without gradient, with another batch, inside the step."""
    model = mlp(torch.float64)
    with gt.record(model, tmp_path / "run.zarr") as recorder, recorder.step(groups=labels()):
        loss = model(vectors(torch.float64)).square().mean()
        with torch.no_grad():
            model(torch.randn(3, FEATURES, dtype=torch.float64))
        loss.backward()
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    assert node.attrs["rung"] == "factored"
    assert float(node["residual"].isel(step=0)) < 1e-12


def test_every_third_step_is_recorded(tmp_path: Path) -> None:
    problem = BY_NAME["mlp_vectors"].build(torch.float32)
    with gt.record(problem.model, tmp_path / "run.zarr", every=3) as recorder:
        train(problem, 8, recorder=recorder)
    tree = gt.open_run(tmp_path / "run.zarr").tree
    assert tree["0.weight"]["gradient"]["step"].values.tolist() == [0, 3, 6]


@pytest.mark.parametrize("call_backward", [torch.autograd.backward, Tensor.backward], ids=["function", "method"])
def test_any_call_of_backward_is_seen(call_backward: Callable[[Tensor], None], tmp_path: Path) -> None:
    problem = BY_NAME["mlp_sequences"].build()
    with gt.record(problem.model, tmp_path / "run.zarr") as recorder, recorder.step(groups=problem.labels):
        call_backward(problem.loss_fn(call(problem.model, problem.inputs)))
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    assert node.attrs["rung"] == "factored"
    assert float(node["residual"].isel(step=0)) < 1e-12


def test_gradients_from_before_the_step_are_not_counted(tmp_path: Path) -> None:
    """p.grad that the user has left to add to belongs to no group of this step."""
    problem = BY_NAME["mlp_vectors"].build()
    for parameter in problem.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with gt.record(problem.model, tmp_path / "run.zarr", keep=None) as recorder, recorder.step(groups=problem.labels):
        problem.loss_fn(call(problem.model, problem.inputs)).backward()
    node = gt.open_run(tmp_path / "run.zarr").tree["0.weight"]
    expected = spectrum(group_loss_gradients(BY_NAME["mlp_vectors"], torch.float64)["all"]["0.weight"]).numpy()
    found = node["gradient"].sel(group="all").isel(step=0).values
    assert float(node["residual"].isel(step=0)) < 1e-12
    assert found[: len(expected)] == pytest.approx(expected[: len(found)], rel=1e-6)


def test_a_gradient_penalty_trains_as_before(tmp_path: Path) -> None:
    """A loss with a gradient in it: the backward pass runs twice through one graph."""

    def steps(model: nn.Module, recorder: Any) -> None:
        learner = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            with nullcontext() if recorder is None else recorder.step(groups=labels()):
                x = vectors().requires_grad_()
                output = model(x)
                (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
                (output.square().mean() + slope.square().sum(1).mean()).backward()
            learner.step()
            learner.zero_grad()

    build = lambda: nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUT))  # noqa: E731
    torch.manual_seed(3)
    plain = build()
    traced = copy.deepcopy(plain)
    steps(plain, None)
    with gt.record(traced, tmp_path / "run.zarr") as recorder:
        steps(traced, recorder)
    assert Snapshot.of(traced).changes_since(Snapshot.of(plain)) == []
