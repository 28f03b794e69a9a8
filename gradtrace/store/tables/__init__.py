"""Runs as tables that other programs read."""
