"""Dropout within an LSTM: VariationalLSTM."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, normal, ones
from thinned.compare.laws.chance import binomial_bounds
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.lstm import VariationalLSTM

__all__ = ["ENTRIES"]

INPUTS, UNITS = 30, 40


class VariationalLSTMFormula(nn.LSTM):
    """One layer in one direction, step by step."""

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, input_size: int, hidden_size: int, **probabilities: float) -> None:
        super().__init__(input_size, hidden_size)
        self.p = probabilities

    def _mask(self, like: Tensor, name: str) -> Tensor:
        return F.dropout(torch.ones_like(like), self.p.get(f"{name}_p", 0.0), self.training)

    def _zoneout(self, candidate: Tensor, previous: Tensor, name: str) -> Tensor:
        p = self.p.get(f"{name}_zoneout_p", 0.0)
        zoned = (torch.rand_like(candidate) < p).to(candidate.dtype) if self.training else p
        return zoned * previous + (1 - zoned) * candidate

    def forward(  # type: ignore[override]
        self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
        (h,), (c,) = hx or (zeros, zeros)
        x = x * self._mask(x[:1], "input")
        recurrent = self._mask(h, "recurrent")
        weight = self.weight_hh_l0 * self._mask(self.weight_hh_l0, "weight")
        all_gates = F.linear(x, self.weight_ih_l0, self.bias_ih_l0 + self.bias_hh_l0)
        outputs = []
        for gates in all_gates:
            i, f, g, o = (gates + F.linear(h * recurrent, weight)).chunk(4, 1)
            candidate = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = self._zoneout(o.sigmoid() * candidate.tanh(), h, "hidden")
            c = self._zoneout(candidate, c, "cell")
            outputs.append(h)
        output = torch.stack(outputs)
        return output * self._mask(output[:1], "output"), (h[None], c[None])


def _make(layer: Case, **probabilities: float) -> nn.Module:
    module: nn.Module = layer.make(input_size=INPUTS, hidden_size=UNITS, **probabilities)
    return module


def _plain(module: nn.Module) -> nn.LSTM:
    plain = nn.LSTM(INPUTS, UNITS)
    plain.load_state_dict(module.state_dict())
    return plain


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def evaluation(layer: Case, settings: Settings) -> Finding:
    module = _make(layer, input_p=0.5, recurrent_p=0.5, weight_p=0.5, output_p=0.5).eval()
    x = settings.normal(5, 4, INPUTS, dtype=torch.float32)
    (y, (h, c)), (z, (plain_h, plain_c)) = module(x), _plain(module)(x)
    same = _close(y, z) and _close(h, plain_h) and _close(c, plain_c)
    return holds_if(same, "torch.nn.LSTM's" if same else "other values")


def input_mask(layer: Case, settings: Settings) -> Finding:
    """Seen in the gradient, which is exactly 0 for what was dropped."""
    p, samples = 0.3, 500
    x = settings.normal(3, samples, INPUTS, dtype=torch.float32).requires_grad_()
    (gradient,) = torch.autograd.grad(_make(layer, input_p=p)(x)[0].sum(), x)
    dropped = gradient == 0
    low, high = binomial_bounds(samples * INPUTS, p)
    locked = bool((dropped == dropped[0]).all())
    holds = locked and low <= int(dropped[0].sum()) <= high
    return holds_if(holds, f"{dropped[0].double().mean():.3f}, {'one mask' if locked else 'masks differ'}")


def recurrent_mask(layer: Case, settings: Settings) -> Finding:
    """One sample's mask of the state is one of the columns of its weight, at every step."""
    p = 0.3
    module = _make(layer, recurrent_p=p)
    h = settings.normal(1, 1, UNITS, dtype=torch.float32).requires_grad_()
    c = settings.normal(1, 1, UNITS, dtype=torch.float32)
    x = settings.normal(4, 1, INPUTS, dtype=torch.float32)
    y, _ = module(x, (h, c))
    (gradient,) = torch.autograd.grad(y.sum(), h)
    return _as_if(module, (gradient.flatten() != 0).to(x.dtype) / (1 - p), x, (h, c), y)


def weight_mask(layer: Case, settings: Settings) -> Finding:
    """Seen in the gradient of the weight."""
    p = 0.3
    module = _make(layer, weight_p=p)
    x = settings.normal(4, 3, INPUTS, dtype=torch.float32)
    y, _ = module(x)
    kept = torch.autograd.grad(y.sum(), module.get_parameter("weight_hh_l0"))[0] != 0
    low, high = binomial_bounds(kept.numel(), 1 - p)
    if not low <= int(kept.sum()) <= high:
        return holds_if(False, f"{1 - kept.double().mean():.3f} dropped")
    return _as_if(module, kept.to(x.dtype) / (1 - p), x, None, y)


def _as_if(
    module: nn.Module, factor: Tensor, x: Tensor, hx: tuple[Tensor, Tensor] | None, y: Tensor
) -> Finding:
    """``y`` is what a plain LSTM gives, whose recurrent weight is multiplied by ``factor``."""
    plain = _plain(module)
    with torch.no_grad():
        plain.get_parameter("weight_hh_l0").mul_(factor)
    same = _close(plain(x, hx)[0], y)
    return holds_if(same, "one mask" if same else "other values")


def all_zoned(layer: Case, settings: Settings) -> Finding:
    h, c = settings.normal(2, 1, 4, UNITS, dtype=torch.float32).unbind()
    x = settings.normal(3, 4, INPUTS, dtype=torch.float32)
    y, (h_n, c_n) = _make(layer, hidden_zoneout_p=1.0, cell_zoneout_p=1.0)(x, (h, c))
    stays = torch.equal(y, h.expand_as(y)) and torch.equal(h_n, h) and torch.equal(c_n, c)
    return holds_if(stays, "stays" if stays else "changes")


def zoned(layer: Case, settings: Settings) -> Finding:
    """A state that an LSTM has computed is nowhere what it was before."""
    p, samples = 0.3, 500
    h, c = settings.normal(2, 1, samples, UNITS, dtype=torch.float32).unbind()
    x = settings.normal(1, samples, INPUTS, dtype=torch.float32)
    _, (h_n, c_n) = _make(layer, hidden_zoneout_p=p, cell_zoneout_p=p)(x, (h, c))
    low, high = binomial_bounds(h.numel(), p)
    kept = [int((h_n == h).sum()), int((c_n == c).sum())]
    holds = all(low <= each <= high for each in kept)
    return holds_if(holds, f"{kept[0] / h.numel():.3f} of h, {kept[1] / h.numel():.3f} of c")


LAWS = (
    Law("recurrence", "evaluation", "in evaluation torch.nn.LSTM's output and states", evaluation),
    Law("recurrence", "input mask", "one mask of the input for all steps, binomial", input_mask),
    Law("recurrence", "recurrent mask", "one mask of the state for all steps", recurrent_mask),
    Law("recurrence", "weight mask", "one mask of the weight for all steps, binomial", weight_mask),
    Law("recurrence", "zoneout", "units of h and c keep their previous value, binomially", zoned),
    Law("recurrence", "zoneout at p = 1", "the state stays what it was", all_zoned),
)

EVERYWHERE = {f"{name}_p": 0.5 for name in ("input", "recurrent", "weight", "output", "cell_zoneout")}
EVERYWHERE["hidden_zoneout_p"] = 0.1


ENTRIES = [
    Entry(
        VariationalLSTM,
        mask="(1, N, C), (N, H), the weight's, (N, H) each step",
        source="Gal & Ghahramani 2016, section 4; Merity et al. 2018; Krueger et al. 2017, section 3",
        peer=Implementation("formula", VariationalLSTMFormula),
        example=Example(
            normal(3, 6, 8),
            {"input_size": 8, "hidden_size": 8, **EVERYWHERE},
            p_name="recurrent_p",
            identity_in_evaluation=False,
            saved_bytes=41.0,
        ),
        workload=Workload(ones(64, 32, 512), {"input_size": 512, "hidden_size": 128, **EVERYWHERE}),
        special=LAWS,
        functional="locked_dropout, drop_connect, zoneout",
    )
]
