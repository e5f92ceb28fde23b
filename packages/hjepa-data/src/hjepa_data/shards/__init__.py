"""Shards: write, index, read."""

from hjepa_data.shards.cache import CacheConfig
from hjepa_data.shards.patterns import expand_shards
from hjepa_data.shards.source import RawSample, ShardSource
from hjepa_data.shards.write import ShardWriter, write_shards

__all__ = ["CacheConfig", "RawSample", "ShardSource", "ShardWriter", "expand_shards", "write_shards"]
