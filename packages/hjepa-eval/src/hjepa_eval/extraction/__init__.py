"""Features of every sample, in one pass for all levels, blocks and poolings; over processes; kept on disk."""
