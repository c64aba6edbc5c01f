"""Backends as parameters, what ran of them in the summary, and examples that are the same in every run."""

from __future__ import annotations

import gc
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from backend_under_test import BackendUnderTest
from distributed.world import World
from thinned import backends
from thinned.backends.variants import Variant, variants

# Where no GPU could run them, Triton's kernels run in its interpreter. Triton reads this at its import.
if not torch.accelerator.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile(
    "thinned",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("thinned")

ran: set[str] = set()


def pytest_configure(config: pytest.Config) -> None:
    # torch warns of itself: it scripts its own derivatives when the first forward-mode one is asked for.
    for category in ("DeprecationWarning", "FutureWarning"):  # the latter from torch 2.15 on
        config.addinivalue_line("filterwarnings", f"ignore:.torch.jit.(script|freeze):{category}")
    # And Dynamo of itself: it makes an instance of a Function's context to trace with.
    config.addinivalue_line("filterwarnings", "ignore:.*should not be instantiated:DeprecationWarning")
    # In 2.11 the first sparse tensor of a process warns, even one with check_invariants=False.
    config.addinivalue_line("filterwarnings", "ignore:Sparse invariant checks:UserWarning")
    # On a loaded machine, threads that wait for each other make a test of one second take ten.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    # Tests compare what is printed, also by processes; GitHub's runners, for example, ask for colours.
    for name in ("COLUMNS", "FORCE_COLOR", "GITHUB_ACTIONS", "NO_COLOR", "PY_COLORS"):
        os.environ.pop(name, None)
    for name in ("PYTEST_ADDOPTS", "PYTHONWARNINGS"):
        os.environ.pop(name, None)


# Tests with so many tiles that Triton's interpreter takes more than 5 s.
LONG_INTERPRETED = re.compile(
    r"layers/(?!.*test_backends_agree)|test_chunks_are_parts|test_more_blocks|test_memory_layout"
    r"|test_layouts(?!.*\(2, 3, 4, 5\))|test_stratified.py::test_(any_geometry|a_draw_for|values_are|rows_of)"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests that are long in Triton's interpreter to `make test-slow`."""
    for item in items:
        if "triton-interpreter" in item.name and LONG_INTERPRETED.search(item.nodeid):
            item.add_marker(pytest.mark.slow)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """The random numbers of a module are the same whether it is alone or one of many."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_runtest_setup() -> None:
    """A test's random numbers are the same whichever tests run before it."""
    torch.manual_seed(0)


def _marked(variant: Variant) -> Any:
    return pytest.param(variant, marks=() if variant.device == "cpu" else pytest.mark.gpu)


@pytest.fixture(params=[_marked(variant) for variant in variants() if not variant.why_missing()], ids=str)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[BackendUnderTest]:
    """Each backend in turn, which serves the public functions too; native under each instruction set."""
    variant: Variant = request.param
    ran.add(str(variant))
    with variant.running() as module:
        # Triton's interpreter takes 0.1 s where compiled code takes 0.1 ms.
        under_test = BackendUnderTest(module, variant.device, slow=str(variant) == "triton-interpreter")
        if variant.backend != "native":
            serving = {"cpu": under_test.module}
            monkeypatch.setattr(backends, "for_device_type", lambda device: serving.get(device, module))
        yield under_test


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Garbage collections skip what was imported, a million objects: 0.02 s each instead of 0.6."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that nanobind's modules find nothing leaked at exit


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Start without compiled code of this process or an earlier one."""
    import torch._functorch.config
    import torch._inductor.config

    torch.compiler.reset()
    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield
    torch.compiler.reset()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """torch.set_num_threads ends with the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, World]]:
    """The worlds that this process has started, by size."""
    started: dict[int, World] = {}
    yield started
    for world in started.values():
        world.stop()


@pytest.fixture(scope="module", params=[2, 4])
def world(request: pytest.FixtureRequest, worlds: dict[int, World]) -> World:
    """Processes that compute together; ``parametrize(..., indirect=True)`` asks for other sizes."""
    size = request.param
    return worlds.setdefault(size, World(size))


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parent.parent


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["ran"] = sorted(ran)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    ran.update(getattr(node, "workeroutput", {}).get("ran", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    _show_backends(terminalreporter)
    _show_placements(terminalreporter)


def _show_backends(terminalreporter: pytest.TerminalReporter) -> None:
    if not ran:
        return
    terminalreporter.section("backends and instruction sets")
    why = {str(variant): variant.why_missing() or "not asked for" for variant in variants()}
    terminalreporter.line("ran: " + ", ".join(name for name in why if name in ran))
    for name in (name for name in why if name not in ran):
        terminalreporter.line(f"did not run: {name} ({why[name]})")


def _show_placements(terminalreporter: pytest.TerminalReporter) -> None:
    """The placements of DTensors that were compared with one process, by layer and mesh."""
    found: dict[str, Counter[str]] = {}
    for report in chain.from_iterable(terminalreporter.stats.values()):
        if getattr(report, "when", "") == "call":
            for _, (layer, cases) in report.user_properties:  # of record_property, which no other test uses
                found.setdefault(layer, Counter()).update(cases)
    if not found:
        return
    terminalreporter.section("placements of DTensors, by mesh")
    meshes = sorted(set().union(*found.values()), key=lambda mesh: (len(mesh), mesh))
    width = max(map(len, found))
    terminalreporter.line(" " * width + "".join(f"{mesh:>6}" for mesh in meshes))
    for layer, cases in found.items():
        terminalreporter.line(f"{layer:{width}}" + "".join(f"{cases[mesh] or '':>6}" for mesh in meshes))
