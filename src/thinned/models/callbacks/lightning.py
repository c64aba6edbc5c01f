"""Masks by address in the ``Trainer`` of Lightning."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lightning.pytorch import Callback

from thinned.keys import Key
from thinned.models.address import address

__all__ = ["AddressCallback"]


class AddressCallback(Callback):
    r"""Each training batch of a Lightning ``Trainer`` within :func:`thinned.address`.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(epoch).\text{fold}(batch\_idx).\text{fold}(site)

    ``epoch`` is the trainer's ``current_epoch``, ``batch_idx`` what ``training_step`` is given, and sites are
    paths in the ``LightningModule``. So training that is resumed with ``ckpt_path=`` has the masks of the
    uninterrupted run, and validation in the middle does not shift them. An error ends the address as the end
    of the batch does. Another batch size has other masks.

    Each process of a distributed run has the same masks for its own batches, unless it is given a seed of its
    own, such as ``Key(7).fold(rank)``. Tensor-parallel processes need the same.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large.

    Example, for a model that somebody else wrote::

        thinned.convert(module)
        trainer = Trainer(callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.fit(module, data, ckpt_path="last")
        thinned.address(module, seed=Key(7).fold(epoch), step=batch_idx).mask_of("model.dropout", (8, 32))
    """

    def __init__(self, seed: int | Key) -> None:
        self.seed = seed if isinstance(seed, Key) else Key(seed)
        self._batch = ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Enter the address of the batch."""
        self._batch.close()
        seed = self.seed.fold(trainer.current_epoch)
        self._batch.enter_context(address(pl_module, seed=seed, step=batch_idx))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the batch, if one is running."""
        self._batch.close()

    # A module that skips the rest of an epoch ends it without the end of the batch.
    on_train_batch_end = on_train_epoch_end = on_exception = teardown = close
