"""The zoo: architectures that people train, compared group by group with autograd."""

from __future__ import annotations

import pytest
import torch
import xarray as xr

import gradtrace as gt
from tests.case import Case
from tests.oracles import SEED, Gradients, group_loss_gradients, memberships, spectrum
from tests.test_whole_models import difference
from tests.zoo import layers, library
from tests.zoo.measured import BY_NAME, ZOO, Measured, dtype_of, measured
from tests.zoo.rows import rows_gradients
from tests.zoo.table import PAGE, page

# Two correct ways to add up the same products differ by a few eps of the largest terms: the parameter's own gradient,
# and, where contributions cancel (a bias before a norm), adjoints as large as elsewhere in the model. Measured: below 9
# eps of the parameter's own largest singular value and 0.4 eps of the model's. One sample in the wrong group makes
# thousands of times that, in float32 too.
ROUNDING, OF_THE_MODEL = 128, 0.1
DTYPES = {"own": None, "float32": torch.float32}
LEAST_FACTORED = 0.95  # of the parameter elements in the zoo


def oracle(case: Case, coupling: str) -> Gradients:
    """Group gradients by the definition of coupling asked for; they are the same where samples are independent."""
    apart = coupling == "loss" or not case.coupled
    if apart and not getattr(case, "loss_couples", False):
        return group_loss_gradients(case, dtype_of(case))
    return rows_gradients(case, dtype_of(case))


def check_spectra(tree: xr.DataTree, expected: Gradients, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    largest = max(spectrum(gradient)[0].item() for gradient in expected["all"].values())
    for name, whole in expected["all"].items():
        allowed = ROUNDING * eps * (spectrum(whole)[0].item() + OF_THE_MODEL * largest)
        for group, gradients in expected.items():
            error = difference(tree[name], "gradient", group, spectrum(gradients[name]))
            assert error <= allowed, (name, group, tree[name].attrs["rung"])


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_every_gradient_is_measured_per_group_and_nothing_is_left(case: Case) -> None:
    found = measured(case)
    assert found.changes == []
    expected = oracle(case, "loss" if case.opaque else "rows")
    assert set(expected["all"]) <= set(found.tree.children), "a parameter that gets a gradient is not accounted for"
    ungrouped = {name for name, node in found.tree.children.items() if node.attrs["rung"] == "ungrouped"}
    assert ungrouped == set(case.ungrouped)
    grouped = {group: {n: g for n, g in each.items() if n not in ungrouped} for group, each in expected.items()}
    check_spectra(found.tree, grouped, dtype_of(case))


@pytest.mark.parametrize("case", library.MODELS, ids=str)
def test_activations_and_adjoints_are_the_rows_of_the_group(case: Case) -> None:
    """Of linear layers and convolutions that run once: all that were recognised."""
    problem, tree = case.build(dtype_of(case)), measured(case).tree
    eps = torch.finfo(dtype_of(case)).eps
    for name, pair in layers.matrices(problem):
        if name in tree.children and tree[name].attrs["rung"] == "factored":
            for group, mask in memberships(problem.labels).items():
                for kind, rows in zip(("activation", "adjoint"), pair, strict=True):
                    expected = torch.linalg.svdvals(rows[mask].flatten(0, 1))
                    allowed = ROUNDING * eps * torch.linalg.vector_norm(rows).item()
                    assert difference(tree[name], kind, group, expected) <= allowed, (name, kind, group)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_both_audits_are_at_rounding_level(case: Case, dtype: torch.dtype | None) -> None:
    """In the model's own dtype and in the one that most are trained in. On the rung global no owner is claimed."""
    for name, node in measured(case, dtype=dtype).tree.children.items():
        tolerance = node.attrs["tolerance"]
        if node.attrs["rung"] != "ungrouped":
            assert float(node["residual"]) <= tolerance, name
        if node.attrs["rung"] not in ("ungrouped", "global"):
            assert float(node["owner_residual"]) <= tolerance, name


COUPLED = [case for case in ZOO if case.coupled and not case.opaque and not getattr(case, "loss_couples", False)]


@pytest.mark.parametrize("case", COUPLED, ids=str)
def test_coupled_samples_are_marked_and_the_other_definition_holds(case: Case) -> None:
    found = measured(case, "loss")
    assert any(node.attrs["coupled"] for node in found.tree.children.values())
    check_spectra(found.tree, oracle(case, "loss"), dtype_of(case))


def test_the_two_definitions_differ() -> None:
    """Otherwise their oracles would prove nothing about coupling."""
    case = next(case for case in COUPLED if case.name == "resnet3d")
    rows, loss = oracle(case, "rows"), oracle(case, "loss")
    apart = [name for name in rows["all"] if not torch.allclose(rows["site=0"][name], loss["site=0"][name])]
    assert len(apart) > len(rows["all"]) / 2


def test_keywords_are_as_good_as_positions() -> None:
    """Also where samples meet inside, so that rows have no owner and might be taken for constants."""
    case = BY_NAME["clip_with_its_own_loss"]
    problem = case.build(dtype_of(case))
    names = ("input_ids", "pixel_values", "attention_mask", "position_ids", "return_loss")
    by_name = dict(zip(names, problem.inputs, strict=True))
    torch.manual_seed(SEED)
    tree = gt.spectra(problem.model, by_name, problem.loss_fn, groups=problem.labels, keep=None, **problem.options)
    check_spectra(tree, oracle(case, "loss"), dtype_of(case))
    for name, node in measured(case).tree.children.items():
        assert tree[name].attrs["rung"] == node.attrs["rung"], name


def test_the_zoo_is_large_and_no_two_share_a_name() -> None:
    assert len({case.name for case in ZOO}) == len(ZOO) >= 40


def test_nearly_all_parameter_elements_are_factored() -> None:
    zoo = {case.name: measured(case) for case in ZOO}
    share = sum(m.elements("factored") for m in zoo.values()) / sum(m.elements() for m in zoo.values())
    assert share >= LEAST_FACTORED, below(zoo)


def below(zoo: dict[str, Measured]) -> str:
    """One line per product that is not factored, for the message."""
    lines = [
        f"{case} {name}: {facts['rung']} {', '.join(facts['ops'])} {facts['reason']}"
        for case, found in zoo.items()
        for name, facts in found.products_below_factored()
    ]
    return "\n".join(["too few are factored. Products that are not:", *lines])


def test_the_page_of_the_zoo_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tests.zoo.table > docs/reference/zoo.md"
