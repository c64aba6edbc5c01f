"""A backend on a device under one signature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from thinned.backends import Backend
from thinned.geometry import Geometry


class BackendUnderTest:
    """A backend on a device, called with CPU tensors and answering with them."""

    def __init__(self, module: Backend, device: str = "cpu", slow: bool = False) -> None:
        self.module, self.device, self.slow, self.examples = module, device, slow, 0

    def enough(self, of: int = 12) -> bool:
        """Whether a slow backend has had this many examples of a property; the fast ones have all."""
        self.examples += 1
        return self.slow and self.examples > of

    def keep_mask(self, key: Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
        return self.module.keep_mask(key.to(self.device), shape, geometry, T).cpu()

    def uniform(
        self,
        key: Tensor,
        shape: tuple[int, ...],
        geometry: Geometry,
        draw: Tensor | None = None,
        strata: int = 1,
    ) -> Tensor:
        draw = None if draw is None else draw.to(self.device)
        return self.module.uniform(key.to(self.device), shape, geometry, draw, strata).cpu()

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
        x = x.to(self.device)
        out = torch.empty_like(x) if out is None else out.to(self.device)
        return self.module.masked_affine(x, key.to(self.device), geometry, T, scale, shift, fill, out).cpu()


def on_gpu(test: Any) -> Any:
    """Mark a test that needs a GPU, which ``pytest -m gpu`` runs and a machine without one skips."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
    return pytest.mark.gpu(skip(test))
