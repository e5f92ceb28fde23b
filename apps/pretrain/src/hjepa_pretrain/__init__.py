"""Pretrain a (hierarchical) JEPA on webdataset shards, resumably, with a report."""
