"""Keys: from a seed, from bits, drawn from a generator, or folded from another key."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from thinned import backends
from thinned.backends import portable
from thinned.backends.inductor import show_kernel
from thinned.backends.strata import MOST
from thinned.checks import check_integer, got
from thinned.devices import to_device
from thinned.philox import signed64
from thinned.torch_state import (
    compiling,
    constant_when_compiled,
    is_eager,
    is_legacy_batched,
    unwrap_if_dead,
)

__all__ = [
    "Key",
    "RowsKey",
    "StratifiedKey",
    "as_key",
    "draw",
    "draw_int",
    "key_of_rows",
    "key_of_seed",
    "not_a_key",
    "on_device",
    "packed",
    "savable",
    "unpacked",
]


class Key:
    """A 64-bit key; a mask is a pure function of it and of a position.

    Formula: ``key.fold(data)`` is words 0 and 1 of ``philox4x32-10((lo32(data), hi32(data), 0, 1), key)``;
    a string counts as the first 8 bytes, little-endian, of its BLAKE2b-512 digest.

    The bits are an int64 tensor and not a Python number, so that code under :func:`torch.compile` takes
    another key without a recompile. They are on the CPU, whatever the default device, until :meth:`to` moves
    them. Folding in a tensor of ids gives a batch of keys, one for each row of dimension 0 of the tensor they
    are used on. ``torch.load(weights_only=True)`` loads keys where thinned is imported.

    Args:
        seed: an integer in ``-2**63 .. 2**64-1``, negative ones standing for ``2**64 + seed`` as in
            :func:`torch.manual_seed`.

    Attributes:
        bits: int64 tensor, 0-d for one key, of the batch's shape for a batch.

    Raises:
        TypeError: ``seed`` is no integer.
        ValueError: ``seed`` does not fit into 64 bits.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11.

    >>> key = Key(7)
    >>> key
    Key(7)
    >>> key.fold("encoder").fold(3) == Key(7).fold("encoder").fold(3)
    True
    >>> key.fold(torch.arange(4)).shape
    torch.Size([4])
    """

    bits: Tensor

    def __init__(self, seed: int) -> None:
        try:
            number = seed if isinstance(seed, int | torch.SymInt) else operator.index(seed)
        except TypeError:
            raise TypeError(f"a key's seed must be an integer, {got(seed)}") from None
        if isinstance(number, int) and not -(2**63) <= number < 2**64:
            raise ValueError(f"a key's seed must be in -2**63 .. 2**64-1, got {number}")
        self.bits = savable(torch.full((), _int64(number), dtype=torch.int64, device="cpu"))

    @classmethod
    def from_bits(cls, bits: Tensor) -> Key:
        """A key, or a batch of keys, from its int64 bits (which are not copied, except from inference mode).

        >>> Key.from_bits(torch.tensor(7))
        Key(7)
        """
        if isinstance(bits, Proxy):
            return _node(_from_bits, bits)
        if not isinstance(bits, Tensor) or bits.dtype != torch.int64:
            got = f"{bits.dtype}" if isinstance(bits, Tensor) else f"{bits!r} of type {type(bits).__name__}"
            raise TypeError(f"a key's bits must be an int64 tensor, got {got}")
        key = cls.__new__(cls)
        key.bits = savable(bits)
        return key

    @classmethod
    def from_torch(cls, key: Tensor) -> Key:
        r"""The key, or the batch of keys, for keys of ``torch.func._random`` (PyTorch 2.14, experimental).

        .. math:: \text{Key}(seed).\text{fold}(offset)

        Every ``key=`` accepts such a tensor and calls this, and so does the ``seed=`` of
        :func:`thinned.address` and of the callbacks. The masks are thinned's: ``torch.func._random.uniform``
        has other numbers.

        Args:
            key: uint64 tensor of shape ``(*, 2)``, in which each last dimension is ``(seed, offset)``.

        Raises:
            TypeError: ``key`` is of another type, dtype or shape.

        >>> pairs = torch.tensor([[7, 0], [7, 1], [8, 0]], dtype=torch.uint64)
        >>> Key.from_torch(pairs[1]) == Key(7).fold(1)
        True
        >>> Key.from_torch(pairs).shape
        torch.Size([3])
        """
        if not isinstance(key, Tensor) or key.dtype != torch.uint64 or key.shape[-1:] != (2,):
            raise TypeError(
                f"a key of torch.func._random must be a uint64 tensor of shape (*, 2), {got(key)}"
            )
        seed, offset = key.to(torch.int64).unbind(-1)  # uint64 has few operations
        return cls.from_bits(seed).fold(offset)

    @property
    def shape(self) -> torch.Size:
        """``()`` for one key, the batch's shape for a batch."""
        return self.bits.shape

    def fold(self, data: int | str | Tensor) -> Key:
        """The child of this key that ``data`` names; different data give unrelated children.

        Args:
            data: an integer (modulo 2**64), a string, or an int64 tensor of any shape, which broadcasts
                against the key's own and gives a batch of keys.

        >>> Key(7).fold(1) == Key(7).fold(2)
        False
        """
        if isinstance(data, str):
            data = _digest(data)
        if isinstance(data, Tensor):
            if data.dtype != torch.int64:
                raise TypeError(f"data must be an int64 tensor where it is a tensor of ids, {got(data)}")
        elif isinstance(data, Proxy):
            return _node(_folded, self, data)
        elif isinstance(data, (int, torch.SymInt)) or hasattr(data, "__index__"):
            number = _int64(data)
            if is_eager(self.bits) and self.bits.is_cpu and not self.bits.dim():
                return Key.from_bits(backends.for_device_type("cpu").fold(self.bits, number))
            data = torch.full((), number, dtype=torch.int64, device=self.bits.device)
        else:
            raise TypeError(f"data must be an integer, a string or an int64 tensor, {got(data)}")
        eager = is_eager(self.bits) and is_eager(data)
        return Key.from_bits(_fold(self.bits, data) if eager else _fold_traced(self.bits, data))

    def stratified(self, draw: int | Tensor, strata: int = 20) -> Key:
        r"""The key of one draw of a stratified set of ``strata`` draws, whose means vary less.

        .. math:: \text{keep } i \text{ where } u'(i, s) < T, \qquad
            u'(i, s) = (u(i) + \pi_i(s) \lfloor 2^{32} / S \rfloor) \bmod 2^{32}

        ``s`` is the draw, ``S`` the strata, ``u(i)`` the number of element ``i`` under this key, which is the
        set's, and :math:`\pi_i` the element's own permutation of ``0 .. S-1``, which the key decides too.
        Each draw alone is a mask as under any key, and its elements are independent. The draws of an element
        are not: if ``S q`` is an integer, that many of the ``S`` draws keep it. Unless ``S`` is a power of
        two, it is one more or less in few elements, 1 in 27 million at ``S = 20`` and ``q = 0.5``. So the
        average of a network's predictions over the set has less variance than over independent draws.

        The numbers are ``u'`` in the dropouts of elements, channels, paths and tokens, in alpha dropout, in
        the Gaussian and concrete ones, and in :func:`thinned.keep_mask`. To everything else this is the
        independent key ``self.fold(draw)``: to layers that fold it, to dropouts of blocks, weights, edges and
        targets, to nested and sparse tensors, and in :func:`torch.jit.script`.

        Args:
            draw: an integer in ``0 .. strata-1``, or an int64 tensor of any shape, which broadcasts against
                the key's own and gives a batch of keys; its numbers count modulo ``strata``.
            strata: the number of draws in the set, in 1 .. 65521.

        Raises:
            TypeError: ``draw`` is neither an integer nor an int64 tensor, or ``strata`` no integer.
            ValueError: ``draw`` is an integer out of its range, or ``strata`` is out of its range.

        Source: McKay, Beckman and Conover, "A comparison of three methods for selecting values of input
        variables", Technometrics 21 (1979), for Latin hypercube sampling; here only the strata of an
        element are distinct, and its position within a stratum is common to all draws.

        >>> import thinned
        >>> keys = Key(7).stratified(torch.arange(4), strata=4)
        >>> thinned.keep_mask(keys, (4, 6), p=0.5).sum(0)
        tensor([2, 2, 2, 2, 2, 2])
        """
        check_integer("strata", strata, least=1)
        if strata > MOST:
            raise ValueError(f"strata has to be at most {MOST}, but got {strata}")
        if isinstance(draw, Proxy):
            return _node(_stratified, self, strata, draw)
        if not isinstance(draw, Tensor):
            check_integer("draw", draw, least=0)
            if draw >= strata:
                raise ValueError(f"draw has to be below strata, {strata}, but got {draw}")
            draw = torch.full((), _int64(draw), dtype=torch.int64, device=self.bits.device)
        elif draw.dtype != torch.int64:
            raise TypeError(f"draw must be an int64 tensor where it is a tensor, {got(draw)}")
        return StratifiedKey(self.bits, draw, strata)

    def to(self, device: torch.device | str) -> Key:
        """The same key with its bits on a device."""
        return Key.from_bits(on_device(self.bits, _device(device)))

    def __int__(self) -> int:
        return int(self.bits.item()) % 2**64

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Key):
            return NotImplemented
        return self.shape == other.shape and bool((self.bits.cpu() == other.bits.cpu()).all())

    def __hash__(self) -> int:
        return hash(("thinned.Key", tuple(self.bits.flatten().tolist())))

    def __repr__(self) -> str:
        if not self.shape:
            try:
                return f"Key({int(self)})"
            except RuntimeError:  # the bits have no value: a meta or fake tensor, or one under vmap
                pass
        return f"Key.from_bits({self.bits!r})"

    def __fx_create_arg__(self, tracer: Any) -> Any:
        """A node that makes this key, for torch.fx, in whose graphs a key as such cannot be an argument."""
        if self.shape:
            return tracer.create_node("call_function", _from_bits, (tracer.create_arg(self.bits),), {})
        return tracer.create_node("call_function", Key, (int(self),), {})

    def __reduce__(self) -> tuple[Any, ...]:
        if self.shape or self.bits.is_meta:
            return Key, (0,), self.bits  # not from_bits: torch.load(weights_only=True) calls no methods
        return Key, (int(self),)

    def __setstate__(self, bits: Tensor) -> None:
        self.bits = savable(bits)


class StratifiedKey(Key):
    """The result of :meth:`Key.stratified`.

    Attributes:
        bits: those of ``Key.from_bits(of).fold(draw)``, for code that knows no strata.
        of: the bits of the set's key, in the shape of ``bits``.
        draw: int64 tensor of the shape of ``bits``, or one number.
        strata: how many draws the set has.
    """

    def __init__(self, of: Tensor, draw: Tensor, strata: int) -> None:
        self.bits = Key.from_bits(of).fold(draw).bits
        device, shape = self.bits.device, self.bits.shape
        self.of = savable(on_device(of, device).expand(shape))
        self.draw = savable(on_device(draw, device).expand(shape if draw.dim() else ()))
        self.strata = strata

    def to(self, device: torch.device | str) -> Key:
        there = _device(device)
        if there == self.bits.device:
            return self
        return StratifiedKey(on_device(self.of, there), on_device(self.draw, there), self.strata)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StratifiedKey):
            return NotImplemented if not isinstance(other, Key) else False
        return self.strata == other.strata and super().__eq__(other)

    def __hash__(self) -> int:
        return hash((super().__hash__(), self.strata))

    def __repr__(self) -> str:
        try:
            draw = repr(self.draw) if self.draw.dim() else str(int(self.draw))
        except RuntimeError:  # as for a key
            draw = repr(self.draw)
        return f"{Key.from_bits(self.of)!r}.stratified({draw}, {self.strata})"

    def __fx_create_arg__(self, tracer: Any) -> Any:
        parts = (tracer.create_arg(Key.from_bits(self.of)), self.strata, tracer.create_arg(self.draw))
        return tracer.create_node("call_function", _stratified, parts, {})

    def __reduce__(self) -> tuple[Any, ...]:
        return StratifiedKey, (self.of, self.draw, self.strata)


class RowsKey(Key):
    """One key for a tensor that has only some rows of a batch: their mask is that of the batch.

    Its ``bits`` cannot be read, so a layer that does not know such keys raises and draws no other mask.

    Attributes:
        of: the key.
        index: the rows' places in the batch.
        size: the number of rows of the batch.
        dim: the dimension of the rows.
    """

    def __init__(self, of: Key, index: Tensor, size: int, dim: int) -> None:
        self.of, self.index, self.size, self.dim = of, index, size, dim

    @property
    def bits(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError(
            "this dropout is within a residual branch that is computed for the kept rows alone, and cannot "
            "make the mask of those rows under one key; give thinned.address samples=, or compute this "
            "branch for all rows"
        )


torch.serialization.add_safe_globals([Key, StratifiedKey])


def key_of_rows(key: Key, index: Tensor, size: int, dim: int) -> Key:
    """The key for some rows of a batch of ``size`` rows along ``dim``, given that of the batch."""
    if not key.shape:
        return RowsKey(key, index, size, dim)
    index = to_device(index, key.bits.device)
    if isinstance(key, StratifiedKey):
        draw = key.draw.index_select(0, index) if key.draw.dim() else key.draw
        return StratifiedKey(key.of.index_select(0, index), draw, key.strata)
    return Key.from_bits(key.bits.index_select(0, index))


def packed(key: Key) -> tuple[Tensor, int]:
    """A key as a tensor, which autograd can save, and its number of strata, 0 for an ordinary key."""
    if isinstance(key, StratifiedKey):
        return torch.stack((key.of, key.draw.expand(key.shape)), -1), key.strata
    return key.bits, 0


def unpacked(tensor: Tensor, strata: int) -> Key:
    """The key of which :func:`packed` made these."""
    return (
        StratifiedKey(tensor.select(-1, 0), tensor.select(-1, 1), strata) if strata else Key.from_bits(tensor)
    )


def as_key(value: Any) -> Key:
    """The key that a ``key=`` stands for: itself, or that of a tensor as in :meth:`Key.from_torch`."""
    if isinstance(value, Key):
        return value
    if isinstance(value, Tensor) and value.dtype == torch.uint64:
        return Key.from_torch(value)
    raise not_a_key(value)


def key_of_seed(seed: Any) -> Key:
    """The key that a ``seed=`` stands for: an integer, or all that a ``key=`` may be."""
    is_pair = isinstance(seed, Tensor) and seed.dtype == torch.uint64 and seed.dim()
    return as_key(seed) if is_pair or isinstance(seed, Key) else Key(seed)


def not_a_key(value: Any, others: str = "") -> TypeError:
    """The error for a ``key`` that is none; ``others`` says what else is accepted."""
    hint = f"; write thinned.Key({value})" if isinstance(value, int) else ""
    return TypeError(f"key must be a thinned.Key{others}, {got(value)}{hint}")


def _int64(number: Any) -> Any:
    """The int64 with the 64 lowest bits of an integer, which stays symbolic in compiled code if it fits."""
    if isinstance(number, torch.SymInt) or (isinstance(number, int) and -(2**63) <= number < 2**63):
        return number
    return signed64(operator.index(number))  # a constant for Dynamo: symbolic integers have 64 bits, too


def savable(bits: Tensor) -> Tensor:
    """The bits in a tensor that autograd can save, without the inference mode or transform that made them."""
    if compiling():
        return bits
    while (inner := unwrap_if_dead(bits)) is not bits:
        bits = inner
    if not bits.is_inference():
        return bits
    with torch.inference_mode(False):
        return bits.clone()


def _device(device: torch.device | str) -> torch.device:
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"device must be a torch.device or the name of one, {got(device)}")
    return torch.device(device)


def on_device(bits: Tensor, device: torch.device) -> Tensor:
    """The bits on a device; one key of the CPU gets there as a number and not by a copy."""
    if bits.device == device:
        return bits
    if bits.is_cpu and not bits.dim() and is_eager(bits):
        return torch.full((), int(bits.item()), dtype=torch.int64, device=device)
    return to_device(bits, device)


# torch.fx writes the name of a function into code, but none of a method.
def _from_bits(bits: Tensor) -> Key:
    return Key.from_bits(bits)


def _folded(key: Key, data: Tensor) -> Key:
    return key.fold(data)


def _stratified(key: Key, strata: int, draw: Tensor) -> Key:
    return key.stratified(draw, strata)


def _node(function: Callable[..., Key], *args: Any) -> Any:
    """The key that a call of ``function`` makes in the graph that torch.fx traces."""
    return args[-1].tracer.create_proxy("call_function", function, args, {})


# For a compiler a fold is one node instead of the 150 nodes of a philox4x32 with 10 rounds.
_library = torch.library.Library("thinned", "FRAGMENT")
_library.define("fold(Tensor keys, Tensor data) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _fold(keys: Tensor, data: Tensor) -> Tensor:
    """The children of keys; either argument may be one number on the CPU and the other on another device."""
    device = data.device if keys.is_cpu else keys.device
    return backends.for_device_type(device.type).fold(keys, data)


def _fold_traced(keys: Tensor, data: Tensor) -> Tensor:
    if is_legacy_batched(keys) or is_legacy_batched(data):
        return portable.fold(keys, data)
    return torch.ops.thinned.fold(keys, data)  # type: ignore[no-any-return]


def _fold_fake(keys: Tensor, data: Tensor) -> Tensor:
    return keys + data  # which has the shape and the device


def _vmap_fold(info: Any, in_dims: tuple[Any, ...], keys: Tensor, data: Tensor) -> tuple[Tensor, int]:  # noqa: ARG001
    ndim = max(x.dim() - (dim is not None) for x, dim in zip((keys, data), in_dims, strict=True))

    def aligned(x: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return x
        x = x.movedim(dim, 0)
        return x.reshape(x.shape[0], *(1,) * (ndim - x.dim() + 1), *x.shape[1:])

    keys, data = (aligned(x, dim) for x, dim in zip((keys, data), in_dims, strict=True))
    return Key.from_bits(keys).fold(data).bits, 0


_library.impl("fold", _fold, "CompositeExplicitAutograd")
torch.library.register_fake("thinned::fold", _fold_fake, lib=_library)
show_kernel(_library, "fold", _fold)
torch.library.register_vmap("thinned::fold", _vmap_fold, lib=_library)


@constant_when_compiled
def _digest(name: str) -> int:
    return signed64(int.from_bytes(blake2b(name.encode()).digest()[:8], "little"))


def draw(device: torch.device) -> Tensor:
    """One key's bits from torch's default generator of a device, in one draw."""
    return torch.empty((), dtype=torch.int64, device=device).random_()


def draw_int() -> int:
    """The number that :func:`draw` gives for the CPU, without a new tensor."""
    try:
        place = _local.place
    except AttributeError:
        with torch.inference_mode(False):
            place = _local.place = torch.empty((), dtype=torch.int64, device="cpu")
    return place.random_().item()  # type: ignore[no-any-return]


_local = threading.local()
