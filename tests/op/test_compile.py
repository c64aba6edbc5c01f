"""torch.compile: one graph, the results of eager code bit for bit, and torch's own seeds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import oracle
import thinned
from thinned import Key
from thinned.functional import dropout

pytestmark = pytest.mark.usefixtures("fresh_compiler")

KEY = Key(7)
ROWS = KEY.fold(torch.arange(6))
INPUTS = {
    "float32": torch.randn(6, 7, 8),
    "bfloat16": torch.randn(6, 7, 8).bfloat16(),
    "complex64": torch.randn(6, 7, 8, dtype=torch.complex64),
    "permuted": torch.randn(7, 8, 6).permute(2, 0, 1),
    "channels_last": torch.randn(6, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "every other": torch.randn(6, 16)[:, ::2],
    "expanded": torch.randn(6, 1).expand(6, 8),
    "0-d": torch.randn(()),
    "empty": torch.randn(6, 0),
}


def compiled(
    function: Callable[..., Tensor], backend: str = "aot_eager", **options: bool
) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)  # type: ignore[call-overload,no-any-return]


def forward_and_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    (grad,) = torch.autograd.grad(y, leaf, torch.full_like(y, 3.0))
    return y.detach(), grad


def assert_agree(function: Callable[[Tensor], Tensor], x: Tensor, backend: str = "aot_eager") -> None:
    """Value, gradient and their memory formats, when both draw from the same seed."""
    results = []
    for run in (function, compiled(function, backend)):
        torch.manual_seed(3)
        results.append(forward_and_backward(run, x))
    for eager, fast in zip(*results, strict=True):
        oracle.assert_same(fast, eager)
        assert fast.stride() == eager.stride()


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("key", [KEY, None], ids=["key", "drawn"])
def test_layouts_and_types(x: str, key: Key | None) -> None:
    assert_agree(lambda x: dropout(x, 0.3, key=key), INPUTS[x])


def written(x: Tensor, key: Key | None = KEY) -> Tensor:
    y = x.abs()
    dropout(y, 0.3, inplace=True, key=key)
    return y * 2


LAYER, NONE, ALL = thinned.Dropout(0.5), thinned.Dropout(0.0), thinned.Dropout(1.0)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a key for each row": lambda x: dropout(x, 0.3, key=ROWS),
    "shared dimensions": lambda x: dropout(x, 0.3, key=KEY, broadcast_dims=(1, -1)),
    "p = 0 amid others": lambda x: NONE(x * 2).abs() - NONE(x),
    "p = 1 amid others": lambda x: ALL(x * 2).abs() - ALL(x),
    "three masks": lambda x: torch.stack([LAYER(x), LAYER(x), LAYER(x * 2)]),
    "in place": written,
    "in place, drawn": lambda x: written(x, None),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    assert_agree(FUNCTIONS[name], INPUTS["float32"])
    if "in place" not in name and "p = 0" not in name:  # PyTorch 2.11 gives that one other strides
        assert_agree(FUNCTIONS[name], INPUTS["permuted"])


def test_training_and_evaluation() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8), thinned.Dropout(0.5))
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 8)
    for training in (True, False, True):
        layer.train(training)
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        assert fast(x).equal(y)


def test_inplace_on_an_input() -> None:
    def f(x: Tensor) -> Tensor:
        return dropout(x, 0.3, inplace=True, key=KEY)

    x = torch.randn(50)
    expected = dropout(x, 0.3, key=KEY)
    y = compiled(f)(x)
    oracle.assert_same(x, expected)
    assert y.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("function", [lambda x: dropout(x.abs(), 0.3, key=KEY) * 2, written])
def test_inductor(function: Callable[[Tensor], Tensor]) -> None:
    assert_agree(function, INPUTS["permuted"], "inductor")


def test_inductor_draws_what_eager_draws() -> None:
    """Two draws of one size are two masks, and the backward pass draws no third."""
    assert_agree(lambda x: torch.stack([LAYER(x), LAYER(x)]) * 2, torch.ones(20, 30), "inductor")
    first, second = compiled(lambda x: torch.stack([LAYER(x), LAYER(x)]), "inductor")(torch.ones(20, 30))
    assert not first.equal(second)


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "drawn"])
def test_dynamic_shapes(key: Key | None) -> None:
    def f(x: Tensor) -> Tensor:
        return dropout(x.permute(1, 0, 2), 0.3, key=key, broadcast_dims=(2,))

    fast = compiled(f, dynamic=True)
    fast(torch.randn(4, 5, 6))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((7, 5, 6), (9, 11, 13), (100, 3, 50)):
            x = torch.randn(shape)
            torch.manual_seed(3)
            y = f(x)
            torch.manual_seed(3)
            oracle.assert_same(fast(x), y)


def test_another_p_is_the_other_p() -> None:
    fast = compiled(lambda x, p: dropout(x, p, key=KEY))
    x = torch.randn(500)
    for p in (0.1, 0.2, 0.3, 0.45, 1.0, 0.0):
        assert fast(x, p).equal(dropout(x, p, key=KEY))


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: dropout(x, 1.5), "between 0 and 1"),
        (lambda x: dropout(x.long(), 0.5), "floating-point"),
        (lambda x: dropout(x, 0.5, key=KEY, broadcast_dims=(5,)), "names dimension 5"),
    ],
    ids=["p", "dtype", "broadcast_dims"],
)
def test_errors_reach_the_caller(call: Callable[[Tensor], Tensor], error: str) -> None:
    with pytest.raises(Exception, match=error):
        compiled(call)(torch.ones(3))


def test_checkpoint() -> None:
    linear = torch.nn.Linear(8, 8)
    layer = torch.nn.Sequential(linear, thinned.Dropout(0.5), torch.nn.Tanh())

    def f(x: Tensor) -> Tensor:
        y: Tensor = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return y

    x = torch.randn(4, 8)
    fast = compiled(f)
    leaf = x.clone().requires_grad_()
    y = fast(leaf)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    kept = (y != 0).to(y.dtype)
    expected = (kept * 2 * (1 - y.square())) @ linear.weight
    torch.testing.assert_close(grad, expected)


def test_vmap_inside() -> None:
    def f(x: Tensor, bits: Tensor) -> Tensor:
        return torch.vmap(lambda x, bits: dropout(x, 0.4, key=Key.from_bits(bits)))(x, bits)

    x = torch.randn(6, 20)
    oracle.assert_same(compiled(f)(x, ROWS.bits), f(x, ROWS.bits))


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_drawn_in_a_map(randomness: str) -> None:
    """The mapped calls share a mask or do not, and have the eager ones."""

    def f(x: Tensor) -> Tensor:
        return torch.vmap(lambda x: dropout(x, 0.5), randomness=randomness)(x)

    x = torch.ones(5, 40)
    torch.manual_seed(3)
    fast = compiled(f)(x)
    torch.manual_seed(3)
    oracle.assert_same(fast, f(x))
    assert len({tuple(row) for row in fast.tolist()}) == (1 if randomness == "same" else 5)


def test_drawn_in_a_map_that_allows_nothing_random() -> None:
    with pytest.raises(Exception, match="randomness error mode"):
        compiled(lambda x: torch.vmap(lambda x: dropout(x, 0.5))(x))(torch.ones(5, 40))


def test_grad_inside() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: dropout(x, 0.4, key=KEY).square().sum())(x)

    x = torch.randn(6, 20)
    oracle.assert_same(compiled(f)(x), f(x))


def test_no_graph_break_of_a_whole_model() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), thinned.Dropout(0.2), torch.nn.Flatten(), thinned.Dropout(0.5, inplace=True)
    )
    explained = torch._dynamo.explain(model)(torch.randn(2, 3, 8, 8))
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0
