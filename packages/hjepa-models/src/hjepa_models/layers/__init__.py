"""Transformer layers on token grids of any number of axes."""
