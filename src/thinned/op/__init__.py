"""The operations that every layer is made of: eager, compiled, differentiated and under vmap.

``masked_affine`` is ``y_i = keep(m(i)) ? x_i * scale + shift : fill``. ``keep_mask`` is the mask itself, and
``uniform`` the random numbers behind it, by which ``choose`` masks. ``m`` is a
:class:`~thinned.geometry.Geometry`; ``keep(m)`` holds if the 32-bit number of mask index ``m`` under the key
is below ``T``. A key is an int64 tensor whose shape is that of ``x``'s leading dimensions: ``()`` for one
key, ``(n,)`` for a key per row. One key may be an ``int`` or on another device.

A call of ``masked_affine`` takes the first code path that applies. A plain tensor goes straight to the
backend, since the dispatcher costs more from Python than the work on a small tensor.

=============================  =======================  ===============================  =====================
situation                      test                     code path                        autograd by
=============================  =======================  ===============================  =====================
plain tensor, nothing active   ``is_eager``             the backend                      ``_ReverseMode``
the same, in place             ``is_eager``             the backend, into ``x``          ``_InPlace``
sparse COO tensor              ``layout``               ``keep_mask``, then ``values()``  torch
the vmap of batched gradients  ``is_legacy_batched``    the portable backend             torch
vmap, grad, jvp, forward AD    neither of the two below ``_BothModes``, then the backend  ``_BothModes``
compiler, mode, subclass, ...  ``is_traced``            ``torch.ops.thinned``            ``_Registered``
functionalize                  ``functionalizing``      ``torch.ops.thinned``            ``_Registered``
=============================  =======================  ===============================  =====================

``is_traced`` also covers meta tensors and ZeroTensors. In place, other paths copy their result into ``x``.
``fused`` and ``fused_add`` are ``masked_affine`` and the step beside it, for plain tensors on the CPU.

Jagged tensors come here as their values, from :mod:`thinned.nested`. A DTensor is a subclass, whose rules for
``torch.ops.thinned`` are in :mod:`thinned.op.dtensor`.
"""

from thinned.op.affine import choose, masked_affine, masked_affine_, refuse_layout
from thinned.op.dtensor import accept, locally, shard_like, uniform_for, unsharded, whole
from thinned.op.fused import fused, fused_add, fuses
from thinned.op.registered import keep_mask, key_tensor, uniform

__all__ = [
    "accept",
    "choose",
    "fused",
    "fused_add",
    "fuses",
    "keep_mask",
    "key_tensor",
    "locally",
    "masked_affine",
    "masked_affine_",
    "refuse_layout",
    "shard_like",
    "uniform",
    "uniform_for",
    "unsharded",
    "whole",
]
