"""The cost of thinned beside its peers: `python -m benchmarks`."""
