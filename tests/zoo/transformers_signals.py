"""Models of speech and of time series of the package transformers, from configurations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    PatchTSTConfig,
    PatchTSTForRegression,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests.case import SAMPLES, Problem
from tests.zoo.model import WIDTH, WORDS, architecture, training, words


def _wav2vec2(**settings: Any) -> Problem:
    config = Wav2Vec2Config(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=5,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.0,
        **settings,
    )
    return training(Wav2Vec2ForCTC(config), input_values=torch.randn(SAMPLES, 200))


def wav2vec2() -> Problem:
    """Group norm in the first layer of the feature extractor, weight norm in the positional convolution."""
    return _wav2vec2(mask_time_prob=0.0)


def wav2vec2_masked() -> Problem:
    """Layer norms in the feature extractor, and a learned vector written over some of the time steps."""
    problem = _wav2vec2(feat_extract_norm="layer", do_stable_layer_norm=True, mask_time_prob=0.3)
    given = problem.inputs
    model = _Masked(problem.model, torch.rand(SAMPLES, 19) < 0.3)
    return training(model, input_values=given["input_values"])


class _Masked(torch.nn.Module):
    """The model's states with chosen time steps masked: by itself it draws them from numpy's random state."""

    def __init__(self, model: Any, where: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("where", where)

    def forward(self, input_values: Tensor) -> Any:
        output = self.model.wav2vec2(input_values, mask_time_indices=self.where)
        output.logits = self.model.lm_head(output.last_hidden_state)
        return output


def whisper() -> Problem:
    config = WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=20,
        encoder_attention_heads=2,
        decoder_layers=1,
        decoder_ffn_dim=20,
        decoder_attention_heads=2,
        max_source_positions=10,
        max_target_positions=11,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        begin_suppress_tokens=None,
        dropout=0.1,
    )
    model = WhisperForConditionalGeneration(config)
    return training(model, input_features=torch.randn(SAMPLES, 8, 20), decoder_input_ids=words())


def patchtst() -> Problem:
    """Channels folded into the batch, and batch norms in the place of layer norms."""
    config = PatchTSTConfig(
        num_input_channels=3,
        context_length=16,
        patch_length=4,
        patch_stride=4,
        num_hidden_layers=2,
        d_model=WIDTH,
        num_attention_heads=2,
        ffn_dim=20,
        num_targets=2,
        loss="mse",
        use_cls_token=True,
    )
    return training(PatchTSTForRegression(config), lambda o: o.regression_outputs, past_values=torch.randn(7, 16, 3))


SOURCE = "transformers"
MODELS = [
    architecture(wav2vec2, "wav2vec 2.0", SOURCE),
    architecture(wav2vec2_masked, "wav2vec 2.0, masked", SOURCE),
    architecture(whisper, "Whisper", SOURCE),
    architecture(patchtst, "PatchTST", SOURCE, coupled=True),
]
