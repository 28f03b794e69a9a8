"""Runs as they are written: rows in, whole blocks and commits out."""
