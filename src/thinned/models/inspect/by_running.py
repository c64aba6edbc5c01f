"""What a run of a model drops, and in which of its modules."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

import thinned
from thinned.models.convert.rules import probability_of
from thinned.models.inspect.targets import HAND_WRITTEN, TARGETS, recurrent
from thinned.models.walk import is_ours
from thinned.torch_state import TorchDispatchMode, arguments_of, buffers_of

__all__ = ["TORCH", "Event", "run_once"]

TORCH = str(Path(torch.__file__).parent) + os.sep
THINNED = str(Path(thinned.__file__).parent) + os.sep


@dataclass
class Event:
    """Calls that drop, of one function, from one line, in one module.

    Attributes:
        module: the innermost that ran.
        name: of the function.
        function, file, line: from where it was called.
        p: the probability, if the call has it.
        calls: how many there were.
        evaluating: whether the model was in evaluation.
        note: a word on it.
    """

    module: nn.Module
    name: str
    function: str
    file: str
    line: int
    p: float | None
    evaluating: bool
    note: str = ""
    calls: int = field(default=0)


def run_once(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Event]:
    """What a call in training and one in evaluation drop; the model and the generators stay as they were."""
    spy = _Spy()
    with _unchanged(model), torch.no_grad():
        for training in (True, False):
            model.train(training)
            with spy.watching(model, training):
                model(*args, **kwargs)
    return list(spy.events.values())


class _Spy:
    def __init__(self) -> None:
        self.events: dict[tuple[Any, ...], Event] = {}
        self.stack: list[nn.Module] = []
        self.accounted = False
        self.evaluating = False

    @contextlib.contextmanager
    def watching(self, model: nn.Module, training: bool) -> Iterator[None]:
        known = {id(module) for module in model.modules()}

        def enter(module: nn.Module, _: Any) -> None:
            # One that a forward made for itself belongs to the module that runs.
            self.stack.append(module if id(module) in known else self.stack[-1])
            if module.training and is_ours(module) and (p := probability_of(module)):
                self.add(module, "thinned", ("", "", 0), p)

        def leave(*_: Any) -> None:
            if len(self.stack) > 1:
                self.stack.pop()

        handles = [
            register_module_forward_pre_hook(enter),
            register_module_forward_hook(leave, always_call=True),
        ]
        self.stack, self.evaluating = [model], not training
        try:
            with _Functions(self), _Dispatch(self):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.stack = []

    def saw(self, name: str, p: float | None, note: str = "") -> None:
        frame = _caller()
        where = ("", "", 0)
        if frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(THINNED):
                return  # already ours
            where = (getattr(frame.f_code, "co_qualname", frame.f_code.co_name), file, frame.f_lineno)
        self.add(self.stack[-1], name, where, p, note)

    def add(
        self, module: nn.Module, name: str, where: tuple[str, str, int], p: float | None, note: str = ""
    ) -> None:
        key = (id(module), name, where, self.evaluating)
        event = Event(module, name, *where, p, self.evaluating, note)
        self.events.setdefault(key, event).calls += 1

    def call(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call a function that has been seen to drop: what it does in turn is not told again."""
        before, self.accounted = self.accounted, True
        try:
            return function(*args, **kwargs)
        finally:
            self.accounted = before


def _caller() -> FrameType | None:
    """The innermost frame outside torch and this file; None if there is only the call of the model."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not run_once.__code__:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(TORCH):
            return frame
        frame = frame.f_back
    return None


class _Functions(TorchFunctionMode):
    def __init__(self, spy: _Spy) -> None:
        super().__init__()
        self.spy = spy

    def __torch_function__(
        self, function: Callable[..., Any], _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        target = TARGETS.get(function)
        found = (target.name, target.rate(args, kwargs)) if target else recurrent(function, args)
        if found is None or not found[1]:
            return function(*args, **kwargs)
        if not self.spy.accounted:
            self.spy.saw(*found)
        return self.spy.call(function, args, kwargs)


class _Dispatch(TorchDispatchMode):
    """What comes to ATen without one of the known functions: every operation that draws random numbers."""

    def __init__(self, spy: _Spy) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.spy = spy

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.spy.accounted and torch.Tag.nondeterministic_seeded in function.tags:
            rate = _rate(function, args, kwargs)
            name = f"aten.{function.overloadpacket.__name__}"
            if rate is None:
                self.spy.saw(name, None, HAND_WRITTEN)
            elif rate:
                self.spy.saw(name, rate)
        return function(*args, **kwargs)


def _rate(function: Any, args: Any, kwargs: Any) -> float | None:
    """Of an operation with an argument for it, such as attention, the rate; None if there is no such."""
    given: dict[str, Any] = {}
    for place, argument in enumerate(arguments_of(function)):
        value = args[place] if place < len(args) else argument.default_value
        given[argument.name] = kwargs.get(argument.name, value)
    p = next((given[name] for name in ("dropout_p", "dropout") if name in given), None)
    if p is None and "native_dropout" in function.name():
        p = given["p"]
    if p is None:
        return None
    return float(p) if given.get("train", True) is not False else 0.0


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training modes, buffers and generators come back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, value, None if value is None else value.detach().clone())
        for module in model.modules()
        for name, value in buffers_of(module).items()
    ]
    tensors = (*model.parameters(), *model.buffers())
    devices = {tensor.device.index for tensor in tensors if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=[index for index in devices if index is not None]):
            yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, value, content in buffers:
                if value is not None and content is not None and not torch.equal(value, content):
                    value.copy_(content)
                buffers_of(module)[name] = value
