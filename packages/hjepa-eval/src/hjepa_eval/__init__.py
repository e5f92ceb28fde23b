"""What was learned: feature extraction, kNN, linear probe, RankMe and effective rank on any module."""
