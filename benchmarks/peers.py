"""Other people's dropout, each as a function of a tensor-like input."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import thinned
from thinned.compare.textbook import TextbookDropout

__all__ = ["backward", "elsewhere", "layers"]


def layers(p: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """The PyTorch layers."""
    return {"thinned": thinned.Dropout(p), "nn.Dropout": nn.Dropout(p), "textbook": TextbookDropout(p)}


def elsewhere(elements: int, p: float) -> dict[str, Callable[[], object]]:
    """NumPy's formula and JAX's jitted one, where installed, on float32 ones."""
    calls: dict[str, Callable[[], object]] = {"numpy": _numpy(elements, p)}
    if find_spec("jax"):
        calls["jax.jit"] = _jax(elements, p)
    return calls


def _numpy(elements: int, p: float) -> Callable[[], object]:
    random, x = np.random.default_rng(0), np.ones(elements, np.float32)
    return lambda: x * (random.random(elements, np.float32) >= p) / np.float32(1 - p)


def _jax(elements: int, p: float) -> Callable[[], object]:
    import jax

    @jax.jit
    def dropout(key: Any, x: Any) -> Any:
        keep = jax.random.bernoulli(key, 1 - p, x.shape)
        return jax.numpy.where(keep, x / (1 - p), 0)

    key, x = jax.random.key(0), jax.numpy.ones(elements, jax.numpy.float32)
    dropout(key, x).block_until_ready()
    return lambda: dropout(key, x).block_until_ready()


def backward(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """A forward and a backward pass."""
    upstream = torch.ones_like(x)
    return lambda: torch.autograd.grad(layer(x), x, upstream)
