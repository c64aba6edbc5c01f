"""Dropout within recurrent networks: VariationalLSTM, VariationalGRU."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, normal, ones
from thinned.compare.laws.chance import binomial_bounds
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.recurrent import VariationalGRU, VariationalLSTM

__all__ = ["ENTRIES"]

INPUTS, UNITS = 30, 40
STATES = {"LSTM": ("hidden", "cell"), "GRU": ("hidden",)}


class _Formula(nn.RNNBase):
    """One layer in one direction, step by step."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor
    mode_: str

    def __init__(self, input_size: int, hidden_size: int, **probabilities: float) -> None:
        super().__init__(self.mode_, input_size, hidden_size)
        self.p = probabilities

    def step(self, x: Tensor, gates: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """The candidates, from the two linear maps and the states."""
        raise NotImplementedError

    def _mask(self, like: Tensor, name: str) -> Tensor:
        return F.dropout(torch.ones_like(like), self.p.get(f"{name}_p", 0.0), self.training)

    def _zoneout(self, candidate: Tensor, previous: Tensor, name: str) -> Tensor:
        p = self.p.get(f"{name}_zoneout_p", 0.0)
        zoned = (torch.rand_like(candidate) < p).to(candidate.dtype) if self.training else p
        return zoned * previous + (1 - zoned) * candidate

    def forward(self, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        names = STATES[self.mode]
        zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
        states = [zeros[0]] * len(names) if hx is None else [state[0] for state in _tuple(hx)]
        x = x * self._mask(x[:1], "input")
        recurrent = self._mask(zeros[0], "recurrent")
        weight = self.weight_hh_l0 * self._mask(self.weight_hh_l0, "weight")
        outputs = []
        for inputs in F.linear(x, self.weight_ih_l0, self.bias_ih_l0):
            gates = F.linear(states[0] * recurrent, weight, self.bias_hh_l0)
            candidates = self.step(inputs, gates, *states)
            states = [self._zoneout(*each) for each in zip(candidates, states, names, strict=True)]
            outputs.append(states[0])
        output, last = torch.stack(outputs), tuple(state[None] for state in states)
        return output * self._mask(output[:1], "output"), last if len(last) > 1 else last[0]


class VariationalLSTMFormula(_Formula):
    mode_ = "LSTM"

    def step(self, x: Tensor, gates: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (x + gates).chunk(4, 1)
        cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class VariationalGRUFormula(_Formula):
    mode_ = "GRU"

    def step(self, x: Tensor, gates: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        (r, z, n), (r_h, z_h, n_h) = x.chunk(3, 1), gates.chunk(3, 1)
        z = (z + z_h).sigmoid()
        return ((1 - z) * (n + (r + r_h).sigmoid() * n_h).tanh() + z * states[0],)


def _tuple(states: Any) -> tuple[Tensor, ...]:
    return states if isinstance(states, tuple) else (states,)


def _make(layer: Case, **probabilities: float) -> nn.RNNBase:
    module: nn.RNNBase = layer.make(input_size=INPUTS, hidden_size=UNITS, **probabilities)
    return module


def _plain(module: nn.RNNBase) -> nn.RNNBase:
    plain: nn.RNNBase = getattr(nn, module.mode)(INPUTS, UNITS)
    plain.load_state_dict(module.state_dict())
    return plain


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _states(mode: str, samples: int, settings: Settings) -> Any:
    """States from an earlier call, as torch.nn takes them."""
    states = settings.normal(2, 1, samples, UNITS, dtype=torch.float32).unbind()
    return states if mode == "LSTM" else states[0]


def evaluation(layer: Case, settings: Settings, mode: str) -> Finding:
    """Output and states after eval() against those of torch.nn with the same weights."""
    module = _make(layer, input_p=0.5, recurrent_p=0.5, weight_p=0.5, output_p=0.5).eval()
    x = settings.normal(5, 4, INPUTS, dtype=torch.float32)
    (y, states), (z, plain_states) = module(x), _plain(module)(x)
    pairs = zip((y, *_tuple(states)), (z, *_tuple(plain_states)), strict=True)
    same = all(_close(*each) for each in pairs)
    return holds_if(same, f"torch.nn.{mode}'s" if same else "other values")


def input_mask(layer: Case, settings: Settings) -> Finding:
    """The gradient shows the mask: it is exactly 0 for what was dropped."""
    p, samples = 0.3, 500
    x = settings.normal(3, samples, INPUTS, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(_make(layer, input_p=p)(x)[0].sum(), x)
    dropped = gradient == 0
    low, high = binomial_bounds(samples * INPUTS, p)
    locked = bool((dropped == dropped[0]).all())
    holds = locked and low <= int(dropped[0].sum()) <= high
    return holds_if(holds, f"{dropped[0].double().mean():.3f}, {'one mask' if locked else 'masks differ'}")


def recurrent_mask(layer: Case, settings: Settings, mode: str) -> Finding:
    """One sample's mask of the state is one of the columns of its weight, at every step.

    The gradient of the weight shows it: the column of a dropped unit is exactly 0.
    """
    p = 0.3
    module = _make(layer, recurrent_p=p)
    hx, x = _states(mode, 1, settings), settings.normal(4, 1, INPUTS, dtype=torch.float32)
    y, _ = module(x, hx)
    (gradient,) = torch.autograd.grad(y.sum(), module.get_parameter("weight_hh_l0"))
    return _as_if(module, (gradient != 0).any(0).to(x.dtype) / (1 - p), x, hx, y)


def weight_mask(layer: Case, settings: Settings) -> Finding:
    """The gradient of the weight shows the mask."""
    p = 0.3
    module = _make(layer, weight_p=p)
    x = settings.normal(4, 3, INPUTS, dtype=torch.float32)
    y, _ = module(x)
    kept = torch.autograd.grad(y.sum(), module.get_parameter("weight_hh_l0"))[0] != 0
    low, high = binomial_bounds(kept.numel(), 1 - p)
    if not low <= int(kept.sum()) <= high:
        return holds_if(False, f"{1 - kept.double().mean():.3f} dropped")
    return _as_if(module, kept.to(x.dtype) / (1 - p), x, None, y)


def _as_if(module: nn.RNNBase, factor: Tensor, x: Tensor, hx: Any, y: Tensor) -> Finding:
    """``y`` is what a plain network gives, whose recurrent weight is multiplied by ``factor``."""
    plain = _plain(module)
    with torch.no_grad():
        plain.get_parameter("weight_hh_l0").mul_(factor)
    same = _close(plain(x, hx)[0], y)
    return holds_if(same, "one mask" if same else "other values")


def all_zoned(layer: Case, settings: Settings, mode: str) -> Finding:
    """At p = 1 every step puts out the state that was passed in, bit for bit."""
    hx, x = _states(mode, 4, settings), settings.normal(3, 4, INPUTS, dtype=torch.float32)
    y, last = _make(layer, **{f"{name}_zoneout_p": 1.0 for name in STATES[mode]})(x, hx)
    before, after = _tuple(hx), _tuple(last)
    stays = torch.equal(y, before[0].expand_as(y)) and all(map(torch.equal, before, after))
    return holds_if(stays, "stays" if stays else "changes")


def zoned(layer: Case, settings: Settings, mode: str) -> Finding:
    """A state that the network has computed is nowhere what it was before."""
    p, samples = 0.3, 500
    hx, x = _states(mode, samples, settings), settings.normal(1, samples, INPUTS, dtype=torch.float32)
    _, last = _make(layer, **{f"{name}_zoneout_p": p for name in STATES[mode]})(x, hx)
    low, high = binomial_bounds(samples * UNITS, p)
    pairs = zip(_tuple(last), _tuple(hx), strict=True)
    kept = [int((after == before).sum()) for after, before in pairs]
    shares = (f"{n / (samples * UNITS):.3f} of {name}" for n, name in zip(kept, "hc", strict=False))
    return holds_if(all(low <= n <= high for n in kept), ", ".join(shares))


def _laws(mode: str) -> list[Law]:
    law = partial(Law, "recurrence")
    return [
        law(
            "evaluation",
            f"in evaluation torch.nn.{mode}'s output and states",
            partial(evaluation, mode=mode),
            why="Weights of torch.nn cannot be loaded and used: predictions differ.",
        ),
        law(
            "input mask",
            "one mask of the input for all steps, binomial",
            input_mask,
            why="Noise that changes with each step drowns what the state carries over long sequences.",
        ),
        law(
            "recurrent mask",
            "one mask of the state for all steps",
            partial(recurrent_mask, mode=mode),
            why="Noise that changes with each step drowns what the state carries over long sequences.",
        ),
        law(
            "weight mask",
            "one mask of the weight for all steps, binomial",
            weight_mask,
            why="Each step runs another recurrent network, and not one that is thinned.",
        ),
        law(
            "zoneout",
            f"units of {' and '.join('hc'[: len(STATES[mode])])} keep their previous value, binomially",
            partial(zoned, mode=mode),
            why="Units forget or keep more of their state than p says.",
        ),
        law(
            "zoneout at p = 1",
            "the state stays what it was",
            partial(all_zoned, mode=mode),
            why="A kept state is not the previous one.",
        ),
    ]


def _entry(layer: type[nn.RNNBase], mode: str, formula: type[_Formula], saved_bytes: float) -> Entry:
    everywhere = {f"{name}_p": 0.5 for name in ("input", "recurrent", "weight", "output")}
    everywhere |= {f"{name}_zoneout_p": 0.5 if name == "cell" else 0.1 for name in STATES[mode]}
    return Entry(
        layer,
        mask="(1, N, C), (N, H), the weight's, (N, H) each step",
        source="Gal & Ghahramani 2016, section 4; Merity et al. 2018; Krueger et al. 2017, section 3",
        peer=Implementation("formula", formula),
        example=Example(
            normal(3, 6, 8),
            {"input_size": 8, "hidden_size": 8, **everywhere},
            p_name="recurrent_p",
            identity_in_evaluation=False,
            saved_bytes=saved_bytes,
        ),
        workload=Workload(ones(64, 32, 512), {"input_size": 512, "hidden_size": 128, **everywhere}),
        special=_laws(mode),
        functional="locked_dropout, drop_connect, zoneout",
    )


ENTRIES = [
    _entry(VariationalLSTM, "LSTM", VariationalLSTMFormula, 41.0),
    _entry(VariationalGRU, "GRU", VariationalGRUFormula, 42.0),
]
