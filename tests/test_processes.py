"""Forked children, threads that call at once, and what travels between processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import oracle
import thinned
from process import PATIENCE, output
from thinned.functional import dropout

KEY = thinned.Key(7)
LARGE = torch.randn(400, 500)  # shared by two threads and more

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
# Python 3.12 and later warn of any fork while there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@forks
@pytest.mark.usefixtures("restore_threads")
def test_fork_after_parallel_use_does_not_hang() -> None:
    """The child has none of the parent's threads, and computes the same.

    It compares in NumPy, since torch's own parallel operations do hang there.
    """
    torch.set_num_threads(2)
    leaf, ones = LARGE.clone().requires_grad_(), torch.ones_like(LARGE)
    y = dropout(leaf, 0.1, key=KEY)
    (grad,) = torch.autograd.grad(y, leaf, ones, retain_graph=True)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        with torch.no_grad():
            again = dropout(leaf, 0.1, key=KEY)
        (gradient,) = torch.autograd.grad(y, leaf, ones)
        send.send(
            [(a.detach().numpy() == b.detach().numpy()).all() for a, b in ((again, y), (gradient, grad))]
        )

    process = context.Process(target=child)
    process.start()
    try:
        assert receive.poll(PATIENCE), "the child hangs"
        assert receive.recv() == [True, True]
        process.join(PATIENCE)
        assert process.exitcode == 0
    finally:
        process.kill()
    oracle.assert_same(dropout(LARGE, 0.1, key=KEY), y)


@forks
def test_fork_after_torch_alone_was_parallel_does_not_hang() -> None:
    """The pool that the child lacks is PyTorch's as well: a first call of ours in the child must know."""
    child = f"""
        import os, signal, torch, thinned
        torch.set_num_threads(2)
        x = torch.ones(4_000_000) * 2
        pid = os.fork()
        if pid == 0:
            signal.alarm({PATIENCE // 2})
            thinned.functional.dropout(x, 0.5, key=thinned.Key(7))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """
    assert output(child, PYTHONWARNINGS="ignore").strip() == "0"


class Noisy(Dataset[Tensor]):
    """Rows that are thinned where they are loaded, each under its own key."""

    def __init__(self) -> None:
        self.layer = thinned.Dropout(0.5)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        row: Tensor = self.layer(torch.ones(50), key=KEY.fold(i))
        return row


@forks
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")  # on one core
def test_workers_of_a_data_loader() -> None:
    loader = DataLoader(Noisy(), 4, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    rows = torch.cat(list(loader))
    assert rows.equal(dropout(torch.ones(12, 50), 0.5, key=KEY.fold(torch.arange(12))))


def at_once(function: Callable[[int], Tensor], threads: int) -> list[Tensor]:
    """Results of threads that all wait for each other before they begin."""
    barrier = threading.Barrier(threads)

    def begin(i: int) -> Tensor:
        torch.set_num_threads(2)
        barrier.wait(PATIENCE)
        return function(i)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(begin, range(threads)))


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("keys", [[KEY] * 6, [KEY.fold(i) for i in range(6)]], ids=["one key", "keys"])
@pytest.mark.parametrize("x", [LARGE, LARGE[:3, :40]], ids=["large", "small"])
def test_threads(x: Tensor, keys: list[thinned.Key]) -> None:
    expected = [dropout(x, 0.1, key=key) for key in keys]
    for y, wanted in zip(at_once(lambda i: dropout(x, 0.1, key=keys[i]), 6), expected, strict=True):
        oracle.assert_same(y, wanted)


@pytest.mark.usefixtures("restore_threads")
def test_one_thread_forces_an_instruction_set_while_others_compute() -> None:
    if "native" in thinned.backends.missing():
        pytest.skip(thinned.backends.missing()["native"])
    from thinned.backends import _native, native

    expected = dropout(LARGE, 0.1, key=KEY)

    def work(i: int) -> Tensor:
        for _ in range(20):
            if i == 0:
                for isa in _native.supported_isas():
                    _native.set_isa(isa)
            y = dropout(LARGE, 0.1, key=KEY)
        return y

    with native.instruction_set(_native.isa()):
        for y in at_once(work, 3):
            oracle.assert_same(y, expected)


def test_another_process_agrees() -> None:
    """Under another number of threads and from pickles."""
    layer, key = pickle.dumps(thinned.Dropout(0.3)), pickle.dumps(KEY.fold("there"))
    printed = output(
        f"""
        import pickle, torch
        torch.set_num_threads(1)
        layer, key = pickle.loads({layer!r}), pickle.loads({key!r})
        print(layer(torch.ones(300, 301), key=key).nonzero().sum(0).tolist())
        """,
        PYTHONHASHSEED="1",
    )
    y = thinned.Dropout(0.3)(torch.ones(300, 301), key=KEY.fold("there"))
    assert printed.strip() == str(y.nonzero().sum(0).tolist())
