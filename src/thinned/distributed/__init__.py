"""Masks on many devices: shards of a :class:`~torch.distributed.tensor.DTensor`, and groups of processes."""

from thinned.distributed.ranks import shard_ids

__all__ = ["shard_ids"]
