"""Zoneout: units that keep their previous value."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_variadic

from thinned.keys import Key
from thinned.layers._arguments import check_device, check_tensor, drops, kept, key_for, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import alike, elementwise, shape_of
from thinned.torch_state import compiling

__all__ = ["Zoneout", "zoneout"]


def zoneout(
    input: Tensor, previous: Tensor, p: float = 0.5, *, training: bool = True, key: Key | None = None
) -> Tensor:
    r"""Let each unit of a recurrent state keep its previous value with probability ``p``.

    .. math:: h_i = \begin{cases} \tilde h_i & u(i) < T \\ h'_i & \text{otherwise} \end{cases}
        \qquad\text{in training,}\qquad h = q\,\tilde h + (1 - q)\,h' \qquad\text{in evaluation}

    for the candidate :math:`\tilde h` and the previous state :math:`h'`. Training selects one of the two and
    computes nothing with the other, so a NaN in the other has no effect.

    Args:
        input: the candidate, a floating-point or complex tensor of any shape.
        previous: the state before, of ``input``'s shape and dtype.
        p: the probability of keeping the previous value, in [0, 1].
        training: False returns the expectation; ``p = 0`` returns ``input`` itself.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``previous`` is of another type,
            shape or dtype.

    Source: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017,
    section 3.

    >>> import torch, thinned
    >>> candidate, previous = torch.full((6,), 4.0), torch.full((6,), 2.0)
    >>> thinned.functional.zoneout(candidate, previous, p=0.5, key=thinned.Key(7))
    tensor([2., 2., 2., 4., 4., 4.])
    >>> thinned.functional.zoneout(candidate, previous, p=0.5, training=False)
    tensor([3., 3., 3., 3., 3., 3.])
    """
    if has_torch_function_variadic(input, previous) and not compiling():
        return overridden(zoneout, locals())
    T, _ = threshold_and_scale(p)
    active = drops("zoneout", input, p, True, key)
    check_tensor("zoneout", "previous", previous)
    if not active:
        return input
    if not alike(previous, input) or previous.dtype != input.dtype:
        raise RuntimeError(
            f"zoneout needs a previous state like its input, of shape {shape_of(input)} and "
            f"{input.dtype}; got shape {shape_of(previous)} and {previous.dtype}"
        )
    check_device("previous", previous, input)
    if T == 2**32:
        return input
    if not training and T:
        if input.dtype in (torch.float16, torch.bfloat16):  # in float32, so that the result is rounded once
            return zoneout(input.float(), previous.float(), p, training=False).to(input.dtype)
        if input.is_complex():  # by parts: infinity times a real number would be NaN in the other part
            new, old = (torch.view_as_real(state.resolve_conj()) for state in (input, previous))
            return torch.view_as_complex(zoneout(new, old, p, training=False))
        return torch.add(input * (T / 2**32), previous, alpha=1 - T / 2**32)
    # Evaluation comes here only with p = 1, where every key gives the same mask: no key is drawn.
    key = key_for(input, key if training else Key(0), elementwise=True)
    if input.is_nested:
        return elementwise("zoneout", partial(zoneout, p=p), input, key, previous)
    return torch.where(kept(key, input, (), T), input, previous)


class Zoneout(Layer):
    """Let units of a recurrent state keep their previous values.

    Use this layer in a loop of your own over a recurrent cell, where a dropped state would be forgotten. For
    characters the paper has a p of 0.5 for the cells of an LSTM and 0.05 for its hidden state.
    :class:`VariationalLSTM` has the loop and both.

    :func:`thinned.functional.zoneout` has the formula.

    Shape:
        candidate and previous state ``(*)``; the output has the candidate's shape.

    Source: Krueger et al., "Zoneout", ICLR 2017, section 3.

    >>> import torch, thinned
    >>> cell, zoneout = torch.nn.GRUCell(3, 5), thinned.Zoneout(0.1)
    >>> state = torch.zeros(2, 5)
    >>> for input in torch.randn(4, 2, 3):
    ...     state = zoneout(cell(input, state), state)
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor, previous: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) or isinstance(previous, Proxy):
            node = module_node(self, input, previous, key=key)
            if node is not None:
                return node
        return zoneout(input, previous, self.p, training=self.training, key=key)
