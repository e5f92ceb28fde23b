"""Webdataset shards, exact-resume streams, transforms and masks for self-supervised learning."""
