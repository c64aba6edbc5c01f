"""Masks by address in the ``Trainer`` of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from transformers import TrainerCallback

from thinned.keys import Key, key_of_seed
from thinned.models.address import address

__all__ = ["AddressCallback"]


class AddressCallback(TrainerCallback):
    r"""Run each step of a ``Trainer`` within :func:`thinned.address`, with its ``global_step`` as ``step``.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(global\_step).\text{fold}(site)

    Sites are paths in ``trainer.model``; their calls are counted over all batches that a step accumulates.
    Training that resumes with ``resume_from_checkpoint`` has the masks of the uninterrupted run, also without
    the checkpoint's random state. Evaluation in between, ``gradient_checkpointing`` and ``torch_compile`` do
    not change them. Another batch size has other masks, because the trainer gives samples no ids.

    - The trainer calls no callback when a step raises. The step's address then stays active in this thread
      until :meth:`close`, or until that trainer trains or evaluates again. A process that continues after
      such an error should train with ``with contextlib.closing(callback): trainer.train()``.
    - All processes of a distributed run have the same masks, as tensor parallelism needs, and so have the
      replicas of ``torch.nn.DataParallel``, which a Trainer uses if one process sees several GPUs. For
      different masks give each process a seed of its own, such as ``Key(7).fold(rank)``.

    Args:
        seed: of the run: an integer, or a :class:`~thinned.Key`.

    Raises:
        TypeError, ValueError: ``seed`` is no integer, or too large.

    Example, for a model that somebody else wrote::

        model = thinned.convert(model)
        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[AddressCallback(seed=7)])
        with thinned.intercept():
            trainer.train(resume_from_checkpoint=True)
        thinned.address(model, seed=7, step=100).mask_of("bert.embeddings.dropout", (8, 12, 32))
    """

    def __init__(self, seed: int | Key) -> None:
        self.seed = key_of_seed(seed)
        self._step = ExitStack()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Enter the address of ``state.global_step``."""
        self._step.close()
        self._step.enter_context(address(kwargs["model"], seed=self.seed, step=state.global_step))

    def close(self, *_: Any, **__: Any) -> None:
        """Leave the address of the step, if there is one; for use after an error."""
        self._step.close()

    on_step_end = on_epoch_end = on_train_begin = on_train_end = on_prediction_step = close
