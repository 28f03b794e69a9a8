import torch
from kron_linear import KronLinear, KronLinearAdapter, kron_linear

import gradtrace as gt
from gradtrace.testing import AdapterTests, OpCase, draw

A, B = draw(3, 2), draw(11, 5)  # from 2 x 5 features to 3 x 11
COMPLEX = {"dtype": torch.complex128}


class TestContract(AdapterTests):
    adapter = KronLinearAdapter()

    def calls(self) -> list[OpCase]:
        x = draw(7, 10)
        return [
            OpCase("first factor", kron_linear, (x, A, B), operand=(1,)),
            OpCase("second factor", kron_linear, (x, A, B), operand=(2,)),
            OpCase("positions", kron_linear, (draw(7, 13, 10), A, B), operand=(2,)),
            OpCase("time first", kron_linear, (draw(13, 7, 10), A, B), operand=(1,), sample_axis=1),
            OpCase("one vector", kron_linear, (draw(10), A, B), operand=(2,), sample_axis=None),
            OpCase("by keyword", kron_linear, (x,), {"a": A, "b": B}, operand=("b",)),
            OpCase("complex", kron_linear, tuple(t.to(**COMPLEX) for t in (x, A, B)), operand=(1,)),
        ]


def test_the_installed_adapter_is_found_and_used() -> None:
    labels = ["patient", "control", "control", "patient", "patient", "control", "patient"]
    model = torch.nn.Sequential(KronLinear((2, 5), (3, 11)), torch.nn.Tanh()).double()
    tree = gt.spectra(model, draw(7, 10), lambda y: y.square().mean(), groups={"diagnosis": labels})
    for name in ("0.a", "0.b"):
        attributes = tree[name].attrs
        assert attributes["adapters"] == [KronLinearAdapter.name], "not installed? pip install -e ."
        assert attributes["rung"] == "factored"
        assert float(tree[name]["residual"]) <= attributes["tolerance"]
        assert float(tree[name]["owner_residual"]) <= attributes["tolerance"]
