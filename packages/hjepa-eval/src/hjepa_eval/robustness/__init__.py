"""Accuracy on changed images: corruptions, rotations, occlusion, lower resolution, and folders of other images."""
