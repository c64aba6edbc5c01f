"""Masks by address in the ``Trainer`` of Lightning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback

from thinned.keys import Key, key_of_seed
from thinned.models.address import address

__all__ = ["AddressCallback"]


class AddressCallback(Callback):
    r"""Run each training batch of a Lightning ``Trainer`` within :func:`thinned.address`.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(epoch).\text{fold}(batch\_idx).\text{fold}(site)

    ``epoch`` is the trainer's ``current_epoch``, ``batch_idx`` the argument of ``training_step``, and sites
    are paths in the ``LightningModule``. Training that resumes with ``ckpt_path=`` has the masks of the
    uninterrupted run, and validation in between does not change them. Another batch size has other masks. An
    error ends the address, as the end of the batch does.

    All processes of a distributed run have the same masks, as tensor parallelism needs. For different masks
    give each process a seed of its own, such as ``Key(7).fold(rank)``.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large.

    Example, for a model that somebody else wrote::

        module = thinned.convert(module)
        trainer = Trainer(callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.fit(module, data, ckpt_path="last")
        thinned.address(module, seed=Key(7).fold(epoch), step=batch_idx).mask_of("model.dropout", (8, 32))
    """

    def __init__(self, seed: int | Key) -> None:
        self.seed = key_of_seed(seed)
        self._batch = ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Enter the address of the batch."""
        self._batch.close()
        seed = self.seed.fold(trainer.current_epoch)
        self._batch.enter_context(address(pl_module, seed=seed, step=batch_idx))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the batch, if there is one."""
        self._batch.close()

    # A module that skips the rest of an epoch gets no on_train_batch_end.
    on_train_batch_end = on_train_epoch_end = on_exception = teardown = close
