"""Processes on the CPU that compute together, started once for all tests of a pytest process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from process import PATIENCE
from thinned.key_source import active


class World:
    """Ranks within one gloo group, which start with the first :meth:`run` and live until :meth:`stop`.

    Args:
        size: the number of ranks.
        patience: the seconds after which a run hangs.
        grace: the seconds that the other ranks have left once one rank has failed.
    """

    def __init__(self, size: int, patience: float = PATIENCE, grace: float = 10) -> None:
        self.size, self.patience, self.grace = size, patience, grace
        self.ranks: list[Any] = []
        self.pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """The results of ``function(*args, **kwargs)`` in each rank, in the order of ranks.

        The function is pickled by its name. It starts from torch's seed 0, without a key source.

        Raises:
            RuntimeError: a rank raised, died or hangs. The message has each such rank's number and traceback,
                the first to fail first. All ranks are killed, and the next run starts others.
        """
        if not self.ranks:
            self._start()
        call = pickle.dumps((function, args, kwargs))
        for pipe in self.pipes:
            pipe.send_bytes(call)
        end, waiting = time.monotonic() + self.patience, dict(zip(self.pipes, range(self.size), strict=True))
        results: list[Any] = [None] * self.size
        failed: dict[int, str] = {}
        while waiting:
            ready: list[Any] = connection.wait(waiting, max(0, end - time.monotonic()))
            if not ready:
                limit = f"{self.grace} s after another failed" if failed else f"after {self.patience} s"
                for rank in waiting.values():
                    failed[rank] = f"was still running {limit}\n{self._stack(rank)}"
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    results[rank], error = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    self.ranks[rank].join()
                    error = f"died with exit code {self.ranks[rank].exitcode}"
                if error:
                    failed[rank] = error
                    end = min(end, time.monotonic() + self.grace)
        if failed:
            self.stop()
            raise RuntimeError("\n".join(f"rank {rank} of {self.size} {failed[rank]}" for rank in failed))
        return results

    def stop(self) -> None:
        """Kill the ranks."""
        for rank in self.ranks:
            rank.kill()
            rank.join()
        for pipe in self.pipes:
            pipe.close()
        if self.ranks:
            self.folder.cleanup()
        self.ranks, self.pipes = [], []

    def _stack(self, rank: int) -> str:
        """Where a rank was when it was terminated."""
        self.ranks[rank].terminate()
        self.ranks[rank].join(self.grace)
        return Path(self.folder.name, str(rank)).read_text()

    def _start(self) -> None:
        # A server imports what takes long once, and is forked for each rank: 0.1 s instead of 2.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(
            ["torch.distributed.tensor.debug", "thinned.compare.layers", "hypothesis"]
        )
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            mine, theirs = processes.Pipe()
            process = processes.Process(
                target=_serve, args=(theirs, rank, self.size, self.folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self.ranks.append(process)
            self.pipes.append(mine)


def _serve(pipe: connection.Connection, rank: int, size: int, folder: str) -> None:
    """Run what comes through the pipe until it closes."""
    torch.set_num_threads(1)
    stack = Path(folder, str(rank)).open("w")  # noqa: SIM115 (open as long as the process)
    faulthandler.register(signal.SIGTERM, stack, chain=True)
    store = Path(folder, "store").as_uri()
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=patience)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args, kwargs = pickle.loads(call)
            active.key_source = None
            torch.manual_seed(0)
            # Pickled here: Connection.send shares memory, which ends with the process.
            answer = pickle.dumps((function(*args, **kwargs), None))
        except Exception:
            answer = pickle.dumps((None, f"raised\n{traceback.format_exc()}"))
        pipe.send_bytes(answer)
