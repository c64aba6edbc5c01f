"""Recomputed regions have the dropout masks of their forward pass.

A region is recomputed by one of three means. A context that counts dropout calls handles each:

- ``torch.utils.checkpoint`` with ``use_reentrant=False``: while such a context is active, torch's checkpoint
  generator is patched, so that a recomputation resumes counting where the region began.
- An autograd Function that calls the region in ``forward`` and again in ``backward``: torch's reentrant
  checkpoint, those of Megatron, DeepSpeed and fairscale, reversible networks. Hooks on the Function's node
  give the recomputed calls the numbers that they had in ``forward``.
- Any other dropout call during a backward pass raises: nothing says which forward call it repeats.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from copy import copy
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor
from torch.autograd.function import FunctionCtx

from thinned.key_source import Seeing, active
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
    """A context that numbers the dropout calls of each module path, from 0. For one thread and asyncio task.

    Subclasses implement :meth:`resumed` and call :meth:`number` once for each dropout.

    Attributes:
        calls: the number of calls so far, by module path.
        stack: paths of the modules that are running, innermost last.
    """

    _title: str  # for error messages
    # The innermost context of a subclass in this asyncio task; thread-local state is shared by all tasks.
    _innermost: ContextVar[Counting | None]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._innermost = ContextVar(cls.__name__, default=None)

    def _reset(
        self,
        calls: Mapping[str, int] | None = None,
        stack: Sequence[str] = (),
        region: _Region | None = None,
        recomputes: bool = False,
    ) -> None:
        self.calls, self.stack = dict(calls or {}), list(stack)
        self._region, self._recomputes = region, recomputes
        self._outer: Any = None

    def resumed(
        self, calls: Mapping[str, int], stack: Sequence[str], region: _Region | None
    ) -> AbstractContextManager[Any]:
        """A context for a recomputation that begins while the modules of ``stack`` are running.

        It resumes counting from ``calls``. With a ``region``, it repeats the numbers of that region's calls.
        """
        raise NotImplementedError

    def _enter_counting(self, outer: Any) -> None:
        """Become the innermost context; ``outer`` is the one that was innermost so far."""
        if outer is not None and self._innermost.get() is not outer:
            raise RuntimeError(
                f"{self._title} is entered while another task of this thread is within one; let no task "
                "await within it, or give each a thread"
            )
        _checkpoint_patch.install()
        self._outer = outer
        self._innermost.set(self)
        _thread.counting.append(self)

    def _exit_counting(self) -> None:
        _checkpoint_patch.remove()
        _thread.counting.remove(self)
        if (innermost := self._innermost.get()) is not self:
            self._unlink(innermost)
            raise RuntimeError(
                f"{self._title} is left while another that was entered after it is active, in a generator "
                "or a task; calls since then may have had the other's masks"
            )
        self._innermost.set(self._outer)

    def _unlink(self, innermost: Any) -> Any:
        """Take this out of the chain that begins at ``innermost``, and return the chain's new beginning."""
        if innermost is self:
            return self._outer
        inner = innermost
        while inner is not None and inner._outer is not self:
            inner = inner._outer
        if inner is not None:
            inner._outer = self._outer
        return innermost

    def number(self, path: str) -> int:
        """Count this call of ``path`` and return its number."""
        if compiling():
            return self._count(path)
        if self._innermost.get() is not self:
            raise RuntimeError(
                f"a dropout is called within the {self._title} of another task of this thread; let no task "
                "await within it, or give each a thread"
            )
        if self._region is not None:
            number = self._region.repeat(path)
        else:
            if not self._recomputes and graph_task_is_running():
                raise RuntimeError(
                    f"a dropout{path and ' in '}{path} is called while a backward pass runs, within "
                    f"{self._title}. Which call of the forward pass it repeats is unknown. Recompute by "
                    "torch.utils.checkpoint, or by a torch.autograd.Function whose forward takes ctx, or "
                    "give the dropout a key"
                )
            number = self._count(path)
        self.note(path, number)
        return number

    def _count(self, path: str) -> int:
        number = self.calls.get(path, 0)
        self.calls[path] = number + 1
        return number

    def note(self, path: str, number: int) -> None:
        """Record a call in every autograd Function whose forward is running, for its backward to repeat."""
        if compiling() or torch.is_grad_enabled():  # a Function's forward runs without grad
            return
        for ctx in _running_functions():
            regions = vars(ctx).setdefault("_thinned_regions", {})
            if self not in regions:
                regions[self] = _Region(ctx, self)
            regions[self].add(path, number, self.stack)

    def again(self) -> Callable[[], AbstractContextManager[Any]]:
        """Return a factory of contexts, usable in any thread, that resume counting at this point."""
        calls, stack, region = dict(self.calls), list(self.stack), self._region and self._region.copy()
        return lambda: self.resumed(calls, stack, region and region.copy())


class _Region:
    """The calls that a context counted in an autograd Function's forward, for its backward to repeat.

    Attributes:
        stack: the common prefix of the module stacks of all calls. A recomputation begins with it, since it
            enters only the modules that the region itself calls.
    """

    def __init__(self, ctx: FunctionCtx, counting: Counting) -> None:
        self.stack: list[str] | None = None
        self._calls: list[tuple[str, int, int]] = []  # path, random state, number
        self._remaining: list[tuple[str, int, int]] = []
        # torch's reentrant checkpoint repeats the calls in order, and may not restore the random state.
        self._in_order = function_of(ctx) is torch_checkpoint.CheckpointFunction
        stack, rows = ExitStack(), active.rows

        def begin(_: Any) -> None:
            close_failed()
            self._remaining = list(self._calls)
            stack.enter_context(Seeing(rows))
            stack.enter_context(counting.resumed(counting.calls, self.stack or (), self))
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
        twin = copy(self)
        twin._remaining = list(self._remaining)
        return twin

    def repeat(self, path: str) -> int:
        """The number of the next call of ``path``.

        A reversible network recomputes its blocks in reverse, each from the random state that it restored. So
        the random state selects a block's calls, which come in the order of the forward pass.
        """
        calls = [call for call in self._remaining if call[0] == path]
        if len({state for _, state, _ in calls}) > 1 and not self._in_order:
            state = _random_state()
            calls = [call for call in calls if call[1] == state]
        if not calls:
            raise RuntimeError(
                f"a recomputation calls a dropout{path and ' in '}{path} that the forward pass did not call, "
                "or not with the random state that there is now; restore the state of the forward pass, "
                "recompute by torch.utils.checkpoint, or give the dropout a key"
            )
        self._remaining.remove(calls[0])
        return calls[0][2]


def _running_functions() -> list[FunctionCtx]:
    """The ctx of each autograd Function whose forward is running in this thread, innermost first.

    PyTorch keeps no list of them. A frame of a ``forward`` shows one by its first argument.
    """
    found: list[FunctionCtx] = []
    frame = sys._getframe().f_back
    while frame is not None:
        code, caller = frame.f_code, frame.f_back
        of_a_module = caller is not None and caller.f_code is MODULE_CALL
        if code.co_name == "forward" and code.co_argcount and not of_a_module:
            ctx = frame.f_locals.get(code.co_varnames[0])
            if isinstance(ctx, FunctionCtx) and not any(ctx is other for other in found):
                found.append(ctx)
        frame = caller
    return found


def _random_state() -> int:
    """A hash of the states of the default generators: the CPU's and the current CUDA device's."""
    states: list[Tensor] = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return hash(tuple(state.numpy().tobytes() for state in states))


class _ThreadState(threading.local):
    """The active contexts of each thread, and the recomputations that are running in it."""

    def __init__(self) -> None:
        self.counting: list[Counting] = []
        self.recomputing: list[ExitStack] = []


def close_failed() -> None:
    """Leave the contexts of recomputations that raised: torch does not run a node's hooks after an error."""
    if _thread.recomputing and not graph_task_is_running():
        failed, _thread.recomputing = _thread.recomputing, []
        for stack in reversed(failed):
            stack.close()


class _CheckpointPatch:
    """Replaces the generator of torch's checkpoint while any thread is within a context that counts.

    Models hold references to ``checkpoint`` itself, but ``checkpoint`` looks up its generator on each call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._installed = 0
        self._name = ""
        self._original: Any = None
        self._setting: bool | None = None

    def install(self) -> None:
        with self._lock:
            name = self._name = self._name or checkpoint_generator()
            if not self._installed:
                self._original = getattr(torch_checkpoint, name)
                self._setting = let_compiled_checkpoints_count(True)
                setattr(torch_checkpoint, name, self._generator)
            self._installed += 1

    def remove(self) -> None:
        with self._lock:
            self._installed -= 1
            if not self._installed:
                setattr(torch_checkpoint, self._name, self._original)
                if self._setting is not None:
                    let_compiled_checkpoints_count(self._setting)

    def _generator(self, region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the recomputations of ``region`` resume counting here.

        torch passes its generator the region for recomputation alone, and makes the first run itself.
        """
        contexts = [counting.again() for counting in _thread.counting]
        rows = active.rows

        def recompute(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                stack.enter_context(Seeing(rows))
                for context in contexts:
                    stack.enter_context(context())
                return region(*args, **kwargs)

        return self._original(recompute, *args, **kwargs)


_thread, _checkpoint_patch = _ThreadState(), _CheckpointPatch()
