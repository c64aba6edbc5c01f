"""Layers of other libraries are found without importing the libraries."""

from __future__ import annotations

import pickle
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from torch import nn

from thinned.compare.layers._peers import from_library, from_torch, library_class

PATHS = ("timm.layers.drop:DropPath", "torchvision.ops.stochastic_depth:StochasticDepth")


class Formula(nn.Module):
    pass


@pytest.mark.parametrize("path", PATHS)
def test_a_class_of_an_installed_library(path: str) -> None:
    library = path.partition(".")[0]
    try:
        version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    packages = {name for name in sys.modules if name == library}
    found = library_class.__wrapped__(path)
    assert found.__name__ == path.rpartition(":")[2]
    assert pickle.loads(pickle.dumps(found)) is found
    assert {name for name in sys.modules if name == library} == packages


def test_a_missing_library_leaves_the_formula() -> None:
    peer = from_library("no_such_library.layers:Layer", Formula)
    assert (peer.name, peer.make, peer.origin) == ("formula", Formula, "Layer of no_such_library")


def test_a_layer_of_torch() -> None:
    assert from_torch(nn.Dropout).origin == "torch.nn.Dropout"
