"""All measurements, with what is promised of each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

import thinned
from benchmarks.case import MULTIPLY, Bound, Case, Work
from benchmarks.dtensor import dtensor_cases
from benchmarks.fused import fused_cases
from benchmarks.layers import layer_cases
from benchmarks.montecarlo import montecarlo_cases
from benchmarks.peers import backward, elsewhere, layers
from benchmarks.residual import residual_cases
from benchmarks.tokens import tokens_cases
from thinned.backends import _native

__all__ = ["cases"]

# At p: how many times a multiply, on AVX-512 and on AVX2, and how many times faster than nn.Dropout,
# forward and with backward.
PROMISED = {0.5: (1.2, 2, 60, 40), 0.1: (2, 3, 25, 20)}
THREADS = (1, 2)
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (100_000, 1_000_000)
HUGE = 32_000_000


def cases() -> Iterator[Case]:
    """Every measurement, in the order in which they are shown."""
    for threads in THREADS:
        yield from _contiguous(threads)
        yield from _huge(threads)
        yield from _layouts(threads)
        yield from _rows(threads)
        yield from layer_cases(threads)
        yield from fused_cases(threads)
        yield from residual_cases(threads)
    yield from _small()
    yield from _addressed()
    yield from _compiled()
    yield from _compiling()
    yield from _elsewhere()
    yield from dtensor_cases()
    yield from montecarlo_cases()
    yield from tokens_cases()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _contiguous(threads: int) -> Iterator[Case]:
    widest = _native.supported_isas()[-1]
    for isa, dtype, elements, p in product(reversed(_native.supported_isas()), DTYPES, SIZES, PROMISED):
        wide, narrow, faster, faster_backward = PROMISED[p]
        setting = f"{_name(dtype)}, {elements:,} elements, p = {p}"
        case = partial(Case, threads=threads, isa=isa, elements=elements)
        x = partial(torch.ones, elements, dtype=dtype)
        limits = {"avx512": (Bound(MULTIPLY, wide),), "avx2": (Bound(MULTIPLY, narrow),)}
        yield case("forward", setting, partial(_beside_multiply, x, p), limits.get(isa, ()))
        if isa == widest:
            bound = Bound("nn.Dropout", 1 / faster)
            yield case("forward, peers", setting, partial(_beside_peers, x, p), (bound,))
            bound = Bound("nn.Dropout", 1 / faster_backward)
            yield case("forward + backward", setting, partial(_forward_backward, x, p), (bound,))


def _beside_multiply(x: Callable[[], Tensor], p: float) -> Work:
    # Nothing else in the round: what peers allocate changes what the allocator costs both.
    tensor = x()
    return {MULTIPLY: lambda: tensor * 2, "thinned": partial(thinned.Dropout(p), tensor)}


def _beside_peers(x: Callable[[], Tensor], p: float) -> Work:
    tensor = x()
    return {name: partial(layer, tensor) for name, layer in layers(p).items()}


def _forward_backward(x: Callable[[], Tensor], p: float) -> Work:
    tensor = x().requires_grad_()
    return {MULTIPLY: backward(lambda x: x * 2, tensor)} | {
        name: backward(layer, tensor) for name, layer in layers(p).items()
    }


def _huge(threads: int) -> Iterator[Case]:
    def make() -> Work:
        x = torch.ones(HUGE)
        return {
            MULTIPLY: lambda: x * 2,
            "thinned": partial(thinned.Dropout(0.5), x),
            "thinned, in place": partial(thinned.Dropout(0.5, inplace=True), x),
        }

    yield Case(
        "forward",
        f"float32, {HUGE:,} elements, p = 0.5",
        make,
        (Bound(MULTIPLY, 1.15), Bound("thinned", 1, subject="thinned, in place")),
        threads=threads,
        rounds=7,
        elements=HUGE,
    )


def _layouts(threads: int) -> Iterator[Case]:
    x = torch.ones(16, 64, 56, 56)
    layouts = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "permuted (3, 1, 0, 2)": x.permute(3, 1, 0, 2),
        "transposed": x.transpose(0, 3),
    }
    for (name, permuted), p in product(layouts.items(), PROMISED):
        layer = thinned.Dropout(p)
        yield Case(
            "layout",
            f"{name}, float32, {x.numel():,} elements, p = {p}",
            partial(dict, {"contiguous": partial(layer, x), "thinned": partial(layer, permuted)}),
            (Bound("contiguous", 3),),
            threads=threads,
            elements=x.numel(),
        )


def _rows(threads: int) -> Iterator[Case]:
    def make() -> Work:
        x, keys = torch.ones(200, 5_000), thinned.Key(7).fold(torch.arange(200))
        ours, torchs = thinned.Dropout(0.5), nn.Dropout(0.5)
        return {"thinned": lambda: ours(x, key=keys), "nn.Dropout": lambda: torchs(x)}

    yield Case(
        "forward, peers",
        "float32, 200 x 5,000 elements, p = 0.5, a key for each row",
        make,
        (Bound("nn.Dropout", 1),),
        threads=threads,
        elements=1_000_000,
    )


def _small() -> Iterator[Case]:
    x = torch.ones(256)
    leaf = torch.ones(256, requires_grad=True)
    both: dict[str, Callable[[], Work]] = {
        "forward": lambda: {name: partial(layer, x) for name, layer in layers(0.5).items()},
        "forward + backward": lambda: {name: backward(layer, leaf) for name, layer in layers(0.5).items()},
    }
    for group, make in both.items():
        yield Case(
            group, "float32, 256 elements, p = 0.5", make, (Bound("nn.Dropout", 1),), rounds=41, elements=256
        )


def _compiled() -> Iterator[Case]:
    elements = 1_000_000

    def make(p: float) -> Work:
        x = torch.ones(elements)
        torch.compiler.reset()
        implementations: Sequence[tuple[str, nn.Module]] = (
            ("thinned", thinned.Dropout(p)),
            ("nn.Dropout", nn.Dropout(p)),
        )
        calls = {name: partial(torch.compile(layer, fullgraph=True), x) for name, layer in implementations}
        for call in calls.values():
            call()
        return calls

    for p in PROMISED:
        yield Case(
            "compiled",
            f"float32, {elements:,} elements, p = {p}",
            partial(make, p),
            (Bound("nn.Dropout", 1 / 20),),
            elements=elements,
        )


def _compiling() -> Iterator[Case]:
    """The time to compile two layers of BERT and their backward pass, within an address and without."""

    def make() -> Work:
        try:
            import torchvision.ops  # noqa: F401
        except Exception:  # its compiled part does not fit the installed torch, and transformers asks for it
            sys.modules["torchvision"] = None  # type: ignore[assignment]
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64
        )
        model = thinned.convert(BertForSequenceClassification(config).train())
        words = torch.arange(24).reshape(2, 12)

        def compile_and_run() -> None:
            torch.compiler.reset()
            fast = torch.compile(model, fullgraph=True)
            fast(words).logits.sum().backward()  # type: ignore[no-untyped-call]

        def within() -> None:
            with thinned.address(model, seed=7, step=3):
                compile_and_run()

        return {"without": compile_and_run, "thinned": within}

    yield Case("compile time", "BERT of 2 layers within an address", make, (Bound("without", 2),), rounds=3)


def _addressed() -> Iterator[Case]:
    """The cost of a key for each site of a step: divide by the sites, subtract the time without."""
    sites = 20
    model = nn.Sequential(*(thinned.Dropout(0.5) for _ in range(sites)))
    x, ids = torch.ones(4, 16), torch.arange(4)

    def call(samples: Tensor | None = None) -> Callable[[], object]:
        def addressed() -> object:
            with thinned.address(model, seed=7, step=3, samples=samples):
                return model(x)

        return addressed

    yield Case(
        "address",
        f"{sites} sites; ns a site",
        lambda: {"without": partial(model, x), "thinned": call(), "thinned, samples": call(ids)},
        (),
        elements=sites,
    )


def _elsewhere() -> Iterator[Case]:
    for elements, p in product(SIZES, PROMISED):

        def make(elements: int = elements, p: float = p) -> Work:
            return {"thinned": partial(thinned.Dropout(p), torch.ones(elements)), **elsewhere(elements, p)}

        yield Case(
            "other libraries",
            f"float32, {elements:,} elements, p = {p}",
            make,
            (),
            threads=2,
            elements=elements,
        )
