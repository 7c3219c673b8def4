"""Measurements: each module is one command that prints one JSON document."""
