"""The zoo's models from libraries."""

from __future__ import annotations

from tests.zoo import monai_models, transformers_signals, transformers_text, transformers_vision

MODELS = [
    *transformers_text.MODELS,
    *transformers_vision.MODELS,
    *transformers_signals.MODELS,
    *monai_models.MODELS,
]
