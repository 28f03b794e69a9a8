"""Networks for images and connectomes, written out by hand: convolutions of every make."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from tests.case import OUTPUT, SAMPLES, Apply, Problem
from tests.zoo.handwritten_case import written


def pictures(channels: int = 3, height: int = 8, width: int = 12) -> Tensor:
    """A batch of images."""
    return torch.randn(SAMPLES, channels, height, width)


class BasicBlock(nn.Module):
    """Two convolutions with batch norm and a skip, as in torchvision."""

    def __init__(self, inner: int, outer: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inner != outer:
            self.downsample = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


@written("ResNet, by hand", coupled=True, loop=False)
def resnet_by_hand() -> Problem:
    """ResNet with batch norm in training."""
    stem = (nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    blocks = (BasicBlock(4, 4), BasicBlock(4, 6, 2), BasicBlock(6, 6))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, OUTPUT))
    return Problem(nn.Sequential(*stem, *blocks, *head), pictures())


class SqueezeExcite(nn.Module):
    """An inverted residual: expand, depthwise, squeeze and excite, project."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 2 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU(True))
        self.depthwise = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.SiLU(True)
        )
        self.squeeze, self.excite = nn.Conv2d(wide, 3, 1), nn.Conv2d(3, wide, 1)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.depthwise(self.expand(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(h, 1)))))
        return x + self.project(h * gate)


@written("Inverted residuals with squeeze and excite", coupled=True, loop=False)
def mobile_network() -> Problem:
    """EfficientNet- or MobileNet-like: depthwise convolutions, squeeze and excite, batch norm."""
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, OUTPUT))
    return Problem(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), SqueezeExcite(4), SqueezeExcite(4), *head), pictures())


class ConvNextBlock(nn.Module):
    """Depthwise convolution, layer norm over channels, an MLP, and a learned scale per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.gamma = nn.Parameter(0.1 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        h = self.gamma * self.pwconv2(F.gelu(self.pwconv1(h)))
        return x + h.permute(0, 3, 1, 2)


@written("ConvNeXt, by hand")
def convnext_by_hand() -> Problem:
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, OUTPUT))
    return Problem(nn.Sequential(nn.Conv2d(3, 5, 2, stride=2), ConvNextBlock(5), ConvNextBlock(5), *head), pictures())


class StandardisedConv2d(nn.Conv2d):
    """A convolution whose kernels are standardised in every forward pass (BiT)."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, correction=0)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-6)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@written("Weight-standardised convolutions (BiT)")
def weight_standardised_network() -> Problem:
    def block(inner: int, outer: int, stride: int) -> tuple[nn.Module, ...]:
        return StandardisedConv2d(inner, outer, 3, stride, 1), nn.GroupNorm(2, outer), nn.ReLU(inplace=True)

    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, OUTPUT))
    return Problem(nn.Sequential(*block(3, 4, 1), *block(4, 6, 2), *head), pictures())


class Discriminator(nn.Module):
    """The critic of an SN-GAN, with class projection."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(spectral_norm(nn.Conv2d(3, 4, 4, 2, 1)), nn.LeakyReLU(0.1)),
            *(spectral_norm(nn.Conv2d(4, 6, 4, 2, 1)), nn.LeakyReLU(0.1)),
        )
        self.head = spectral_norm(nn.Linear(6, 1))
        self.classes = spectral_norm(nn.Embedding(5, 6))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        h = self.body(image).sum((2, 3))
        return self.head(h)[:, 0] + (self.classes(label) * h).sum(1)


@written("SN-GAN discriminator (spectral norm)", loop=False)
def spectral_norm_discriminator() -> Problem:
    """Real and generated images in one step; power iterations change the weights between the two calls."""

    def forward(m: Apply, real: Tensor, fake: Tensor, label: Tensor) -> Tensor:
        return torch.stack([F.softplus(-m.critic(real, label)), F.softplus(m.critic(fake, label))], dim=1)

    return Problem(Apply(forward, critic=Discriminator()), (pictures(), pictures(), torch.randint(5, (SAMPLES,))))


class ModulatedConv2d(nn.Module):
    """A kernel per sample, scaled by its style and demodulated, run as one grouped convolution (StyleGAN2)."""

    def __init__(self, inner: int, outer: int, size: int, style: int, demodulate: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outer, inner, size, size))
        self.modulation = nn.Linear(style, inner)
        self.demodulate, self.scale = demodulate, 1 / math.sqrt(inner * size**2)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        n, inner, height, width = x.shape
        weight = self.scale * self.weight * (1 + self.modulation(style)).view(n, 1, inner, 1, 1)
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4], keepdim=True) + 1e-8)
        weight = weight.flatten(0, 1)
        out = F.conv2d(x.reshape(1, n * inner, height, width), weight, padding=weight.shape[-1] // 2, groups=n)
        return out.view(n, -1, height, width)


class StyleGenerator(nn.Module):
    """Mapping network, constant input, modulated convolutions with noise, and images summed over scales."""

    def __init__(self, style: int = 7, channels: int = 4) -> None:
        super().__init__()
        self.mapping = nn.Sequential(nn.Linear(style, style), nn.LeakyReLU(0.2), nn.Linear(style, style))
        self.constant = nn.Parameter(torch.randn(1, channels, 2, 3))
        self.convs = nn.ModuleList(ModulatedConv2d(channels, channels, 3, style) for _ in range(3))
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(3))
        self.strengths = nn.ParameterList(nn.Parameter(torch.tensor(0.1)) for _ in range(3))
        self.to_rgb = nn.ModuleList(ModulatedConv2d(channels, 3, 1, style, demodulate=False) for _ in range(2))

    def styled(self, number: int, x: Tensor, style: Tensor) -> Tensor:
        h = self.convs[number](x, style)
        h = h + self.strengths[number] * torch.randn_like(h[:, :1])
        return F.leaky_relu(h + self.biases[number], 0.2)

    def forward(self, z: Tensor) -> Tensor:
        style = self.mapping(z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8))
        h = self.styled(0, self.constant.repeat(len(z), 1, 1, 1), style)
        image = self.to_rgb[0](h, style)
        h = F.interpolate(h, scale_factor=2, mode="nearest")
        h = self.styled(2, self.styled(1, h, style), style)
        return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False) + self.to_rgb[1](h, style)


@written("StyleGAN2 generator (modulated convolutions)", loop=False)
def style_generator() -> Problem:
    """StyleGAN2-like generator."""
    return Problem(StyleGenerator(), torch.randn(SAMPLES, 7))


class CondConv2d(nn.Module):
    """Kernels mixed per sample from a few shared ones by a router (CondConv)."""

    def __init__(self, inner: int, outer: int, experts: int) -> None:
        super().__init__()
        self.routing = nn.Linear(inner, experts)
        self.weight = nn.Parameter(0.3 * torch.randn(experts, outer, inner, 3, 3))
        self.bias = nn.Parameter(0.3 * torch.randn(experts, outer))

    def forward(self, x: Tensor) -> Tensor:
        n, inner, height, width = x.shape
        share = torch.sigmoid(self.routing(x.mean((2, 3))))
        kernels = torch.matmul(share, self.weight.flatten(1)).view(-1, inner, 3, 3)
        bias = torch.matmul(share, self.bias).flatten()
        out = F.conv2d(x.reshape(1, n * inner, height, width), kernels, bias, padding=1, groups=n)
        return out.view(n, -1, height, width)


@written("CondConv (dynamic convolutions)")
def conditional_convolutions() -> Problem:
    """CondConv: dynamic convolutions between ordinary ones."""
    layers = (nn.Conv2d(3, 4, 3, 2), nn.ReLU(), CondConv2d(4, 5, 3), nn.GroupNorm(1, 5), nn.ReLU(), CondConv2d(5, 4, 2))
    return Problem(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, OUTPUT)), pictures())


class MixerBlock(nn.Module):
    """An MLP over patches, by transposing, and one over channels."""

    def __init__(self, patches: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.tokens = nn.Sequential(nn.Linear(patches, 13), nn.GELU(), nn.Linear(13, patches))
        self.channels = nn.Sequential(nn.Linear(channels, 17), nn.GELU(), nn.Linear(17, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on patches of 4 × 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 4, stride=4)
        self.blocks = nn.Sequential(MixerBlock(6, 5), MixerBlock(6, 5))
        self.norm, self.head = nn.LayerNorm(5), nn.Linear(5, OUTPUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


@written("MLP-Mixer")
def mlp_mixer() -> Problem:
    return Problem(Mixer(), pictures())


class EdgeToEdge(nn.Module):
    """Every connection gathers its row and its column of the connectome (BrainNetCNN)."""

    def __init__(self, inner: int, outer: int, regions: int) -> None:
        super().__init__()
        self.regions = regions
        self.row = nn.Conv2d(inner, outer, (1, regions))
        self.column = nn.Conv2d(inner, outer, (regions, 1))

    def forward(self, x: Tensor) -> Tensor:
        row, column = self.row(x), self.column(x)
        return torch.cat([row] * self.regions, dim=3) + torch.cat([column] * self.regions, dim=2)


@written("BrainNetCNN")
def brain_net_cnn() -> Problem:
    """Edge to edge twice, edge to node, node to graph."""
    regions = 11
    layers = (EdgeToEdge(1, 3, regions), nn.LeakyReLU(0.33), EdgeToEdge(3, 4, regions), nn.LeakyReLU(0.33))
    nodes = (nn.Conv2d(4, 5, (1, regions)), nn.LeakyReLU(0.33), nn.Conv2d(5, 6, (regions, 1)), nn.LeakyReLU(0.33))
    dense = (nn.Flatten(), nn.Dropout(0.0), nn.Linear(6, 5), nn.LeakyReLU(0.33), nn.Linear(5, OUTPUT))
    connectome = torch.randn(SAMPLES, 1, regions, regions)
    return Problem(nn.Sequential(*layers, *nodes, *dense), connectome + connectome.transpose(2, 3))
