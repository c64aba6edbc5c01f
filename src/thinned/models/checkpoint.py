"""Regions that are computed twice: in the backward pass their dropouts have the masks of the forward pass.

There are three ways to recompute, and a context that counts calls handles each.

- ``torch.utils.checkpoint`` without reentrance. Its generator is replaced while a context is active, so that
  the recomputation resumes counting where the region began.
- An autograd Function that calls the region in ``forward`` and again in ``backward``: torch's reentrant
  checkpoint, those of Megatron, DeepSpeed and fairscale, reversible networks. Hooks on the Function's node
  let the recomputation have the numbers of the region's calls.
- Anything else that calls a dropout while a backward pass runs is refused: which call it repeats is unknown.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx

from thinned.torch_state import (
    MODULE_CALL,
    checkpoint_generator,
    compiling,
    function_of,
    graph_task_is_running,
    let_compiled_checkpoints_count,
)

__all__ = ["Counting", "close_failed"]


class Counting:
    """A context that numbers the calls of each path, from 0. It is for one thread, and one asyncio task.

    Subclasses give :meth:`resumed`, and call :meth:`number` for each dropout.
    """

    _owner: ContextVar[Counting | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._owner = ContextVar(cls.__name__, default=None)

    def _reset(
        self,
        calls: dict[str, int],
        stack: list[str] | None = None,
        region: _Region | None = None,
        recomputes: bool = False,
    ) -> None:
        self.calls = calls
        self.stack = [] if stack is None else stack
        self._region = region
        self._recomputes = recomputes or region is not None
        self._before: Counting | None = None

    def resumed(
        self, calls: dict[str, int], stack: list[str], region: _Region | None
    ) -> AbstractContextManager[Any]:
        """Another context like this for a recomputation, in which the modules of ``stack`` are running.

        It resumes counting from ``calls``; with a ``region`` its numbers are those of the region's calls.
        """
        raise NotImplementedError

    def _enter_counting(self, outer: Counting | None) -> None:
        """Make this the innermost of its kind; ``outer`` is what is so now in this thread."""
        self._before = self._owner.get()
        if outer is not None and self._before is not outer:
            raise RuntimeError(
                f"{self._words()} is entered while another task of this thread is within one; let no task "
                "await within it, or give each a thread"
            )
        _checkpoint.install()
        self._owner.set(self)
        _thread.counting.append(self)

    def _exit_counting(self) -> None:
        _checkpoint.remove()
        _thread.counting.remove(self)
        if (inner := self._owner.get()) is not self:
            while inner is not None and inner._before is not self:
                inner = inner._before
            if inner is not None:
                inner._before = self._before
            raise RuntimeError(
                f"{self._words()} is left while another that was entered after it is active, in a generator "
                "or a task; calls since then may have had the other's masks"
            )
        self._owner.set(self._before)

    def _words(self) -> str:
        return f"thinned.{type(self).__name__.strip('_').lower()}"

    def number(self, path: str) -> int:
        """The number of a call of ``path`` that is made now, which is counted."""
        if compiling():
            return self._count(path)
        if self._owner.get() is not self:
            raise RuntimeError(
                f"a dropout is called within the {self._words()} of another task of this thread; let no task "
                "await within it, or give each a thread"
            )
        if self._region is not None:
            number = self._region.repeat(path)
        else:
            if not self._recomputes and graph_task_is_running():
                raise RuntimeError(
                    f"a dropout{path and ' in '}{path} is called while a backward pass runs, within "
                    f"{self._words()}. Which call of the forward pass it repeats is unknown. Recompute by "
                    "torch.utils.checkpoint, or by a torch.autograd.Function whose forward takes ctx, or "
                    "give the dropout a key"
                )
            number = self._count(path)
        if not torch.is_grad_enabled():
            self.note(path, number)
        return number

    def _count(self, path: str) -> int:
        number = self.calls.get(path, 0)
        self.calls[path] = number + 1
        return number

    def note(self, path: str, number: int) -> None:
        """Let the autograd Functions whose forward is running know of a call."""
        if compiling() or torch.is_grad_enabled():
            return
        for ctx in _running_functions():
            regions = vars(ctx).setdefault("_thinned_regions", {})
            if self not in regions:
                regions[self] = _Region(ctx, self)
            regions[self].add(path, number, self.stack)

    def again(self) -> Callable[[], AbstractContextManager[Any]]:
        """A factory of contexts, for any thread, that resume counting where this stands now."""
        calls, stack, region = dict(self.calls), list(self.stack), self._region and self._region.copy()
        return lambda: self.resumed(dict(calls), list(stack), region and region.copy())


class _Region:
    """The calls that a context counted in the forward of an autograd Function, for its backward to repeat.

    Attributes:
        stack: the paths of the modules that were running when the forward began, the innermost last; longer
            than that where no call needs to know.
    """

    def __init__(self, ctx: FunctionCtx, counting: Counting) -> None:
        self.stack: list[str] | None = None
        self._calls: list[tuple[str, int, int]] = []
        self._left: list[tuple[str, int, int]] = []
        self._in_order = function_of(ctx) is torch_checkpoint.CheckpointFunction
        stack = ExitStack()

        def begin(_: Any) -> None:
            close_failed()
            self._left = list(self._calls)
            stack.enter_context(counting.resumed(dict(counting.calls), list(self.stack or ()), self))
            _thread.recomputing.append(stack)

        def end(*_: Any) -> None:
            _thread.recomputing.remove(stack)
            stack.close()

        ctx.register_prehook(begin)  # type: ignore[attr-defined]
        ctx.register_hook(end)  # type: ignore[attr-defined]

    def add(self, path: str, number: int, stack: list[str]) -> None:
        self._calls.append((path, _random_state(), number))
        if self.stack is None:
            self.stack = list(stack)
        while self.stack != stack[: len(self.stack)]:
            self.stack.pop()

    def copy(self) -> _Region:
        twin = object.__new__(_Region)
        vars(twin).update(vars(self), _left=list(self._left))
        return twin

    def repeat(self, path: str) -> int:
        """The number of the next call of ``path``.

        Calls of one path are told apart by the random state, which a recomputation out of order, as in a
        reversible network, restores for each part of it. Within a part the order is that of the forward pass.
        """
        calls = [call for call in self._left if call[0] == path]
        if len({state for _, state, _ in calls}) > 1 and not self._in_order:
            state = _random_state()
            calls = [call for call in calls if call[1] == state]
        if not calls:
            raise RuntimeError(
                f"a recomputation calls a dropout{path and ' in '}{path} that the forward pass did not call, "
                "or not with the random state that there is now; restore the state of the forward pass, "
                "recompute by torch.utils.checkpoint, or give the dropout a key"
            )
        self._left.remove(calls[0])
        return calls[0][2]


def _running_functions() -> list[FunctionCtx]:
    """The contexts of the autograd Functions whose forward is running in this thread, the innermost first."""
    found: list[FunctionCtx] = []
    frame = sys._getframe().f_back
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        of_a_module = caller is not None and caller.f_code is MODULE_CALL
        if code.co_name == "forward" and code.co_argcount and not of_a_module:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx) and not any(ctx is each for each in found):
                found.append(ctx)
        frame = caller
    return found


def _random_state() -> int:
    """A number that stands for the state of the default generators of the CPU and of the CUDA device."""
    states: list[Tensor] = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return hash(tuple(state.numpy().tobytes() for state in states))


class _Thread(threading.local):
    def __init__(self) -> None:
        self.counting: list[Counting] = []
        self.recomputing: list[ExitStack] = []


def close_failed() -> None:
    """Leave the contexts of recomputations that raised, since torch does not run the hooks after those."""
    if _thread.recomputing and not graph_task_is_running():
        failed, _thread.recomputing = _thread.recomputing, []
        for stack in reversed(failed):
            stack.close()


class _Checkpoint:
    """The generator of torch's checkpoint, replaced while any thread is within a context that counts.

    ``checkpoint`` itself cannot be replaced, as models hold it. It looks up the generator on each call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._name = ""
        self._torchs: Any = None
        self._allowed: bool | None = None

    def install(self) -> None:
        with self._lock:
            name = self._name = self._name or checkpoint_generator()
            if not self._wanted:
                self._torchs = getattr(torch_checkpoint, name)
                self._allowed = let_compiled_checkpoints_count(True)

                def generator(region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                    return self._torchs(_region(region), *args, **kwargs)

                setattr(torch_checkpoint, name, generator)
            self._wanted += 1

    def remove(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                setattr(torch_checkpoint, self._name, self._torchs)
                if self._allowed is not None:
                    let_compiled_checkpoints_count(self._allowed)


_thread, _checkpoint = _Thread(), _Checkpoint()


def _region(region: Callable[..., Any]) -> Callable[..., Any]:
    """A checkpointed region as it is to be recomputed. torch computes it the first time itself."""
    contexts = [counting.again() for counting in _thread.counting]

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return region(*args, **kwargs)

    return recomputed
