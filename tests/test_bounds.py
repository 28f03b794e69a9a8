"""What a gradient's rank cannot exceed holds in every model, and says why; and where a fall of rank comes from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.bounds import Bound, attribution_of, beside, rank_bounds
from gradtrace.errors import SelectionError
from tests.case import Apply, default_dtype
from tests.models import CASES

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def loss_of(output: Tensor) -> Tensor:
    """A loss whose adjoints have full rank."""
    steps = torch.arange(output.numel(), dtype=output.dtype).reshape(output.shape)
    return (output - torch.cos(1.3 * steps)).square().mean()


def measured(
    model: nn.Module, x: Any, loss: Callable[[Any], Tensor] = loss_of
) -> tuple[dict[str, Bound], dict[str, int]]:
    """The bounds, and the numerical ranks of the gradients of one batch."""
    bounds = rank_bounds(gt.trace(model, x))
    tree = gt.spectra(model, x, loss, keep=None, kinds=["gradient"])
    ranks = {n.attrs["parameter"]: int(n["numerical_rank"].sel(group="all")) for n in tree.children.values()}
    return bounds, ranks


def holds(model: nn.Module, x: Any, loss: Callable[[Any], Tensor] = loss_of) -> dict[str, Bound]:
    bounds, ranks = measured(model, x, loss)
    assert set(ranks) <= set(bounds)
    for name, rank in ranks.items():
        assert rank <= bounds[name].rank, (str(bounds[name]), rank)
        assert bounds[name].rank <= min(bounds[name].sides)
    return bounds


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]), default_dtype(torch.float64):
        torch.manual_seed(0)
        yield


# ---------------------------------------------------------------------- models drawn at random

WIDTHS = st.lists(st.integers(1, 9), min_size=2, max_size=6)
BETWEEN = (nn.Identity, nn.Identity, nn.Tanh, lambda: nn.LeakyReLU(0.1), lambda: nn.Dropout(0.3), nn.Flatten)


@st.composite
def chains(draw: Any) -> tuple[nn.Module, Tensor]:
    """Linear layers with bottlenecks, some with a bias, some with something nonlinear behind them; 2 or 3 axes."""
    torch.manual_seed(draw(st.integers(0, 99)))
    widths, layers = draw(WIDTHS), list[nn.Module]()
    positions = draw(st.sampled_from([None, 1, 3]))
    for here, there in itertools.pairwise(widths):
        layers.append(nn.Linear(here, there, bias=draw(st.booleans())))
        between = draw(st.sampled_from(BETWEEN))()
        if not (isinstance(between, nn.Flatten) and positions):
            layers.append(between)
    samples = draw(st.integers(1, 8))
    shape = (samples, widths[0]) if positions is None else (samples, positions, widths[0])
    return nn.Sequential(*layers), torch.randn(shape)


@given(chains())
@QUICK
def test_bounds_hold_in_chains_of_linear_layers(made: tuple[nn.Module, Tensor]) -> None:
    holds(*made)


@given(
    channels=st.lists(st.integers(1, 4), min_size=2, max_size=4), size=st.integers(5, 8), stride=st.integers(1, 3),
    samples=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@QUICK
def test_bounds_hold_in_convolutions(channels: list[int], size: int, stride: int, samples: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(here, there, 3, stride=stride, padding=1) for here, there in itertools.pairwise(channels)]
    holds(nn.Sequential(*layers, nn.ConvTranspose2d(channels[-1], 2, 2)), torch.randn(samples, channels[0], size, size))


@given(
    kind=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]), time=st.integers(1, 4), samples=st.integers(1, 3),
    width=st.integers(1, 7), hidden=st.integers(1, 7), seed=st.integers(0, 99),
)  # fmt: skip
@QUICK
def test_bounds_hold_in_recurrent_layers(
    kind: type[nn.RNNBase], time: int, samples: int, width: int, hidden: int, seed: int
) -> None:
    torch.manual_seed(seed)
    parts = {"rnn": kind(width, hidden, batch_first=True), "head": nn.Linear(hidden, 3)}
    model = Apply(lambda m, x: m.head(m.rnn(x)[0][:, -1]), **parts)
    bounds = holds(model, torch.randn(samples, time, width))
    assert bounds["rnn.weight_ih_l0"].rank <= samples * time


@pytest.mark.parametrize("case", [case for case in CASES if not case.opaque], ids=str)
def test_bounds_hold_in_every_model_of_the_tests(case: Any) -> None:
    problem = case.build()
    graph = gt.trace(problem.model, problem.inputs, groups=problem.labels, **problem.options)
    bounds = rank_bounds(graph)
    tree = gt.spectra(
        problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, kinds=["gradient"],
        **problem.options,
    )  # fmt: skip
    for node in tree.children.values():
        name, rank = node.attrs["parameter"], float(node["numerical_rank"].sel(group="all"))
        if name in bounds:  # the loss may read more than the model's output
            assert not rank > bounds[name].rank, (str(bounds[name]), rank)


# ---------------------------------------------------------------------- what they say


def linear(*widths: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(*pair, bias=bias) for pair in itertools.pairwise(widths)))


def test_a_bottleneck_bounds_every_layer_of_a_linear_network() -> None:
    bounds, ranks = measured(linear(11, 9, 2, 8, 7), torch.randn(13, 11))
    assert {name: bound.rank for name, bound in bounds.items()} == ranks == dict.fromkeys(bounds, 2)
    assert bounds["0.weight"].reason == "narrowest linear layer after: 2 (1.weight), nothing nonlinear in between"
    assert bounds["3.weight"].reason == "narrowest linear layer before: 2 (1.weight), nothing nonlinear in between"
    assert str(bounds["1.weight"]) == "1.weight: at most 2 (its matrix is 2 x 9)"
    assert bounds["0.weight"].is_low
    assert not bounds["1.weight"].is_low


def test_a_bias_behind_the_bottleneck_adds_one() -> None:
    bounds, ranks = measured(linear(11, 9, 2, 8, 7, bias=True), torch.randn(13, 11))
    assert bounds["3.weight"].rank == ranks["3.weight"] == 3
    assert bounds["3.weight"].reason == (
        "narrowest linear layer before: 2 (1.weight) + 1 for biases, nothing nonlinear in between"
    )
    assert bounds["0.weight"].rank == ranks["0.weight"] == 2
    assert bounds["0.bias"].rank == 1


def test_few_inputs_bound_what_follows_and_few_outputs_what_comes_before() -> None:
    bounds, ranks = measured(linear(2, 9, 8, 3), torch.randn(13, 2))
    assert bounds["1.weight"].reason == "2 inputs of 0.weight, nothing nonlinear in between"
    assert (bounds["1.weight"].rank, ranks["1.weight"]) == (2, 2)
    bounds, ranks = measured(linear(11, 9, 8, 3), torch.randn(13, 11))
    assert bounds["0.weight"].reason == "narrowest linear layer after: 3 (2.weight), nothing nonlinear in between"
    assert bounds["0.weight"].rank == ranks["0.weight"] == 3


def test_few_samples_bound_all_and_more_positions_less() -> None:
    bounds, ranks = measured(linear(11, 9, 8), torch.randn(4, 11))
    assert bounds["1.weight"].reason == "4 samples x 1 position"
    assert bounds["1.weight"].rank == ranks["1.weight"] == 4
    bounds = rank_bounds(gt.trace(linear(11, 9), torch.randn(4, 2, 11)))
    assert (bounds["0.weight"].rank, bounds["0.weight"].reason) == (8, "4 samples x 2 positions")


def test_a_nonlinearity_ends_what_a_bottleneck_does() -> None:
    model = nn.Sequential(nn.Linear(11, 9), nn.LeakyReLU(0.1), nn.Linear(9, 2), nn.LeakyReLU(0.1), nn.Linear(2, 8))
    bounds, ranks = measured(model, torch.randn(40, 11))
    assert bounds["0.weight"].rank == 9
    assert ranks["0.weight"] > 2


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_stride_lowers_the_bound_of_a_convolution(stride: int) -> None:
    model = nn.Conv1d(5, 13, 3, stride=stride)
    bounds, ranks = measured(model, torch.randn(2, 5, 9))
    positions = (9 - 3) // stride + 1
    assert bounds["weight"].rank == ranks["weight"] == min(13, 2 * positions)


@pytest.mark.parametrize("time", [1, 2, 3])
def test_the_length_of_a_sequence_raises_the_bound_of_a_recurrent_layer(time: int) -> None:
    model = Apply(lambda m, x: m.rnn(x)[0], rnn=nn.RNN(11, 9, batch_first=True))
    bounds, ranks = measured(model, torch.randn(2, time, 11))
    assert bounds["rnn.weight_ih_l0"].rank == ranks["rnn.weight_ih_l0"] == 2 * time
    assert f"2 samples x {time} position" in bounds["rnn.weight_ih_l0"].reason


def test_uses_of_one_parameter_add_up() -> None:
    model = Apply(lambda m, x: m.cell(torch.tanh(m.cell(torch.tanh(m.cell(x))))), cell=nn.Linear(11, 11))
    bounds = holds(model, torch.randn(2, 11))
    assert (bounds["cell.weight"].rank, bounds["cell.weight"].reason) == (6, "2 + 2 + 2, over its 3 uses")


def test_data_of_low_rank_can_be_named() -> None:
    model, data = linear(11, 9, 8), torch.randn(13, 3) @ torch.randn(3, 11)
    graph = gt.trace(model, data)
    assert rank_bounds(graph)["1.weight"].rank == 8
    bounds = rank_bounds(graph, known={"0.weight": 3})
    _, ranks = measured(model, data)
    assert {name: bound.rank for name, bound in bounds.items()} == ranks == {"0.weight": 3, "1.weight": 3}
    assert bounds["1.weight"].reason == "rank of the activations of 0.weight: 3"


# ---------------------------------------------------------------------- what would break a careless bound


def residual(m: Any, x: Tensor) -> Tensor:
    hidden = m.wide(m.narrow(x))
    return torch.cat([hidden, m.head(hidden)], 1)


def hooked(m: Any, x: Tensor) -> Tensor:
    hidden = m.wide(x)
    if hidden.requires_grad:
        hidden.register_hook(lambda grad: grad.sign() * grad.abs().sqrt())
    return m.head(m.narrow(hidden))


def in_place(m: Any, x: Tensor) -> Tensor:
    hidden = m.narrow(x)
    hidden.sigmoid_()
    return m.head(m.wide(hidden).sin_())


def regrouped(m: Any, x: Tensor) -> Tensor:
    return m.head(m.narrow(x).reshape(-1, 8)) if len(x) % 4 == 0 else m.head(x)


def turned(m: Any, x: Tensor) -> Tensor:
    return m.head(m.narrow(x).t().reshape(12, 2).contiguous())


TRAPS: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module], int]] = {
    "residual": (residual, {"narrow": nn.Linear(8, 2), "wide": nn.Linear(2, 7), "head": nn.Linear(7, 6)}, 12),
    "hooked": (hooked, {"wide": nn.Linear(8, 9), "narrow": nn.Linear(9, 2), "head": nn.Linear(2, 7)}, 12),
    "in_place": (in_place, {"narrow": nn.Linear(8, 2), "wide": nn.Linear(2, 9), "head": nn.Linear(9, 7)}, 12),
    "regrouped": (regrouped, {"narrow": nn.Linear(8, 2), "head": nn.Linear(8, 7)}, 12),
    "turned": (turned, {"narrow": nn.Linear(8, 2), "head": nn.Linear(2, 7)}, 12),
}


@pytest.mark.parametrize("name", TRAPS)
def test_bounds_hold_where_something_is_in_between(name: str) -> None:
    function, parts, samples = TRAPS[name]
    holds(Apply(function, **{key: part.double() for key, part in parts.items()}), torch.randn(samples, 8))


def test_a_skip_connection_and_a_hook_end_what_comes_after() -> None:
    for name, layer in (("residual", "narrow"), ("hooked", "wide")):
        function, parts, samples = TRAPS[name]
        graph = gt.trace(Apply(function, **{key: p.double() for key, p in parts.items()}), torch.randn(samples, 8))
        assert "after" not in rank_bounds(graph)[f"{layer}.weight"].reason


def test_a_penalty_in_the_loss_has_full_rank() -> None:
    model = Apply(lambda m, x: m.layers(x) + 0.1 * m.layers[0].weight.square().sum(), layers=linear(11, 9, 2))
    bounds, ranks = measured(model, torch.randn(5, 11))
    assert bounds["layers.0.weight"].rank == ranks["layers.0.weight"] == 9


def test_tied_weights_and_embeddings_hold() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(13, 5)
            self.head = nn.Linear(5, 13, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.table(x)))

    bounds = holds(Tied(), torch.tensor([[1], [2]]))
    assert (bounds["table.weight"].rank, bounds["table.weight"].reason) == (4, "2 + 2, over its 2 uses")


def test_weights_made_by_arithmetic_keep_the_sides_of_their_matrix() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(11, 9))
    bounds = holds(model, torch.randn(2, 11))
    assert bounds["parametrizations.weight.original1"].rank == 9


def test_weights_with_axes_of_equal_length_are_not_confused() -> None:
    """One row, but the matrix that a parameter is flattened to is not the one that its op multiplies by."""
    model = Apply(lambda m, x: torch.einsum("nb,abc->nac", x, m.weight), weight=nn.Parameter(torch.randn(2, 2, 2)))
    holds(model, torch.randn(1, 2))


# ---------------------------------------------------------------------- beside a run, and where a fall comes from


def recorded(path: Path, change: Callable[[int, Tensor], Tensor], *, steps: int = 6) -> gt.Run:
    """A run of a layer between two nonlinear ones, in which `change` does something to the batch."""
    model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6))
    with gt.record(model, path) as recorder:
        for step in range(steps):
            with recorder.step(groups={"site": ["a", "b"] * 6}):
                loss_of(model(change(step, torch.randn(12, 8)))).backward()
    return gt.open_run(path)


def test_bounds_stand_beside_what_a_run_has(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run.zarr", lambda step, x: x)
    model = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6))
    rows = beside(rank_bounds(gt.trace(model, torch.randn(12, 8))), run)
    assert [(row["parameter"], row["bound"], row["measured"]) for row in rows] == [
        ("0.weight", 7, 7.0), ("0.bias", 1, 1.0), ("2.weight", 6, 6.0), ("2.bias", 1, 1.0),
    ]  # fmt: skip


def test_a_fall_that_comes_from_the_activations_is_attributed_to_them(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run.zarr", lambda step, x: x if step < 3 else x[:2].repeat(6, 1))
    found = gt.bounds.attribution(run, "2.weight", metric="numerical_rank")
    assert found.cause == "activation"
    assert (found.first, found.last) == (0, 3)
    assert found.values["gradient"] == (6.0, 2.0)
    assert found.values["activation"] == (7.0, 2.0)
    assert found.shares["activation"] == 1.0
    assert str(found).startswith("The numerical_rank of the gradient of 2.weight fell from 6 (step 0) to 2 (step 3);")
    assert "It comes from its activations, whose rank it cannot exceed" in str(found)
    assert gt.bounds.attribution(run, "2.weight", group="site=a").cause in ("activation", "both")
    for words, arguments in {
        "Nearest: '2.weight'": {"parameter": "2.wieght"},
        "There is no group 'site=c'": {"parameter": "2.weight", "group": "site=c"},
        "no variable 'tail'": {"parameter": "2.weight", "metric": "tail"},
    }.items():
        with pytest.raises(SelectionError, match=words):
            gt.bounds.attribution(run, **arguments)  # type: ignore[arg-type]


def test_a_fall_that_comes_from_the_adjoints_is_attributed_to_them(tmp_path: Path) -> None:
    model = nn.Linear(8, 6)
    with gt.record(model, tmp_path / "run.zarr") as recorder:
        for step in range(6):
            with recorder.step():
                output = model(torch.randn(12, 8))
                loss_of(output if step < 3 else output[:, :1]).backward()
    found = gt.bounds.attribution(gt.open_run(tmp_path / "run.zarr"), "weight")
    assert found.cause == "adjoint"
    assert "look at the loss and the layers after it" in str(found)


def series(gradient: Sequence[float], activation: Sequence[float], adjoint: Sequence[float]) -> dict[str, np.ndarray]:
    return {"gradient": np.array(gradient), "activation": np.array(activation), "adjoint": np.array(adjoint)}


@pytest.mark.parametrize(
    ("given", "metric", "cause"),
    [
        (series([8, 8, 2], [9, 9, 9], [9, 9, 9]), "numerical_rank", "neither"),
        (series([8, 8, 2], [9, 9, 2], [9, 9, 9]), "numerical_rank", "activation"),
        (series([8, 8, 2], [9, 9, 9], [9, 9, 3]), "numerical_rank", "adjoint"),
        (series([8, 8, 2], [9, 9, 2], [9, 9, 2]), "numerical_rank", "both"),
        (series([8, 8, 7], [9, 9, 7], [9, 9, 9]), "numerical_rank", "no fall"),
        (series([2, 4, 8], [2, 4, 8], [9, 9, 9]), "effective_rank", "no fall"),
        (series([8, 4, 2], [4, 2, 1], [9, 9, 9]), "effective_rank", "activation"),
        (series([8, 4, 2], [9, 9, 9], [4, 3, 2]), "effective_rank", "adjoint"),
        (series([8, 4, 2], [9, 9, 8], [9, 9, 8]), "effective_rank", "neither"),
        (series([8, 4, 0], [9, 9, 0], [9, 9, 8]), "effective_rank", "activation"),
        (series([0, 0, 0], [9, 9, 0], [9, 9, 8]), "effective_rank", "no fall"),
        (series([8, np.nan, 2], [9, 9, np.nan], [9, 9, 2]), "numerical_rank", "adjoint"),
    ],
)
def test_the_cause_is_what_explains_half_or_more(given: dict[str, np.ndarray], metric: str, cause: str) -> None:
    found = attribution_of(np.array([0, 10, 20]), given, metric=metric, parameter="w")
    assert found.cause == cause
    assert found.sentence.endswith(".")


def test_one_step_among_many_is_no_fall() -> None:
    gradient = np.full(100, 8.0)
    gradient[50] = 1.0
    found = attribution_of(np.arange(100), series(gradient, gradient, gradient), metric="effective_rank", parameter="w")
    assert found.cause == "no fall"
    with pytest.raises(SelectionError, match="There is no"):
        attribution_of(np.arange(1), series([np.nan], [1], [1]), metric="nuclear", parameter="w")


def test_the_loss_of_these_tests_lets_ranks_be_full() -> None:
    assert measured(linear(5, 4), torch.randn(9, 5))[1] == {"0.weight": 4}
