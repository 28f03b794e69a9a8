"""What must hold for any data and any groups, by properties over random small models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradtrace as gt
from gradtrace.store.rows import KINDS

PRIMES = (2, 3, 5, 7, 11, 13)
ROUNDING = 1e-9  # of the largest value that enters a comparison; everything is float64
fast = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class World:
    """A two-layer model's sizes, its data, and one label per sample."""

    hidden: int
    output: int
    positions: int | None
    labels: tuple[str, ...]
    features: int
    seed: int

    def model(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        return nn.Sequential(
            nn.Linear(self.features, self.hidden), nn.Tanh(), nn.Linear(self.hidden, self.output)
        ).double()

    def inputs(self) -> Tensor:
        shape = (len(self.labels), *([self.positions] if self.positions else []), self.features)
        return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(self.seed + 1))


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Sizes are distinct primes, so that swapped axes fail."""
    hidden, output, features, positions = draw(st.permutations(PRIMES))[:4]
    labels = draw(st.lists(st.sampled_from("abc"), min_size=17, max_size=17))
    return World(hidden, output, draw(st.sampled_from([None, positions])), tuple(labels), features, draw(seeds))


seeds = st.integers(0, 2**20)


def mean_square(weights: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """Loss: weighted sum over samples of a squared distance; by default the mean."""

    def loss(output: Tensor) -> Tensor:
        rows = (output - 0.3).square().flatten(1).mean(1)
        return rows.mean() if weights is None else (weights * rows).sum()

    return loss


def measure(
    world: World,
    *,
    model: nn.Module | None = None,
    inputs: Tensor | None = None,
    labels: Sequence[str] | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> xr.DataTree:
    return gt.spectra(
        model or world.model(),
        world.inputs() if inputs is None else inputs,
        loss or mean_square(),
        groups={"group": list(labels or world.labels)},
        keep=None,
        sample_dim=0,
    )


def values(node: xr.DataTree, kind: str, group: str) -> np.ndarray:
    return node[kind].sel(group=group).dropna("component").values


def assert_same_spectra(left: xr.DataTree, right: xr.DataTree, kinds: Sequence[str] = KINDS) -> None:
    assert set(left.children) == set(right.children)
    for name in left.children:
        assert left[name]["group"].values.tolist() == right[name]["group"].values.tolist()
        for kind in kinds:
            for group in left[name]["group"].values:
                a, b = values(left[name], kind, group), values(right[name], kind, group)
                size = max(len(a), len(b))
                a, b = np.pad(a, (0, size - len(a))), np.pad(b, (0, size - len(b)))
                assert np.abs(a - b).max(initial=0) <= ROUNDING * max(a.max(initial=0), 1e-3), (name, kind, group)


@fast
@given(worlds())
def test_the_groups_of_a_partition_add_up_to_the_gradient(world: World) -> None:
    """||G_all||^2 is the sum of all inner products of the groups, and G_all's product with G_g the row sums."""
    for node in measure(world).children.values():
        product = node["inner_product"].values
        names = node["group"].values.tolist()
        whole, parts = names.index("all"), [n for n, name in enumerate(names) if name != "all"]
        among = product[np.ix_(parts, parts)]
        assert among.sum() == pytest.approx(product[whole, whole], rel=ROUNDING, abs=1e-14)
        assert among.sum(0) == pytest.approx(product[whole, parts], rel=ROUNDING, abs=ROUNDING * product[whole, whole])


@fast
@given(worlds(), st.randoms(use_true_random=False))
def test_sample_order_does_not_matter(world: World, random: object) -> None:
    order = list(range(len(world.labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = measure(world, inputs=world.inputs()[order], labels=[world.labels[n] for n in order])
    assert_same_spectra(measure(world), shuffled)


def orthogonal(size: int, seed: int) -> Tensor:
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise).Q


@fast
@given(worlds(), seeds)
def test_an_orthogonal_change_of_the_input_leaves_spectra_unchanged(world: World, seed: int) -> None:
    """The first layer sees x Q and has the weight W Q: the same function, its gradient turned."""
    turn = orthogonal(world.features, seed)
    model = world.model()
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight @ turn)
    assert_same_spectra(measure(world), measure(world, model=model, inputs=world.inputs() @ turn))


@fast
@given(worlds(), seeds)
def test_an_orthogonal_change_of_the_output_leaves_spectra_unchanged(world: World, seed: int) -> None:
    turn = orthogonal(world.output, seed)
    model, loss = world.model(), mean_square()
    with torch.no_grad():
        model[2].weight.copy_(turn @ model[2].weight)
        model[2].bias.copy_(turn @ model[2].bias)
    assert_same_spectra(measure(world), measure(world, model=model, loss=lambda output: loss(output @ turn)))


@fast
@given(worlds(), st.integers(0, 16))
def test_a_duplicate_with_half_the_weight_changes_no_gradient(world: World, which: int) -> None:
    inputs = torch.cat([world.inputs(), world.inputs()[which : which + 1]])
    weights = torch.full((18,), 1 / 17, dtype=torch.float64)
    weights[which] = weights[17] = 0.5 / 17
    doubled = measure(world, inputs=inputs, labels=[*world.labels, world.labels[which]], loss=mean_square(weights))
    assert_same_spectra(measure(world), doubled, kinds=("gradient",))


@fast
@given(worlds())
def test_rank_and_size_are_bounded_by_the_factors(world: World) -> None:
    """rank <= min(rows, in, out); sigma1 <= sigma1(A) sigma1(D); the spectrum's norm is the Frobenius norm."""
    tree = measure(world)
    for name, node in tree.children.items():
        shape = dict(world.model().named_parameters())[name].shape
        columns = shape[1] if len(shape) > 1 else 1
        for n, group in enumerate(node["group"].values):
            sigma = values(node, "gradient", group)
            samples = int(node["n_samples"].sel(group=group))
            rows = samples * (world.positions or 1)
            assert int(node["numerical_rank"].sel(group=group)) <= min(rows, columns, shape[0])
            if "activation" in node.attrs["kinds"]:
                top = values(node, "activation", group)[0] * values(node, "adjoint", group)[0]
                assert sigma[0] <= top * (1 + ROUNDING)
            frobenius = float(node["frobenius"].sel(group=group))
            assert np.linalg.norm(sigma) == pytest.approx(frobenius, rel=ROUNDING)
            assert float(node["inner_product"].values[n, n]) == pytest.approx(frobenius**2, rel=ROUNDING, abs=1e-15)


@fast
@given(worlds())
def test_inner_products_are_positive_semidefinite(world: World) -> None:
    for node in measure(world).children.values():
        product = node["inner_product"].values
        assert product == pytest.approx(product.T, rel=0, abs=1e-14 * np.trace(product))
        assert np.linalg.eigvalsh(product)[0] >= -ROUNDING * np.trace(product)


@fast
@given(worlds())
def test_the_number_of_groupings_changes_no_spectrum(world: World) -> None:
    """A grouping measured alone and beside another is the same."""
    halves = ["left" if n < 8 else "right" for n in range(len(world.labels))]
    groups = {"group": list(world.labels), "half": halves}
    both = gt.spectra(world.model(), world.inputs(), mean_square(), groups=groups, keep=None, sample_dim=0)
    alone = measure(world)
    for name, node in alone.children.items():
        for group in node["group"].values:
            assert values(both[name], "gradient", group) == pytest.approx(values(node, "gradient", group), abs=1e-12)


@fast
@given(worlds(), st.integers(1, 4))
def test_keeping_fewer_values_changes_neither_them_nor_the_metrics(world: World, keep: int) -> None:
    whole = measure(world)
    groups = {"group": list(world.labels)}
    few = gt.spectra(world.model(), world.inputs(), mean_square(), groups=groups, keep=keep, sample_dim=0)
    for name, node in whole.children.items():
        for group in node["group"].values:
            kept = values(few[name], "gradient", group)
            assert len(kept) <= keep
            assert kept == pytest.approx(values(node, "gradient", group)[: len(kept)], rel=1e-9, abs=1e-13)
            for metric in ("frobenius", "nuclear", "effective_rank", "stable_rank", "numerical_rank"):
                a, b = float(few[name][metric].sel(group=group)), float(node[metric].sel(group=group))
                assert a == pytest.approx(b, rel=1e-9), metric


@fast
@given(worlds())
def test_one_layer_has_the_spectrum_of_its_factors(world: World) -> None:
    """A, D and A'D of a linear layer, from the definition."""
    world = replace(world, positions=None)
    model = nn.Linear(world.features, world.output, bias=False).double()
    inputs = world.inputs()
    adjoint = 2 * (model(inputs) - 0.3).detach() / (world.output * len(world.labels))
    node = measure(world, model=model, inputs=inputs)["weight"]
    for group in node["group"].values:
        mask = torch.tensor([group in ("all", f"group={label}") for label in world.labels])
        expected = {"activation": inputs[mask], "adjoint": adjoint[mask], "gradient": adjoint[mask].T @ inputs[mask]}
        for kind, matrix in expected.items():
            sigma = torch.linalg.svdvals(matrix).numpy()
            found = values(node, kind, group)
            found = np.pad(found, (0, len(sigma) - len(found)))
            assert found == pytest.approx(sigma, rel=0, abs=1e-10 * sigma[0]), (kind, group)
