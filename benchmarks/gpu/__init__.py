"""The cost of thinned on a GPU beside its peers, and a dry run without one: `python -m benchmarks.gpu`."""
