"""The functional face: the gradients of autograd, the spectra of `gt.spectra`, a clear word where neither can be."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import gradtrace as gt
from gradtrace.func import grad_and_spectra
from gradtrace.inputs import Inputs
from tests.case import DIAGNOSIS, FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Case, Problem, call
from tests.models import CASES
from tests.oracles import SEED, memberships, spectrum
from tests.snapshot import Snapshot

LABELS = {"diagnosis": list(DIAGNOSIS)}
Params = Mapping[str, Tensor]
# Reentrant checkpoints refuse torch.autograd.grad too: see the test of that refusal.
PURE = [case for case in CASES if not case.name.startswith("checkpoint_reentrant")]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return 0.4 * torch.randn(shape, generator=generator, dtype=torch.float64)


def weights() -> dict[str, Tensor]:
    return {"in": draw(FEATURES, HIDDEN), "shift": draw(HIDDEN), "out": draw(HIDDEN, OUTPUT)}


X, SEQUENCES = draw(SAMPLES, FEATURES), draw(SAMPLES, TIME, FEATURES)
CLASSES = torch.arange(SAMPLES) % OUTPUT
TOKENS = torch.arange(SAMPLES * TIME).reshape(SAMPLES, TIME) % OUTPUT


def network(p: Params, x: Tensor) -> Tensor:
    return torch.tanh(x @ p["in"] + p["shift"]) @ p["out"]


def cross_entropies(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(p, x), y, reduction="none")


def mean_cross_entropy(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(p, x, y).mean()


def autograd(f: Callable[..., Tensor], params: Any, *args: Any) -> Any:
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    return pytree.tree_unflatten(torch.autograd.grad(f(pytree.tree_unflatten(leaves, spec), *args), leaves), spec)


def equal(a: Any, b: Any) -> bool:
    one, other = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(one) == len(other) and all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def same_tree(a: xr.DataTree, b: xr.DataTree) -> bool:
    """All values and attributes of all parameters, to the last bit."""
    return list(a.children) == list(b.children) and all(
        a[name].to_dataset().identical(b[name].to_dataset()) for name in a.children
    )


# ---------------------------------------------------------------------- models, by functional_call


def functional(problem: Problem) -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A problem's loss as a function of (parameters, what else the model holds, inputs)."""
    model = problem.model
    named = dict(model.named_parameters())
    params = {name: p for name, p in named.items() if p.requires_grad}
    rest = {name: p for name, p in named.items() if not p.requires_grad}
    rest |= {name: buffer.clone() for name, buffer in model.named_buffers()}

    def f(params: Params, rest: Params, inputs: Any) -> Tensor:
        given = Inputs.of(inputs)
        return problem.loss_fn(functional_call(model, {**params, **rest}, given.args, dict(given.kwargs)))

    return f, params, rest


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", PURE, ids=str)
def test_models_have_the_gradients_of_autograd_and_the_spectra_of_spectra(case: Case) -> None:
    problem = case.build()
    torch.manual_seed(SEED)
    problem.loss_fn(call(problem.model, problem.inputs)).backward()
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in problem.model.named_parameters()}

    problem = case.build()
    f, params, rest = functional(problem)
    torch.manual_seed(SEED)
    before = Snapshot.of(problem.model)
    g = grad_and_spectra(f, keep=None, **problem.options)
    gradients, tree = g(params, rest, problem.inputs, groups=problem.labels)
    changes = [change for change in Snapshot.of(problem.model).changes_since(before) if change != "random state"]
    assert [change for change in changes if change.startswith(("parameter", "gradient", "hooks", "buffer"))] == []
    for name, gradient in gradients.items():
        one, other = (t.to_dense() if t.is_sparse else t for t in (gradient, expected[name]))
        assert torch.equal(one, other), name

    problem = case.build()
    torch.manual_seed(SEED)
    tree_of_model = gt.spectra(
        problem.model, problem.inputs, problem.loss_fn, groups=problem.labels, keep=None, **problem.options
    )
    assert same_tree(tree, tree_of_model)
    assert tree.attrs["loss"] == float(tree["loss"]) == float(tree_of_model["loss"])


def batch_normed() -> nn.Sequential:
    torch.manual_seed(SEED)
    layers = nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Dropout(0.3), nn.Linear(HIDDEN, OUTPUT)
    return nn.Sequential(*layers).double()


class Hidden(torch.autograd.Function):
    """x @ w, of which the capture sees nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


@pytest.mark.parametrize("passed", [True, False], ids=["buffers passed", "the module's own buffers"])
def test_buffers_and_random_state_are_as_after_one_call_also_where_f_is_run_again(passed: bool) -> None:
    """A scale by a table looked up with constants is first taken for an op on data: f runs twice."""
    calls = []

    def loss(model: nn.Module) -> Callable[..., Tensor]:
        def f(p: Any, buffers: Params, x: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            scale = p["scale"][torch.arange(FEATURES) % 2]
            held = buffers if passed else {}
            return F.cross_entropy(functional_call(model, {**p["net"], **held}, (Hidden.apply(x, p["w"]) * scale,)), y)

        return f

    model = batch_normed()
    params = {"net": dict(model.named_parameters()), "scale": draw(2), "w": draw(FEATURES, FEATURES)}
    results = []
    for run in (autograd, lambda f, *args: grad_and_spectra(f)(*args, groups=LABELS)[0]):
        copied = copy.deepcopy(model)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        torch.manual_seed(SEED)
        calls.clear()
        gradients = run(loss(copied), params, buffers, X, CLASSES)
        results.append((gradients, buffers, dict(copied.named_buffers()), torch.get_rng_state()))
    assert len(calls) == 2
    assert equal(results[0], results[1])
    moved = results[0][1] if passed else results[0][2]
    assert int(moved["1.num_batches_tracked"]) == 1


class Checkpointed(nn.Module):
    def __init__(self, how: bool | None) -> None:
        super().__init__()
        self.how = how
        self.first, self.norm, self.last = (
            nn.Linear(FEATURES, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.Linear(HIDDEN, OUTPUT),
        )
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        def region(h: Tensor) -> Tensor:
            return torch.tanh(self.norm(self.first(h)))

        return self.last(region(x) if self.how is None else checkpoint(region, x, use_reentrant=self.how))


def of_module(model: nn.Module) -> Callable[..., Tensor]:
    return lambda p, buffers, x, y: F.cross_entropy(functional_call(model, {**p, **buffers}, (x,)), y)


def test_checkpoints_recompute_on_the_parameters_that_were_given() -> None:
    """Not on the module's own, which are in place again when the backward pass runs."""
    results = []
    for how in (None, False):
        model = Checkpointed(how)
        params = {name: draw(*p.shape, seed=place) for place, (name, p) in enumerate(model.named_parameters())}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        before = Snapshot.of(model)
        gradients, tree = grad_and_spectra(of_module(model))(params, buffers, X, CLASSES, groups=LABELS)
        assert Snapshot.of(model).changes_since(before) == []
        results.append((gradients, buffers, tree))
    assert equal(results[0][:2], results[1][:2])
    for name in results[0][2].children:
        one, other = results[0][2][name]["gradient"].values, results[1][2][name]["gradient"].values
        assert np.array_equal(one, other, equal_nan=True)


def test_a_checkpointed_module_on_two_sets_of_parameters_is_refused() -> None:
    model = Checkpointed(False)
    f, params = of_module(model), dict(model.named_parameters())

    def both(p: Params, q: Params, x: Tensor, y: Tensor) -> Tensor:
        return f(p, {}, x, y) + f(q, {}, x, y)

    with pytest.raises(gt.GradtraceError, match="several sets of parameters"):
        grad_and_spectra(both, (0, 1))(params, {n: 2 * p for n, p in params.items()}, X, CLASSES, groups=LABELS)


def test_reentrant_checkpoints_are_refused() -> None:
    model = Checkpointed(True)
    params = dict(model.named_parameters())
    with pytest.raises(gt.GradtraceError, match="use_reentrant=False"):
        grad_and_spectra(of_module(model))(params, {}, X.clone().requires_grad_(), CLASSES, groups=LABELS)


def test_tied_weights_are_one_parameter_or_two() -> None:
    table, head = nn.Embedding(OUTPUT, HIDDEN), nn.Linear(HIDDEN, OUTPUT, bias=False)
    head.weight = table.weight
    model = nn.Sequential(table, nn.Tanh(), head).double()

    def loss(tie: bool) -> Callable[..., Tensor]:
        def f(p: Params, tokens: Tensor) -> Tensor:
            output = functional_call(model, p, (tokens,), tie_weights=tie)
            return F.cross_entropy(output.flatten(0, 1), tokens.flatten())

        return f

    gradients, tree = grad_and_spectra(loss(True))(dict(model.named_parameters()), TOKENS, groups=LABELS)
    assert list(tree.children) == list(gradients) == ["0.weight"]
    model_loss = lambda output: F.cross_entropy(output.flatten(0, 1), TOKENS.flatten())  # noqa: E731
    assert same_tree(tree, gt.spectra(model, TOKENS, model_loss, groups=LABELS))
    both = dict(model.named_parameters(remove_duplicate=False))
    apart, tree = grad_and_spectra(loss(False))(both, TOKENS, groups=LABELS)
    assert list(tree.children) == ["0.weight", "2.weight"]
    assert torch.allclose(apart["0.weight"] + apart["2.weight"], gradients["0.weight"])


def test_an_ensemble_is_a_loop_over_its_stacked_state() -> None:
    models = [batch_normed().eval() for _ in range(3)]
    for place, model in enumerate(models):
        nn.init.normal_(model[0].weight, generator=torch.Generator().manual_seed(place))
    stacked, buffers = stack_module_state(models)
    g = grad_and_spectra(of_module(models[0]))
    for n, model in enumerate(models):
        one, other = ({name: t[n].clone() for name, t in state.items()} for state in (stacked, buffers))
        _, tree = g(one, other, X, CLASSES, groups=LABELS)
        expected = gt.spectra(model, X, lambda output: F.cross_entropy(output, CLASSES), groups=LABELS)
        assert same_tree(tree, expected)
    assert all(p.grad is None for p in stacked.values())


def test_autocast_around_the_call_is_autocast_in_the_forward_pass() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUT))
    params, x = dict(model.named_parameters()), X.float()

    def f(p: Params, x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).float().square().mean()

    def cast(p: Params, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return f(p, x)

    inside, tree = grad_and_spectra(cast)(params, x, groups=LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        around, other = grad_and_spectra(f)(params, x, groups=LABELS)
    assert equal(inside, around)
    assert equal(inside, autograd(cast, params, x))
    for name in tree.children:
        assert np.array_equal(tree[name]["gradient"], other[name]["gradient"], equal_nan=True)


def test_a_table_that_scales_what_it_looks_up_is_scaled_by_the_function_and_not_by_spectra() -> None:
    model = nn.Sequential(nn.Embedding(OUTPUT, HIDDEN, max_norm=0.5), nn.Flatten(1)).double()
    before = Snapshot.of(model)
    square = lambda output: output.square().mean()  # noqa: E731
    tree = gt.spectra(model, TOKENS, square, groups=LABELS)
    assert Snapshot.of(model).changes_since(before) == []
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, found = grad_and_spectra(lambda p, x: square(functional_call(model, p, (x,))))(params, TOKENS, groups=LABELS)
    assert same_tree(found, tree)
    assert float(params["0.weight"].norm(dim=1).max()) == pytest.approx(0.5), "as functional_call does"


# ---------------------------------------------------------------------- mathematics by hand


def tokens_apart(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(p, x).transpose(1, 2), y, reduction="none").mean(1)


def flat_tokens(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(network(p, x).reshape(-1, OUTPUT), y.reshape(-1))


def flat_head(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """The last matrix product has a row per token; what follows it, one per sample."""
    hidden = torch.tanh(x @ p["in"] + p["shift"]).reshape(-1, HIDDEN)
    return F.cross_entropy(hidden @ p["out"], y.reshape(-1), reduction="none").reshape(y.shape).mean(1).mean()


def mapped(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return torch.vmap(lambda a, b: F.cross_entropy(network(p, a[None]), b[None]))(x, y).mean()


def penalties(p: Params, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(p, x).square().sum(), x, create_graph=True)
    return slope.square().sum(1)


def transformed(p: Params, x: Tensor, y: Tensor) -> Tensor:
    slope = torch.vmap(torch.func.grad(lambda row: network(p, row).square().sum()))(x)
    return slope.square().sum(1).mean()


def residual(p: Params, x: Tensor, y: Tensor) -> Tensor:
    hidden = x @ p["in"] + p["shift"]
    return (hidden + torch.tanh(hidden @ p["out"]) @ p["out"].T).square().mean(1)


def with_a_loss_on_hidden_values(p: Params, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropies(p, x, y) + 0.1 * (x @ p["in"]).square().mean(1)


def mean_of(per_sample: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: per_sample(*args).mean()


BY_HAND = {
    "a loss per sample": (mean_cross_entropy, cross_entropies, (X, CLASSES)),
    "a loss per token": (flat_tokens, tokens_apart, (SEQUENCES, TOKENS)),
    "tokens flattened before the head": (flat_head, tokens_apart, (SEQUENCES, TOKENS)),
    "residual": (mean_of(residual), residual, (X, CLASSES)),
    "a loss on hidden values": (mean_of(with_a_loss_on_hidden_values), with_a_loss_on_hidden_values, (X, CLASSES)),
    "vmap inside": (mapped, cross_entropies, (X, CLASSES)),
    "torch.func.grad inside": (transformed, penalties, (X, CLASSES)),
    "torch.autograd.grad inside": (mean_of(penalties), penalties, (X, CLASSES)),
}
FACTORED = list(BY_HAND)[:5]


def check(tree: xr.DataTree, per_sample: Callable[..., Tensor], params: Params, args: tuple[Any, ...]) -> None:
    """The spectra are those of the gradients of the groups' shares of the loss."""
    for group, mask in memberships(LABELS).items():
        share = autograd(lambda p, *a: (per_sample(p, *a) * mask).sum() / SAMPLES, params, *args)  # noqa: B023
        for name, gradient in share.items():
            expected = spectrum(gradient).numpy()
            found = tree[name]["gradient"].sel(group=group).dropna("component").values
            found = np.pad(found, (0, len(expected) - len(found)))
            assert np.abs(found - expected).max() < 1e-12, (name, group)


@pytest.mark.parametrize("name", BY_HAND)
def test_mathematics_by_hand_has_the_gradients_of_the_groups(name: str) -> None:
    f, per_sample, args = BY_HAND[name]
    gradients, tree = grad_and_spectra(f, keep=None)(weights(), *args, groups=LABELS)
    assert equal(gradients, autograd(f, weights(), *args))
    check(tree, per_sample, weights(), args)
    assert max(float(node["residual"]) for node in tree.children.values()) < 1e-13
    if name in FACTORED:
        assert {node.attrs["rung"] for node in tree.children.values()} == {"factored"}
    assert not any(node.attrs["coupled"] for node in tree.children.values())


@pytest.mark.parametrize("closure", [False, True], ids=["argument", "closure"])
def test_samples_that_a_function_couples_are_marked(closure: bool) -> None:
    params = {name: w for name, w in weights().items() if name != "shift"}

    def per_sample(p: Params, x: Tensor) -> Tensor:
        hidden = x @ p["in"]
        return (torch.tanh(hidden - hidden.mean(0)) @ p["out"]).square().mean(1)

    g = grad_and_spectra((lambda p: per_sample(p, X).mean()) if closure else mean_of(per_sample), keep=None)
    _, tree = g(params, *([] if closure else [X]), groups=LABELS)
    assert (tree["in"].attrs["coupled"], tree["in"].attrs["coupling"]) == (True, "loss")
    assert not tree["out"].attrs["coupled"]
    check(tree, per_sample, params, (X,))


def test_constants_among_the_arguments_are_told_from_data() -> None:
    def per_sample(p: Params, x: Tensor, mask: Tensor, order: Tensor) -> Tensor:
        return ((x + p["table"][order] * mask) @ p["in"]).square().mean((1, 2))

    params = {"table": draw(TIME, FEATURES), "in": draw(FEATURES, HIDDEN)}
    args = (SEQUENCES, draw(TIME, 1), torch.arange(TIME).flip(0))
    _, tree = grad_and_spectra(mean_of(per_sample), keep=None)(params, *args, groups=LABELS)
    check(tree, per_sample, params, args)
    assert tree["table"].attrs["rung"] == "pulled back"
    assert not tree["table"].attrs["coupled"]


def test_a_penalty_on_the_weights_is_in_the_whole_alone() -> None:
    def f(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return mean_cross_entropy(p, x, y) + 0.1 * torch.stack([w.square().sum() for w in p.values()]).sum()

    gradients, tree = grad_and_spectra(f, keep=None)(weights(), X, CLASSES, groups=LABELS)
    _, plain = grad_and_spectra(mean_cross_entropy, keep=None)(weights(), X, CLASSES, groups=LABELS)
    for name, gradient in gradients.items():
        whole = tree[name]["gradient"].sel(group="all").dropna("component").values
        assert np.abs(whole - spectrum(gradient).numpy()[: len(whole)]).max() < 1e-12
        parts = [t[name]["gradient"].sel(group="diagnosis=SZ").dropna("component").values for t in (tree, plain)]
        size = max(map(len, parts))
        assert np.pad(parts[0], (0, size - len(parts[0]))) == pytest.approx(
            np.pad(parts[1], (0, size - len(parts[1]))), abs=1e-12
        )


def test_without_groups_there_is_the_whole() -> None:
    """Also where values on the way to the loss have different numbers of rows."""

    def f(p: Params, x: Tensor) -> Tensor:
        hidden = x @ p["in"] + p["shift"]
        return (hidden.reshape(-1, HIDDEN) @ p["out"]).square().mean() + hidden.mean()

    gradients, tree = grad_and_spectra(f, keep=None)(weights(), SEQUENCES)
    assert tree["group"].values.tolist() == ["all"]
    for name, gradient in gradients.items():
        found = tree[name]["gradient"].sel(group="all").dropna("component").values
        assert np.abs(found - spectrum(gradient).numpy()[: len(found)]).max() < 1e-12


# ---------------------------------------------------------------------- the call


def test_names_are_paths_and_gradients_have_the_structure_of_the_parameters() -> None:
    w = weights()
    nested = {"layers": [{"w": w["in"], "b": w["shift"]}, (w["out"],)]}

    def f(p: Any, x: Tensor) -> Tensor:
        first, (last,) = p["layers"]
        return network({"in": first["w"], "shift": first["b"], "out": last}, x).square().mean()

    gradients, tree = grad_and_spectra(f)(nested, X, groups=LABELS)
    assert list(tree.children) == ["layers.0.w", "layers.0.b", "layers.1.0"]
    assert equal(gradients, autograd(f, nested, X))
    assert pytree.tree_structure(gradients) == pytree.tree_structure(nested)


def test_a_bare_tensor_and_several_arguments_bear_the_names_of_the_arguments() -> None:
    w = weights()

    def f(encoder: Tensor, x: Tensor, head: Params) -> Tensor:
        return (torch.tanh(x @ encoder) @ head["out"]).square().mean()

    gradient, tree = grad_and_spectra(f)(w["in"], X, {"out": w["out"]}, groups=LABELS)
    assert isinstance(gradient, Tensor)
    assert list(tree.children) == ["encoder"]
    gradients, tree = grad_and_spectra(f, argnums=(0, -1))(w["in"], X, {"out": w["out"]}, groups=LABELS)
    assert list(tree.children) == ["encoder", "head.out"]
    assert isinstance(gradients, tuple)
    assert torch.equal(gradients[0], gradient)
    _, tree = grad_and_spectra(lambda *args: f(*args))(w["in"], X, {"out": w["out"]}, groups=LABELS)
    assert list(tree.children) == ["0"]


def test_aux_comes_beside_the_spectra_and_carries_no_graph() -> None:
    def f(p: Params, x: Tensor, *, y: Tensor) -> tuple[Tensor, Any]:
        return mean_cross_entropy(p, x, y), {"logits": network(p, x), "note": "as it is"}

    gradients, (tree, aux) = grad_and_spectra(f, has_aux=True, parameters="o*")(weights(), X, y=CLASSES, groups=LABELS)
    assert not aux["logits"].requires_grad
    assert torch.equal(aux["logits"], network(weights(), X))
    assert aux["note"] == "as it is"
    assert list(tree.children) == ["out"]
    assert equal(gradients, autograd(mean_cross_entropy, weights(), X, CLASSES)), "also of what is not measured"
    assert tree.attrs["loss"] == float(mean_cross_entropy(weights(), X, CLASSES))


def test_a_parameter_that_the_loss_does_not_use_has_a_gradient_of_zero() -> None:
    gradients, tree = grad_and_spectra(mean_cross_entropy)({**weights(), "idle": X}, X, CLASSES, groups=LABELS)
    assert torch.equal(gradients["idle"], torch.zeros_like(X))
    assert "idle" not in tree.children


def test_nothing_is_accumulated_outside() -> None:
    leaf, frozen = draw(FEATURES, HIDDEN).requires_grad_(), nn.Linear(HIDDEN, OUTPUT).double()
    source = X.clone().requires_grad_()

    def f(p: Params, x: Tensor) -> Tensor:
        return F.cross_entropy(frozen(torch.tanh(x @ p["in"])), CLASSES)

    with torch.no_grad():
        gradients, tree = grad_and_spectra(f)({"in": leaf}, source, groups=LABELS)
    computed, other = grad_and_spectra(f)({"in": leaf * 1.0}, source * 1.0, groups=LABELS)
    assert equal(gradients, computed)
    assert same_tree(tree, other)
    assert not gradients["in"].requires_grad
    assert all(t.grad is None for t in (leaf, source, *frozen.parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_it_refuses_to_be_transformed() -> None:
    g, w = grad_and_spectra(mean_cross_entropy), weights()
    gradient = lambda p: g(p, X, CLASSES)[0]  # noqa: E731
    stacked = {name: torch.stack([t, t]) for name, t in w.items()}
    attempts = {
        "vmap": lambda: torch.vmap(gradient)(stacked),
        "grad": lambda: torch.func.grad(lambda p: gradient(p)["in"].sum())(w),
        "jvp": lambda: torch.func.jvp(gradient, (w,), (w,)),
    }
    for name, attempt in attempts.items():
        with pytest.raises(gt.GradtraceError, match=rf"torch\.func\.{name}.*loop"):
            attempt()
    dual = torch.autograd.forward_ad
    with dual.dual_level(), pytest.raises(gt.GradtraceError, match="tangent"):
        gradient({**w, "in": dual.make_dual(w["in"], w["in"])})
    with torch.inference_mode(), pytest.raises(gt.GradtraceError, match="no_grad"):
        gradient(w)


def test_it_refuses_to_run_inside_a_recorded_step(tmp_path: Path) -> None:
    model = nn.Linear(FEATURES, OUTPUT).double()
    with gt.record(model, tmp_path / "run.zarr") as recorder, pytest.raises(gt.GradtraceError, match="recorded step"):  # noqa: SIM117
        with recorder.step(groups=LABELS):
            grad_and_spectra(mean_cross_entropy)(weights(), X, CLASSES, groups=LABELS)


def test_compiled_functions_and_callers_run_as_written() -> None:
    expected, tree = grad_and_spectra(mean_cross_entropy)(weights(), X, CLASSES, groups=LABELS)
    inside = grad_and_spectra(torch.compile(mean_cross_entropy, backend="eager"))
    around = torch.compile(grad_and_spectra(mean_cross_entropy), backend="eager")
    for g in (inside, around):
        gradients, found = g(weights(), X, CLASSES, groups=LABELS)
        assert equal(gradients, expected)
        assert same_tree(found, tree)


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no such argument": (lambda: grad_and_spectra(network, 2)(weights(), X), "2 positional"),
    "one argument twice": (lambda: grad_and_spectra(network, (0, 0))(weights(), X), "none twice"),
    "a module": (lambda: grad_and_spectra(network)(nn.Linear(2, 2), X), r"dict\(module.named_parameters"),
    "integers": (lambda: grad_and_spectra(network)({"in": TOKENS}, X), "p.in.*int64"),
    "no parameters": (lambda: grad_and_spectra(network)({}, X), "holds no tensor"),
    "one path twice": (lambda: grad_and_spectra(network)({"a.b": X, "a": {"b": X}}, X), "'a.b'"),
    "no scalar": (lambda: grad_and_spectra(network)(weights(), X), r"\(7, 3\)"),
    "no aux": (lambda: grad_and_spectra(mean_cross_entropy, has_aux=True)(weights(), X, CLASSES), r"\(loss, aux\)"),
    "detached": (lambda: grad_and_spectra(lambda p: p["in"].detach().sum())(weights()), "does not depend"),
    "glob": (lambda: grad_and_spectra(mean_cross_entropy, parameters="q*")(weights(), X, CLASSES), "matches no"),
    "kinds": (lambda: grad_and_spectra(network, kinds="gradients"), "no kind"),
    "labels": (lambda: grad_and_spectra(mean_cross_entropy)(weights(), X, CLASSES, groups=[1, 2]), "2 labels"),
    "rows that no value keeps apart": (
        lambda: grad_and_spectra(lambda p, x: (x.reshape(-1, FEATURES) @ p["in"]).square().mean())(
            weights(), SEQUENCES, groups=LABELS
        ),
        "computed last with a parameter",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    attempt, message = WRONG[name]
    with pytest.raises(gt.GradtraceError, match=message):
        attempt()


def test_an_axis_that_is_as_long_as_the_batch_by_chance_is_not_taken_for_the_samples() -> None:
    """Seven classes and seven samples; 35 tokens have a row each."""
    params = {"w": draw(FEATURES, SAMPLES)}

    def f(p: Params, x: Tensor, y: Tensor) -> Tensor:
        losses = F.cross_entropy(x.reshape(-1, FEATURES) @ p["w"], y.reshape(-1), reduction="none")
        return losses.reshape(y.shape).mean(1).mean()

    def per_sample(p: Params, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy((x @ p["w"]).transpose(1, 2), y, reduction="none").mean(1)

    for sample_dim in (None, 0):
        _, tree = grad_and_spectra(f, sample_dim=sample_dim, keep=None)(params, SEQUENCES, TOKENS, groups=LABELS)
        check(tree, per_sample, params, (SEQUENCES, TOKENS))


def test_it_is_reached_from_the_package_which_opens_without_torch() -> None:
    code = "import sys, gradtrace; print('torch' in sys.modules); print(gradtrace.func.grad_and_spectra.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "grad_and_spectra"]
