"""Pipeline stages on several ranks have the masks of one process that runs the whole batch."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, SplitPoint, pipeline
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.utils.checkpoint import checkpoint

import thinned
from distributed.world import World
from thinned.key_source import active

BATCH, WIDTH, LAYERS = 8, 6, 4
IDS = torch.tensor([40, 7, 2**62, -1, 12, 13, 14, 15])
Gradients = dict[str, Tensor]


class Block(nn.Module):
    """Calls one dropout twice, and one as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), thinned.Dropout(0.3)
        self.path = thinned.DropPath(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.linear(self.dropout(x)).tanh())
        return x + self.path(thinned.functional.dropout(y, 0.1))


class Model(nn.Module):
    """Some layers of a model; the first stage has ``embed`` too, and the last ``head``."""

    def __init__(self, layers: range = range(LAYERS), checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: Any = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleDict({str(number): Block() for number in range(LAYERS)})
        self.head: Any = nn.Sequential(thinned.Dropout(0.5), nn.Linear(WIDTH, 3))
        if 0 not in layers:
            self.embed = None
        if LAYERS - 1 not in layers:
            self.head = None
        for number in set(range(LAYERS)) - set(layers):
            del self.layers[str(number)]
        self.checkpointed = checkpointed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            options: Any = {"use_reentrant": False, "preserve_rng_state": False}
            x = checkpoint(layer, x, **options) if self.checkpointed else layer(x)
        return x if self.head is None else self.head(x)


class Chain(nn.Module):
    """Layers that torch.distributed.pipelining can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, WIDTH, dtype=torch.float64), torch.randn(BATCH, 3, dtype=torch.float64)


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().sum()


def gradients(*models: nn.Module) -> Gradients:
    found = {}
    for model in models:
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name.removeprefix("_orig_mod.")] = parameter.grad.clone()
        model.zero_grad()
    return found


def in_one_process(steps: int) -> list[tuple[Tensor, Gradients]]:
    model, (x, target) = Model(), batch()
    seen = []
    for step in range(steps):
        with thinned.address(model, seed=7, step=step, samples=IDS):
            y = model(x)
        loss(y, target).backward()
        seen.append((y.detach(), gradients(model)))
    return seen


def stages_of(rank: int, size: int, name: str) -> list[range]:
    """The layers of each stage of a rank."""
    if name in ("GPipe", "1F1B"):
        return [range(LAYERS)[rank * LAYERS // size : (rank + 1) * LAYERS // size]]
    second = 2 * size - 1 - rank if name in ("ZBVZeroBubble", "DualPipeV") else rank + size
    each = LAYERS // (2 * size)
    return [range(LAYERS)[stage * each : (stage + 1) * each] for stage in (rank, second)]


class Pipeline:
    """A schedule with the stages of one rank."""

    def __init__(
        self, name: str, microbatches: int, checkpointed: bool = False, compiled: bool = False
    ) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        layers = stages_of(rank, size, name)
        self.models: list[Any] = [Model(each, checkpointed) for each in layers]
        if compiled:
            self.models = [torch.compile(model, backend="eager", fullgraph=True) for model in self.models]
        self.first, self.microbatches = rank == 0, microbatches
        count = size * len(layers)
        stages: Any = [
            PipelineStage(model, each.start * count // LAYERS, count, torch.device("cpu"))
            for model, each in zip(self.models, layers, strict=True)
        ]
        self.schedule: Any = get_schedule_class(name)(
            stages if len(stages) > 1 else stages[0], microbatches, loss_fn=loss, scale_grads=False
        )

    def step(self, step: int, method: str = "step", **arguments: Any) -> Tensor | None:
        """The output, in the rank with the last stage."""
        x, target = batch()
        with ExitStack() as stack:
            for model in self.models:
                stack.enter_context(thinned.address(model, seed=7, step=step, **arguments))
            y: Tensor | None = getattr(self.schedule, method)(*[x] * self.first, target=target)
        assert active.key_source is None
        return y

    def by_ids(self, step: int, method: str = "step") -> Tensor | None:
        return self.step(step, method, samples=IDS, microbatches=self.microbatches)


def trained(*schedule: Any) -> list[tuple[Tensor | None, Gradients]]:
    """In two steps; the stages run their modules once more before the first."""
    run = Pipeline(*schedule)
    return [(run.by_ids(step), gradients(*run.models)) for step in range(2)]


def evaluated() -> tuple[Tensor | None, Tensor | None]:
    """Twice by a schedule that runs no backward pass, while the model drops."""
    run = Pipeline("GPipe", 4)
    return run.by_ids(0, "eval"), run.by_ids(1, "eval")


def without_ids(*steps: int) -> Gradients:
    """The gradients of the last step."""
    run = Pipeline("1F1B", 4)
    for step in steps:
        run.step(step)
        found = gradients(*run.models)
    return found


SCHEDULES = [
    ("GPipe", 1), ("GPipe", 8), ("1F1B", 4), ("Interleaved1F1B", 4), ("LoopedBFS", 2),
    ("InterleavedZeroBubble", 4), ("ZBVZeroBubble", 4), ("DualPipeV", 4),
]  # fmt: skip
two_ranks = pytest.mark.parametrize("world", [2], indirect=True)


def check(world: World, *schedule: Any) -> None:
    ranks = world.run(trained, *schedule)
    for step, (y, grads) in enumerate(in_one_process(2)):
        (output,) = (rank[step][0] for rank in ranks if rank[step][0] is not None)
        assert output.allclose(y, atol=1e-12)
        found = {name: grad for rank in ranks for name, grad in rank[step][1].items()}
        assert found.keys() == grads.keys()
        assert [name for name in grads if not found[name].allclose(grads[name], atol=1e-12)] == []


@two_ranks
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize(("name", "microbatches"), SCHEDULES)
def test_a_schedule(world: World, name: str, microbatches: int, checkpointed: bool) -> None:
    check(world, name, microbatches, checkpointed)


@two_ranks
@pytest.mark.slow
def test_compiled_stages(world: World) -> None:
    """The code that infers shapes is compiled code of a microbatch."""
    check(world, "1F1B", 4, False, True)


@pytest.mark.parametrize("world", [4], indirect=True)
def test_four_stages(world: World) -> None:
    check(world, "1F1B", 8)


@two_ranks
def test_a_schedule_in_evaluation(world: World) -> None:
    (first,) = (each for each in world.run(evaluated) if each[0] is not None)
    for y, (expected, _) in zip(first, in_one_process(2), strict=True):
        assert y is not None
        assert y.allclose(expected, atol=1e-12)


@two_ranks
def test_a_stage_that_infers_shapes_counts_no_calls(world: World) -> None:
    """Without ids masks are by call. A run that resumes infers shapes at another step."""
    for whole, resumed in zip(world.run(without_ids, 0, 1), world.run(without_ids, 1), strict=True):
        assert all(whole[name].equal(resumed[name]) for name in whole)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of PyTorch, as it traces
def test_a_traced_stage_is_refused() -> None:
    """Its graph draws keys, so that its masks would not be those of the address."""
    split = {"layers.1": SplitPoint.BEGINNING}
    stage = pipeline(Chain(), mb_args=(torch.ones(2, WIDTH),), split_spec=split).get_stage_module(0)
    with pytest.raises(TypeError, match="a graph that draws its keys"):
        thinned.address(stage, seed=7, step=0)
