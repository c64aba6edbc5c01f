"""What thinned costs beside its peers: `python -m benchmarks`."""
