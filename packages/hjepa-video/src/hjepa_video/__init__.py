"""Video JEPA on the same tokens: tubelets, clips, tube masks."""
