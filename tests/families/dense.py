"""Multilayer perceptrons, raw parameters in products, low-rank adapters, bilinear forms and complex weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Apply, Problem, SquaredError, case


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, 17), nn.Tanh(), nn.Linear(17, OUTPUT)
    )


def vectors() -> Tensor:
    return torch.randn(SAMPLES, FEATURES)


def sequences() -> Tensor:
    return torch.randn(SAMPLES, TIME, FEATURES)


def parameter(*shape: int, scale: float = 0.3) -> nn.Parameter:
    return nn.Parameter(scale * torch.randn(*shape))


@case()
def mlp_vectors() -> Problem:
    return Problem(mlp(), vectors())


@case()
def mlp_sequences() -> Problem:
    """The first layer's output is a view, which the in-place activation changes: hooks on it never fire."""
    return Problem(mlp(), sequences())


@case()
def mlp_scalar_output() -> Problem:
    return Problem(Apply(lambda m, x: m.body(x).sum(1), body=mlp()), vectors())


@case()
def mlp_keyword_input() -> Problem:
    return Problem(Apply(lambda m, features: m.body(features), body=mlp()), {"features": vectors()})


@case()
def mlp_inputs_object() -> Problem:
    from gradtrace import Inputs

    model = Apply(lambda m, x, *, shift: m.body(x + shift), body=mlp())
    return Problem(model, Inputs((vectors(),), {"shift": vectors()}))


@case()
def reused_module() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.last(m.shared(torch.tanh(m.shared(m.first(x)))))

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "shared": nn.Linear(HIDDEN, HIDDEN)}
    return Problem(Apply(forward, **parts, last=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case()
def reused_unclaimed_op() -> Problem:
    """The same slope twice, once through the other: paths to the earlier use must not be counted twice."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.last(F.prelu(m.mix(F.prelu(m.first(x), m.slope)), m.slope))

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "mix": nn.Linear(HIDDEN, HIDDEN), "slope": parameter(HIDDEN)}
    return Problem(Apply(forward, **parts, last=nn.Linear(HIDDEN, OUTPUT)), vectors())


@case()
def transposed_tied_autoencoder() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        code = torch.tanh(F.linear(x, m.weight, m.down))
        return F.linear(code, m.weight.t(), m.up)

    return Problem(
        Apply(forward, weight=parameter(HIDDEN, FEATURES), down=parameter(HIDDEN), up=parameter(FEATURES)), vectors()
    )


@case()
def raw_matmul() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        return torch.tanh(x @ m.right).transpose(1, 2).contiguous().transpose(1, 2) @ m.other + m.bias

    return Problem(
        Apply(forward, right=parameter(FEATURES, HIDDEN), other=parameter(HIDDEN, OUTPUT), bias=parameter(OUTPUT)),
        sequences(),
    )


@case()
def raw_matmul_left() -> Problem:
    """A parameter that multiplies from the left mixes positions instead of features."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return torch.tanh(m.mix @ m.lift(x))

    return Problem(Apply(forward, mix=parameter(17, TIME), lift=nn.Linear(FEATURES, OUTPUT)), sequences())


@case()
def raw_matrix_times_columns() -> Problem:
    """Samples are the columns of the right operand."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return (m.weight @ x.t()).t()

    return Problem(Apply(forward, weight=parameter(OUTPUT, FEATURES)), vectors())


@case()
def raw_vector_product() -> Problem:
    return Problem(Apply(lambda m, x: x @ m.weight + m.bias, weight=parameter(FEATURES), bias=parameter(1)), vectors())


@case()
def raw_scalar() -> Problem:
    """A scalar parameter: a 1 x 1 matrix."""
    model = Apply(lambda m, x: m.temperature * m.body(x), temperature=nn.Parameter(torch.tensor(1.7)), body=mlp())
    return Problem(model, vectors())


@case()
def raw_einsum() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        heads = torch.tanh(torch.einsum("nti,hio->nhto", x, m.heads))
        return torch.einsum("nhto,ho->nt", heads, m.readout)

    return Problem(Apply(forward, heads=parameter(2, FEATURES, HIDDEN), readout=parameter(2, HIDDEN)), sequences())


@case()
def batched_matmul() -> Problem:
    """One matrix per position, through bmm and baddbmm with positions leading."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return torch.tanh(torch.baddbmm(m.bias, x.transpose(0, 1), m.weight)).transpose(0, 1) @ m.last

    parts = {"bias": parameter(TIME, 1, HIDDEN), "weight": parameter(TIME, FEATURES, HIDDEN)}
    return Problem(Apply(forward, **parts, last=parameter(HIDDEN, OUTPUT)), sequences())


@case()
def addmm() -> Problem:
    model = Apply(
        lambda m, x: torch.addmm(m.bias, x, m.weight, beta=0.5, alpha=2.0),
        bias=parameter(OUTPUT),
        weight=parameter(FEATURES, OUTPUT),
    )
    return Problem(model, vectors())


@case()
def low_rank_adapter() -> Problem:
    """LoRA: the base is frozen, so autograd keeps no activation for it."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.base(x) + 2.0 * (x @ m.down) @ m.up))

    base = nn.Linear(FEATURES, HIDDEN).requires_grad_(False)
    parts = {"base": base, "down": parameter(FEATURES, 2), "up": parameter(2, HIDDEN)}
    return Problem(Apply(forward, **parts, head=nn.Linear(HIDDEN, OUTPUT)), sequences())


@case()
def frozen_head() -> Problem:
    """Adjoints pass through frozen layers to those that learn."""
    model = mlp()
    model[4].requires_grad_(False)
    return Problem(model, vectors())


@case()
def bilinear() -> Problem:
    model = Apply(
        lambda m, a, b: m.join(torch.tanh(m.left(a)), b), left=nn.Linear(FEATURES, 2), join=nn.Bilinear(2, 5, 3)
    )
    return Problem(model, (vectors(), torch.randn(SAMPLES, 5)))


@case()
def complex_weights() -> Problem:
    def forward(m: Apply, x: Tensor) -> Tensor:
        hidden = x.to(m.first.dtype) @ m.first + m.bias
        return F.linear(hidden * hidden.abs(), m.second)

    kind = torch.promote_types(torch.get_default_dtype(), torch.complex64)
    shapes = {"first": (FEATURES, HIDDEN), "bias": (HIDDEN,), "second": (OUTPUT, HIDDEN)}
    parts = {name: nn.Parameter(0.3 * torch.randn(*shape, dtype=kind)) for name, shape in shapes.items()}
    return Problem(Apply(forward, **parts), vectors())


@case()
def hypernetwork() -> Problem:
    """Each sample has its own weights, made by a layer that all share."""

    def forward(m: Apply, x: Tensor, context: Tensor) -> Tensor:
        weights = m.maker(context).view(-1, FEATURES, OUTPUT)
        return torch.bmm(x, weights)

    return Problem(Apply(forward, maker=nn.Linear(2, FEATURES * OUTPUT)), (sequences(), torch.randn(SAMPLES, 2)))


@case(loop=False)
def dropout_mlp() -> Problem:
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Dropout(0.4), nn.Linear(HIDDEN, OUTPUT))
    return Problem(model, sequences())


@case(loop=False)
def variational_autoencoder() -> Problem:
    """Noise of the hidden value's shape in the middle of the model."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        mean, spread = m.encoder(x).chunk(2, dim=-1)
        return m.decoder(mean + torch.randn_like(mean) * (0.5 * spread).exp())

    parts = {"encoder": nn.Linear(FEATURES, 2 * OUTPUT), "decoder": nn.Linear(OUTPUT, FEATURES)}
    return Problem(Apply(forward, **parts), vectors())


@case()
def tall_batch_of_rows() -> Problem:
    """Many more rows than columns: the other way to a spectrum."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 5))
    return Problem(model, torch.randn(SAMPLES, 53, 2))


@case()
def wide_layer() -> Problem:
    """Far fewer rows than columns."""
    return Problem(nn.Sequential(nn.Linear(101, 83), nn.Tanh(), nn.Linear(83, OUTPUT)), torch.randn(SAMPLES, 101))


@case()
def product_of_two_parameters() -> Problem:
    """One call with data and two parameters, and a weight that is a product of two."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("ni,ij,jk->nk", x, m.a, m.b)) @ (m.c @ m.d)

    parts = {"a": parameter(FEATURES, 2), "b": parameter(2, HIDDEN), "c": parameter(HIDDEN, 2), "d": parameter(2, 3)}
    return Problem(Apply(forward, **parts), vectors())


@case()
def prototypes() -> Problem:
    """Distances to learned points: an op that is no product."""
    model = Apply(lambda m, x: torch.cdist(m.body(x), m.points), body=nn.Linear(FEATURES, 2), points=parameter(5, 2))
    return Problem(model, vectors())


@case()
def weights_by_index() -> Problem:
    """Every sample looks up a weight matrix of its own."""

    def forward(m: Apply, x: Tensor, which: Tensor) -> Tensor:
        return torch.einsum("ni,nio->no", x, m.weights[which]) / m.temperature.exp()

    parts = {"weights": parameter(3, FEATURES, OUTPUT), "temperature": nn.Parameter(torch.tensor(0.3))}
    return Problem(Apply(forward, **parts), (vectors(), torch.tensor([0, 2, 2, 1, 0, 1, 2])))


@case()
def samples_last() -> Problem:
    """The sample axis is the output's last."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        return (m.last @ torch.tanh(m.first(x)).transpose(1, 2)).permute(1, 2, 0)

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "last": parameter(OUTPUT, HIDDEN)}
    return Problem(Apply(forward, **parts), sequences(), SquaredError(-1), options={"sample_dim": -1})


@case()
def stopped_gradient() -> Problem:
    """A branch whose gradient is stopped, and a layer that only it uses."""

    def forward(m: Apply, x: Tensor) -> Tensor:
        hidden = m.first(x)
        return m.last(torch.tanh(hidden) * torch.sigmoid(m.gate(x)).detach() + hidden.detach())

    parts = {"first": nn.Linear(FEATURES, HIDDEN), "gate": nn.Linear(FEATURES, HIDDEN)}
    return Problem(Apply(forward, **parts, last=nn.Linear(HIDDEN, OUTPUT)), vectors())
