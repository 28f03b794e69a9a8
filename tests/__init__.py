"""Tests. A package, so that the shared cases and oracles import as `tests.models` and `tests.oracles`."""
