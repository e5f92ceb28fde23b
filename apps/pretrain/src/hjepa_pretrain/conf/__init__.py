"""Recipes and presets, as YAML; hydra finds them because this folder is a package."""
