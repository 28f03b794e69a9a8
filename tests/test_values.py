"""Where values come from: what is a constant, what is data, and what is still a parameter, if only a part of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.utils.checkpoint import checkpoint

import gradtrace as gt
from gradtrace.moves import move_of
from tests.case import Apply
from tests.models import BY_NAME

N, FEATURES, OUTPUT = 7, 5, 3
LABELS = ["a", "b", "a", "a", "b", "b", "b"]
GROUP_A = torch.tensor([label == "a" for label in LABELS])


def vectors() -> Tensor:
    return torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mean_square(output: Tensor) -> Tensor:
    return output.square().flatten(1).sum(1).mean()


def share(output: Tensor) -> Tensor:
    """The part of `mean_square` of the samples of group a."""
    return (output.square().flatten(1).sum(1) * GROUP_A).sum() / N


def leading(node: Any, group: str = "group=a") -> float:
    return float(node["gradient"].sel(group=group)[0])


def norm_of(loss: Tensor, parameter: Tensor) -> float:
    """Largest singular value of a gradient that is a vector."""
    return float(torch.autograd.grad(loss, parameter)[0].norm())


# Constants

TEMPLATES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda x: torch.arange(FEATURES).to(x),
    "type_as": lambda x: torch.arange(FEATURES).type_as(x),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
    "new_ones": lambda x: x.new_ones(FEATURES),
    "new_zeros": lambda x: x.new_zeros(FEATURES) + 2,
    "new_full": lambda x: x.new_full((FEATURES,), 3.0),
    "new_empty": lambda x: x.new_empty(FEATURES).fill_(2.0),
    "ones_like": lambda x: torch.ones_like(x[0]),
    "full_like": lambda x: torch.full_like(x[0], 2.0),
    "rand_like": lambda x: torch.rand_like(x[0]),
    "empty_like": lambda x: torch.empty_like(x[0]).fill_(2.0),
    "expand_as": lambda x: torch.ones(1).to(x.dtype).expand_as(x[0]),
    "view_as": lambda x: torch.ones(FEATURES, dtype=x.dtype).view_as(x[0]),
    "reshape_as": lambda x: torch.ones(1, FEATURES, dtype=x.dtype).reshape_as(x[0]),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_a_template_come_shape_dtype_and_device_alone(name: str) -> None:
    model = Apply(lambda m, x: x * (m.p * TEMPLATES[name](x)), p=nn.Parameter(torch.randn(FEATURES))).double()
    tree = gt.spectra(model, vectors(), mean_square, groups=LABELS)
    assert (tree["p"].attrs["rung"], tree["p"].attrs["reason"]) == (
        "pulled back",
        "the weight of `mul` is made by arithmetic",
    )


@pytest.mark.parametrize("name", ["to", "type_as", "expand_as", "view_as", "reshape_as"])
def test_a_parameter_shaped_like_the_data_stays_one(name: str) -> None:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return x * (m.p.to(x[0]) if name in ("to", "type_as") else getattr(m.p, name)(x[0]))

    model = Apply(forward, p=nn.Parameter(torch.randn(FEATURES, dtype=torch.float64)))
    tree = gt.spectra(model, vectors(), mean_square, groups=LABELS)
    assert tree["p"].attrs["ops"] == ["mul"]
    assert tree["p"].attrs["rung"] == "factored"
    assert leading(tree["p"]) == pytest.approx(norm_of(share(model(vectors())), model.p), rel=1e-12)


class Positions(nn.Module):
    """Position numbers in a buffer, and a layer behind a reentrant checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, FEATURES), nn.Embedding(6, FEATURES)
        self.layer, self.head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, OUTPUT)
        self.register_buffer("numbers", torch.arange(6)[None])

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(self.numbers[:, : words.shape[1]])
        return self.head(checkpoint(self.layer, x, use_reentrant=True)).mean(1)


def test_a_buffer_is_a_constant_in_the_shadow_pass_too() -> None:
    tree = gt.spectra(Positions(), torch.randint(9, (N, 4)), mean_square, groups=LABELS)
    assert {node.attrs["rung"] for node in tree.children.values()} == {"factored"}


# Data


class Contrastive(nn.Module):
    """Makes its loss itself, so that nothing but its inputs tells what is data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, 4), nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scores, numbers = self.a(x) @ self.b(y).mT, torch.arange(len(x))
        return F.cross_entropy(scores, numbers)


def test_keyword_inputs_are_data() -> None:
    torch.manual_seed(0)
    model, x, y = Contrastive().double(), vectors(), vectors().flip(0)
    found = [
        gt.spectra(model, inputs, lambda loss: loss, groups=LABELS, sample_dim=0)
        for inputs in ((x, y), {"x": x, "y": y}, gt.Inputs((x,), {"y": y}))
    ]
    for tree in found:
        assert tree["a.weight"].attrs["rung"] == "factored"
        assert tree["b.weight"].attrs["rung"] == "global"  # every score needs all of its rows
        assert leading(tree["a.weight"]) == pytest.approx(leading(found[0]["a.weight"]), rel=1e-12)


def registries() -> dict[str, int]:
    return {
        name: len(value) for name, value in vars(torch_modules).items() if isinstance(value, dict) and name[0] == "_"
    }


def test_keyword_inputs_are_data_in_a_loop_and_nothing_stays_in_torch(tmp_path: Path) -> None:
    before = registries()
    model, x, y = Contrastive(), vectors().float(), vectors().flip(0).float()
    with gt.record(model, tmp_path / "run", sample_dim=0) as recorder:
        for _ in range(3):
            with recorder.step(groups=LABELS):
                model(x=x, y=y).backward()
            model.zero_grad()
    assert registries() == before
    tree = gt.open_run(tmp_path / "run").tree
    assert (tree["a.weight"].attrs["rung"], tree["b.weight"].attrs["rung"]) == ("factored", "global")


@pytest.mark.parametrize("shape", [(1, 4), (4,), (1, N), (1, 2 * N)])
def test_positions_that_all_samples_share_are_constants_however_they_are_given(shape: tuple[int, ...]) -> None:
    parts = {"words": nn.Embedding(9, FEATURES), "places": nn.Embedding(20, FEATURES)}
    model = Apply(lambda m, w, *, places: torch.tanh(m.words(w) + m.places(places)), **parts).double()
    words, places = torch.randint(9, (N, shape[-1])), torch.arange(shape[-1]).view(shape)
    tree = gt.spectra(model, gt.Inputs((words,), {"places": places}), mean_square, groups=LABELS, sample_dim=0)
    node = tree["places.weight"]
    assert (node.attrs["rung"], node.attrs["coupled"]) == ("factored", False)
    gradient = torch.autograd.grad(share(model(words, places=places)), model.places.weight)[0]
    assert leading(node) == pytest.approx(float(torch.linalg.svdvals(gradient)[0]), rel=1e-9)


# Parameters

WHOLE_AND_PARTS = {
    "slices_of_a_matrix": {"out": "factored"},
    "layers_stacked_in_one_parameter": {"weights": "factored"},
    "scaled_weights": {"first": "factored", "shift": "factored", "second": "factored", "last": "factored"},
    "tables_looked_up_at_constant_places": {"positions.weight": "factored", "table": "factored", "bias": "factored"},
    "repeated_and_rolled": {"row": "factored", "grid": "factored", "token": "local"},
    "experts_in_one_parameter": {"experts": "factored", "shifts": "factored"},
    "written_over_some_positions": {"mask": "local", "start": "local", "number": "local"},
    "positions_by_keyword": {"positions.weight": "factored"},
    "shaped_like_the_data": {"first": "pulled back"},
}


@pytest.mark.parametrize("name", WHOLE_AND_PARTS)
def test_a_part_of_a_parameter_is_as_good_as_the_whole(name: str) -> None:
    """No detour through the graph, and no pass per group: their gradients are compared in the tests of whole models."""
    problem = BY_NAME[name].build()
    tree = gt.spectra(problem.model, problem.inputs, problem.loss_fn, groups=problem.labels)
    for parameter, rung in WHOLE_AND_PARTS[name].items():
        assert (tree[parameter].attrs["rung"], tree[parameter].attrs["coupled"]) == (rung, False), parameter


NUMBERS = torch.tensor([2, 0, 2])
LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "select": lambda w: w.select(1, 2),
    "narrow": lambda w: w.narrow(0, 1, 2),
    "__getitem__": lambda w: w[1:, None, NUMBERS],
    "chunk": lambda w: w.chunk(2, 1),
    "split": lambda w: w.split([1, 3], 1),
    "unbind": lambda w: w.unbind(1),
    "expand": lambda w: w.expand(2, 3, 4),
    "repeat": lambda w: w.repeat(2, 1),
    "repeat_interleave": lambda w: w.repeat_interleave(2, 0),
    "index_select": lambda w: w.index_select(0, NUMBERS),
    "embedding": lambda w: F.embedding(NUMBERS, w, padding_idx=0),
    "gather": lambda w: w.gather(0, NUMBERS[None].expand(2, 3)),
    "roll": lambda w: w.roll(1, 0),
    "flip": lambda w: w.flip(0, 1),
    "tril": lambda w: w.tril(),
    "diagonal": lambda w: w.diagonal(),
    "unfold": lambda w: w.unfold(1, 2, 1),
    "neg": lambda w: -w,
    "mul": lambda w: 3 * w,
    "__rmul__": lambda w: w * (2 - 1j),
    "div": lambda w: w / 4,
    "permute": lambda w: w.permute(1, 0),
    "flatten": lambda w: w.flatten(),
}


class Calls(torch.overrides.TorchFunctionMode):
    """Keeps the last call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.last = (func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", LINEAR)
def test_the_inverse_of_a_move_is_what_autograd_does(name: str, dtype: torch.dtype) -> None:
    dtype = {"__rmul__": torch.complex64, "embedding": torch.float32}.get(name, dtype)  # of one kind only
    source = torch.randn(3, 4, dtype=dtype, requires_grad=True)
    with Calls() as calls:
        result = LINEAR[name](source)
    func, args, kwargs = calls.last
    for place, part in enumerate([result] if isinstance(result, Tensor) else result):
        move = move_of(func, func.__name__, source, part, args, kwargs, place)
        gradient = torch.randn_like(part)
        (expected,) = torch.autograd.grad(part, source, gradient, retain_graph=True)
        assert move is not None
        assert torch.equal(move.inverse(gradient), expected)


@pytest.mark.parametrize(
    "call",
    [lambda w: w * w, lambda w: w / w.detach(), lambda w: 1 / w, torch.exp],
    ids=["square", "quotient", "inverse", "exponential"],
)
def test_what_is_not_linear_is_no_move(call: Callable[[Tensor], Tensor]) -> None:
    source = torch.randn(3, 4, requires_grad=True)
    with Calls() as calls:
        part = call(source)
    func, args, kwargs = calls.last
    assert move_of(func, func.__name__, source, part, args, kwargs) is None


def test_under_autocast_a_part_is_cast_where_it_was_cast() -> None:
    model = Apply(lambda m, x: F.linear(x, m.fused[:OUTPUT] * 0.5), fused=nn.Parameter(torch.randn(9, FEATURES)))
    x = vectors().float()

    def loss(output: Tensor) -> Tensor:
        assert output.dtype == torch.bfloat16
        return mean_square(output.float())

    with torch.autocast("cpu", torch.bfloat16):
        node = gt.spectra(model, x, loss, groups=LABELS)["fused"]
    assert node.attrs["rung"] == "factored"
    assert float(node["residual"]) < 8 * torch.finfo(torch.bfloat16).eps


# Parameters of the loss


class Tempered(nn.Module):
    """Has a temperature that only the loss uses: returned by the model, or taken from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.log_alpha = nn.Linear(FEATURES, OUTPUT), nn.Parameter(torch.tensor(-1.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.log_alpha.exp()


@pytest.mark.parametrize("returned", [True, False])
def test_a_parameter_that_meets_samples_in_the_loss_alone_is_not_measured_as_zero(returned: bool) -> None:
    model = Tempered().double()

    def loss(output: tuple[Tensor, Tensor]) -> Tensor:
        alpha = output[1] if returned else model.get_parameter("log_alpha").exp()
        return mean_square(output[0] * alpha)

    node = gt.spectra(model, vectors(), loss, groups=LABELS)["log_alpha"]
    assert node.attrs["rung"] == "ungrouped"
    assert "only in the loss" in node.attrs["reason"]
    assert node["gradient"].sel(group=["group=a", "group=b"]).isnull().all()
    assert leading(node, "all") == pytest.approx(norm_of(loss(model(vectors())), model.log_alpha), rel=1e-12)
