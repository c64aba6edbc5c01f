"""``thinned inspect``: a model by its name, and random inputs by their sizes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from thinned.compare.errors import one_line, one_line_with_place
from thinned.compare.loading import model_of
from thinned.models.inspect import Inspection, inspect

__all__ = ["RandomInput", "inspect_named", "to_json"]

SPELLING = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::(\w+))?")


@dataclass(frozen=True)
class RandomInput:
    """One argument of a model: its name, empty if it is passed by position; its shape; its dtype if given.

    >>> RandomInput.parse("input_ids=2x16:int64")
    RandomInput(name='input_ids', shape=(2, 16), dtype=torch.int64)
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @classmethod
    def parse(cls, text: str) -> RandomInput:
        """The input behind ``2x3x32x32``, ``2x16:int64`` or ``mask=2x16:bool``; ValueError for others."""
        found = SPELLING.fullmatch(text)
        name, sizes, kind = found.groups() if found else ("", "", "")
        dtype = getattr(torch, kind or "float32", None)
        if not sizes or not isinstance(dtype, torch.dtype):
            raise ValueError(
                f"input {text!r} is not understood; accepted are sizes, such as 2x3x32x32, with a dtype of "
                "torch, such as 2x16:int64, and with the argument's name, such as input_ids=2x16:int64"
            )
        return cls(name or "", tuple(map(int, sizes.split("x"))), dtype if kind else None)

    def draw(self, model: nn.Module) -> Tensor:
        """Normal numbers in the dtype of the model's parameters, or 0 and 1, which every vocabulary has."""
        tensors = [*model.parameters(), *model.buffers()]
        dtypes = [tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point]
        dtype = self.dtype or next(iter(dtypes), torch.get_default_dtype())
        is_normal = dtype.is_floating_point or dtype.is_complex
        drawn = torch.randn(self.shape) if is_normal else torch.randint(0, 2, self.shape)
        return drawn.to(dtype=dtype, device=tensors[0].device if tensors else None)


def inspect_named(text: str, inputs: Sequence[str]) -> Inspection:
    """The sites of the model behind ``package.module:factory``, with a run if there are inputs.

    Raises:
        ValueError: with one line that says what is wrong with ``text``, an input or the run.

    >>> inspect_named("torch.nn:Dropout", ["2x3"])[0].calls
    1
    """
    parsed = [RandomInput.parse(each) for each in inputs]
    model = model_of(text)
    try:
        args = [each.draw(model) for each in parsed if not each.name]
        kwargs = {each.name: each.draw(model) for each in parsed if each.name}
    except (RuntimeError, NotImplementedError) as error:  # such as a shape that exceeds the memory
        raise ValueError(f"cannot make the inputs: {one_line(error)}") from error
    try:
        return inspect(model, *args, **kwargs)
    except Exception as error:  # whatever a stranger's model raises
        raise ValueError(f"{text} raises in the run: {one_line_with_place(error)}") from error


def to_json(found: Inspection) -> str:
    """The sites with all attributes, as a list of objects."""
    return json.dumps([{**asdict(site), "where": site.where} for site in found], indent=1)
