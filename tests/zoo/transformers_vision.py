"""Models of images and of images with text of the package transformers, from configurations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    Dinov2Config,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from tests.case import SAMPLES, Problem, SquaredError
from tests.zoo.model import WIDTH, WORDS, architecture, images, training, words

ENCODER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
PATCHES = {"image_size": 8, "patch_size": 4}


def vit() -> Problem:
    model = ViTForImageClassification(ViTConfig(**ENCODER, **PATCHES, num_labels=3))
    return training(model, pixel_values=images(8))


def vit_mae() -> Problem:
    """A random part of the patches is kept, by sorting noise, and mask tokens fill the gaps."""
    config = ViTMAEConfig(
        **ENCODER,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
    )
    return training(ViTMAEForPreTraining(config), pixel_values=images(16))


def dinov2() -> Problem:
    sizes = {name: value for name, value in ENCODER.items() if name != "intermediate_size"}
    config = Dinov2Config(**sizes, **PATCHES, mlp_ratio=2, drop_path_rate=0.2, num_labels=3)
    return training(Dinov2ForImageClassification(config), pixel_values=images(8))


def swin() -> Problem:
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, num_labels=3
    )
    return training(SwinForImageClassification(config), pixel_values=images(16))


def segformer() -> Problem:
    config = SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 12],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=10,
        num_labels=3,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    with torch.no_grad():
        model(images(16))  # its first call puts hooks of its own on the modules
    return training(model, pixel_values=images(16))


def convnext() -> Problem:
    config = ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 12], depths=[1, 1], patch_size=2, num_labels=3, layer_scale_init_value=0.5
    )
    return training(ConvNextForImageClassification(config), pixel_values=images(8))


def resnet() -> Problem:
    config = ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3)
    return training(ResNetForImageClassification(config), pixel_values=images(16))


def mobilenet_v2() -> Problem:
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.05, expand_ratio=2, num_labels=3))
    return training(model, pixel_values=images(32))


def detr() -> Problem:
    """Its own ResNet as the backbone, with frozen batch norms, and learned queries of objects."""
    backbone = ResNetConfig(
        embedding_size=6, hidden_sizes=[6, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = DetrConfig(
        backbone_config=backbone,
        num_queries=5,
        d_model=WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=20,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=20,
        decoder_attention_heads=2,
        num_labels=3,
    )
    return training(DetrForObjectDetection(config), _boxes, pixel_values=images(16))


def _boxes(output: Any) -> Tensor:
    return torch.cat([output.logits, output.pred_boxes], dim=-1)


def _clip() -> CLIPModel:
    text = {**ENCODER, "vocab_size": WORDS, "max_position_embeddings": 11, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**ENCODER, **PATCHES}, projection_dim=6))


def _pairs() -> dict[str, Any]:
    """A text, whose last word ends it, with every image."""
    ended = torch.cat([words(4), torch.ones(SAMPLES, 1, dtype=torch.int64)], dim=1)
    return {"input_ids": ended, "pixel_values": images(8)}


def clip() -> Problem:
    """The contrastive loss stands outside, on both towers' embeddings, as in open implementations."""
    model = _clip().train()

    def contrast(output: Any) -> Tensor:
        similar = 5 * output.text_embeds @ output.image_embeds.mT
        samples = torch.arange(len(similar))
        return (F.cross_entropy(similar, samples) + F.cross_entropy(similar.mT, samples)) / 2

    return Problem(model, _pairs(), SquaredError(read=lambda output: output.text_embeds), loss=contrast)


def clip_with_its_own_loss() -> Problem:
    """All texts meet all images inside. A pair's share is its text's and its image's cross-entropy."""

    def per_pair(output: Any) -> Tensor:
        similar, pairs = output.logits_per_text, torch.arange(SAMPLES)
        both = [F.cross_entropy(logits, pairs, reduction="none") for logits in (similar, similar.mT)]
        return (both[0] + both[1]) / 2

    inputs = (*_pairs().values(), None, None, True)  # the last: return_loss
    return Problem(_clip().train(), inputs, per_pair, {"sample_dim": 0}, loss=lambda output: output.loss)


SOURCE = "transformers"
MODELS = [
    architecture(vit, "ViT", SOURCE),
    architecture(vit_mae, "ViT-MAE", SOURCE),
    architecture(dinov2, "DINOv2", SOURCE),
    architecture(swin, "Swin", SOURCE),
    architecture(segformer, "SegFormer", SOURCE, coupled=True),
    architecture(convnext, "ConvNeXt", SOURCE),
    architecture(resnet, "ResNet", SOURCE, coupled=True),
    architecture(mobilenet_v2, "MobileNet v2", SOURCE, coupled=True),
    architecture(detr, "DETR", SOURCE),
    architecture(clip, "CLIP, loss outside", SOURCE, loss_couples=True),
    architecture(clip_with_its_own_loss, "CLIP, loss inside", SOURCE, coupled=True, opaque=True),
]
