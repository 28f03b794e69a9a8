"""What plugin authors test an adapter with: its contract as a pytest class, and the oracles behind it.

    class TestMine(AdapterTests):
        adapter = MyAdapter()

        def calls(self):
            return [OpCase("matrix", my_op, (draw(7, 5), draw(5, 3)))]

Nothing here imports pytest: `TestMine.run()` runs the same checks anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradtrace.adapters import Adapter, JointAdapter
from gradtrace.arguments import paths
from gradtrace.calls import Adjoint, OpCall, Path, RowsCutError
from gradtrace.cases import (
    OpCase,
    adjoints_of,
    apply,
    ask_all,
    delivered,
    draw,
    groups_of,
    joint_settings,
    looped_gradients,
    masked,
    outputs,
    reference_gradient,
    reordered,
    settings,
    tensors,
)
from gradtrace.factors import Factors

__all__ = ["AdapterTests", "OpCase", "apply", "draw", "looped_gradients", "masked", "reference_gradient"]

_DOUBLE = (torch.float64, torch.complex128)


class AdapterTests:
    """The contract of an adapter, as tests. A subclass named `Test...` gives `adapter` and `calls()`.

    The factors of every group of samples, densified, are the gradient of that one call with respect to its effective
    weight, for the adjoint masked to the group's rows: to `tolerance`, relative to the gradient, in float64.
    """

    adapter: Adapter
    tolerance = 1e-10

    def calls(self) -> Sequence[OpCase]:
        """Every way of calling the op that the adapter claims."""
        raise NotImplementedError(f"{type(self).__name__} needs a method `calls` that returns a list of OpCase.")

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test per case: pytest asks."""
        if "case" in metafunc.fixturenames:
            cases = list(self.calls())
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])

    @classmethod
    def run(cls) -> int:
        """How many checks passed; the first that does not raises AssertionError. For use outside pytest."""
        tests, passed = cls(), 0
        names = dict.fromkeys(name for base in reversed(cls.__mro__) for name in vars(base))
        for name in (n for n in names if n.startswith("test_")):
            for case in tests.calls():
                getattr(tests, name)(case)
                passed += 1
        return passed

    # ------------------------------------------------------------------ what is claimed

    def test_the_call_is_claimed(self, case: OpCase) -> None:
        for tensor in tensors(case):
            plain = tensor.dtype in _DOUBLE or not (tensor.is_floating_point() or tensor.is_complex())
            _check(plain, case, f"has a tensor of {tensor.dtype}: write cases in float64 or complex128")
        _check(self.adapter.claims(case.call()), case, "is not claimed")

    def test_no_other_function_is_claimed(self, case: OpCase) -> None:
        """The same arguments, handed to a function of another name, or to a library's of the same name."""

        def unheard_of(*args: Any, **kwargs: Any) -> None: ...

        def another(*args: Any, **kwargs: Any) -> None: ...

        another.__name__ = case.call().name
        another._qualified_op_name = f"elsewhere::{another.__name__}"  # type: ignore[attr-defined]
        for function in (unheard_of, another):
            call = replace(case.call(), function=function)
            _check(not self.adapter.claims(call), case, f"is claimed when the function is `{call.name}`")

    def test_elsewhere_the_weight_is_not_claimed_or_is_factored_rightly(self, case: OpCase) -> None:
        for path, tensor in paths(case.args, case.kwargs):
            if path == case.operand or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            other = replace(case, operand=path)
            for call, adjoint, _ in settings(other, self.adapter) if self.adapter.claims(other.call()) else ():
                try:
                    factors = self._factors(case, call, adjoint)
                except RowsCutError:
                    continue  # it says so, and is measured in another way
                expected = reference_gradient(call, adjoint, output=case.output)
                self._same(factors.densify(), expected, expected, case, f"the weight at {path}")

    # ------------------------------------------------------------------ what the factors are

    def test_every_groups_factors_are_its_gradient(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            factors = self._factors(case, call, adjoint)
            whole = reference_gradient(call, adjoint, output=case.output)
            self._same(factors.densify(), whole, whole, case, "all rows")
            for keep in groups:
                expected = reference_gradient(call, masked(call, adjoint, keep), output=case.output)
                self._same(factors.restrict(keep).densify(), expected, whole, case, f"`restrict` to {keep.tolist()}")

    def test_a_loop_over_samples_gives_the_same(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter) if case.loop else ():
            factors = self._factors(case, call, adjoint)
            looped = looped_gradients(call, adjoint, output=case.output)
            whole = sum(looped.values(), torch.zeros_like(call.weight))
            for owner, expected in looped.items():
                keep = torch.zeros_like(groups[0])
                keep[owner] = True
                got = factors.restrict(keep).densify()
                self._same(got, expected, whole, case, f"sample {owner}", tolerance=max(self.tolerance, 1e-8))

    def test_weights_multiply_each_samples_share(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            weights = draw(len(groups[0]), seed=3)
            assert call.owners is not None
            expected = reference_gradient(call, adjoint * weights[call.owners], output=case.output)
            got = self._factors(case, call, adjoint).weighted(weights).densify()
            self._same(got, expected, expected, case, "`weighted`")

    def test_cells_are_groups_and_add_up(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            factors = self._factors(case, call, adjoint)
            cells = torch.arange(len(groups[0])) * 5 % 3 + 11
            found = factors.by_cell(cells)
            whole = factors.densify()
            self._same(sum(found.values(), torch.zeros_like(whole)), whole, whole, case, "the sum of `by_cell`")
            unknown = set(found) - set(cells.tolist())
            _check(not unknown, case, f"`by_cell` names cells that there are not: {unknown}")
            for cell in set(cells.tolist()):
                expected = reference_gradient(call, masked(call, adjoint, cells == cell), output=case.output)
                got = found.get(cell, torch.zeros_like(whole))
                self._same(got, expected, whole, case, f"`by_cell` of {cell}")

    def test_sample_numbers_and_their_order_do_not_matter(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            factors, number = self._factors(case, call, adjoint), len(groups[0]) - 1
            order = torch.cat([torch.arange(number).flip(0), torch.tensor([-1])])
            assert call.owners is not None
            turned = self._factors(case, replace(call, owners=order[call.owners]), adjoint)
            moved = reordered(case, call, adjoint)
            for keep in groups:
                expected = factors.restrict(keep).densify()
                got = turned.restrict(keep[order]).densify()
                self._same(got, expected, expected, case, "the samples numbered backwards")
                if moved is not None:
                    got = self._factors(case, *moved).restrict(keep).densify()
                    self._same(got, expected, expected, case, "the samples in another order")

    def test_outputs_are_taken_together(self, case: OpCase) -> None:
        """Of a JointAdapter: all weights, for all outputs at once; nothing is counted once per output."""
        results = outputs(case.call()) if isinstance(self.adapter, JointAdapter) else ()
        if len(results) < 2:
            return
        told = case.together is not None and len(case.together) == len(results)
        _check(told, case, f"returns {len(results)} outputs: `together` has to say where samples lie in each of them")
        for call, weights, drawn, owners in joint_settings(case, self.adapter):
            found = self._jointly(case, call, weights, adjoints_of(delivered(call, weights, drawn)[0], owners))
            for keep in groups_of(owners[0]):
                shares = [torch.where(keep[o], d, torch.zeros_like(d)) for o, d in zip(owners, drawn, strict=True)]
                for path, expected in zip(weights, delivered(call, weights, shares)[1], strict=True):
                    got, whole = found[path].restrict(keep).densify(), found[path].densify()
                    self._same(got, expected, whole, case, f"all outputs together, the weight at {path}")

    def _jointly(
        self, case: OpCase, call: OpCall, weights: Sequence[Path], adjoints: Mapping[int, Adjoint]
    ) -> Mapping[Path, Factors]:
        """The factors for all outputs, which have no more rows than for one."""
        assert isinstance(self.adapter, JointAdapter)
        found, first = self.adapter.joint_factors(call, weights, adjoints), dict([next(iter(adjoints.items()))])
        _check(
            set(found) >= set(weights), case, f"`joint_factors` has weights at {list(found)}, not at {list(weights)}"
        )
        for path, alone in self.adapter.joint_factors(call, weights, first).items():
            counts = [None if rows is None else len(rows.owners) for rows in (alone.rows(), found[path].rows())]
            _check(counts[0] == counts[1], case, f"`rows` of the weight at {path}: {counts[1]} for all outputs "
                f"together, {counts[0]} for one")  # fmt: skip
        return found

    # ------------------------------------------------------------------ rows and sizes

    def test_every_row_has_its_owner(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            rows = self._factors(case, call, adjoint).rows()
            if rows is None:
                continue
            count, width = rows.adjoint.shape
            sizes = {len(rows.owners), count, count if rows.activation is None else len(rows.activation)}
            _check(len(sizes) == 1 and rows.owners.dim() == 1, case, f"`rows` have different lengths: {sizes}")
            same = rows.activation is None or rows.activation.dtype == rows.adjoint.dtype
            _check(same, case, "`rows` have different dtypes: see `gradtrace.calls.cast_as_used`")
            assert call.owners is not None
            if case.rows is None:
                expected = torch.bincount(call.owners.expand(adjoint.shape).flatten() + 1, minlength=len(groups[0]))
                got = torch.bincount(rows.owners + 1, minlength=len(groups[0])) * width
                _check(torch.equal(got, expected), case, f"`rows` per owner: {got} elements instead of {expected}")
            else:
                _check(count == case.rows, case, f"`rows` are {count} instead of {case.rows}")
            for keep in groups:
                some = self._factors(case, call, masked(call, adjoint, keep)).rows()
                assert some is not None
                live = some.owners[(some.adjoint != 0).any(1)]
                _check(bool(keep[live].all()), case, f"`rows` gives rows of {keep.tolist()} to {live.tolist()}")

    def test_rows_that_are_formed_later_are_the_same(self, case: OpCase) -> None:
        for call, adjoint, _ in settings(case, self.adapter):
            factors = self._factors(case, call, adjoint)
            sources = {kind: factors.source(kind) for kind in ("activation", "adjoint")}
            for kind, source in sources.items():
                rows = None if source is None else factors.rows()
                if source is None or rows is None:
                    continue
                expected = getattr(rows, kind)
                width = expected.shape[1]
                _check(source.width == width, case, f"`source` of {kind} has {source.width} columns, not {width}")
                for owner in torch.unique(rows.owners).tolist():
                    own = expected[rows.owners == owner]
                    units = (source.owners == owner).nonzero(as_tuple=True)[0]
                    found = torch.cat([*source.blocks(units), own[:0]])
                    what = f"`source` of {kind}, rows of {owner}"
                    _check(len(found) == len(own), case, f"{what}: {len(found)} instead of {len(own)}")
                    square, power = own.mH @ own, own.abs().square().sum().reshape(1)
                    self._same(found.mH @ found, square, power.to(square.dtype), case, what)
                    self._same(source.square(units), square, power.to(square.dtype), case, f"{what}, squared")

    def test_scale_bounds_the_gradient(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            factors = self._factors(case, call, adjoint)
            for some in (factors, *(factors.restrict(keep) for keep in groups)):
                norm, told = float(torch.linalg.vector_norm(some.densify())), some.scale()
                single = isinstance(told, float) or (isinstance(told, Tensor) and told.numel() == 1)
                _check(single, case, f"`scale` is {type(told)} instead of float")
                scale = float(told)
                _check(norm <= scale * (1 + self.tolerance), case, f"`scale` {scale} is below the norm {norm}")
                norms = some.norms()
                if norms is not None:  # the audits divide by it: one that is too large would hide mistakes
                    most = float((norms.activation * norms.adjoint).sum())
                    _check(scale <= most * (1 + 1e-6), case, f"`scale` {scale} is more than rows make: {most}")

    # ------------------------------------------------------------------ manners

    def test_nothing_is_written_on_the_inputs(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            kept = [*tensors(call), adjoint]
            before = [(t._version, t.clone()) for t in kept]
            self.adapter.claims(call)
            ask_all(self._factors(case, call, adjoint), groups[0])
            for tensor, (version, value) in zip(kept, before, strict=True):
                same = tensor._version == version and torch.equal(tensor, value)
                _check(same, case, f"a tensor of shape {tuple(tensor.shape)} was written on")

    def test_an_adjoint_may_have_any_strides(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            axes = list(reversed(range(adjoint.dim())))
            backwards = adjoint.permute(axes).contiguous().permute(axes)
            single = torch.ones((), dtype=adjoint.dtype).expand(adjoint.shape)
            for strided in (backwards, single):
                expected = reference_gradient(call, strided.contiguous(), output=case.output)
                factors = self._factors(case, call, strided)
                size = torch.tensor(factors.scale())  # ones may cancel, as what a norm returns does
                self._same(factors.densify(), expected, size, case, f"an adjoint with strides {strided.stride()}")
                ask_all(factors, torch.ones_like(groups[0]))

    def test_what_is_not_finite_stays_with_its_sample(self, case: OpCase) -> None:
        for call, adjoint, groups in settings(case, self.adapter):
            spoiled = torch.zeros_like(groups[0])
            spoiled[0] = True
            broken = torch.where(spoiled[call.owners], float("nan"), adjoint)
            expected = self._factors(case, call, adjoint).restrict(~spoiled).densify()
            factors = self._factors(case, call, broken)
            self._same(factors.restrict(~spoiled).densify(), expected, expected, case, "`restrict` beside a NaN")
            of_others = factors.by_cell(spoiled.long()).get(0, torch.zeros_like(expected))
            self._same(of_others, expected, expected, case, "`by_cell` beside a NaN")

    # ------------------------------------------------------------------ how they are asked and compared

    def _factors(self, case: OpCase, call: OpCall, adjoint: Tensor) -> Factors:
        """The adapter's factors; AssertionError where it does not claim the call or fails on it."""
        _check(self.adapter.claims(call), case, "is not claimed")
        try:
            return self.adapter.factors(call, adjoint)
        except RowsCutError:
            raise
        except Exception as error:
            what = f"`factors` failed with the weight at {list(call.operand)}: {type(error).__name__}: {error}"
            raise AssertionError(f"{case.name} (`{call.name}`): {what}") from error

    def _same(
        self, got: Tensor, expected: Tensor, whole: Tensor, case: OpCase, what: str, *, tolerance: float | None = None
    ) -> None:
        """Relative to the expected gradient, or, where that is nothing but rounding, to the whole one."""
        _check(got.shape == expected.shape, case, f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
        _check(got.dtype == expected.dtype, case, f"{what}: {got.dtype}, not {expected.dtype}")
        norm, total = (float(torch.linalg.vector_norm(t)) for t in (expected, whole))
        error = float(torch.linalg.vector_norm(got - expected))
        allowed = (tolerance or self.tolerance) * (norm if norm > 1e-6 * total else total)
        _check(error <= allowed, case, f"{what}: differs by {error:.3g} from a gradient of norm {norm:.3g}")


def _check(holds: bool, case: OpCase, message: str) -> None:
    if not holds:
        raise AssertionError(f"{case.name} (`{case.call().name}`): {message}.")
