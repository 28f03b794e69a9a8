"""Encoders with decoders: U-Nets, diffusion, autoencoders."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.case import FEATURES, HIDDEN, SAMPLES, Problem, SquaredError
from tests.zoo.handwritten_case import written


def double_conv(inner: int, outer: int) -> nn.Sequential:
    """Two convolutions with group norm."""
    return nn.Sequential(
        *(nn.Conv2d(inner, outer, 3, padding=1), nn.GroupNorm(2, outer), nn.ReLU(inplace=True)),
        *(nn.Conv2d(outer, outer, 3, padding=1), nn.GroupNorm(2, outer), nn.ReLU(inplace=True)),
    )


class UNet(nn.Module):
    """Down twice, up twice by transposed convolutions, skips by concatenation."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double_conv(channels, 4), double_conv(4, 6), double_conv(6, 8)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.conv2, self.conv1 = double_conv(12, 6), double_conv(8, 4)
        self.head = nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(self.pool(first))
        h = self.up2(self.bottom(self.pool(second)))
        h = self.up1(self.conv2(torch.cat([second, h], dim=1)))
        return self.head(self.conv1(torch.cat([first, h], dim=1)))


@written("2-d U-Net")
def unet() -> Problem:
    """Segmentation: one class per pixel."""
    return Problem(UNet(2, 3), torch.randn(SAMPLES, 2, 8, 12))


class TimeEmbedding(nn.Module):
    """Sines and cosines of the diffusion time, and an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, time: Tensor) -> Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10000) * torch.arange(half, device=time.device) / (half - 1))
        angles = time[:, None] * rates[None].to(time)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=-1))


class ResidualBlock(nn.Module):
    """Group norm, SiLU, convolution, with scale and shift from the time."""

    def __init__(self, inner: int, outer: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, inner), nn.Conv2d(inner, outer, 3, padding=1)
        self.time = nn.Linear(width, 2 * outer)
        self.norm2, self.conv2 = nn.GroupNorm(2, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, dim=1)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))


class SpatialAttention(nn.Module):
    """Self-attention over the pixels, by a fused 1 × 1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.qkv, self.proj = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *space = x.shape
        q, k, v = self.qkv(self.norm(x.flatten(2))).chunk(3, dim=1)
        weight = torch.einsum("nct,ncs->nts", q, k).div(math.sqrt(c)).softmax(-1)
        return x + self.proj(torch.einsum("nts,ncs->nct", weight, v)).view(n, c, *space)


class DiffusionUNet(nn.Module):
    """Predicts the noise in an image at a time of the diffusion, for a class that may be dropped."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time, self.classes = TimeEmbedding(width), nn.Embedding(4, width)
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.down1, self.down2 = ResidualBlock(4, 4, width), ResidualBlock(4, 6, width)
        self.shrink, self.grow = nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.middle = SpatialAttention(6)
        self.up = ResidualBlock(8, 4, width)
        self.out = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        keep = (torch.rand(len(x), 1, device=x.device) > 0.3).to(x.dtype)
        context = self.time(time) + keep * self.classes(label)
        first = self.down1(self.stem(x), context)
        h = self.middle(self.down2(self.shrink(first), context))
        h = self.grow(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(self.up(torch.cat([h, first], dim=1), context))


@written("Diffusion U-Net", loop=False)
def diffusion_unet() -> Problem:
    inputs = {
        "x": torch.randn(SAMPLES, 1, 6, 8),
        "time": 1000 * torch.rand(SAMPLES),
        "label": torch.randint(4, (SAMPLES,)),
    }
    return Problem(DiffusionUNet(), inputs)


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's matrices, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, 5)
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(HIDDEN)), nn.Parameter(torch.zeros(FEATURES))])

    def forward(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.second(torch.tanh(self.first(x))))
        h = torch.tanh(F.linear(code, self.second.weight.t(), self.biases[0]))
        return F.linear(h, self.first.weight.t(), self.biases[1])


@written("Autoencoder with tied weights")
def tied_autoencoder() -> Problem:
    return Problem(TiedAutoencoder(), torch.randn(SAMPLES, FEATURES))


class Vae(nn.Module):
    """A convolutional variational autoencoder; returns the reconstruction and the posterior's two moments."""

    def __init__(self, latent: int = 5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
        self.mean, self.logvar = nn.Linear(36, latent), nn.Linear(36, latent)
        self.unpack = nn.Linear(latent, 36)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(6, 4, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x).flatten(1)
        mean, logvar = self.mean(h), self.logvar(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * logvar)
        return self.decoder(self.unpack(z).view(-1, 6, 2, 3)), mean, logvar


class Evidence(SquaredError):
    """Per-sample negative evidence bound: squared error and the divergence from the prior."""

    def __call__(self, output: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        image, mean, logvar = output
        return super().__call__(image) - 0.05 * (1 + logvar - mean.square() - logvar.exp()).sum(1)


@written("VAE", loop=False)
def variational_autoencoder() -> Problem:
    return Problem(Vae(), torch.rand(SAMPLES, 1, 8, 12), Evidence())


class Quantised(nn.Module):
    """A VQ-VAE: the nearest code word, straight-through gradients, and both of its penalties."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv1d(2, 4, 4, 2, 1), nn.ConvTranspose1d(4, 2, 4, 2, 1)
        self.codebook = nn.Embedding(6, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.encoder(x).transpose(1, 2)
        nearest = torch.cdist(z, self.codebook.weight.expand(len(z), -1, -1)).argmin(-1)
        code = self.codebook(nearest)
        penalty = (code - z.detach()).square().mean((1, 2)) + 0.25 * (z - code.detach()).square().mean((1, 2))
        straight = z + (code - z).detach()
        return {"signal": self.decoder(straight.transpose(1, 2)), "penalty": penalty}


class Commitment(SquaredError):
    """Squared error and the penalties that the model returns per sample."""

    def __call__(self, output: dict[str, Tensor]) -> Tensor:
        return super().__call__(output["signal"]) + output["penalty"]


@written("VQ-VAE")
def vector_quantised_autoencoder() -> Problem:
    return Problem(Quantised(), torch.randn(SAMPLES, 2, 10), Commitment())


class AdaIn(nn.Module):
    """Instance norm with a style's moments, done by `F.batch_norm` on a batch of one, as MUNIT's code does."""

    def __init__(self) -> None:
        super().__init__()
        self.content, self.style = nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(nn.Linear(5, 6), nn.ReLU())
        self.moments, self.out = nn.Linear(6, 8), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        h = self.content(x)
        n, c, *space = h.shape
        shift, scale = self.moments(self.style(style)).chunk(2, dim=1)
        h = F.batch_norm(h.reshape(1, n * c, *space), None, None, scale.flatten(), shift.flatten(), training=True)
        return self.out(F.relu(h.view(n, c, *space)))


@written("Style transfer by AdaIN")
def adaptive_instance_norm() -> Problem:
    """A batch norm in training that couples no samples."""
    return Problem(AdaIn(), (torch.randn(SAMPLES, 2, 6, 5), torch.randn(SAMPLES, 5)))
