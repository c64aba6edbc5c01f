"""Checks of tensors: each error names the argument and repeats what it got."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.checks import got

__all__ = ["check_same_shape", "classification", "first_wrong", "numbers_of", "regression", "variances"]


def classification(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    numbers = numbers_of("probabilities", probabilities, "(n, classes)")
    if (numbers < 0).any():
        raise ValueError(f"probabilities must not be negative, but got {first_wrong(numbers, numbers < 0)}")
    # Rounded softmax: half a unit in the last place of each probability.
    rounding = torch.finfo(probabilities.dtype).eps if probabilities.is_floating_point() else 0
    sums = numbers.sum(1)
    off = (sums - 1).abs() > max(1e-3, 4 * rounding)
    if off.any():
        raise ValueError(
            "each row of probabilities must sum to 1, as softmax makes logits do, but got the sum "
            f"{first_wrong(sums, off)}"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a tensor, {got(labels)}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers, {got(labels)}")
    if labels.shape != sums.shape:
        raise ValueError(
            f"labels must have shape {tuple(sums.shape)}, one for each row of probabilities, {got(labels)}"
        )
    integers = labels.cpu().long()
    outside = (integers < 0) | (integers >= numbers.size(1))
    if outside.any():
        raise ValueError(
            f"labels must be in 0..{numbers.size(1) - 1} for probabilities of shape {tuple(numbers.shape)}, "
            f"but got {first_wrong(integers, outside)}"
        )
    return numbers, integers


def regression(mean: Tensor, variance: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, targets = numbers_of("mean", mean), variances(variance), numbers_of("targets", targets)
    check_same_shape(mean=mean, variance=variance, targets=targets)
    return mean, variance, targets


def variances(variance: Tensor) -> Tensor:
    numbers = numbers_of("variance", variance)
    if (numbers < 0).any():
        raise ValueError(f"variance must not be negative, but got {first_wrong(numbers, numbers < 0)}")
    return numbers


def numbers_of(name: str, value: Tensor, shape: str | None = None) -> Tensor:
    """``value`` in float64 on the CPU, checked; ``shape`` is how messages write its shape, None for any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, {got(value)}")
    if value.is_complex():
        raise TypeError(f"{name} must hold real numbers, {got(value)}")
    if (shape and value.dim() != len(shape.strip("()").rstrip(",").split(","))) or not value.numel():
        raise ValueError(
            f"{name} must have {f'shape {shape} and ' if shape else ''}at least 1 element, {got(value)}"
        )
    numbers = value.detach().cpu().double()
    if not numbers.isfinite().all():
        raise ValueError(
            f"{name} must hold no NaN and no infinity, but got {first_wrong(numbers, ~numbers.isfinite())}"
        )
    return numbers


def first_wrong(values: Tensor, wrong: Tensor) -> str:
    """The end of a message: the first of ``values`` that is wrong, and how many are."""
    first = tuple(wrong.nonzero()[0].tolist())
    place = first[0] if len(first) == 1 else first
    return f"{values[first].item():.10g} at index {place} ({int(wrong.sum())} such of {values.numel()})"


def check_same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{' and '.join(tensors)} must have the same shape, but got {shapes}")
