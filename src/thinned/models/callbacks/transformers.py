"""Masks by address in the ``Trainer`` of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainerCallback

from thinned.distributed.ranks import DataParallel
from thinned.keys import Key, key_of_seed
from thinned.models.address import Address, address

__all__ = ["AddressCallback"]


class AddressCallback(TrainerCallback):
    r"""Run each step of a ``Trainer`` within :func:`thinned.address`, with its ``global_step`` as ``step``.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(global\_step)\;[.\text{fold}(\text{"\#data parallel"})
        .\text{fold}(replica)].\text{fold}(site)

    Sites are paths in ``trainer.model``; their calls are counted over all batches that a step accumulates.
    Training that resumes with ``resume_from_checkpoint`` has the masks of the uninterrupted run, also without
    the checkpoint's random state. Evaluation in between, ``gradient_checkpointing`` and ``torch_compile`` do
    not change them. Another batch size has other masks, because the trainer gives samples no ids.

    - The trainer calls no callback when a step raises. The step's address then stays active in this thread
      until :meth:`close`, or until that trainer trains or evaluates again. A process that continues after
      such an error should train with ``with contextlib.closing(callback): trainer.train()``.
    - In a distributed run each data-parallel replica has other masks, and the processes of a tensor-parallel
      group have the same. The replicas of ``torch.nn.DataParallel``, which a Trainer uses if one process sees
      several GPUs, have the same masks.
    - Every process needs the callback with the same seed: at the beginning of the training all compare seed
      and step, see :meth:`thinned.Address.check_agreement`.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.
        data_parallel: as for :func:`thinned.address`. ``"auto"`` first looks at the mesh of accelerate's
            ``ParallelismConfig``, in which ``dp_replicate``, ``dp_shard``, ``cp`` and ``sp`` distinguish
            replicas and ``tp`` does not. ``None`` gives all processes the same masks.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large; or ``data_parallel``, at the first step.
        RuntimeError: at the beginning of the training, where processes disagree on the seed or the step.

    Example, for a model that somebody else wrote::

        model = thinned.convert(model)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.train(resume_from_checkpoint=True)
        thinned.address(model, seed=7, step=100).mask_of("bert.embeddings.dropout", (8, 12, 32))
    """

    def __init__(self, seed: int | Key, data_parallel: DataParallel = "auto") -> None:
        self.seed = key_of_seed(seed)
        self.data_parallel = data_parallel
        self._step = ExitStack()

    def _address(self, model: Any, state: Any) -> Address:
        replicas = _replicas() if self.data_parallel == "auto" else self.data_parallel
        return address(model, seed=self.seed, step=state.global_step, data_parallel=replicas)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Leave the address of an earlier training, and compare seed and step with the other processes."""
        self._step.close()
        self._address(kwargs["model"], state).check_agreement()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Enter the address of ``state.global_step``."""
        self._step.close()
        self._step.enter_context(self._address(kwargs["model"], state))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the step, if there is one; for use after an error."""
        self._step.close()

    on_step_end = on_epoch_end = on_train_end = on_prediction_step = close


def _replicas() -> DataParallel:
    """The mesh of accelerate without its tensor-parallel dimension; "auto" if accelerate has no mesh."""
    mesh = getattr(AcceleratorState(), "device_mesh", None) if is_initialized() else None
    if mesh is None:
        return "auto"
    names = tuple(name for name in mesh.mesh_dim_names if name != "tp")
    return mesh[names] if names else None
