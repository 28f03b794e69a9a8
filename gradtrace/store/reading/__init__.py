"""Runs as they are read: checked first, then lazily, without torch."""
