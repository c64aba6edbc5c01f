"""Backends on any device under one signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from thinned.backends import Backend
from thinned.geometry import Geometry


class Moved:
    """A backend that computes on another device what it is asked on the CPU."""

    def __init__(self, module: Backend, device: str) -> None:
        self.module, self.device = module, device

    def moved(self, x: Tensor) -> Tensor:
        """``x`` on the device, with the same strides and the same place in its storage."""
        if x.is_conj():
            return self.moved(x.conj()).conj()
        whole = torch.empty(0, dtype=x.dtype, device="cpu").set_(x.untyped_storage())
        return whole.to(self.device).as_strided(x.shape, x.stride(), x.storage_offset())

    def moved_key(self, key: int | Tensor) -> int | Tensor:
        return self.moved(key) if isinstance(key, Tensor) and key.is_cpu else key

    def masked_affine(
        self,
        x: Tensor,
        key: int | Tensor,
        geometry: Geometry | None,
        T: int,
        scale: float,
        shift: float,
        fill: float,
        out: Tensor | None = None,
    ) -> Tensor:
        there = self.moved(x)
        place = out if out is None else there if out is x else self.moved(out)
        y = self.module.masked_affine(there, self.moved_key(key), geometry, T, scale, shift, fill, place)
        return y.cpu() if out is None else out.copy_(y)

    def keep_mask(self, key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
        there = torch.tensor(key, device=self.device) if isinstance(key, int) else self.moved_key(key)
        return self.module.keep_mask(there, shape, geometry, T).cpu()

    def uniform(
        self,
        key: Tensor,
        shape: tuple[int, ...],
        geometry: Geometry,
        draw: Tensor | None = None,
        strata: int = 1,
    ) -> Tensor:
        draw = None if draw is None else self.moved(draw)
        return self.module.uniform(self.moved(key), shape, geometry, draw, strata).cpu()

    def choose(self, x: Tensor, numbers: Tensor, *constants: Any) -> Tensor:
        return self.module.choose(self.moved(x), self.moved(numbers), *constants).cpu()

    def fold(self, keys: Tensor, data: int | Tensor) -> Tensor:
        return self.module.fold(self.moved(keys), self.moved_key(data)).cpu()


class BackendUnderTest:
    """A backend on a device under one signature, called with CPU tensors and answering with them."""

    def __init__(self, module: Backend, device: str = "cpu", slow: bool = False) -> None:
        self.module: Backend = module if device == "cpu" else Moved(module, device)
        self.device, self.slow, self.examples = device, slow, 0
        self.keep_mask, self.uniform = self.module.keep_mask, self.module.uniform

    def enough(self, of: int = 12) -> bool:
        """Whether a slow backend has had this many examples of a property; the fast ones have all."""
        self.examples += 1
        return self.slow and self.examples > of

    def masked_affine(
        self,
        x: Tensor,
        key: Tensor,
        geometry: Geometry,
        T: int,
        scale: float,
        shift: float = 0.0,
        fill: float = 0.0,
        out: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty_like(x) if out is None else out
        return self.module.masked_affine(x, key, geometry, T, scale, shift, fill, out)


def on_gpu(test: Any) -> Any:
    """Mark a test that needs a GPU, which ``pytest -m gpu`` runs and a machine without one skips."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
    return pytest.mark.gpu(skip(test))
