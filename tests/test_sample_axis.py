"""The sample axis is not told by its length alone: experts, classes or hidden units may be as many as samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradtrace as gt
from tests.case import Apply

N, HIDDEN, FEATURES = 7, 6, 5
LABELS = ["a", "b", "a", "a", "b", "b", "b"]


def of(label: str) -> Tensor:
    return torch.tensor([one == label for one in LABELS])


def check(tree: Any, model: nn.Module, of_group: Callable[[Tensor], Tensor], step: int | None = None) -> None:
    """`of_group(mask)`: a loss with the gradient of the masked samples' rows. With `step`: of a store, in float32."""
    for name, parameter in model.named_parameters():
        found = tree[name]["gradient"] if step is None else tree[name]["gradient"].isel(step=step)
        for label in "ab":
            gradient = torch.autograd.grad(of_group(of(label)), parameter, allow_unused=True)[0]
            want = torch.linalg.svdvals(gradient[None] if gradient.dim() == 1 else gradient.flatten(1))
            have = torch.tensor(found.sel(group=f"group={label}").dropna("component").values)
            have = F.pad(have, (0, len(want) - len(have)))
            torch.testing.assert_close(have.double(), want, atol=1e-7 if step is not None else 1e-12, rtol=1e-6)


def network(hidden: int, out: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, out)).double()


@pytest.mark.parametrize("hidden", [HIDDEN, N])
@pytest.mark.parametrize("unlabelled", [10, 14, 21])
def test_rows_without_labels_are_nobodys(tmp_path: Path, hidden: int, unlabelled: int) -> None:
    """Semi-supervised: also once the layer's layout is known, and where twice as many rows seem to fit it."""
    model = network(hidden, 3)
    labelled = []
    with gt.record(model, tmp_path / "run", keep=None) as recorder:
        for _ in range(5):
            x, u = torch.randn(N, FEATURES).double(), torch.randn(unlabelled, FEATURES).double()
            labelled.append(x)
            with recorder.step(groups=LABELS):
                (model(x).square().sum(1).mean() + model(u).square().mean()).backward()
            model.zero_grad()
    tree = gt.open_run(tmp_path / "run").tree
    for step, x in enumerate(labelled):
        check(tree, model, lambda mask, x=x: (model(x).square().sum(1) * mask).sum() / N, step)
    assert "no sample owns" in tree["0.weight"].attrs["reason"]


class Routed(nn.Module):
    """A gate over experts and a balance loss on it, inside the model or left to the caller."""

    def __init__(self, experts: int, *, inside: bool) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, experts), nn.Linear(HIDDEN, 3)
        self.inside = inside

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.first(x))
        p = self.gate(h.flatten(0, 1)).softmax(-1)
        score = p.view(len(x), -1, p.shape[1]).amax(-1).mean(1, keepdim=True)
        load = p.mean(0)
        return self.head(h).mean(1) * score, load.square().sum() if self.inside else load, p


@pytest.mark.parametrize("sample_dim", [None, 0])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("experts", [4, N])
def test_as_many_experts_as_samples(experts: int, inside: bool, sample_dim: int | None) -> None:
    torch.manual_seed(0)
    model, x = Routed(experts, inside=inside).double(), torch.randn(N, 3, FEATURES).double()

    def loss(output: tuple[Tensor, ...]) -> Tensor:
        return output[0].square().sum(1).mean() + (output[1] if inside else output[1].square().sum())

    tree = gt.spectra(model, x, loss, groups=LABELS, keep=None, sample_dim=sample_dim)

    def of_group(mask: Tensor) -> Tensor:
        output, _, p = model(x)
        balance = (2 * p.mean(0).detach() * p.view(N, 3, experts).mean(1)).sum(1)  # the rows' share of its gradient
        return ((output.square().sum(1) + balance) * mask).sum() / N

    check(tree, model, of_group)


def test_as_many_classes_as_samples_needs_no_question() -> None:
    model, x = network(HIDDEN, N), torch.randn(N, FEATURES).double()
    tree = gt.spectra(model, x, lambda o: o.square().sum(1).mean(), groups=LABELS, keep=None)
    check(tree, model, lambda mask: (model(x).square().sum(1) * mask).sum() / N)


def test_as_many_heads_as_samples_needs_no_question() -> None:
    """Scores of attention, (samples, heads, queries, keys)."""
    torch.manual_seed(0)
    parts = {"q": nn.Linear(FEATURES, 2 * N), "k": nn.Linear(FEATURES, 2 * N)}
    heads: Callable[[Tensor], Tensor] = lambda t: t.unflatten(2, (N, 2)).transpose(1, 2)  # noqa: E731
    model = Apply(lambda m, x: heads(m.q(x)) @ heads(m.k(x)).mT, **parts).double()
    x = torch.randn(N, 3, FEATURES).double()
    tree = gt.spectra(model, x, lambda o: o.square().flatten(1).sum(1).mean(), groups=LABELS, keep=None)
    check(tree, model, lambda mask: (model(x).square().flatten(1).sum(1) * mask).sum() / N)


def test_as_many_channels_as_samples_needs_no_question() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, N, 1)).double().eval()
    x = torch.randn(N, 2, 5, 5).double()
    tree = gt.spectra(model, x, lambda o: o.square().flatten(1).sum(1).mean(), groups=LABELS, keep=None)
    check(tree, model, lambda mask: (model(x).square().flatten(1).sum(1) * mask).sum() / N)


HEAD = nn.Linear(4, N).double()
FOLDED = {
    "positions folded into the batch": (network(HIDDEN, N), lambda y: y.flatten(0, 1), (N, 3, FEATURES)),
    "and a softmax over the classes": (network(HIDDEN, N), lambda y: y.flatten(0, 1).log_softmax(1), (N, 3, FEATURES)),
    "a scale per class": (
        nn.Sequential(network(HIDDEN, N), nn.LayerNorm(N).double()), lambda y: y.flatten(0, 1), (N, 3, FEATURES),
    ),
    "channels of convolutions": (nn.Conv2d(2, N, 1).double(), lambda y: y, (14, 2, 4, 4)),
    "steps first, or two views of a batch with seven positions": (network(HIDDEN, 3), lambda y: y, (14, N, FEATURES)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_what_may_be_another_axis_is_asked_about(name: str) -> None:
    body, after, shape = FOLDED[name]
    model = Apply(lambda m, x: after(m.body(x)), body=body)
    x = torch.randn(*shape).double()
    with pytest.raises(gt.GradtraceError, match="sample_dim="):
        gt.spectra(model, x, lambda o: o.square().sum(1).mean(), groups=LABELS)


def test_the_answer_is_believed() -> None:
    model, x = network(HIDDEN, 3), torch.randn(14, N, FEATURES).double()
    tree = gt.spectra(model, x, lambda o: o.square().mean(), groups=LABELS, keep=None, sample_dim=1)
    check(tree, model, lambda mask: (model(x).square().mean((0, 2)) * mask).sum() / N)


def test_behind_a_reentrant_checkpoint_the_shadow_pass_is_asked() -> None:
    """The live graph cannot be: as many classes as labels, and other rows than these."""
    model = Apply(lambda m, x: m.head(checkpoint(m.body, x, use_reentrant=True)), body=network(HIDDEN, 4), head=HEAD)
    x = torch.randn(20, FEATURES, requires_grad=True, dtype=torch.float64)
    with pytest.raises(gt.GradtraceError, match="counts features"):
        gt.spectra(model, x, lambda o: o.square().mean(), groups=LABELS)


PER_SAMPLE: dict[str, tuple[nn.Module, Tensor]] = {
    "a vector for every sample": (
        Apply(
            lambda m, x: m.body(x + m.own), body=network(HIDDEN, 3), own=nn.Parameter(torch.randn(N, FEATURES))
        ).double(),
        torch.randn(N, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    ),
    "a row for every sample": (nn.Linear(N, 3, bias=False).double(), torch.eye(N, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_parameter_with_a_part_for_every_sample_needs_the_answer(name: str) -> None:
    model, x = PER_SAMPLE[name]
    loss: Callable[[Tensor], Tensor] = lambda o: o.square().sum(1).mean()  # noqa: E731
    with pytest.raises(gt.GradtraceError, match="sample_dim="):
        gt.spectra(model, x, loss, groups=LABELS)
    tree = gt.spectra(model, x, loss, groups=LABELS, keep=None, sample_dim=0)
    check(tree, model, lambda mask: (model(x).square().sum(1) * mask).sum() / N)


def test_nodes_of_a_graph_that_all_see_each_other_are_still_the_samples() -> None:
    """All rows behind the output are mixed, and there are as many classes as nodes: nothing else is better."""
    torch.manual_seed(0)
    adjacency = torch.rand(N, N).double().softmax(1)
    model = Apply(
        lambda m, x: m.adjacency @ m.second(torch.tanh(m.adjacency @ m.first(x))),
        first=nn.Linear(FEATURES, HIDDEN), second=nn.Linear(HIDDEN, N), adjacency=adjacency,
    ).double()  # fmt: skip
    x = torch.randn(N, FEATURES).double()
    tree = gt.spectra(model, x, lambda o: o.square().sum(1).mean(), groups=LABELS, keep=None)
    assert tree["first.weight"].attrs["coupling"] == "loss"
    check(tree, model, lambda mask: (model(x).square().sum(1) * mask).sum() / N)


def test_one_sample_owns_everything_along_whichever_axis() -> None:
    model, x = network(HIDDEN, 1), torch.randn(1, FEATURES).double()
    tree = gt.spectra(model, x, lambda o: o.square().mean(), groups=["a"], keep=None)
    for name in ("0.weight", "2.bias"):
        gradient = tree[name]["gradient"]
        assert gradient.sel(group="group=a").values.tolist() == gradient.sel(group="all").values.tolist()


def test_a_last_batch_as_long_as_another_axis(tmp_path: Path) -> None:
    """Three samples, three classes and three positions: what earlier steps showed decides."""
    model = Apply(lambda m, x: m.body(x), body=network(HIDDEN, 3))
    sizes, found = (N, 5, 3), []
    with gt.record(model, tmp_path / "run", keep=None) as recorder:
        for size in sizes:
            x = torch.randn(size, 3, FEATURES).double()
            found.append(x)
            with recorder.step(groups=LABELS[:size]):
                model(x).square().sum().backward()
            model.zero_grad()
    tree = gt.open_run(tmp_path / "run").tree
    for step, x in enumerate(found):
        check(tree, model, lambda mask, x=x: (model(x).square().sum((1, 2)) * mask[: len(x)]).sum(), step)


def counted(calls: list[int]) -> Callable[..., Any]:
    plain = torch.autograd.grad

    def grad(*args: Any, **kwargs: Any) -> Any:
        calls[-1] += 1
        return plain(*args, **kwargs)

    return grad


def passes_of(model: nn.Module, batches: Sequence[Tensor], path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many passes of ours each recorded step took."""
    calls: list[int] = []
    monkeypatch.setattr(torch.autograd, "grad", counted(calls))
    with gt.record(model, path) as recorder:
        for x in batches:
            calls.append(0)
            with recorder.step(groups=LABELS):
                sum(y.square().mean() for y in model(x)).backward()
            model.zero_grad()
    return calls


def test_the_test_is_made_once_and_for_many_outputs_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Apply(lambda m, x: [m.body(x) for _ in range(20)], body=network(HIDDEN, 3))
    calls = passes_of(model, [torch.randn(N, FEATURES).double()] * 4, tmp_path / "run", monkeypatch)
    assert calls[0] < 12
    assert calls[-1] == 0
