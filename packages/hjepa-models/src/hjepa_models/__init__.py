"""Hierarchical JEPA architectures and objectives: encoder, predictor, pyramid, heads."""
