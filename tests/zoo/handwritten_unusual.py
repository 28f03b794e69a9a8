"""Models whose inputs, outputs and parameters are out of the ordinary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES, TIME, Problem, SquaredError
from tests.zoo.handwritten_case import written
from tests.zoo.handwritten_pairs import Embedder, images, vectors


@dataclass
class Prediction:
    """What a model with two tasks returns."""

    diagnosis: Tensor
    age: Tensor
    hidden: tuple[Tensor, ...] = ()


class MultiModal(nn.Module):
    """An image, a time course and a table of scores; a diagnosis per person and an age per time point."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.course = Embedder(6), nn.Sequential(nn.Linear(FEATURES, 6), nn.GELU())
        self.scores = nn.Linear(4, 6)
        self.fuse = nn.Bilinear(6, 6, HIDDEN)
        self.diagnosis, self.age = nn.Linear(HIDDEN, OUTPUT), nn.Linear(6, 1)

    def forward(self, *, image: Tensor, course: Tensor, table: dict[str, Tensor]) -> Prediction:
        states = self.course(course)
        scores = self.scores(torch.stack([table[name] for name in sorted(table)], dim=1))
        hidden = torch.tanh(self.fuse(self.image(image), states.mean(1) + scores))
        return Prediction(self.diagnosis(hidden), self.age(states)[..., 0], (states, hidden))


def _tasks(output: Prediction) -> Tensor:
    return torch.cat([output.diagnosis, 0.2 * output.age], dim=1)


@written("Multimodal, multitask, keyword-only")
def multimodal_multitask() -> Problem:
    """Keyword-only, nested inputs; a dataclass of outputs, two of which the loss reads."""
    table = {name: torch.randn(SAMPLES) for name in ("iq", "panss", "motion", "years")}
    inputs = {"image": images(), "course": torch.randn(SAMPLES, TIME, FEATURES), "table": table}
    return Problem(MultiModal(), inputs, SquaredError(read=_tasks))


class Named(NamedTuple):
    """A tuple with names."""

    mean: Tensor
    precision: Tensor


class Heteroscedastic(nn.Module):
    """A mean and a precision per sample, as a named tuple, with layers that some setting leaves unused."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Softplus())
        self.mean, self.precision = nn.Linear(HIDDEN, 1), nn.Linear(HIDDEN, 1)
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.old_head = nn.Linear(HIDDEN, OUTPUT)
        self.unused = nn.Parameter(torch.tensor(1.0))
        self.empty = nn.Parameter(torch.zeros(0, HIDDEN))

    def forward(self, x: Tensor) -> Named:
        h = self.body(x)
        return Named(self.mean(h)[:, 0], F.softplus(self.precision(h))[:, 0] / self.temperature.exp())


class Gaussian(SquaredError):
    """Negative log-likelihood of a target."""

    def __call__(self, output: Named) -> Tensor:
        target = torch.cos(torch.tensor(self.samples).to(output.mean))
        return 0.5 * output.precision * (output.mean - target).square() - 0.5 * output.precision.log()


@written("Temperature and unused parameters")
def unused_and_scalar_parameters() -> Problem:
    return Problem(Heteroscedastic(), vectors(), Gaussian())


class Clip(nn.Module):
    """Two towers and a learned temperature; returns the logits of every image against every prompt of a fixed list."""

    def __init__(self, prompts: int = 4) -> None:
        super().__init__()
        self.image, self.text = Embedder(), nn.Sequential(nn.Linear(3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 5))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("prompts", torch.randn(prompts, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.logit_scale.exp() * self.image(x) @ F.normalize(self.text(self.prompts), dim=-1).T


@written("CLIP on fixed prompts")
def zero_shot_classifier() -> Problem:
    """CLIP on fixed prompts: the text tower never meets a sample, its output is a weight."""
    return Problem(Clip(), images())


class Ensemble(nn.Module):
    """Members that share a batched product (`baddbmm`), each with scales of its own (BatchEnsemble)."""

    def __init__(self, members: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.3 * torch.randn(members, FEATURES, HIDDEN))
        self.bias = nn.Parameter(torch.zeros(members, 1, HIDDEN))
        self.r = nn.Parameter(torch.ones(members, 1, HIDDEN))
        self.shared = nn.Linear(HIDDEN, OUTPUT)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.baddbmm(self.bias, x.expand(len(self.weight), -1, -1), self.weight)
        return self.shared(torch.relu(h) * self.r).transpose(0, 1)


@written("BatchEnsemble")
def batch_ensemble() -> Problem:
    return Problem(Ensemble(), vectors())


class Critic(nn.Module):
    """Actor and twin critics on one trunk; the actor's gradient runs through a critic (soft actor-critic)."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4))
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES + 2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)) for _ in range(2)
        )
        self.log_alpha = nn.Parameter(torch.tensor(-1.0))

    def forward(self, state: Tensor) -> dict[str, Tensor]:
        mean, log_std = self.actor(state).chunk(2, dim=-1)
        action = torch.tanh(mean + log_std.clamp(-5, 2).exp() * torch.randn_like(mean))
        values = torch.cat([critic(torch.cat([state, action], dim=-1)) for critic in self.critics], dim=1)
        return {"value": values.min(1).values, "action": action, "entropy": self.log_alpha.exp() * log_std.sum(1)}


class ActorLoss(SquaredError):
    """What the actor wants: value, and entropy at the price of a temperature."""

    def __call__(self, output: dict[str, Tensor]) -> Tensor:
        return -output["value"] - output["entropy"]


@written("Soft actor-critic", loop=False)
def soft_actor_critic() -> Problem:
    return Problem(Critic(), vectors(), ActorLoss())


class Prototypes(nn.Module):
    """A GRU with a learned first state, and distances to learned prototypes (prototypical network)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.start = nn.GRU(FEATURES, 5, 2, batch_first=True), nn.Parameter(torch.randn(2, 1, 5))
        self.prototypes, self.scale = nn.Parameter(torch.randn(OUTPUT, 5)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        _, last = self.gru(x, self.start.expand(-1, len(x), -1).contiguous())
        return -self.scale * torch.cdist(last[-1], self.prototypes).square()


@written("Prototypes and a learned first state")
def prototype_network() -> Problem:
    return Problem(Prototypes(), torch.randn(SAMPLES, TIME, FEATURES))
