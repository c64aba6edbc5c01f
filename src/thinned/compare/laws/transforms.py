"""What PyTorch does to a layer: compile it, map it over examples, copy it, save it."""

from __future__ import annotations

import copy
import pickle

import torch
from torch import Tensor, nn

from thinned.compare.laws.law import HALF, Finding, Law, holds_if, nothing_wrong
from thinned.compare.laws.values import departure
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject

__all__ = ["LAWS"]


def compiled(subject: Subject, settings: Settings) -> Finding:
    """No graph break, a valid result, a new mask each call, and the forward's mask in backward.

    The default compiler takes seconds a layer; --quick stops at the graphs that it would be given.
    """
    torch.compiler.reset()
    layer = torch.compile(
        subject.make(HALF), fullgraph=True, backend="aot_eager" if settings.quick else "inductor"
    )
    x = settings.normal(20, 50).requires_grad_()
    y, another = layer(x), layer(x)
    (downstream,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.compiler.reset()
    complaint = departure(y.detach(), x.detach()) or departure(downstream, torch.ones_like(x), kept=y != 0)
    if complaint is None and torch.equal(y, another):
        complaint = "one mask for all calls"
    return nothing_wrong(complaint, "one graph")


def vmapped(subject: Subject, settings: Settings) -> Finding:
    """randomness="different" gives every example a mask of its own, "same" one mask to all."""
    layer, x = subject.make(HALF), settings.normal(16, 1000)

    def masks(randomness: str) -> Tensor:
        y = torch.func.vmap(layer, randomness=randomness)(x)
        if complaint := departure(y, x):
            raise ValueError(complaint)
        kept: Tensor = y != 0
        return kept

    shared, own = masks("same"), masks("different")
    if not (shared == shared[:1]).all():
        return holds_if(False, 'masks differ under "same"')
    if torch.equal(own, own[:1].expand_as(own)):
        return holds_if(False, 'one mask under "different"')
    return holds_if(True, "same, different")


def deepcopied(subject: Subject, settings: Settings) -> Finding:
    layer = subject.make(settings.p)
    return _behave_alike(layer, copy.deepcopy(layer), settings)


def pickled(subject: Subject, settings: Settings) -> Finding:
    layer = subject.make(settings.p)
    return _behave_alike(layer, pickle.loads(pickle.dumps(layer)), settings)


def _behave_alike(layer: nn.Module, twin: nn.Module, settings: Settings) -> Finding:
    x = settings.normal()
    torch.manual_seed(settings.seed)
    y = layer(x)
    torch.manual_seed(settings.seed)
    if not torch.equal(y, twin(x)):
        return holds_if(False, "another mask for the same seed")
    twin.eval()
    return holds_if(layer.training, "alike" if layer.training else "shares the original's mode")


def state(subject: Subject, settings: Settings) -> Finding:
    """A layer has nothing to save: a model's checkpoint loads whether or not it had dropout in that place."""
    names = list(subject.make(settings.p).state_dict())
    return holds_if(not names, f"holds {', '.join(names)}" if names else "empty")


FAMILY = "transforms"
LAWS = [
    Law(FAMILY, "torch.compile", "compiles without a graph break and keeps the law", compiled),
    Law(FAMILY, "vmap", "one mask for all examples or one for each, as asked", vmapped),
    Law(FAMILY, "deepcopy", "a copy has the original's masks and mode", deepcopied),
    Law(FAMILY, "pickle", "a layer survives pickling with its masks and mode", pickled),
    Law(FAMILY, "state_dict", "there is nothing in it", state),
]
