"""Architectures that people train, small and random. Nothing is ever downloaded for them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
