"""The cases, by kind of model."""
