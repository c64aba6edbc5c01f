"""Nested tensors, which torch's dropout takes too: right in every layout, or refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from thinned import Key
from thinned import functional as F
from thinned.functional import dropout

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

Layer = Callable[..., Tensor]
KEY, IDS = Key(7), torch.tensor([5, 2, 9])
KEYS = KEY.fold(IDS)
SIZES = [(3, 4, 8), (5, 4, 8), (2, 4, 8)]
EQUAL = [(3, 4, 8)] * 3


def parts_of(sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def jagged(sizes: Sequence[tuple[int, ...]] = SIZES) -> Tensor:
    return torch.nested.nested_tensor(parts_of(sizes), layout=torch.jagged)


def transposed(sizes: Sequence[tuple[int, ...]] = SIZES) -> Tensor:
    return jagged(sizes).transpose(1, 2)


def holes(sizes: Sequence[tuple[int, ...]] = SIZES) -> Tensor:
    lengths = torch.tensor([size[0] for size in sizes])
    whole = torch.randn(len(sizes), 7, *sizes[0][1:], generator=torch.Generator().manual_seed(0))
    return torch.nested.narrow(whole, 1, torch.tensor([1, 0, 2]), lengths, layout=torch.jagged)


def strided(sizes: Sequence[tuple[int, ...]] = SIZES) -> Tensor:
    return torch.nested.nested_tensor(parts_of(sizes))


LAYOUTS = [jagged, transposed, holes, strided]
every_layout = pytest.mark.parametrize("make", LAYOUTS)


def ragged_everywhere() -> Tensor:
    return strided([(3, 4, 8), (5, 2, 6), (1, 1, 1)])


def same(x: Tensor, y: Tensor) -> None:
    assert (x.is_nested, x.layout) == (y.is_nested, y.layout)
    for a, b in zip(x.unbind(), y.unbind(), strict=True):
        oracle.assert_same(a, b)


@pytest.mark.parametrize("make", [*LAYOUTS, ragged_everywhere])
def test_one_key(make: Callable[[], Tensor]) -> None:
    """The components' elements are one after the other, whatever lies where in memory."""
    x = make()
    y = thinned.Dropout(0.5)(x, key=KEY)
    packed = torch.cat([part.flatten() for part in x.unbind()])
    oracle.assert_same(torch.cat([part.flatten() for part in y.unbind()]), dropout(packed, 0.5, key=KEY))


def test_values_are_those_of_the_packed_tensor() -> None:
    x = jagged()
    y = dropout(x, 0.5, key=KEY)
    oracle.assert_same(y.values(), dropout(x.values(), 0.5, key=KEY))
    y = dropout(x, 0.5, key=KEY, broadcast_dims=(3, -2))
    oracle.assert_same(y.values(), dropout(x.values(), 0.5, key=KEY, broadcast_dims=(1, 2)))


@pytest.mark.parametrize("make", [*LAYOUTS, ragged_everywhere])
def test_a_key_for_each_row(make: Callable[[], Tensor]) -> None:
    x = make()
    y = dropout(x, 0.5, key=KEYS)
    for i, id in enumerate(IDS.tolist()):  # noqa: A001
        oracle.assert_same(y.unbind()[i], dropout(x.unbind()[i], 0.5, key=KEY.fold(id)))


@every_layout
def test_a_key_is_drawn(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    drawn = dropout(make(), 0.5)
    torch.manual_seed(0)
    same(drawn, dropout(make(), 0.5, key=Key(int(torch.empty((), dtype=torch.int64).random_()))))


@pytest.mark.parametrize("make", [jagged, transposed, holes])
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "rows"])
def test_all_but_the_values_stays(make: Callable[[], Tensor], key: Key) -> None:
    x = make()
    longest = x._get_max_seqlen()  # type: ignore[attr-defined]
    y = dropout(x, 0.5, key=key)
    assert y.shape == x.shape  # with the same symbol for the ragged size, so that they can be added
    assert (x + y).shape == x.shape
    assert y.offsets() is x.offsets()
    assert y.lengths() is x.lengths()
    assert y._maybe_max_seqlen == longest == 5  # type: ignore[attr-defined]
    assert y._maybe_min_seqlen == x._maybe_min_seqlen  # type: ignore[attr-defined]


def derivatives(function: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second derivative of the sum of the cubes."""

    def total(y: Tensor) -> Tensor:
        parts = y.unbind() if y.layout is torch.strided else [y.values()]
        return torch.stack([part.sum() for part in parts]).sum()

    y = function(x)
    (first,) = torch.autograd.grad(total(y * y * y), x, create_graph=True)
    return first, torch.autograd.grad(total(first), x)[0]


@every_layout
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "rows"])
@pytest.mark.parametrize("broadcast_dims", [(), (1, 2, 3)])
def test_derivatives(make: Callable[[], Tensor], key: Key, broadcast_dims: tuple[int, ...]) -> None:
    x = make().requires_grad_()
    first, second = derivatives(partial(dropout, p=0.5, key=key, broadcast_dims=broadcast_dims), x)
    for a, b, part, kept in zip(
        first.unbind(),
        second.unbind(),
        x.detach().unbind(),
        dropout(x.detach() * 0 + 1, 0.5, key=key, broadcast_dims=broadcast_dims).unbind(),
        strict=True,
    ):
        torch.testing.assert_close(a, 3 * part.square() * kept**3)
        torch.testing.assert_close(b, 6 * part * kept**3)


@every_layout
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "rows"])
def test_in_place(make: Callable[[], Tensor], key: Key) -> None:
    x = make()
    expected = dropout(x, 0.5, key=key)
    between = x.values().clone() if make is holes else None
    assert dropout(x, 0.5, inplace=True, key=key) is x
    same(x, expected)
    if between is not None:
        offsets, lengths = x.offsets().tolist(), x.lengths().tolist()
        for start, length, end in zip(offsets, lengths, offsets[1:], strict=False):
            oracle.assert_same(x.values()[start + length : end], between[start + length : end])
    gradients = []
    for inplace in (True, False):
        leaf = make().requires_grad_()
        y = dropout(leaf * 2, 0.5, inplace=inplace, key=key)
        torch.stack([part.square().sum() for part in y.unbind()]).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    same(*gradients)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        dropout(x.detach().requires_grad_(), 0.5, inplace=True, key=key)
    same(x, expected)


LAYERS: dict[str, Layer] = {
    "dropout": dropout,
    "shared": partial(dropout, broadcast_dims=(2,)),
    "alpha": partial(F.alpha_dropout, training=True),
    "feature_alpha": partial(F.feature_alpha_dropout, training=True),
    "dropout2d": F.dropout2d,
    "drop_path": partial(F.drop_path, drop_prob=0.5, training=True),
    "unscaled path": partial(F.drop_path, drop_prob=0.5, training=True, scale_by_keep=False),
    "row": partial(F.stochastic_depth, p=0.5, mode="row"),
    "batch": partial(F.stochastic_depth, p=0.5, mode="batch"),
    "locked": partial(F.locked_dropout, batch_first=True),
    "token": F.token_dropout,
    "head": partial(F.drop_head, normalize="expected"),
    "gaussian": F.gaussian_dropout,
    "variational": partial(F.variational_dropout, log_alpha=torch.tensor([-1.0])),
    "concrete": partial(F.concrete_dropout, p_logit=torch.tensor(0.5)),
    "zoneout": lambda x, key: F.zoneout(x, x * 3, key=key),
    "connect": F.drop_connect,
}
NOISE = ("gaussian", "variational", "concrete", "zoneout")
RIGHT = [(name, make) for name in LAYERS for make in LAYOUTS if not (name in NOISE and make is holes)]


@pytest.mark.parametrize(("name", "make"), RIGHT)
def test_each_layer_under_a_key_for_each_row(name: str, make: Callable[[], Tensor]) -> None:
    x, layer = make(), LAYERS[name]
    y = layer(x, key=KEYS)
    if name == "connect":
        return  # which has one key, of a weight
    for i, part in enumerate(x.unbind()):
        alone = layer(part.unsqueeze(0), key=Key.from_bits(KEYS.bits[i : i + 1]))
        oracle.assert_same(y.unbind()[i], alone.squeeze(0))


@pytest.mark.parametrize(("name", "make"), RIGHT)
def test_components_of_one_size_are_a_dense_batch(name: str, make: Callable[..., Tensor]) -> None:
    x, layer = make(EQUAL), LAYERS[name]
    dense = torch.stack(x.unbind())
    oracle.assert_same(torch.stack(layer(x, key=KEY).unbind()), layer(dense, key=KEY))


def test_channels() -> None:
    """A jagged (N, C, L) and (N, C, L, H, W), for the layers that take no other number of dimensions."""
    sizes = [(3, 8), (5, 8), (2, 8)]
    for x in (jagged(sizes).transpose(1, 2), strided(sizes).transpose(1, 2)):
        y = F.dropout1d(x, 0.5, key=KEYS)
        for i, part in enumerate(x.unbind()):
            oracle.assert_same(y.unbind()[i], F.dropout1d(part, 0.5, key=KEY.fold(IDS[i].item())))
    x = jagged([(*size, 2) for size in SIZES]).transpose(1, 2)
    y = F.dropout3d(x, 0.5, key=KEYS)
    for i, part in enumerate(x.unbind()):
        keys = Key.from_bits(KEYS.bits[i : i + 1])
        oracle.assert_same(y.unbind()[i], F.dropout3d(part.unsqueeze(0), 0.5, key=keys).squeeze(0))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "rows"])
def test_embedding(layout: torch.layout, key: Key) -> None:
    words = [torch.tensor([1, 2, 2]), torch.tensor([1, 5]), torch.tensor([0, 1, 4, 1])]
    x, weight = torch.nested.nested_tensor(words, layout=layout), torch.randn(6, 4)
    y = F.embedding_dropout(x, weight, 0.5, key=key)
    for i, part in enumerate(words):
        own = KEY.fold(IDS[i].item()) if key is KEYS else KEY
        oracle.assert_same(y.unbind()[i], F.embedding_dropout(part, weight, 0.5, key=own))


REFUSED: dict[str, Layer] = {
    "locked_dropout with batch_first=False": F.locked_dropout,
    "dropout of (C, *)": F.dropout3d,
    "patch_dropout": F.patch_dropout,
    "token_dropout": partial(F.token_dropout, num_prefix_tokens=1),
    "drop_head": F.drop_head,
    "drop_key": F.drop_key,
    "drop_block2d": partial(F.drop_block2d, p=0.5, block_size=2),
    "targeted_dropout": F.targeted_dropout,
    "broadcast_dims (0,)": partial(dropout, broadcast_dims=(0,)),
    "gaussian_dropout with broadcast_dims (1,)": partial(F.gaussian_dropout, broadcast_dims=(1,)),
    "variational_dropout with log_alpha of shape (8,)": partial(
        F.variational_dropout, log_alpha=torch.zeros(8)
    ),
    "concrete_dropout with p_logit of shape () and broadcast_dims (1,)": partial(
        F.concrete_dropout, p_logit=torch.tensor(0.5), broadcast_dims=(1,)
    ),
}


def shape_of(x: Tensor) -> str:
    if x.layout is torch.strided:
        return "(3, '*', 4, 8)"
    return str(tuple(x.shape))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("make", [jagged, strided])
@pytest.mark.filterwarnings("ignore:dropout3d")
def test_refused_in_words(name: str, make: Callable[[], Tensor]) -> None:
    x = make()
    with pytest.raises(NotImplementedError) as caught:
        REFUSED[name](x, key=KEY)
    got = f"{name} got a nested tensor with layout={x.layout} of shape {shape_of(x)}; accepted: "
    assert str(caught.value).startswith(got)
    assert REFUSED[name](x, training=False) is x


@pytest.mark.parametrize("make", [jagged, strided])
def test_refused_whatever_is_dropped(make: Callable[[], Tensor]) -> None:
    x, target = make(), torch.zeros(3, dtype=torch.long)
    with pytest.raises(NotImplementedError, match=r"multi_sample_dropout got a nested tensor with layout"):
        F.multi_sample_dropout(x, training=False)
    with pytest.raises(NotImplementedError, match=r"r_drop_loss got a nested tensor with layout"):
        F.r_drop_loss(x, x, target)
    with pytest.raises(NotImplementedError, match=r"VariationalLSTM got a nested tensor with layout"):
        thinned.VariationalLSTM(8, 8)(x)


@pytest.mark.parametrize("name", NOISE)
def test_noise_with_holes_is_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="accepted: a jagged one without holes"):
        LAYERS[name](holes(), key=KEY)


@every_layout
def test_arguments(make: Callable[[], Tensor]) -> None:
    x = make()
    with pytest.raises(IndexError, match=r"names dimension 4, but for shape \(3, .*\) dimensions are in -4"):
        dropout(x, 0.5, broadcast_dims=(4,))
    with pytest.raises(RuntimeError, match=r"keys of shape \(2,\) do not fit a tensor of shape \(3, "):
        dropout(x, 0.5, key=KEY.fold(torch.arange(2)))
    with pytest.raises(RuntimeError, match=r"previous state like its input, of shape \(3, "):
        F.zoneout(x, make() if make is not strided else strided(SIZES[::-1]))


def test_dimension_0_can_be_shared_with_the_ragged_one() -> None:
    x = jagged()
    y = dropout(x, 0.5, key=KEY, broadcast_dims=(0, 1))
    for part, whole in zip(y.unbind(), x.unbind(), strict=True):
        oracle.assert_same(part, dropout(whole, 0.5, key=KEY, broadcast_dims=(0,)))


@every_layout
@pytest.mark.parametrize("nothing", [{"p": 0.0}, {"training": False}])
def test_nothing_to_drop(make: Callable[[], Tensor], nothing: dict[str, float | bool]) -> None:
    x, before = make(), torch.get_rng_state()
    for layer in (dropout, F.alpha_dropout, F.dropout2d, F.drop_key, F.locked_dropout, F.token_dropout):
        assert layer(x, **{"training": True} | nothing) is x  # type: ignore[operator]
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_special_numbers(dtype: torch.dtype, layout: torch.layout) -> None:
    parts = [oracle.specials(size, dtype) for size in [(40, 3), (0, 3), (77, 3)]]
    x = torch.nested.nested_tensor(parts, layout=layout)
    for p in (0.3, 1.0):
        y = dropout(x, p, key=KEYS)
        for i, part in enumerate(parts):
            oracle.assert_same(y.unbind()[i], oracle.dropout(part, KEY.fold(IDS[i].item()).bits, p, ()))
        packed = oracle.dropout(torch.cat(parts), KEY.bits, p, ())
        oracle.assert_same(torch.cat(dropout(x, p, key=KEY).unbind()), packed)


def test_no_components() -> None:
    assert dropout(torch.nested.nested_tensor([]), 0.5).size(0) == 0
    empty = torch.nested.nested_tensor_from_jagged(torch.ones(0, 8), torch.zeros(1, dtype=torch.int64))
    assert dropout(empty, 0.5, key=KEY.fold(torch.arange(0))).shape == empty.shape


COMPILED: dict[str, Layer] = {
    "dropout": dropout,
    "between": lambda x, key: dropout(x * 2, 0.5, key=key) * 3,
    "in place": lambda x, key: dropout(x * 2, 0.5, inplace=True, key=key),
    "drop_path": partial(F.drop_path, drop_prob=0.5, training=True),
}


def compare(function: Layer, make: Callable[[], Tensor], key: Key | None, backend: str) -> None:
    def run(function: Layer) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = make().detach().requires_grad_()
        y = function(x, key=key)
        assert y.shape == x.shape
        (gradient,) = torch.autograd.grad(y.values().square().sum(), x)
        return y.detach(), gradient

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for a, b in zip(run(compiled), run(function), strict=True):
        same(a, b)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("make", [jagged, transposed])
@pytest.mark.parametrize("key", [None, KEY, KEYS], ids=["drawn", "one", "rows"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(backend: str, make: Callable[[], Tensor], key: Key | None) -> None:
    for name in COMPILED if backend == "aot_eager" else ["between"]:
        compare(COMPILED[name], make, key, backend)
    if (backend, make, key) == ("aot_eager", jagged, KEY):
        for name in ("gaussian", "zoneout"):
            compare(LAYERS[name], make, key, backend)


@pytest.mark.usefixtures("fresh_compiler")
def test_holes_compiled() -> None:
    """Without gradients: torch compiles no backward pass of a tensor with holes, not even ``x * 2``'s."""
    x = holes().detach()
    for key in (KEY, KEYS):
        compiled = torch.compile(partial(dropout, key=key), backend="aot_eager", fullgraph=True)
        same(compiled(x), dropout(x, key=key))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.path = thinned.Dropout(0.5), thinned.DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.dropout(x))


@every_layout
def test_addressed_samples(make: Callable[[], Tensor]) -> None:
    model, x = Block(), make()
    with thinned.address(model, seed=7, step=3, samples=IDS):
        y = model(x)
    for i, part in enumerate(x.unbind()):
        with thinned.address(model, seed=7, step=3, samples=IDS[i : i + 1]):
            oracle.assert_same(y.unbind()[i], model(part.unsqueeze(0)).squeeze(0))
    with (
        pytest.raises(RuntimeError, match=r"\(3, .*\), whose dimension 0 \(sample_dim\) is no multiple"),
        thinned.address(model, seed=7, step=3, samples=[1, 2]),
    ):
        model(x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.usefixtures("fresh_compiler")
def test_addressed_samples_compiled(backend: str) -> None:
    model, x = Block(), jagged().detach()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    address = partial(thinned.address, model, seed=7, step=3, samples=IDS)
    with address():
        expected = model(x)
    with address():
        same(compiled(x), expected)
