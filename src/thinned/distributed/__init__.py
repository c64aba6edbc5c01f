"""Masks on several processes: the data-parallel replicas of a model, and whether its processes agree."""

from thinned.distributed.ranks import shard_ids

__all__ = ["shard_ids"]
