"""Training loops as people write them, for `tests.zoo.watching` to run alone, under a recorder, or judged."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.case import FEATURES, HIDDEN, OUTPUT, SAMPLES
from tests.zoo.watching import LABELS, Watch


def data(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that do not touch the global random state."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Gan(nn.Module):
    """A generator with batch-free norms and a critic with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.Linear(5, 12), nn.ReLU(True), nn.Unflatten(1, (4, 3)), nn.ConvTranspose1d(4, 3, 4, 2, 1)),
            *(nn.GroupNorm(1, 3), nn.ReLU(True), nn.ConvTranspose1d(3, 2, 4, 2, 1), nn.Tanh()),
        )
        self.critic = nn.Sequential(
            *(spectral_norm(nn.Conv1d(2, 4, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True)),
            *(spectral_norm(nn.Conv1d(4, 3, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True), nn.Flatten()),
            spectral_norm(nn.Linear(9, 1)),
        )


def gan(network: Gan, watch: Watch) -> None:
    """Two optimizers in turn; the generator's step leaves gradients in the critic, which are thrown away."""
    g = torch.optim.Adam(network.generator.parameters(), lr=0.01, betas=(0.5, 0.99))
    d = torch.optim.Adam(network.critic.parameters(), lr=0.02, betas=(0.5, 0.99))
    for number in range(2):
        fake = network.generator(data(SAMPLES, 5, seed=number))
        d.zero_grad()
        with watch.step():
            real = network.critic(data(SAMPLES, 2, 12, seed=90 + number))
            watch.mean((F.relu(1 - real) + F.relu(1 + network.critic(fake.detach())))[:, 0]).backward()
        d.step()
        g.zero_grad()
        with watch.step():
            fake = network.generator(data(SAMPLES, 5, seed=number))
            watch.mean(-network.critic(fake)[:, 0]).backward()
        g.step()


def gan_with_frozen_critic(network: Gan, watch: Watch) -> None:
    """`requires_grad` switched off for the critic in the generator's turn; real and fake in one batch, a label each."""
    g = torch.optim.SGD(network.generator.parameters(), lr=0.05)
    d = torch.optim.SGD(network.critic.parameters(), lr=0.05)
    for number in range(2):
        network.critic.requires_grad_(False)
        with watch.step():
            watch.mean(F.softplus(-network.critic(network.generator(data(SAMPLES, 5, seed=number))))[:, 0]).backward()
        g.step()
        g.zero_grad()
        network.critic.requires_grad_(True)
        with watch.step(LABELS + LABELS):
            with torch.no_grad():
                fake = network.generator(data(SAMPLES, 5, seed=number))
            scores = network.critic(torch.cat([data(SAMPLES, 2, 12, seed=90 + number), fake]))[:, 0]
            signs = torch.ones_like(scores).index_fill(0, torch.arange(SAMPLES), -1)
            watch.mean(F.softplus(signs * scores)).backward()
        d.step()
        d.zero_grad()


class Classifier(nn.Module):
    """An encoder with dropout and a head."""

    def __init__(self, outputs: int = OUTPUT) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(HIDDEN, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def targets(number: int, count: int = SAMPLES) -> Tensor:
    """Classes."""
    return torch.randint(OUTPUT, (count,), generator=torch.Generator().manual_seed(number))


def accumulation(network: Classifier, watch: Watch) -> None:
    """Micro-batches of different sizes, one optimizer step, a schedule, and clipping."""
    learner = torch.optim.AdamW(network.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(learner, 5)
    for number in range(3):
        with watch.step(None) as step:
            for part, labels in enumerate((LABELS[:4], LABELS[4:], ["HC", "SZ"])):
                with step.batch(labels):
                    output = network(data(len(labels), FEATURES, seed=10 * number + part))
                    losses = F.cross_entropy(output, targets(part, len(labels)), reduction="none")
                    step.mean(losses, of=SAMPLES + 2).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        learner.step()
        learner.zero_grad(set_to_none=True)
        schedule.step()


def simclr_tutorial(network: Classifier, watch: Watch) -> None:
    """Both views in one batch, as in the tutorials: a label per view. The loss is cross entropy against one's partner.

    The similarities count as data here but for the anchors, as with a queue: so that a group has a share of the loss.
    """
    learner = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for number in range(2):
        with watch.step(LABELS + LABELS):
            views = torch.cat([data(SAMPLES, FEATURES, seed=number), data(SAMPLES, FEATURES, seed=50 + number)])
            z = F.normalize(network(views), dim=1)
            likeness = (z @ z.detach().T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
            partner = torch.arange(len(z)).roll(SAMPLES)
            watch.mean(F.cross_entropy(likeness, partner, reduction="none")).backward()
        learner.step()
        learner.zero_grad()


class Momentum(nn.Module):
    """A query encoder, a key encoder that follows it, and a queue of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = Classifier(5), Classifier(5).requires_grad_(False)
        self.key.load_state_dict(self.query.state_dict())
        self.register_buffer("queue", F.normalize(torch.randn(17, 5), dim=1))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        q = F.normalize(self.query(one), dim=1)
        with torch.no_grad():
            for ours, theirs in zip(self.query.parameters(), self.key.parameters(), strict=True):
                theirs.mul_(0.9).add_(ours, alpha=0.1)
            k = F.normalize(self.key(other), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone().T], dim=1)
        with torch.no_grad():
            self.queue.copy_(torch.cat([k, self.queue])[: len(self.queue)])
        return logits / 0.2


def momentum_contrast(network: Momentum, watch: Watch) -> None:
    """MoCo: weights and buffers that change inside the forward pass."""
    learner = torch.optim.SGD(network.query.parameters(), lr=0.1)
    for number in range(3):
        with watch.step():
            logits = network(data(SAMPLES, FEATURES, seed=number), data(SAMPLES, FEATURES, seed=40 + number))
            watch.mean(F.cross_entropy(logits, torch.zeros(SAMPLES, dtype=torch.long), reduction="none")).backward()
        learner.step()
        learner.zero_grad()


def distillation(network: nn.ModuleDict, watch: Watch) -> None:
    """A teacher in evaluation mode, a student, and the soft and hard losses of both."""
    teacher, student = network["teacher"].eval().requires_grad_(False), network["student"]
    learner = torch.optim.SGD(student.parameters(), lr=0.1)
    for number in range(2):
        x = data(SAMPLES, FEATURES, seed=number)
        with watch.step():
            with torch.no_grad():
                soft = F.softmax(teacher(x) / 2, dim=1)
            output = student(x)
            losses = F.kl_div(F.log_softmax(output / 2, dim=1), soft, reduction="none").sum(1)
            watch.mean(4 * losses + F.cross_entropy(output, targets(number), reduction="none")).backward()
        learner.step()
        learner.zero_grad()


class Staircase(nn.Module):
    """Layers until the whole batch is sure: some steps do not reach the last ones."""

    def __init__(self) -> None:
        super().__init__()
        widths = [FEATURES, HIDDEN, HIDDEN, HIDDEN]
        self.stages = nn.ModuleList(nn.Linear(widths[n], widths[n + 1]) for n in range(3))
        self.exits = nn.ModuleList(nn.Linear(HIDDEN, OUTPUT) for _ in range(3))

    def forward(self, x: Tensor, patience: int) -> list[Tensor]:
        results = []
        for stage, leave in zip(self.stages, self.exits, strict=True):
            x = torch.relu(stage(x))
            results.append(leave(x))
            if len(results) > patience:
                break
        return results


def early_exit_per_batch(network: Staircase, watch: Watch) -> None:
    """Deep supervision of as many exits as the batch needs: parameters come and go from step to step."""
    learner = torch.optim.Adam(network.parameters(), lr=0.01)
    for number, patience in enumerate((2, 0, 1, 2)):
        with watch.step():
            results = network(data(SAMPLES, FEATURES, seed=number), patience)
            losses = [F.cross_entropy(one, targets(number), reduction="none") for one in results]
            watch.mean(sum(losses) / len(losses)).backward()
        learner.step()
        learner.zero_grad()


class Stateful(nn.Module):
    """A recurrent reader that goes on where it was."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(FEATURES, 5, batch_first=True), nn.Linear(5, FEATURES)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        out, state = self.lstm(x, state)
        return self.head(out), state


def truncated_backpropagation(network: Stateful, watch: Watch) -> None:
    """Long courses in pieces; the state is carried on, detached."""
    learner, state = torch.optim.RMSprop(network.parameters(), lr=0.01), None
    course = data(SAMPLES, 13, FEATURES)
    for start in (0, 4, 8):
        piece, following = course[:, start : start + 4], course[:, start + 1 : start + 5]
        with watch.step():
            output, state = network(piece, state)
            watch.mean((output - following).square().mean((1, 2))).backward()
        state = tuple(part.detach() for part in state)
        learner.step()
        learner.zero_grad()


def sharpness_aware(network: Classifier, watch: Watch) -> None:
    """SAM: a first backward pass finds the worst weights nearby, a second one, recorded, is there."""
    learner = torch.optim.SGD(network.parameters(), lr=0.1)
    for number in range(2):
        x = data(SAMPLES, FEATURES, seed=number)
        F.cross_entropy(network(x), targets(number)).backward()
        with torch.no_grad():
            steps = [0.05 * p.grad / (p.grad.norm() + 1e-12) for p in network.parameters()]
            torch._foreach_add_(list(network.parameters()), steps)
        learner.zero_grad()
        with watch.step():
            watch.mean(F.cross_entropy(network(x), targets(number), reduction="none")).backward()
        with torch.no_grad():
            torch._foreach_sub_(list(network.parameters()), steps)
        learner.step()
        learner.zero_grad()


def line_search(network: Classifier, watch: Watch) -> None:
    """L-BFGS calls the closure as often as it likes: every call is a step."""
    network.eval()
    learner = torch.optim.LBFGS(network.parameters(), lr=0.5, max_iter=3)

    def closure() -> Tensor:
        learner.zero_grad()
        with watch.step():
            output = network(data(SAMPLES, FEATURES))
            loss = watch.mean(F.cross_entropy(output, targets(0), reduction="none"))
            loss.backward()
        return loss

    learner.step(closure)


def distillation_networks() -> nn.ModuleDict:
    """Teacher and student."""
    return nn.ModuleDict({"teacher": Classifier(), "student": Classifier()})


LOOPS = {
    gan: Gan,
    gan_with_frozen_critic: Gan,
    accumulation: Classifier,
    simclr_tutorial: Classifier,
    momentum_contrast: Momentum,
    distillation: distillation_networks,
    early_exit_per_batch: Staircase,
    truncated_backpropagation: Stateful,
    sharpness_aware: Classifier,
    line_search: Classifier,
}


def gradient_penalty(network: Gan, watch: Watch) -> None:
    """WGAN-GP's critic: the slope at points between real and fake is pulled to one, by a second derivative."""
    learner = torch.optim.Adam(network.critic.parameters(), lr=0.01)
    for number in range(3):
        with torch.no_grad():
            fake = network.generator(data(SAMPLES, 5, seed=number))
        real = data(SAMPLES, 2, 12, seed=90 + number)
        share = torch.rand(SAMPLES, 1, 1, dtype=real.dtype)
        with watch.step():
            between = (share * real + (1 - share) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(network.critic(between).sum(), between, create_graph=True)
            penalty = (slope.flatten(1).norm(dim=1) - 1).square()
            watch.mean((network.critic(fake) - network.critic(real))[:, 0] + 10 * penalty).backward()
        learner.step()
        learner.zero_grad()
