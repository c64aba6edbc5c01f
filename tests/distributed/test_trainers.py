"""Training by transformers and by Lightning in two processes, whose replicas have other masks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import thinned
from distributed.world import World
from models import zoo
from models.address.test_callbacks import WORDS, Watch, callback_of, import_lightning
from thinned import Key

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # frameworks warn of much that is not about dropout
]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Processes of its own, in which frameworks leave variables and singletons."""
    world = World(2)
    yield world
    world.stop()


def as_torchrun(rank: int) -> None:
    """The variables by which frameworks find the process group that there is."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def train_transformers(folder: str, seeds: tuple[int, int] = (7, 7)) -> tuple[list[Tensor], bool]:
    """The masks of a layer in two steps, and whether the address in the docstring has them."""
    rank = dist.get_rank()
    as_torchrun(rank)
    callback, transformers, watch = callback_of("transformers"), zoo._transformers(), Watch()
    model = zoo.bert(num_labels=3, num_hidden_layers=1, use_cache=False)
    thinned.convert(model)
    model.get_submodule("bert.embeddings.dropout").register_forward_hook(watch)
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    data = [{"input_ids": row, "labels": row[0] % 3} for row in WORDS]
    run = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback(seed=seeds[rank])])
    assert run.accelerator.num_processes == 2
    run.train()
    assert isinstance(run.model_wrapped, nn.parallel.DistributedDataParallel)
    address = thinned.address(run.model, seed=seeds[rank], step=1)
    again = address.mask_of("bert.embeddings.dropout", watch.kept[1].shape)
    return watch.kept, watch.kept[1].equal(again)


def test_transformers(world: World, tmp_path: Path) -> None:
    (first, looked_up), (second, too) = world.run(train_transformers, str(tmp_path))
    assert looked_up
    assert too
    assert len(first) == len(second) == 2
    assert not any(a.equal(b) for a, b in zip(first, second, strict=True))


def test_seeds_that_disagree(world: World, tmp_path: Path) -> None:
    """Both ranks raise before the first step."""
    with pytest.raises(RuntimeError) as error:
        world.run(train_transformers, str(tmp_path), seeds=(7, 8))
    message = r"RuntimeError: ranks 0 and 1 disagree on seed: Key(7) and Key(8)"
    assert str(error.value).count(message) == 2


def train_lightning() -> tuple[list[Tensor], bool]:
    rank = dist.get_rank()
    as_torchrun(rank)
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    callback, lightning, watch = callback_of("lightning"), import_lightning(), Watch()

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 6), thinned.Dropout(0.5))

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(batch.float()).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    module.net[1].register_forward_hook(watch)
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback(seed=7)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(WORDS, batch_size=2))
    assert (trainer.world_size, trainer.global_rank) == (2, rank)
    address = thinned.address(module, seed=Key(7).fold(0), step=1)
    return watch.kept, watch.kept[1].equal(address.mask_of("net.1", (2, 6)))


def test_lightning(world: World) -> None:
    (first, looked_up), (second, too) = world.run(train_lightning)
    assert looked_up
    assert too
    assert len(first) == len(second) == 2
    assert not any(a.equal(b) for a, b in zip(first, second, strict=True))
