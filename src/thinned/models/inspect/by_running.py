"""A run of a model: each function that drops and each other use of random numbers, by module and line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

import thinned
from thinned.models.convert.rules import is_dropout, probability_of
from thinned.models.draws import DRAWS, SINGLE, purpose_of
from thinned.models.inspect.targets import HAND_WRITTEN, OURS, TARGETS, Call, Kind, recurrent
from thinned.models.walk import is_ours, qualified_name
from thinned.torch_state import TorchDispatchMode, arguments_of, buffers_of

__all__ = ["TORCH", "Event", "run_once"]

NAMES = {f"aten.{name.partition('.')[2]}": name for name in reversed(DRAWS.values())}
TORCH = str(Path(torch.__file__).parent) + os.sep
THINNED = str(Path(thinned.__file__).parent) + os.sep


@dataclass
class Event:
    """Calls of one function from one line while one module runs.

    Attributes:
        module: the innermost module that runs.
        call: the function and the line.
        p: the probability, if the call has one.
        evaluating: whether the model was in evaluation.
        calls: the number of calls.
    """

    module: nn.Module
    call: Call
    p: float | None
    evaluating: bool
    calls: int = 0


def run_once(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    others: Set[int] = frozenset(),
    flops: Counter[int] | None = None,
) -> list[Event]:
    """The events of a call in training and of one in evaluation; model and generators stay as they were.

    ``others`` has the ids of modules that are no children of ``model``, and have events of their own. The
    floating-point operations of the call in evaluation are added to ``flops``, by the module's id.
    """
    spy = _Spy({id(module) for module in model.modules()} | others)
    with _unchanged(model), torch.no_grad():
        for training in (True, False):
            model.train(training)
            spy.stack, spy.evaluating = [model], not training
            with (
                _counted(flops) if flops is not None and not training else contextlib.nullcontext(),
                register_module_forward_pre_hook(spy.enter),
                register_module_forward_hook(spy.leave, always_call=True),
                spy,
                _Dispatch(spy),
            ):
                model(*args, **kwargs)
    return list(spy.events.values())


@contextlib.contextmanager
def _counted(flops: Counter[int]) -> Iterator[None]:
    """Count the floating-point operations of each module, those of its children among them."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports triton

    counter = FlopCounterMode(display=False)
    begun: list[int] = []

    def leave(module: nn.Module, *_: Any) -> None:
        flops[id(module)] += counter.get_total_flops() - begun.pop()

    with (
        sdpa_kernel(SDPBackend.MATH),  # FlopCounterMode has no formula for attention that is fused on the CPU
        counter,
        register_module_forward_pre_hook(lambda *_: begun.append(counter.get_total_flops())),
        register_module_forward_hook(leave, always_call=True),
    ):
        yield


class _Spy(TorchFunctionMode):
    """Reports the functions that are known to drop, and the layers of ours."""

    def __init__(self, members: Set[int]) -> None:
        super().__init__()
        self.members = members
        self.events: dict[tuple[Any, ...], Event] = {}
        self.stack: list[nn.Module] = []
        self.reported = self.evaluating = False

    def enter(self, module: nn.Module, _: Any) -> None:
        is_member, is_dropping = id(module) in self.members, is_ours(module) and is_dropout(module)
        if module.training and is_dropping and (p := probability_of(module)) != 0:
            if is_member:
                self.add(module, Call("thinned", "", "", 0, 0), p)
            else:
                self.report(qualified_name(type(module)), p, ours=True)
        self.stack.append(module if is_member or is_dropping else self.stack[-1])

    def leave(self, *_: Any) -> None:
        if len(self.stack) > 1:
            self.stack.pop()

    def report(
        self, name: str, p: float | None, drawn: Sequence[int] | None = None, ours: bool = False
    ) -> None:
        """Report a call, unless it is within one that is reported or within a layer of ours.

        ``drawn`` is the shape of random numbers that the call draws for an unknown purpose, and ``ours``
        whether the call is of a function of ours.
        """
        frame = None if self.reported else _caller((TORCH, THINNED) if ours else (TORCH,))
        code = frame.f_code if frame else None
        if self.reported or (not ours and code and code.co_filename.startswith(THINNED)):
            return
        purpose, at = "", ("", "", 0, 0)
        if frame and code:
            at = getattr(code, "co_qualname", code.co_name), code.co_filename, frame.f_lineno, frame.f_lineno
            if drawn is not None and name in NAMES:
                purpose = purpose_of(at[1], at[2], code.co_name, tuple(drawn) in SINGLE)
        note = HAND_WRITTEN if drawn is not None and not purpose else ""
        kind: Kind = "call" if drawn is None else "layer" if purpose == "layerdrop" else "random"
        call = Call(NAMES[name] if purpose else name, *at, None, note, kind)
        # The calls of a module that a forward makes are those of the module whose forward it is.
        self.add(next(module for module in reversed(self.stack) if id(module) in self.members), call, p)

    def add(self, module: nn.Module, call: Call, p: float | None) -> None:
        event = Event(module, call, p, self.evaluating)
        self.events.setdefault((id(module), call, self.evaluating), event).calls += 1

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = TARGETS.get(function)
        found = (target.name, target.rate(args, kwargs)) if target else recurrent(function, args)
        ours = target is not None and target.name.startswith(OURS)
        if found is None or found[1] == 0 or (ours and is_ours(self.stack[-1])):
            return function(*args, **kwargs)
        self.report(*found, ours=ours)
        before, self.reported = self.reported, True
        try:
            return function(*args, **kwargs)
        finally:
            self.reported = before


def _caller(within: tuple[str, ...]) -> FrameType | None:
    """The innermost frame outside these folders and this file; None if there is only the model's call."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not run_once.__code__:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(within):
            return frame
        frame = frame.f_back
    return None


class _Dispatch(TorchDispatchMode):
    """Reports every further operation that uses random numbers."""

    def __init__(self, spy: _Spy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spy = spy

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            rate = _rate(function, args, kwargs)
            if rate != 0:
                result = function(*args, **kwargs)
                name = f"aten.{function.overloadpacket.__name__}"
                self.spy.report(name, rate, getattr(result, "shape", ()) if rate is None else None)
                return result
        return function(*args, **kwargs)


def _rate(function: Any, args: Any, kwargs: Any) -> float | None:
    """The rate at which an operation such as attention drops; None if it has no argument for one."""
    given: dict[str, Any] = {
        argument.name: kwargs.get(argument.name, args[i] if i < len(args) else argument.default_value)
        for i, argument in enumerate(arguments_of(function))
    }
    names = ("dropout_p", "dropout", *(["p"] if "native_dropout" in function.name() else []))
    p = next((given[name] for name in names if given.get(name) is not None), None)
    if p is None:
        return None
    return float(p) if given.get("train", True) is not False else 0.0


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Restore the training modes, the buffers and the generators."""
    # TorchScript keeps buffers in an object of C++, which is no dictionary; the contents are restored below.
    buffers = {
        module: dict(buffers_of(module))
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    modes = [(module, module.training) for module in model.modules()]
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        for module, before in buffers.items():
            buffers_of(module).update(before)
        with torch.no_grad():
            for buffer, content in contents:
                if not torch.equal(buffer, content):
                    buffer.copy_(content)
