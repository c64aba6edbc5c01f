"""Masks by address in the ``Trainer`` of Lightning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from thinned.distributed.ranks import DataParallel
from thinned.keys import Key, key_of_seed
from thinned.models.address import Address, address

__all__ = ["AddressCallback"]


class AddressCallback(Callback):
    r"""Run each training batch of a Lightning ``Trainer`` within :func:`thinned.address`.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(epoch).\text{fold}(batch\_idx)
        \;[.\text{fold}(\text{"\#data parallel"}).\text{fold}(replica)].\text{fold}(site)

    ``epoch`` is the trainer's ``current_epoch``, ``batch_idx`` the argument of ``training_step``, and sites
    are paths in the ``LightningModule``. Training that resumes with ``ckpt_path=`` has the masks of the
    uninterrupted run, and validation in between does not change them. Another batch size has other masks. An
    error ends the address, as the end of the batch does.

    In a distributed run each data-parallel replica has other masks, and the processes of a tensor-parallel
    group have the same. Every process needs the callback with the same seed: at the beginning of the training
    all compare their seeds, see :meth:`thinned.Address.check_agreement`.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.
        data_parallel: as for :func:`thinned.address`. ``"auto"`` takes the dimension ``"data_parallel"`` of
            the mesh of a ``ModelParallelStrategy``. ``None`` gives all processes the same masks.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large; or ``data_parallel``, at the first batch.
        RuntimeError: at the beginning of the training, where processes disagree on the seed or the epoch.

    Example, for a model that somebody else wrote::

        module = thinned.convert(module)
        trainer = Trainer(callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.fit(module, data, ckpt_path="last")
        thinned.address(module, seed=Key(7).fold(epoch), step=batch_idx).mask_of("model.dropout", (8, 32))
    """

    def __init__(self, seed: int | Key, data_parallel: DataParallel = "auto") -> None:
        self.seed = key_of_seed(seed)
        self.data_parallel = data_parallel
        self._batch = ExitStack()

    def _address(self, trainer: Any, pl_module: Any, batch_idx: int) -> Address:
        replicas = self.data_parallel
        if replicas == "auto" and isinstance(trainer.strategy, ModelParallelStrategy):
            replicas = trainer.strategy.device_mesh["data_parallel"]
        seed = self.seed.fold(trainer.current_epoch)
        return address(pl_module, seed=seed, step=batch_idx, data_parallel=replicas)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compare the seed with that of the other processes."""
        self._address(trainer, pl_module, 0).check_agreement()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Enter the address of the batch."""
        self._batch.close()
        self._batch.enter_context(self._address(trainer, pl_module, batch_idx))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the batch, if there is one."""
        self._batch.close()

    # A module that skips the rest of an epoch gets no on_train_batch_end.
    on_train_batch_end = on_train_epoch_end = on_exception = teardown = close
