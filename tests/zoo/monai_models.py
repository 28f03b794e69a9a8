"""Three-dimensional models of medical imaging, of the package MONAI."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    AutoencoderKL,
    DenseNet,
    SegResNet,
    UNet,
)
from monai.networks.nets.resnet import ResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from tests.case import SAMPLES, Problem, SquaredError
from tests.zoo.model import architecture

STEPS: dict[str, Any] = {"spatial_dims": 3, "channels": (4, 6, 8), "strides": (2, 2)}
CHANNELS: dict[str, Any] = {"in_channels": 1, "out_channels": 2}


def volumes(size: int) -> Tensor:
    return torch.randn(SAMPLES, 1, size, size, size)


def training(model: nn.Module, size: int, read: Any = None) -> Problem:
    return Problem(model.train(), volumes(size), SquaredError(read=read))


def resnet3d() -> Problem:
    model = ResNet("basic", [1, 1, 1, 1], [4, 6, 8, 10], n_input_channels=1, conv1_t_size=3, num_classes=3)
    return training(model, 16)


def densenet3d() -> Problem:
    model = DenseNet(3, 1, 3, init_features=6, growth_rate=4, block_config=(2, 2), bn_size=2, dropout_prob=0.1)
    return training(model, 16)


def unet3d() -> Problem:
    """Instance norm and a PReLU after every convolution, as it comes."""
    return training(UNet(**STEPS, **CHANNELS, num_res_units=1), 8)


def unet3d_batch_norm() -> Problem:
    return training(UNet(**STEPS, **CHANNELS, norm="batch", dropout=0.1), 8)


def attention_unet() -> Problem:
    return training(AttentionUnet(**STEPS, **CHANNELS), 8)


def segresnet() -> Problem:
    return training(SegResNet(init_filters=8, blocks_down=(1, 1), blocks_up=(1,), dropout_prob=0.1), 4)


def unetr() -> Problem:
    model = UNETR(**CHANNELS, img_size=16, feature_size=2, hidden_size=8, mlp_dim=20, num_heads=2, dropout_rate=0.1)
    return training(model, 16)


def swin_unetr() -> Problem:
    return training(_SwinUNETR(), 8)


class _SwinUNETR(nn.Module):
    """SwinUNETR's parts put together as it does, in three stages of four channels: the class begins at twelve."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        block: dict[str, Any] = {"spatial_dims": 3, "kernel_size": 3, "norm_name": "instance", "res_block": True}
        sizes = {"window_size": (2, 2, 2), "patch_size": (2, 2, 2), "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
        self.encoder = SwinTransformer(1, width, **sizes, drop_path_rate=0.1)
        self.fine = UnetrBasicBlock(in_channels=1, out_channels=width, stride=1, **block)
        self.coarse = UnetrBasicBlock(in_channels=width, out_channels=width, stride=1, **block)
        self.ups = nn.ModuleList(
            UnetrUpBlock(in_channels=n, out_channels=width, upsample_kernel_size=2, **block) for n in (2 * width, width)
        )
        self.out = UnetOutBlock(3, width, 2)

    def forward(self, x: Tensor) -> Tensor:
        half, quarter, *_ = self.encoder(x)  # the last three stages are not used
        y = self.ups[0](quarter, self.coarse(half))
        return self.out(self.ups[1](y, self.fine(x)))


def autoencoder_kl() -> Problem:
    """Samples its code by the reparametrisation trick."""
    model = AutoencoderKL(
        spatial_dims=3,
        num_res_blocks=1,
        channels=(4, 6),
        attention_levels=(False, True),
        latent_channels=2,
        norm_num_groups=2,
    )
    return training(model, 8, lambda output: torch.cat([part.flatten(1) for part in output], dim=1))


SOURCE = "MONAI"
MODELS = [
    architecture(resnet3d, "3-d ResNet", SOURCE, coupled=True),
    architecture(densenet3d, "3-d DenseNet", SOURCE, coupled=True),
    architecture(unet3d, "3-d UNet, instance norm", SOURCE),
    architecture(unet3d_batch_norm, "3-d UNet, batch norm", SOURCE, coupled=True),
    architecture(attention_unet, "Attention UNet", SOURCE, coupled=True),
    architecture(segresnet, "SegResNet", SOURCE),
    architecture(unetr, "UNETR", SOURCE),
    architecture(swin_unetr, "SwinUNETR", SOURCE),
    architecture(autoencoder_kl, "AutoencoderKL", SOURCE),
]
