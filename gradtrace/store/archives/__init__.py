"""Stores that are written once: finished runs, compacted or merged."""
