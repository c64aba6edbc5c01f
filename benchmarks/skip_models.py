"""Models of timm, torchvision and transformers after ``thinned.convert(model, skip=True)``.

For each model: its DropPaths that skip and those that do not, with the reason; the largest difference of
outputs and gradients to the masked form, in float64, under one address; and the CPU time of a training step.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import thinned
from benchmarks import record
from benchmarks.case import Bound, Case, Work
from thinned.compare.figures import duration
from thinned.compare.timing import load
from thinned.models.convert.skip import skippable

P, SMALL = 0.4, 1e-3


@dataclass(frozen=True)
class Model:
    """A model of a library, by name, and the images that it gets."""

    library: str
    name: str
    size: int = 64
    batch: int = 16
    arguments: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The model with random weights, and with p = 0.4 in each of the library's own DropPaths."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _with_p(MAKERS[self.library](self).train(), P)


def _of_timm(model: Model) -> nn.Module:
    import timm

    made: nn.Module = timm.create_model(model.name, drop_path_rate=P, num_classes=10, **model.arguments)
    return made


def _of_torchvision(model: Model) -> nn.Module:
    import torchvision

    made: nn.Module = torchvision.models.get_model(model.name, num_classes=10, **model.arguments)
    return made


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images).logits


def _of_transformers(model: Model) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{model.name}Config")(
        drop_path_rate=P, image_size=model.size, num_labels=10, **model.arguments
    )
    return _Logits(getattr(transformers, f"{model.name}ForImageClassification")(config))


MAKERS: dict[str, Callable[[Model], nn.Module]] = {
    "timm": _of_timm,
    "torchvision": _of_torchvision,
    "transformers": _of_transformers,
}
THIN = {"hidden_size": 192, "num_attention_heads": 3}
MODELS = (
    Model("timm", "vit_tiny_patch16_224", 128, arguments={"img_size": 128}),
    Model("timm", "eva02_tiny_patch14_224", 112, arguments={"img_size": 112}),
    Model("timm", "cait_xxs24_224", 128, 8, {"img_size": 128}),
    Model("timm", "convnext_atto", 96),
    Model("timm", "pvt_v2_b0", 96),
    Model("timm", "mixer_s32_224", 224, 8),
    Model("timm", "caformer_s18", batch=8),
    Model("timm", "efficientnet_b0"),
    Model("torchvision", "convnext_tiny", batch=8),
    Model("torchvision", "swin_t", batch=8),
    Model("transformers", "Dinov2", 112, 8, THIN),
    Model("transformers", "Beit", 112, 8, THIN | {"intermediate_size": 768}),
    Model("transformers", "Swin", arguments={"window_size": 2}),
)


def _with_p(model: nn.Module, p: float) -> nn.Module:
    """The model with ``p`` in all of its DropPaths. A first block that has none stays without."""
    for module in model.modules():
        if type(module).__name__.endswith(("DropPath", "StochasticDepth")):
            setattr(module, "p" if hasattr(module, "p") else "drop_prob", p)
    return model


def _cpu_clock(call: Callable[[], object], repeats: int) -> float:
    """CPU time, to which other programs on the machine add less than to the time of a clock."""
    start = time.process_time()
    for _ in range(repeats):
        call()
    return (time.process_time() - start) / repeats


def step(model: nn.Module, x: Tensor) -> Tensor:
    """A forward pass and a backward pass that gives each parameter its gradient."""
    model.zero_grad()
    y: Tensor = model(x)
    y.square().sum().backward()
    return y


def difference(model: nn.Module, x: Tensor) -> float:
    """The largest difference of outputs and gradients between the masked and the skipping form.

    It is in units of the tensor's largest value. Both forms have float64, one address, a sample's ids, and
    parameters that are far from 0, as LayerScale's are not.
    """
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < SMALL:
                parameter.normal_(0, 0.5)
    masked, skipping = (
        _outcome(thinned.convert(model, skip=skip, inplace=False), x) for skip in (False, True)
    )
    # A bias before a normalization has gradients of rounding errors alone.
    least = 1e-6 * max(float(value.abs().max()) for value in masked)
    pairs = zip(masked, skipping, strict=True)
    return max(float((a - b).abs().max()) / max(float(a.abs().max()), least) for a, b in pairs)


def _outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the parameters."""
    inputs = x.double().requires_grad_()
    with thinned.address(model, seed=7, step=1, samples=torch.arange(len(x)) + 100):
        y = step(model, inputs)
    leaves = (inputs, *model.parameters())
    return [y.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def _work(model: Model) -> Work:
    theirs = model.make()
    forms = {
        "p = 0": _with_p(model.make(), 0.0),
        model.library: theirs,
        "thinned, masked": thinned.convert(theirs, inplace=False),
        "thinned": thinned.convert(theirs, skip=True, inplace=False),
    }
    x = torch.randn(model.batch, 3, model.size, model.size)
    return {name: partial(step, form, x) for name, form in forms.items()}


def _case(model: Model, rounds: int) -> Case:
    about = f"{model.library} {version(model.library)} {model.name}"
    return Case(
        "convert(skip=True), CPU time of a training step",
        f"{about}, {model.batch} x 3 x {model.size} x {model.size}, p = {P}",
        partial(_work, model),
        (Bound("thinned, masked", 1),),
        rounds=rounds,
        elements=model.batch,
        clock=_cpu_clock,
    )


def main(
    only: Annotated[str, typer.Option(help="run only models whose library or name contains this")] = "",
    rounds: Annotated[int, typer.Option(help="steps of each form")] = 5,
    save: Annotated[bool, typer.Option(help="append to benchmarks/results.csv")] = True,
) -> None:
    """Print a table, and why DropPaths stay masked; append the times to results.csv."""
    logging.getLogger("thinned").setLevel("ERROR")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 150)
    table = Table(
        "model", "batch", "sites", "difference", "p = 0", "library's", "masked", "skipping", "ratio"
    )
    reasons: list[str] = []
    for model in track(MODELS, "measuring", console=Console(stderr=True)):
        if only not in f"{model.library} {model.name}":
            continue
        made = model.make()
        sites = [site for block in made.modules() for site in skippable(block)]
        refused = Counter(site.reason for site in sites if site.reason)
        reasons += [f"{model.library} {model.name}: {n} x {reason}" for reason, n in refused.items()]
        about = [f"{model.library} {model.name}", f"{model.batch} x {model.size}²"]
        about += [f"{len(sites) - refused.total()} of {len(sites)}"]
        about += [f"{difference(made, torch.randn(6, 3, model.size, model.size)):.1e}"]
        if refused.total() < len(sites):
            result = _case(model, rounds).run()
            about += [duration(result.nanoseconds(name) * model.batch / 1e9) for name in result.seconds]
            about += [f"{1 / result.ratio('thinned', 'thinned, masked'):.2f}x"]
            if save:
                record.append(record.timed(result, record.on_cpu(result.case)))
        table.add_row(*about)
    console.print(table)
    console.print(*reasons, sep="\n")
    console.print(f"1 thread, load of the machine at the end {load()} a core, PyTorch {torch.__version__}")


if __name__ == "__main__":
    typer.run(main)
