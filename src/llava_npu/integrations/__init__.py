"""Doors through which other tools use this project's models, one folder each."""
