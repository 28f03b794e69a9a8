"""Networks that run inside something: solvers, fixed points, other networks, their own derivatives."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchdiffeq import odeint, odeint_adjoint

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, Problem, SquaredError
from tests.zoo.handwritten_case import written


class Field(nn.Module):
    """The velocity of a hidden state, at a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width + 1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, width))

    def forward(self, time: Tensor, state: Tensor) -> Tensor:
        return self.net(torch.cat([state, time.expand(len(state), 1)], dim=1))


class NeuralOde(nn.Module):
    """An encoder, a flow integrated over time, and a head on the states at several times."""

    def __init__(self, adjoint: bool, **solver: Any) -> None:
        super().__init__()
        self.stem, self.field, self.head = nn.Linear(FEATURES, 5), Field(5), nn.Linear(5, OUTPUT)
        self.adjoint, self.solver = adjoint, solver

    def forward(self, x: Tensor) -> Tensor:
        times = torch.linspace(0, 1, 3, dtype=x.dtype)
        solve = odeint_adjoint if self.adjoint else odeint
        states = solve(self.field, self.stem(x), times, **self.solver)
        return self.head(states).transpose(0, 1)


def _neural_ode(adjoint: bool, **solver: Any) -> Problem:
    return Problem(NeuralOde(adjoint, **solver), torch.randn(SAMPLES, FEATURES))


FIXED = {"method": "rk4", "options": {"step_size": 0.25}}


@written("Neural ODE, fixed steps")
def neural_ode() -> Problem:
    return _neural_ode(False, **FIXED)


@written("Neural ODE, adaptive steps", opaque=True)
def neural_ode_adaptive() -> Problem:
    """All samples set the step, which has a gradient: they are coupled."""
    return _neural_ode(False)


@written("Neural ODE with adjoint", opaque=True)
def neural_ode_adjoint() -> Problem:
    """The solver runs again, backwards, inside a custom autograd function."""
    return _neural_ode(True, **FIXED)


class Equilibrium(nn.Module):
    """A fixed point found without a graph; its adjoint is a fixed point too, solved for in a hook."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.uniform_(self.inner.weight, -0.05, 0.05)

    def layer(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.norm(self.outer(x)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(80):
                z = self.layer(z, x)
        z = self.layer(z, x)
        if self.training and torch.is_grad_enabled():
            start = z.detach().requires_grad_()
            again = self.layer(start, x.detach())

            def solve(adjoint: Tensor) -> Tensor:
                found = adjoint
                for _ in range(80):
                    found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + adjoint
                return found

            z.register_hook(solve)
        return z


@written("Deep equilibrium model", opaque=True)
def deep_equilibrium_network() -> Problem:
    layers = (nn.Linear(FEATURES, HIDDEN), Equilibrium(HIDDEN), nn.Linear(HIDDEN, OUTPUT))
    return Problem(nn.Sequential(*layers), torch.randn(SAMPLES, FEATURES))


class HyperNetwork(nn.Module):
    """A network that writes the weights of another, for every sample its own."""

    def __init__(self, inner: int = 4, hidden: int = 5) -> None:
        super().__init__()
        self.sizes = [(hidden, inner), (hidden,), (OUTPUT, hidden), (OUTPUT,)]
        self.trunk = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, torch.Size(size).numel()) for size in self.sizes)

    def forward(self, task: Tensor, points: Tensor) -> Tensor:
        code = self.trunk(task)
        w1, b1, w2, b2 = (head(code).view(-1, *size) for head, size in zip(self.heads, self.sizes, strict=True))
        h = torch.relu(torch.bmm(points, w1.transpose(1, 2)) + b1[:, None])
        return torch.baddbmm(b2[:, None], h, w2.transpose(1, 2))


@written("Hypernetwork")
def hypernetwork() -> Problem:
    return Problem(HyperNetwork(), {"task": torch.randn(SAMPLES, FEATURES), "points": torch.randn(SAMPLES, 6, 4)})


class FiLM(nn.Module):
    """Layers scaled and shifted by what another network says about each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.condition = nn.Sequential(nn.Linear(5, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * HIDDEN))
        self.first, self.norm = nn.Linear(FEATURES, HIDDEN), nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.last = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        gain, shift = self.condition(context).chunk(2, dim=-1)
        return self.last(torch.relu(torch.addcmul(shift, self.norm(self.first(x)), 1 + gain)))


@written("FiLM")
def feature_wise_modulation() -> Problem:
    return Problem(FiLM(), (torch.randn(SAMPLES, FEATURES), torch.randn(SAMPLES, 5)))


class Siren(nn.Module):
    """Sines between linear layers, with trained zero-dimensional frequencies."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(inner, HIDDEN), nn.Linear(HIDDEN, HIDDEN)])
        self.frequencies = nn.ParameterList(nn.Parameter(torch.tensor(1.5)) for _ in range(2))
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer, frequency in zip(self.layers, self.frequencies, strict=True):
            x = torch.sin(frequency * layer(x))
        return self.head(x)


class PhysicsInformed(nn.Module):
    """The value and the residual of u_t + u u_x = ν u_xx at points, by derivatives of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.log_viscosity = Siren(2), nn.Parameter(torch.tensor(-1.0))

    def forward(self, points: Tensor) -> dict[str, Tensor]:
        points = points.detach().requires_grad_()
        u = self.net(points)
        slope = torch.autograd.grad(u.sum(), points, create_graph=True)[0]
        u_x, u_t = slope[:, :1], slope[:, 1:]
        u_xx = torch.autograd.grad(u_x.sum(), points, create_graph=True)[0][:, :1]
        return {"u": u, "residual": u_t + u * u_x - self.log_viscosity.exp() * u_xx}


def _both(output: dict[str, Tensor]) -> Tensor:
    return torch.cat([output["u"], output["residual"]], dim=1)


@written("Physics-informed network", opaque=True)
def physics_informed() -> Problem:
    """Second derivatives with respect to the input, in the loss."""
    return Problem(PhysicsInformed(), torch.randn(SAMPLES, 2), SquaredError(read=_both))


class ForceField(nn.Module):
    """Energies of molecules from distances between atoms, and forces as their negative gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.species = nn.Embedding(4, 3)
        self.pair = nn.Sequential(nn.Linear(7, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 1))

    def forward(self, kinds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.detach().requires_grad_()
        left, right = torch.triu_indices(positions.shape[1], positions.shape[1], 1)
        distance = (positions[:, left] - positions[:, right]).norm(dim=-1, keepdim=True)
        code = self.species(kinds)
        energy = self.pair(torch.cat([distance, code[:, left], code[:, right]], dim=-1)).sum((1, 2))
        forces = -torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]
        return energy, forces


@written("Force field (energies and forces)", opaque=True)
def force_field() -> Problem:
    """A potential trained on energies and forces."""
    read = lambda output: torch.cat([output[0][:, None], output[1].flatten(1)], dim=1)  # noqa: E731
    return Problem(ForceField(), (torch.randint(4, (SAMPLES, 5)), torch.randn(SAMPLES, 5, 3)), SquaredError(read=read))


class Coupling(nn.Module):
    """One affine coupling layer of a normalising flow (RealNVP)."""

    def __init__(self, width: int, flip: bool) -> None:
        super().__init__()
        self.flip, self.half = flip, width // 2
        self.net = nn.Sequential(nn.Linear(self.half, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * self.half))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.flip(1).chunk(2, dim=1) if self.flip else x.chunk(2, dim=1)
        log_scale, shift = self.net(a).chunk(2, dim=1)
        log_scale = self.scale * torch.tanh(log_scale)
        return torch.cat([a, b * log_scale.exp() + shift], dim=1), log_scale.sum(1)


class Flow(nn.Module):
    """Invertible mixing by a trained matrix, its log-determinant, and coupling layers (Glow)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(width, bool(n % 2)) for n in range(3))
        self.mix = nn.Parameter(torch.eye(width) + 0.1 * torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.mix)
        volume = torch.linalg.slogdet(self.mix)[1].expand(len(x))
        for coupling in self.couplings:
            x, log_scale = coupling(x)
            volume = volume + log_scale
        return 0.5 * x.square().sum(1) - volume


class Likelihood(SquaredError):
    """The model's output is the loss of every sample."""

    def __call__(self, output: Tensor) -> Tensor:
        return output


@written("Normalising flow (Glow, RealNVP)")
def normalising_flow() -> Problem:
    return Problem(Flow(), torch.randn(SAMPLES, 6), Likelihood())


class MetaLearner(nn.Module):
    """One gradient step per task on its support points, through which the loss on its query points is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        losses, names = [], [name for name, _ in self.net.named_parameters()]
        for support_x, query_x, support_y, query_y in zip(*x.chunk(2, 1), *y.chunk(2, 1), strict=True):
            slow = list(self.net.parameters())
            inner = F.mse_loss(self.net(support_x), support_y)
            steps = torch.autograd.grad(inner, slow, create_graph=True)
            fast = {n: p - 0.1 * step for n, p, step in zip(names, slow, steps, strict=True)}
            losses.append(F.mse_loss(functional_call(self.net, fast, (query_x,)), query_y))
        return torch.stack(losses)


@written("MAML (tasks as samples)", opaque=True)
def meta_learning() -> Problem:
    x = torch.randn(SAMPLES, 10, 3)
    return Problem(MetaLearner(), (x, x.sum(-1, keepdim=True).sin()), Likelihood())
