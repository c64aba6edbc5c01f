"""The settings of a comparison, and inputs that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thinned.compare.errors import one_line

__all__ = ["DTYPES", "Settings", "parse_dtype", "parse_shape"]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Settings:
    """The choices a user has; laws about a particular p or dtype do not look at these two.

    Inputs come from a generator of their own, so that an implementation finds the default generator as
    ``torch.manual_seed`` left it, and from another seed, so that they do not repeat the numbers of its masks.
    """

    p: float = 0.5
    shape: tuple[int, ...] = (64, 128, 128)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.p < 1:
            raise ValueError(f"p has to be above 0 and below 1 for a comparison, but got {self.p}")
        if not self.shape or any(size < 1 for size in self.shape):
            raise ValueError(f"shape has to be one or more positive sizes, but got {self.shape}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device has to be one that PyTorch finds, but got {self.device}: {one_line(error)}"
            ) from error

    def ones(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Ones of ``shape``, or of the settings' own shape."""
        return torch.ones(shape or self.shape, dtype=dtype or self.dtype, device=self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers, none of them zero, so that a zero in the output means dropped."""
        x = torch.randn(shape or self.shape, generator=self._generator()).to(dtype or self.dtype)
        return x.masked_fill(x == 0, 1).to(self.device)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers from 1 to 2, which take every mantissa of ``dtype`` equally often."""
        x = 1 + torch.rand(shape or self.shape, generator=self._generator(), dtype=torch.float64)
        return x.to(device=self.device, dtype=dtype or self.dtype)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(2**32 - 1 - self.seed % 2**32)


def parse_dtype(text: str) -> torch.dtype:
    """A dtype by its name in PyTorch.

    >>> parse_dtype("bfloat16")
    torch.bfloat16
    """
    if text not in DTYPES:
        raise ValueError(f"dtype has to be one of {', '.join(DTYPES)}, but got {text}")
    return DTYPES[text]


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape from its sizes.

    >>> parse_shape("64,128,128")
    (64, 128, 128)
    """
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ValueError(
            f"shape has to be sizes with commas between, as in 64,128,128, but got {text}"
        ) from None
