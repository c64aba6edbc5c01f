"""Training by transformers and by Lightning: a resumed run equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import importlib
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

import thinned
from models import zoo
from thinned import Key
from thinned.key_source import active

STEPS, HALF, BATCH, EPOCH = 8, 5, 4, 6
WORDS = torch.randint(1, zoo.VOCABULARY, (BATCH * EPOCH, 6), generator=torch.Generator().manual_seed(1))
CLASSES = WORDS[:, 0] % 3

pytestmark = pytest.mark.filterwarnings("ignore")  # frameworks warn of much that is not about dropout


class StopError(Exception):
    """A step raises it."""


class Watch:
    """A hook that records whether a key source is active, and the masks; it raises in call ``raise_at``."""

    def __init__(self, raise_at: int = -1) -> None:
        self.seen: list[tuple[bool, bool]] = []
        self.kept: list[Tensor] = []
        self.raise_at = raise_at

    def __call__(self, module: nn.Module, _: Any, y: Tensor) -> None:
        self.seen.append((module.training, active.key_source is not None))
        if module.training:
            self.kept.append(y != 0)
            if len(self.kept) == self.raise_at:
                raise StopError


Result = tuple[list[float], list[Tensor]]


def same(a: Result, b: Result) -> bool:
    return a[0] == b[0] and all(x.equal(y) for x, y in zip(a[1], b[1], strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "accumulated and checkpointed": {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": False},
    },
    "uneven epochs": {"gradient_accumulation_steps": 4},
}


def import_lightning() -> Any:
    return zoo.import_beside_torchvision("lightning.pytorch")


def callback_of(framework: str) -> Any:
    {"transformers": zoo._transformers, "lightning": import_lightning}[framework]()
    return importlib.import_module(f"thinned.models.callbacks.{framework}").AddressCallback


class TestTransformers:
    @pytest.fixture(scope="class")
    def callback(self) -> Any:
        return callback_of("transformers")

    @pytest.fixture
    def trainer(self, tmp_path: Path) -> Callable[..., Any]:
        transformers = zoo._transformers()
        logging.getLogger("transformers").setLevel(logging.ERROR)

        def make(callback: Any = None, seed: int = 0, watch: Watch | None = None, **options: Any) -> Any:
            model = zoo.bert(
                num_labels=3,
                num_hidden_layers=1,
                use_cache=False,
                problem_type="single_label_classification",
            )
            thinned.convert(model)
            if watch is not None:
                model.get_submodule("bert.embeddings.dropout").register_forward_hook(watch)
            arguments = transformers.TrainingArguments(
                str(tmp_path),
                seed=seed,
                data_seed=3,
                max_steps=STEPS,
                save_steps=HALF,
                save_total_limit=None,
                logging_steps=1,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-2,
                use_cpu=True,
                disable_tqdm=True,
                report_to=[],
                **options,
            )
            data = [{"input_ids": row, "labels": kind} for row, kind in zip(WORDS, CLASSES, strict=True)]
            return transformers.Trainer(
                model,
                arguments,
                train_dataset=data,
                eval_dataset=data[:8],
                callbacks=[] if callback is None else [callback(seed=7)],
            )

        return make

    @staticmethod
    def train(trainer: Any, resume: Path | None = None) -> Result:
        with thinned.intercept():
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == STEPS
        return losses, [parameter.detach().clone() for parameter in trainer.model.parameters()]

    def resumed(self, trainer: Callable[..., Any], path: Path, callback: Any, **options: Any) -> bool:
        """Whether a run from the checkpoint, whose random state is gone, is the rest of the whole one."""
        whole = self.train(trainer(callback, **options))
        checkpoint = path / f"checkpoint-{HALF}"
        (checkpoint / "rng_state.pth").unlink()
        return same(self.train(trainer(callback, seed=5, **options), checkpoint), whole)

    @pytest.mark.parametrize("name", OPTIONS)
    def test_resumed(self, name: str, trainer: Callable[..., Any], tmp_path: Path, callback: Any) -> None:
        assert self.resumed(trainer, tmp_path, callback, **OPTIONS[name])

    def test_resumed_without_it(self, trainer: Callable[..., Any], tmp_path: Path) -> None:
        assert not self.resumed(trainer, tmp_path, None)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed(self, reentrant: bool, trainer: Callable[..., Any], callback: Any) -> None:
        options = {"use_reentrant": reentrant, "preserve_rng_state": False}
        runs = [{}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": options}]
        assert same(*(self.train(trainer(callback, **run)) for run in runs))
        assert not same(*(self.train(trainer(**run)) for run in runs))

    def test_evaluation_in_the_middle(self, trainer: Callable[..., Any], callback: Any) -> None:
        runs: list[dict[str, Any]] = [{}, {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True}]
        watch = Watch()
        assert same(*(self.train(trainer(callback, watch=watch, **run)) for run in runs))
        assert set(watch.seen) == {(True, True), (False, False)}
        assert not same(*(self.train(trainer(**run)) for run in runs))

    def test_masks(self, trainer: Callable[..., Any], callback: Any) -> None:
        """The address in the docstring has them; a step's second batch has the sites' second calls."""
        watch = Watch()
        run = trainer(callback, watch=watch, gradient_accumulation_steps=2)
        self.train(run)
        site, shape = "bert.embeddings.dropout", (BATCH, 6, zoo.WIDTH)
        for step in (0, 5):
            address = thinned.address(run.model, seed=7, step=step)
            for call in (0, 1):
                assert watch.kept[2 * step + call].equal(address.mask_of(site, shape, call=call))

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self, trainer: Callable[..., Any], callback: Any) -> None:
        compiled = trainer(callback, torch_compile=True, torch_compile_backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert same(self.train(compiled), self.train(trainer(callback)))

    def test_errors(self, trainer: Callable[..., Any], callback: Any) -> None:
        """The trainer calls no callback then; close(), training or evaluation ends the address."""
        whole = self.train(trainer(callback))
        for after in ("close", "train", "evaluate"):
            run = trainer(callback, watch=Watch(raise_at=3))
            with pytest.raises(StopError):
                self.train(run)
            assert active.key_source is not None, (
                "transformers has learned to end a step: no more need for close"
            )
            if after == "close":
                (own,) = (each for each in run.callback_handler.callbacks if isinstance(each, callback))
                own.close()
            else:
                run.evaluate()
            if after == "train":
                run.model.load_state_dict(trainer().model.state_dict())
                run.optimizer = run.lr_scheduler = None
                assert same(self.train(run), whole)
            assert active.key_source is None
        own, run = callback(seed=7), trainer(watch=Watch(raise_at=3))
        run.add_callback(own)
        with pytest.raises(StopError), contextlib.closing(own):
            self.train(run)
        assert active.key_source is None


class TestLightning:
    @pytest.fixture(scope="class")
    def lightning(self) -> Any:
        found = import_lightning()
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return found

    @pytest.fixture(scope="class")
    def callback(self) -> Any:
        return callback_of("lightning")

    @pytest.fixture
    def run(self, lightning: Any, tmp_path: Path) -> Callable[..., tuple[Result, Any]]:
        class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.net = nn.Sequential(nn.Embedding(zoo.VOCABULARY, 16), nn.Dropout(0.5), nn.Linear(16, 3))
                self.skip_from: int | None = None

            def on_train_batch_start(self, _: Any, batch_idx: int) -> int | None:
                return -1 if batch_idx == self.skip_from else None

            def on_train_epoch_end(self) -> None:
                assert active.key_source is None

            def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
                words, classes = batch
                logits = dropout(self.net(words), 0.1, self.training).mean(1)
                loss = cross_entropy(logits, classes)
                self.losses[self.current_epoch, batch_idx] = loss.item()
                return loss

            def validation_step(self, batch: list[Tensor], _: int) -> None:
                self.net(batch[0])

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

        def loader(**options: Any) -> Any:
            data = torch.utils.data.TensorDataset(WORDS, CLASSES)
            return torch.utils.data.DataLoader(data, batch_size=BATCH, num_workers=0, **options)

        def fit(
            callback: Any = None,
            seed: int = 0,
            watch: Watch | None = None,
            resume: str | None = None,
            skip_from: int | None = None,
            **options: Any,
        ) -> tuple[Result, Any]:
            module = Module()
            module.losses = {}
            module.skip_from = skip_from
            thinned.convert(module)
            if watch is not None:
                module.net[1].register_forward_hook(watch)
            saver = lightning.callbacks.ModelCheckpoint(
                tmp_path, "{step}", save_top_k=-1, every_n_train_steps=options.pop("save", EPOCH)
            )
            trainer = lightning.Trainer(
                max_epochs=3,
                accelerator="cpu",
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=2,
                callbacks=[saver] if callback is None else [saver, callback],
                **({"limit_val_batches": 0} | options),
            )
            torch.manual_seed(seed)
            with thinned.intercept():
                trainer.fit(module, loader(), loader(), ckpt_path=resume)
            return (module.losses, [p.detach() for p in module.parameters()]), module

        return fit

    @staticmethod
    def resumed(
        run: Callable[..., tuple[Result, Any]], path: Path, make: Callable[[], Any], **options: Any
    ) -> bool:
        """Whether a run from the end of the first epoch is the rest of the whole one."""
        steps = EPOCH // options.get("accumulate_grad_batches", 1)
        (losses, parameters), _ = run(make(), save=steps, **options)
        again, _ = run(make(), seed=5, resume=str(path / f"step={steps}.ckpt"), **options)
        rest = {place: loss for place, loss in losses.items() if place[0] > 0}
        assert len(rest) == 2 * EPOCH
        return same(again, (rest, parameters))

    @pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
    def test_resumed(
        self, options: dict[str, Any], run: Callable[..., Any], tmp_path: Path, callback: Any
    ) -> None:
        assert self.resumed(run, tmp_path, lambda: callback(seed=7), **options)

    def test_resumed_without_it(self, run: Callable[..., Any], tmp_path: Path) -> None:
        assert not self.resumed(run, tmp_path, lambda: None)

    def test_masks_resumed_within_an_epoch(
        self, run: Callable[..., Any], tmp_path: Path, callback: Any
    ) -> None:
        """Lightning continues to count batches, though it begins again with the data."""
        whole, rest = Watch(), Watch()
        run(callback(seed=7), watch=whole, save=8)
        run(callback(seed=7), watch=rest, resume=str(tmp_path / "step=8.ckpt"))
        assert len(rest.kept) == 3 * EPOCH - 8
        assert all(a.equal(b) for a, b in zip(rest.kept, whole.kept[8:], strict=True))

    def test_validation_in_the_middle(self, run: Callable[..., Any], callback: Any) -> None:
        options = {"val_check_interval": 2, "limit_val_batches": 2}
        watch = Watch()
        assert same(run(callback(seed=7))[0], run(callback(seed=7), watch=watch, **options)[0])
        assert set(watch.seen) == {(True, True), (False, False)}

    def test_masks(self, run: Callable[..., Any], callback: Any) -> None:
        """The address in the docstring has them."""
        watch = Watch()
        _, module = run(callback(seed=7), watch=watch)
        for epoch, batch in ((0, 0), (0, 4), (2, 4)):
            address = thinned.address(module, seed=Key(7).fold(epoch), step=batch)
            assert watch.kept[EPOCH * epoch + batch].equal(address.mask_of("net.1", (BATCH, 6, 16)))

    def test_errors_and_skipped_epochs(self, run: Callable[..., Any], callback: Any) -> None:
        with pytest.raises(StopError):
            run(callback(seed=7), watch=Watch(raise_at=3))
        assert active.key_source is None
        watch = Watch()
        run(callback(seed=7), watch=watch, skip_from=2, limit_val_batches=1)
        assert watch.seen.count((True, True)) == 6
        assert set(watch.seen) == {(True, True), (False, False)}
        assert active.key_source is None


@pytest.mark.parametrize("name", ["transformers", "lightning"])
def test_a_seed(name: str) -> None:
    callback = callback_of(name)
    assert callback(seed=7).seed == callback(seed=Key(7)).seed == Key(7)
    with pytest.raises(TypeError, match="seed must be an integer, got 'seven'"):
        callback(seed="seven")
    assert pickle.loads(pickle.dumps(callback(seed=7))).seed == Key(7)


class Mesh:
    """A mesh by the names of its dimensions."""

    def __init__(self, *names: str) -> None:
        self.mesh_dim_names = names

    def __getitem__(self, names: str | tuple[str, ...]) -> str:
        assert set(names if isinstance(names, tuple) else (names,)) <= set(self.mesh_dim_names)
        return f"mesh of {names}"


@pytest.mark.parametrize(
    ("given", "mesh", "replicas"),
    [
        ("auto", None, "auto"),
        ("auto", Mesh("dp_shard", "tp"), "mesh of ('dp_shard',)"),
        ("auto", Mesh("dp_replicate", "dp_shard", "cp", "tp"), "mesh of ('dp_replicate', 'dp_shard', 'cp')"),
        ("auto", Mesh("tp"), None),
        (5, Mesh("dp_shard", "tp"), 5),
        (None, Mesh("dp_shard", "tp"), None),
    ],
)
def test_replicas_of_transformers(
    given: Any, mesh: Mesh | None, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor-parallel processes compute one replica, by the mesh that accelerate made."""
    own = callback_of("transformers")(seed=7, data_parallel=given)
    module = importlib.import_module("thinned.models.callbacks.transformers")
    addresses = mock.Mock()
    monkeypatch.setattr(module, "address", addresses)
    monkeypatch.setattr(module, "is_initialized", lambda: True)
    monkeypatch.setattr(module, "AcceleratorState", lambda: SimpleNamespace(device_mesh=mesh))
    own.on_train_begin(None, SimpleNamespace(global_step=3), None, model="model")
    addresses.assert_called_once_with("model", seed=Key(7), step=3, data_parallel=replicas)
    addresses.return_value.check_agreement.assert_called_once_with()


@pytest.mark.parametrize(
    ("given", "parallel", "replicas"),
    [("auto", False, "auto"), ("auto", True, "mesh of data_parallel"), (5, True, 5), (None, True, None)],
)
def test_replicas_of_lightning(
    given: Any, parallel: bool, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = callback_of("lightning")(seed=7, data_parallel=given)
    module = importlib.import_module("thinned.models.callbacks.lightning")
    addresses = mock.Mock()
    monkeypatch.setattr(module, "address", addresses)
    strategy: Any = mock.Mock()
    if parallel:
        strategy = module.ModelParallelStrategy()
        strategy._device_mesh = Mesh("data_parallel", "tensor_parallel")
    own.on_train_start(SimpleNamespace(strategy=strategy, current_epoch=2), "module")
    addresses.assert_called_once_with("module", seed=Key(7).fold(2), step=0, data_parallel=replicas)
    addresses.return_value.check_agreement.assert_called_once_with()
