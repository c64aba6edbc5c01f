"""Masks by address in the ``Trainer`` of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from thinned.keys import Key
from thinned.models.address import address

__all__ = ["AddressCallback"]


class AddressCallback(TrainerCallback):
    r"""Each step of a ``Trainer`` within :func:`thinned.address`, with its ``global_step`` as ``step``.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(global\_step).\text{fold}(site)

    Sites are paths in ``trainer.model``, and their calls are counted through all the batches that a step
    accumulates. So training that ``resume_from_checkpoint`` continues has the masks of the uninterrupted run,
    also without the checkpoint's random state; evaluation in the middle does not shift them, nor does
    ``gradient_checkpointing`` or ``torch_compile``. The trainer does not tell who the samples of a batch are,
    so another batch size has other masks.

    - A step that raises ends without its callback being told. What thinned does in this thread then keeps the
      step's address until :meth:`close`, or until that trainer trains or evaluates again. A process that goes
      on after such an error trains with ``with contextlib.closing(callback): trainer.train()``.
    - Each process of a distributed run has the same masks for its own batches, unless it is given a seed of
      its own, such as ``Key(7).fold(rank)``. Tensor-parallel processes need the same.
    - So have the replicas of ``torch.nn.DataParallel``, which a Trainer uses where one process sees several
      GPUs.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large.

    Example, for a model that somebody else wrote::

        thinned.convert(model)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.train(resume_from_checkpoint=True)
        thinned.address(model, seed=7, step=100).mask_of("bert.embeddings.dropout", (8, 12, 32))
    """

    def __init__(self, seed: int | Key) -> None:
        self.seed = seed if isinstance(seed, Key) else Key(seed)
        self._step = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Enter the address of ``state.global_step``."""
        self._step.close()
        self._step.enter_context(address(kwargs["model"], seed=self.seed, step=state.global_step))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the step, if one is running; for use after an error."""
        self._step.close()

    on_step_end = on_epoch_end = on_train_begin = on_train_end = on_prediction_step = close
