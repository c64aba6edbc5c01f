"""Every way in which a backend can run: native under each instruction set, the others on each device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from thinned import backends
from thinned.backends import Backend
from thinned.backends.describe import devices

__all__ = ["Variant", "variants"]

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class Variant:
    """A backend by its name, on a type of device, under an instruction set where it has several."""

    backend: str
    device: str = "cpu"
    isa: str = ""

    def __str__(self) -> str:
        if self.backend == "triton" and self.device == "cpu":
            return "triton-interpreter"
        return f"{self.backend} {self.isa}".strip() + (f" on {self.device}" if self.device != "cpu" else "")

    def why_missing(self) -> str:
        """Why this machine cannot run it; empty if it can."""
        if self.backend in backends.missing():
            return backends.missing()[self.backend]
        if self.isa:
            from thinned.backends import _native

            if self.isa not in _native.compiled_isas():
                return "not compiled for this architecture"
            return "" if self.isa in _native.supported_isas() else "this processor lacks it"
        if self.device not in devices():
            return f"torch finds no {self.device} device"
        if self.backend != "triton":
            return ""
        if self.device == "cpu":
            return "" if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"
        serves = backends.for_device_type(self.device) is backends.available()["triton"]
        return "" if serves else f"Triton does not serve {self.device}"

    @contextmanager
    def running(self) -> Iterator[Backend]:
        """The backend, under the variant's instruction set until the end of the context."""
        backend = backends.available()[self.backend]
        if not self.isa:
            yield backend
            return
        from thinned.backends import native

        with native.instruction_set(self.isa):
            yield backend


def variants() -> list[Variant]:
    """All variants of the backends that this version of thinned has, here or elsewhere.

    >>> [str(variant) for variant in variants()][:4]
    ['native baseline', 'native avx2', 'native avx512', 'portable']
    """
    everywhere = dict.fromkeys(("cpu", *backends.ACCELERATORS, *devices()))
    names = {*backends.available(), *backends.missing()}
    return [Variant("native", isa=isa) for isa in INSTRUCTION_SETS] + [
        Variant(name, device) for name in sorted(names - {"native"}) for device in everywhere
    ]
