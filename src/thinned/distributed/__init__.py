"""Masks on many devices: shards of a :class:`~torch.distributed.tensor.DTensor`, and groups of processes."""
