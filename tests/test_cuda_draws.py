"""Keys for CUDA tensors: the host's numbers are those of ``random_()``, and nothing waits for the device."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import thinned
from backend_under_test import on_gpu
from thinned import backends, cuda_draws, devices, keys, spec
from thinned.backends import portable
from thinned.compare.implementation import first
from thinned.compare.layers import ENTRIES, Entry
from thinned.functional import dropout
from thinned.layers import layer_drop
from thinned.philox import signed64

CUDA = torch.device("cuda", 0)
KEY = thinned.Key(7)


def random_(seed: int, offset: int) -> int:
    """The number of the kernel, by the specification's Philox."""
    counter = offset // 4
    words = spec.philox4x32((counter % 2**32, counter >> 32, 0, 0), (seed % 2**32, seed >> 32), 10)
    return (int(words[0]) << 32 | int(words[1])) % 2**63


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 4, 2**34 - 4, 2**34, 2**63])
def test_number(seed: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cuda_draws.number(seed, offset) == random_(seed, offset)
    monkeypatch.setattr(cuda_draws, "_philox", cuda_draws._philox_in_python)
    assert cuda_draws.number(seed, offset) == random_(seed, offset)


def test_number_of_random123() -> None:
    assert cuda_draws.number(0, 0) == 0x6627E8D5_E169C58D


@pytest.mark.parametrize(("seed", "offset", "printed"), [(0, 0, 0.3990), (0, 4, 0.9722), (42, 0, 0.6130)])
def test_number_is_what_gpus_print(seed: int, offset: int, printed: float) -> None:
    """The first element of ``torch.rand(4, device="cuda")``, called once or twice after ``manual_seed``.

    It is word 0 divided by 2**32, and the upper half of a key is word 0 without its highest bit.
    """
    half = (cuda_draws.number(seed, offset) >> 32) / 2**32
    assert half == pytest.approx(printed % 0.5, abs=5e-5)


class State:
    seed, offset = 0, 0


class Generator:
    """A CUDA generator of PyTorch 2.11 to 2.14."""

    def __init__(self, state: State | None = None) -> None:
        self.state = state or State()
        self.restarts_cudnn = False

    def manual_seed(self, seed: int) -> Generator:
        self.state.seed, self.state.offset = seed, 0
        return self

    def initial_seed(self) -> int:
        return self.state.seed

    def get_offset(self) -> int:
        return self.state.offset

    def set_offset(self, offset: int) -> None:
        self.state.offset, self.restarts_cudnn = offset, True

    def graphsafe_get_state(self) -> Generator:
        return Generator(self.state)


class NewGenerator(Generator):
    """That of PyTorch 2.15."""

    def philox_state(self, increment: int) -> tuple[Tensor, Tensor, Tensor]:
        seed, offset = signed64(self.state.seed), self.state.offset
        self.state.offset += increment
        return torch.tensor([seed]), torch.tensor([offset]), torch.tensor([0])

    graphsafe_get_state = None  # type: ignore[assignment]


class Device:
    """The names of torch that :mod:`thinned.cuda_draws` uses, for a GPU that draws by ``rule``."""

    float32, int64, device = torch.float32, torch.int64, torch.device

    def __init__(self, generator: type[Generator] = Generator) -> None:
        self.Generator = lambda _: generator()
        self.default = generator()
        self.rule, self.advances, self.capturing, self.compared, self.by_kernel = random_, 4, False, 0, 0
        self.current = 0
        self.cuda = SimpleNamespace(
            default_generators=(self.default,),
            current_device=lambda: self.current,
            is_current_stream_capturing=lambda: self.capturing and self.current == 0,
            device=self.on,
            Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        )

    @contextmanager
    def on(self, device: torch.device | int) -> Iterator[None]:
        before, self.current = self.current, device if isinstance(device, int) else device.index
        yield
        self.current = before

    def kernel(self, generator: Generator) -> int:
        number = self.rule(generator.state.seed, generator.state.offset)
        generator.state.offset += self.advances
        return number

    def empty(self, *_: Any, **__: Any) -> Any:
        def draw(generator: Generator) -> Tensor:
            assert not self.capturing
            self.compared += 1
            return torch.tensor(self.kernel(generator))

        return SimpleNamespace(random_=draw)

    def draw(self, device: torch.device) -> Tensor:
        """In place of :func:`thinned.keys.draw`."""
        assert device == CUDA
        self.by_kernel += 1
        return torch.tensor(self.kernel(self.default))

    def drawn(self, count: int = 3) -> list[int]:
        return [int(cuda_draws.draw(CUDA)) for _ in range(count)]


@pytest.fixture(params=[Generator, NewGenerator])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device(request.param)
    monkeypatch.setattr(cuda_draws, "torch", device)
    monkeypatch.setattr(devices, "torch", device)
    monkeypatch.setattr(keys, "draw", device.draw)
    cuda_draws._is_known.cache_clear()
    yield device
    cuda_draws._is_known.cache_clear()


def test_the_host_draws_what_the_kernel_draws(device: Device) -> None:
    device.default.manual_seed(2**63 + 3).set_offset(8)
    device.default.restarts_cudnn = False
    drawn = device.drawn()
    assert drawn == [random_(2**63 + 3, offset) for offset in (8, 12, 16)]
    assert (device.default.state.offset, device.by_kernel, device.compared) == (20, 0, 1)
    assert not device.default.restarts_cudnn


def test_host_and_kernel_share_one_sequence(device: Device) -> None:
    expected = [random_(0, 4 * i) for i in range(6)]
    drawn = device.drawn(2)
    device.capturing = True
    drawn += device.drawn(2)
    device.capturing = False
    assert drawn + device.drawn(2) == expected
    assert device.by_kernel == 2


def test_a_capture_compares_nothing(device: Device) -> None:
    device.capturing = True
    assert isinstance(cuda_draws.draw(CUDA), Tensor)
    device.current = 1  # the stream that captures is not one of the current device
    assert isinstance(cuda_draws.draw(CUDA), Tensor)
    assert (device.compared, device.by_kernel, device.current) == (0, 2, 1)


@pytest.mark.parametrize("differs", ["number", "advance", "raises", "lacks a method"])
def test_another_rule_draws_by_kernel(differs: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    if differs == "number":
        monkeypatch.setattr(device, "rule", lambda seed, offset: random_(seed, offset) ^ 1)
    elif differs == "advance":
        monkeypatch.setattr(device, "advances", 8)
    elif differs == "raises":
        monkeypatch.setattr(device.cuda, "Event", lambda: 1 / 0)
    else:
        monkeypatch.delattr(Generator, "set_offset")
    expected = [device.rule(0, device.advances * i) for i in range(3)]
    assert device.drawn() == expected
    assert device.by_kernel == 3


def test_other_devices_draw_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "draw", lambda device: device)
    assert cuda_draws.draw(torch.device("xpu", 0)) == torch.device("xpu", 0)


def test_a_draw_holds_a_lock(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the read of the offset and the write; PyTorch 2.15 does both at once."""
    device.drawn(1)
    held = []

    def set_offset(self: Generator, offset: int) -> None:
        held.append(cuda_draws._lock.locked())
        self.state.offset = offset

    monkeypatch.setattr(Generator, "set_offset", set_offset)
    device.drawn(2)
    assert held == ([] if isinstance(device.default, NewGenerator) else [True, True])


@pytest.mark.parametrize(
    ("place", "capturing", "blocks"),
    [
        ("cuda:0", False, False),
        ("cuda:0", True, True),
        ("cuda", True, True),
        ("xpu", False, False),
        ("mps", False, True),
    ],
)
def test_copies_block_where_they_must(place: str, capturing: bool, blocks: bool, device: Device) -> None:
    device.capturing = capturing
    for x, expected in ((torch.ones(3), blocks), (torch.ones(3, device="meta"), True)):
        seen: Any = SimpleNamespace(is_cpu=x.is_cpu, to=lambda _, non_blocking: non_blocking)
        assert devices.to_device(seen, torch.device(place)) is not expected


# Without a GPU, the meta device stands for it: its tensors have no values, so that a read raises.
META = torch.device("meta")


class Calls(TorchDispatchMode):
    """Records the operations on the meta device, and the copies to it and from it: whether each blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.copies: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        name = func.name().removeprefix("aten::")
        if META in devices:
            self.names.add(name)
        if len(devices) > 1 and name in ("_to_copy", "copy_"):
            self.copies.append(not kwargs.get("non_blocking"))
        return result

    def tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        """In place of ``torch.tensor``, which copies where no mode sees it."""
        if kwargs.get("device") == META:
            self.copies.append(True)
        return _tensor(*args, **kwargs)


_tensor = torch.tensor


@contextmanager
def device_of(backend: Any, monkeypatch: pytest.MonkeyPatch, eager: bool = True) -> Iterator[Calls]:
    """A context in which ``backend`` serves meta tensors, which are plain ones unless ``eager`` is false."""
    of_cpu = backends.for_device_type("cpu")
    monkeypatch.setattr(cuda_draws, "draw", lambda _: 7)
    monkeypatch.setattr(backends, "for_device_type", lambda kind: of_cpu if kind == "cpu" else backend)
    if eager:
        monkeypatch.setattr(layer_drop, "is_traced", lambda _: False)
    for name, module in sys.modules.items():
        if eager and name.startswith("thinned.") and hasattr(module, "is_eager"):
            monkeypatch.setattr(module, "is_eager", lambda x: x.layout is torch.strided)
    with Calls() as calls:
        monkeypatch.setattr(torch, "tensor", calls.tensor)
        yield calls


class Kernel:
    """A backend that only allocates, and keeps the keys it was given."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def masked_affine(self, x: Tensor, key: Any, *_: Any) -> Tensor:
        self.keys.append(key)
        return torch.empty_like(x)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("given", ["nothing", "a key", "an address"])
def test_a_mask_takes_one_kernel(given: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass and in the backward pass: the key is a number within the launch."""
    kernel, model = Kernel(), nn.Sequential(thinned.Dropout(0.5, inplace))
    address = thinned.address(model, seed=7, step=3) if given == "an address" else nullcontext()
    x, grad = torch.empty(4, 5, device=META, requires_grad=True), torch.empty(4, 5, device=META)
    x = x.clone()  # a leaf cannot be overwritten
    with device_of(kernel, monkeypatch) as calls, address:
        y = dropout(x, 0.5, inplace=inplace, key=KEY) if given == "a key" else model(x)
        y.backward(grad)
    assert calls.names <= {"detach", "empty_like"}
    expected = int(KEY.fold(3).fold("0")) if given == "an address" else 7
    assert kernel.keys == [signed64(expected)] * 2


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
@pytest.mark.parametrize("given", ["nothing", "a key", "an address", "samples"])
@pytest.mark.parametrize(
    "entry",
    # Residual waits for the number of kept rows.
    [entry for entry in ENTRIES if entry.name not in ("Masksembles", "RDrop", "DropoutSchedule", "Residual")],
    ids=lambda entry: entry.name,
)
def test_nothing_waits_for_the_device(
    entry: Entry, given: str, eager: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = entry.own.make(**entry.example.arguments).to_empty(device=META)
    inputs = [x.to(META) for x in entry.example.inputs(torch.float32)]
    layer.register_parameter("place", nn.Parameter(torch.empty((), device=META)))
    with device_of(portable, monkeypatch, eager) as calls:
        address = thinned.address(layer, seed=7, step=3, samples=[5] if given == "samples" else None)
        copies = len(calls.copies)
        with address if given in ("an address", "samples") else nullcontext():
            y = first(layer(*inputs, **{"key": KEY} if given == "a key" else {}))
        if y.requires_grad:
            y.sum().backward()
    assert calls.names
    assert not any(calls.copies)
    assert len(calls.copies) == copies or not eager


# On a GPU.


def masks_of(call: Callable[[], Tensor], times: int = 3) -> list[list[bool]]:
    return [(call() != 0).tolist() for _ in range(times)]


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function that replays ``call``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


@on_gpu
def test_draws_on_a_gpu() -> None:
    torch.cuda.manual_seed(2**63 + 3)
    drawn = [cuda_draws.draw(CUDA) for _ in range(3)]
    after = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(2**63 + 3)
    assert drawn == [int(keys.draw(CUDA).item()) for _ in range(3)]
    assert torch.cuda.get_rng_state().equal(after)


@on_gpu
def test_the_first_draw_leaves_the_generator_alone() -> None:
    cuda_draws._is_known.cache_clear()
    before = torch.cuda.get_rng_state()
    assert cuda_draws._is_known(0)
    assert torch.cuda.get_rng_state().equal(before)


@on_gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_eager_compiled_and_replayed_masks_are_one_sequence() -> None:
    x = torch.ones(1000, device=CUDA)

    def call() -> Tensor:
        return dropout(x)

    found = []
    for variant in (call, torch.compile(call), captured(call)):
        variant()
        torch.cuda.manual_seed(3)
        found.append(masks_of(variant))
    assert found[0] == found[1] == found[2]
    assert found[0][0] != found[0][1] != found[0][2]


@on_gpu
def test_a_replay_repeats_the_masks_of_an_address() -> None:
    model, x = nn.Sequential(thinned.Dropout(0.5)).to(CUDA), torch.ones(1000, device=CUDA)

    def call() -> Tensor:
        with thinned.address(model, seed=7, step=3):
            return model(x)

    assert masks_of(captured(call)) == masks_of(call)
    assert call().cpu().equal(dropout(x.cpu(), key=thinned.Key(7).fold(3).fold("0")))


@on_gpu
def test_a_replay_reads_the_step_of_an_address() -> None:
    model, x = nn.Sequential(thinned.Dropout(0.5)).to(CUDA), torch.ones(1000, device=CUDA)
    step = torch.tensor(3, device=CUDA)

    def call() -> Tensor:
        with thinned.address(model, seed=7, step=step):
            return model(x)

    replay = captured(call)
    step.fill_(4)
    assert replay().cpu().equal(dropout(x.cpu(), key=thinned.Key(7).fold(4).fold("0")))


@on_gpu
@pytest.mark.parametrize("given", ["nothing", "a key", "an address", "samples"])
def test_nothing_waits_for_a_gpu(given: str) -> None:
    model, x = (
        nn.Sequential(thinned.Dropout(0.5)).to(CUDA),
        torch.ones(8, 100, device=CUDA, requires_grad=True),
    )

    def call() -> None:
        samples = range(8) if given == "samples" else None
        address = thinned.address(model, seed=7, step=3, samples=samples)
        with address if given in ("an address", "samples") else nullcontext():
            y = dropout(x, key=KEY) if given == "a key" else model(x)
        y.backward(x.detach())

    call()  # compiles
    cuda_draws._is_known.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is called a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_restored_state_draws_again() -> None:
    x, state = torch.ones(1000, device=CUDA), torch.cuda.get_rng_state()
    y = dropout(x)
    torch.cuda.set_rng_state(state)
    with torch.random.fork_rng(devices=[0]):
        assert dropout(x).equal(y)
    assert dropout(x).equal(y)


@on_gpu
def test_a_checkpoint_draws_again() -> None:
    x = torch.ones(1000, device=CUDA, requires_grad=True)
    y: Any = checkpoint(dropout, x, use_reentrant=False)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.equal(y)
