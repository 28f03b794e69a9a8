"""Networks that compare samples, or views of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, HIDDEN, SAMPLES, Apply, Problem, SquaredError
from tests.zoo.handwritten_case import written


def vectors(width: int = FEATURES) -> Tensor:
    """One row of numbers per sample."""
    return torch.randn(SAMPLES, width)


def images() -> Tensor:
    """Small images of two channels."""
    return torch.randn(SAMPLES, 2, 7, 6)


class Embedder(nn.Module):
    """A convolutional embedding on the unit sphere."""

    def __init__(self, width: int = 5, norm: type[nn.Module] = nn.Identity) -> None:
        super().__init__()
        norms = [norm(4), norm(6)] if norm is not nn.Identity else [nn.Identity(), nn.Identity()]
        self.body = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), norms[0], nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3), norms[1], nn.ReLU(inplace=True), nn.Flatten()),
        )
        self.head = nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.head(self.body(x)), dim=1)


class Contrastive(SquaredError):
    """Pairs that belong together are drawn together, others pushed apart up to a margin (Hadsell)."""

    def __call__(self, output: tuple[Tensor, Tensor]) -> Tensor:
        distance = F.pairwise_distance(*output)
        alike = (torch.tensor(self.samples) % 2 == 0).to(distance)
        return alike * distance.square() + (1 - alike) * F.relu(1.5 - distance).square()


@written("Siamese network")
def siamese_network() -> Problem:
    """Two images through one encoder, one after the other."""
    model = Apply(lambda m, left, right: (m.encoder(left), m.encoder(right)), encoder=Embedder())
    return Problem(model, (images(), images()), Contrastive())


class Triplet(SquaredError):
    """Nearer to its like than to another, by a margin."""

    def __call__(self, output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.triplet_margin_loss(*output, margin=1.0, swap=True, reduction="none")


@written("Triplet network")
def triplet_network() -> Problem:
    """Anchor, positive and negative stacked into one batch of three times the size."""

    def forward(m: Apply, anchor: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, ...]:
        return m.encoder(torch.cat([anchor, positive, negative])).chunk(3)

    return Problem(Apply(forward, encoder=Embedder()), (images(), images(), images()), Triplet())


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss per sample: both of its views against all other views of the batch."""
    z = torch.cat([first, second])
    likeness = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    n = len(first)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(likeness, partner, reduction="none").view(2, n).mean(0)


class NtXent(SquaredError):
    """SimCLR's loss: every sample is compared with all others, so that no share of it is one sample's."""

    def __call__(self, output: tuple[Tensor, Tensor]) -> Tensor:
        return nt_xent(*output)


@written("SimCLR", coupled=True, loop=False, loss_couples=True)
def simclr() -> Problem:
    """Two views of every sample; the loss couples samples, the model does not."""
    model = Apply(lambda m, one, other: (m.encoder(one), m.encoder(other)), encoder=Embedder())
    return Problem(model, (images(), images()), NtXent())


@written("SimCLR with batch norm", coupled=True, loop=False, loss_couples=True)
def simclr_with_batch_norm() -> Problem:
    """The loss and the model couple samples."""
    encoder = Embedder(norm=nn.BatchNorm2d)
    model = Apply(lambda m, one, other: (m.encoder(one), m.encoder(other)), encoder=encoder)
    return Problem(model, (images(), images()), NtXent())


class OwnLoss(SquaredError):
    """The model's output is the loss of every sample."""

    def __call__(self, output: Tensor) -> Tensor:
        return output


@written("Contrastive loss inside the model", coupled=True, opaque=True, loop=False)
def contrastive_inside_the_model() -> Problem:
    """The model computes every sample's contrastive loss: what is a group's share is then said by the model."""
    model = Apply(lambda m, one, other: nt_xent(m.encoder(one), m.encoder(other)), encoder=Embedder())
    return Problem(model, (images(), images()), OwnLoss())


class Likeness(SquaredError):
    """SimSiam's loss: each view's prediction of the other's embedding."""

    def __call__(self, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        p1, p2, z1, z2 = output
        return -0.5 * (F.cosine_similarity(p1, z2) + F.cosine_similarity(p2, z1))


@written("SimSiam", coupled=True, loop=False)
def simsiam() -> Problem:
    """Batch norm in encoder and predictor; embeddings that are aimed at get no gradient."""

    def forward(m: Apply, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        z1, z2 = m.encoder(one), m.encoder(other)
        return m.predictor(z1), m.predictor(z2), z1.detach(), z2.detach()

    def hidden(inner: int, outer: int) -> tuple[nn.Module, ...]:
        return nn.Linear(inner, outer, bias=False), nn.BatchNorm1d(outer), nn.ReLU(inplace=True)

    last = (nn.Linear(HIDDEN, 6, bias=False), nn.BatchNorm1d(6, affine=False))
    encoder = nn.Sequential(*hidden(FEATURES, HIDDEN), *last)
    parts = {"encoder": encoder, "predictor": nn.Sequential(*hidden(6, 4), nn.Linear(4, 6))}
    return Problem(Apply(forward, **parts), (vectors(), vectors()), Likeness())


class ImageToText(SquaredError):
    """Cross entropy of every image against all texts of the batch."""

    def __call__(self, output: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.arange(len(output)), reduction="none")


@written("CLIP, by hand, logits inside", opaque=True, loop=False)
def image_text_pretraining() -> Problem:
    """CLIP: every image against every text of the batch, inside the model; a text serves all images."""

    def forward(m: Apply, image: Tensor, text: Tensor) -> Tensor:
        return m.logit_scale.exp() * m.image(image) @ F.normalize(m.text(text), dim=-1).T

    text = nn.Sequential(nn.Linear(3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 5))
    parts = {"image": Embedder(), "text": text, "logit_scale": nn.Parameter(torch.tensor(2.0))}
    return Problem(Apply(forward, **parts), (images(), vectors(3)), ImageToText(), {"sample_dim": 0})
