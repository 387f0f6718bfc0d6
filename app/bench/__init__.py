"""Measurements: each one command, its arms side by side in one run, its figures in a JSON file of the run root."""
