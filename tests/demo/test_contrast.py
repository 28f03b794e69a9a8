"""Contrasts and words: known gaps come back, whatever the groups' sizes."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from gradtrace.demo import words
from gradtrace.demo.contrast import LEADING, contrast, contrasts, mean_spectra, widest

from .trees import GROUPS, PAIRS, SAMPLES, tree

FACTORS = {"first.weight": 1.5, "second.weight": 0.25, "first.bias": 9.0}


def test_a_groups_mean_gradient_does_not_depend_on_its_size() -> None:
    node = tree({"first.weight": 1.0})["first.weight"]
    np.testing.assert_allclose(mean_spectra(node, "cohort=gw"), mean_spectra(node, "cohort=hcp"))
    stored = node["gradient"].sel(group="cohort=gw").values
    np.testing.assert_allclose(mean_spectra(node, "cohort=gw"), stored * SAMPLES[0] / SAMPLES[1])


def test_an_absent_group_is_nan_not_zero() -> None:
    made = tree({"first.weight": 2.0})
    node = made["first.weight"].to_dataset()
    node["n_samples"][4, GROUPS.index("cohort=gw")] = 0
    node["gradient"][4, GROUPS.index("cohort=gw")] = np.nan
    spectra = mean_spectra(node, "cohort=gw")
    assert np.isnan(spectra[4]).all()
    assert np.isfinite(np.delete(spectra, 4, axis=0)).all()


def test_gaps_ratios_and_cosines_are_those_put_in() -> None:
    found = contrasts(tree(FACTORS, cosine=0.25), PAIRS)
    one = found["cohort"]["second.weight"]
    np.testing.assert_allclose(one.ratio, 0.25)
    np.testing.assert_allclose(one.rank_ratio, 1.0)
    assert one.gap == pytest.approx(2.0)
    assert one.cosine == pytest.approx(0.25)
    assert found["half"]["second.weight"].gap == pytest.approx(0.0, abs=1e-9)


def test_each_ratio_looks_at_its_own_part_of_the_spectrum() -> None:
    made = tree({"first.weight": 1.0}, components=11)
    node = made["first.weight"].to_dataset()
    node["gradient"][:, GROUPS.index("cohort=hcp"), 0] *= 2.0
    one = contrast("first.weight", node, PAIRS["cohort"])
    np.testing.assert_allclose(one.top_ratio, 2.0)
    np.testing.assert_allclose(one.ratio, 2.0 ** (1 / LEADING))
    assert one.gap == pytest.approx(np.sqrt(1 / LEADING))
    assert (one.rank_ratio < 1).all()


def test_rounding_noise_beside_the_largest_value_is_not_compared() -> None:
    made = tree({"first.weight": 3.0})
    node = made["first.weight"].to_dataset()
    node["gradient"][:, GROUPS.index("cohort=gw"), 2:] = 1e-12
    one = contrast("first.weight", node, PAIRS["cohort"])
    np.testing.assert_allclose(one.ratio, 3.0)


def test_the_widest_gap_comes_first_and_vectors_are_left_out() -> None:
    found = contrasts(tree(FACTORS), PAIRS)
    assert [one.parameter for one in widest(found["cohort"])] == ["second.weight", "first.weight"]


def test_the_table_sets_the_cohorts_beside_the_yardstick() -> None:
    (top, *_) = words.table(contrasts(tree(FACTORS), PAIRS))
    assert top == ("second.weight", "2.00 | 0.00", "0.25 | 1.00", "1.00 | 1.00", "0.25 | 0.25")
    assert len(top) == len(words.HEADER)


def describe(made: xr.DataTree, held: float = 1.0) -> str:
    """The words on a tree whose held-out people have their own factor."""
    found = contrasts(made, PAIRS)
    top = widest(found["cohort"])[0].parameter
    return words.describe("recurrent", found, contrast(top, tree({top: held})[top], PAIRS["cohort"]))


@pytest.mark.parametrize(("held", "says"), [(0.5, "it is 2.00."), (2.0, "it is 0.50, the other way round.")])
def test_the_held_out_people_are_told_in_the_same_direction(held: float, says: str) -> None:
    text = describe(tree(FACTORS), held=held)
    assert f"Among the held-out people, at constant weights after each epoch, {says}" in text


def test_the_larger_group_is_named_as_the_larger() -> None:
    text = describe(tree(FACTORS))
    assert "singular values of gw's mean gradient are 4.00 times hcp's" in text
    assert "the largest alone 4.00 times; its effective rank is 1.00 times hcp's" in text
    assert "larger in 100% of them" in text
    assert "hardly changes from the first third of training (4.00) to the last (4.00)" in text
    assert "The gap by cohort is the wider one in 2 of 2 matrices." in text
    other = describe(tree({"first.weight": 3.0}))
    assert "hcp's mean gradient are 3.00 times gw's" in other


@pytest.mark.parametrize(
    ("last", "verb"), [(8.0, "grows"), (2.0, "shrinks"), (0.4, "turns round"), (4.0, "hardly changes")]
)
def test_the_course_of_a_ratio_is_told(last: float, verb: str) -> None:
    made = tree({"first.weight": 4.0}, steps=30)
    node = made["first.weight"].to_dataset()
    node["gradient"][20:, GROUPS.index("cohort=hcp")] *= last / 4.0
    made["first.weight"] = node
    assert f"ratio {verb} from the first third of training (4.00) to the last ({last:.2f})" in describe(made)


def test_the_closing_words_claim_nothing() -> None:
    text = words.closing("They differ in scanner.", matrices=17, grouping="cohort")
    assert "no test was made" in text
    assert "picked because" in text
    assert "17 matrices" in text
    assert text.endswith("They differ in scanner.")
