"""The backends that tests run, each under one signature."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from thinned import backends
from thinned.backends import Backend
from thinned.geometry import Geometry

KNOWN_ISAS = ("baseline", "avx2", "avx512")
ACCELERATORS = ("cuda", "xpu")
BACKENDS = (
    *(f"native {isa}" for isa in KNOWN_ISAS),
    "portable",
    "triton-interpreter",
    *(f"triton on {device}" for device in ACCELERATORS),
    *(f"portable on {device}" for device in ACCELERATORS),
)


class BackendUnderTest:
    """A backend on a device, called with CPU tensors and answering with them."""

    def __init__(self, module: Backend, device: str = "cpu") -> None:
        self.module, self.device = module, device

    def keep_mask(self, key: Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
        return self.module.keep_mask(key.to(self.device), shape, geometry, T).cpu()

    def uniform(self, key: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
        return self.module.uniform(key.to(self.device), shape, geometry).cpu()

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


def why_missing(name: str) -> str:
    """Why this machine cannot run a backend; empty if it can."""
    kind, _, rest = name.partition(" ")
    if kind == "native":
        if "native" in backends.missing():
            return backends.missing()["native"]
        from thinned.backends import _native

        if rest not in _native.compiled_isas():
            return "not compiled for this architecture"
        return "" if rest in _native.supported_isas() else "this processor lacks it"
    if name == "triton-interpreter":
        if "triton" in backends.missing():
            return backends.missing()["triton"]
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "on a GPU the kernels run compiled"
    device = rest.removeprefix("on ")
    if kind == "triton" and backends.why_not_triton(device):
        return backends.why_not_triton(device)
    if not device or getattr(torch, device).is_available():
        return ""
    return f"torch finds no {device} device"
