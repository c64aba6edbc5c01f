"""The mean and the variance of Monte-Carlo dropout in one pass, without draws: ``method="moments"``."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import resolve_name

from thinned import functional, layers
from thinned.checks import got
from thinned.geometry import dims_of
from thinned.layers._arguments import threshold_and_scale
from thinned.layers.channels import channel_dims
from thinned.models.address.hooks import has_other_hooks
from thinned.models.convert.rules import HARMLESS, is_dropout, is_known, make, probability_of
from thinned.models.inspect import inspect
from thinned.models.walk import check_model, is_ours, qualified_name
from thinned.montecarlo.noise import Map, Random, Term, scaled, scaled_by_row
from thinned.torch_state import TorchDispatchMode

__all__ = ["Moments", "expected_softmax", "moments"]


class Moments(NamedTuple):
    """The mean and the variance of each output, over the masks."""

    mean: Tensor
    variance: Tensor


def moments(model: nn.Module, input: Tensor) -> Moments:
    r"""Mean and variance of what ``model`` predicts with its dropout on, propagated in one pass.

    .. math:: y = \frac{m x}{q}: \quad \mathrm{E}\,y = \mathrm{E}\,x, \quad
        \mathrm{Var}\,y = \frac{\mathrm{Var}\,x + (\mathrm{E}\,x)^2}{q} - (\mathrm{E}\,x)^2
    .. math:: y = W x + b: \quad \mathrm{E}\,y = W\,\mathrm{E}\,x + b, \quad
        \mathrm{Var}\,y = (W \circ W)\,\mathrm{Var}\,x
    .. math:: y = \max(x, 0), \; t = \mu / \sigma: \quad
        \mathrm{E}\,y = \mu \Phi(t) + \sigma \varphi(t), \quad
        \mathrm{E}\,y^2 = (\mu^2 + \sigma^2) \Phi(t) + \mu \sigma \varphi(t)

    Each dropout is on, whatever its ``training`` flag, with the realised keep probability ``q = T / 2**32``;
    batch normalization is in evaluation. The model is not changed.

    **Exact**, up to rounding, if no ReLU has a random input. Linear layers in a row, with any number of
    dropouts between them, keep the covariances of their units. The layers before the first dropout run as
    they are, and may have any modules and functions.

    **Approximate** from the first ReLU with a random input, which counts as normal. The part of its output
    that is proportional to the input's noise, with the slope :math:`\Phi(t)`, keeps its covariances; the rest
    counts as independent between units. To find ``t`` in a further ReLU, the outputs of the one before count
    as independent, except for noise that elements share under the mask of a channel or of a row. On networks
    trained on 8x8 digits, the deviations are 1 to 4 % off and the means 0.01 to 0.03 deviations, in
    root mean square.

    A channel dropout is exact where the elements of a channel are independent before it, as the outputs of a
    ReLU count, and refused where they are not. It takes the memory of the features once for each channel.

    The time grows with the number of outputs: behind two layers, the variance takes a pass for each output
    or for each unit that drops, whichever are fewer.

    Args:
        model: a model that :class:`torch.fx.Tracer` can trace and that returns one tensor. After its first
            dropout it may have Linear, Conv1d to Conv3d with padding by zeros, BatchNorm1d to BatchNorm3d,
            ReLU, average and adaptive average pooling, ``mean``, Flatten and Identity; Dropout and Dropout1d
            to Dropout3d of torch and thinned, ReLUDropout, DropPath, StochasticDepth and LockedDropout; the
            functions of these; and sums of two tensors that depend on different dropouts.
        input: a tensor of shape ``(N, *)``.

    Returns:
        :class:`Moments`: the mean and the variance of each output, in float64 for a float64 model, else in
        float32.

    Raises:
        TypeError: ``model`` is no module, or ``input`` no tensor.
        NotImplementedError: ``model`` cannot be traced, or a part of it has no rule; the message has its name
            and its path.

    Source: Wang & Manning, "Fast dropout training", ICML 2013; Postels et al., "Sampling-free
    epistemic uncertainty estimation using approximated variance propagation", ICCV 2019; for ReLU, Frey &
    Hinton, "Variational learning in nonlinear Gaussian belief networks", Neural Computation 11 (1999); for
    its slope, Price, "A useful theorem for nonlinear devices having Gaussian inputs", IRE
    Transactions on Information Theory 4 (1958).

    >>> import torch
    >>> from thinned.montecarlo.moments import moments
    >>> model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 1, bias=False))
    >>> _ = torch.nn.init.ones_(model[1].weight)
    >>> moments(model, torch.tensor([[1.0, 2.0]]))
    Moments(mean=tensor([[3.]]), variance=tensor([[5.]]))
    """
    check_model("montecarlo.moments", model)
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a tensor, {got(input)}")
    with torch.inference_mode(False), torch.no_grad():
        twin = _twin(model)
        return _Walk(twin, _trace(twin)).run(input.clone())


def expected_softmax(mean: Tensor, variance: Tensor) -> Tensor:
    r"""The approximate mean of ``softmax(x, -1)`` for independent normal ``x``.

    .. math:: \mathrm{E}\,\mathrm{softmax}(x) \approx
        \mathrm{softmax}\left(\mu / \sqrt{1 + \pi \sigma^2 / 8}\right)

    For two classes of which one has the logit 0 it is MacKay's approximation of the mean of a logistic
    sigmoid, at most 0.02 off.

    Args:
        mean: that of the logits, of shape ``(*, classes)``.
        variance: that of the logits, of the same shape.

    Returns:
        Probabilities of that shape.

    Source: MacKay, "The evidence framework applied to classification networks", Neural Computation 4 (1992);
    for several classes, Gibbs, "Bayesian Gaussian processes for regression and classification", 1997, and
    Daxberger et al., "Laplace redux", NeurIPS 2021.

    >>> expected_softmax(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 0.0]))
    tensor([0.7768, 0.2232])
    """
    return torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), -1)


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters in which whatever drops is in training, and nothing else.

    The model is the child "0" of the copy, so that a model of one layer is a layer in the graph too.
    """
    kept: dict[int, Any] = {id(each): each for each in model.parameters()}
    for module in model.modules():  # such as the weight that weight_norm computes, which has no deepcopy
        kept |= {id(value): value for value in vars(module).values() if isinstance(value, Tensor)}
    twin = copy.deepcopy(model, kept)
    for module in twin.modules():
        module.training = False
    for site in inspect(twin):
        # These draws would be constants in the graph.
        if (site.kind == "layer" and site.status != "off") or site.status == "beyond":
            raise _no_rule(site.type, site.path, site.note)
        try:
            twin.get_submodule(site.path).training = True
        except AttributeError as error:  # it is in a list
            raise _no_rule(site.type, site.path, site.note) from error
    return nn.Sequential(twin)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = _base(m) is not None or is_ours(m) or is_known(m)
        return plain or super().is_leaf_module(m, module_qualified_name)


def _trace(twin: nn.Module) -> fx.Graph:
    try:
        with _NoDraws():  # type: ignore[no-untyped-call]
            return _Tracer().trace(twin)
    except Exception as error:
        name = qualified_name(type(twin.get_submodule("0")))
        raise NotImplementedError(f"method='moments' cannot trace {name} with torch.fx: {error}") from error


class _NoDraws(TorchDispatchMode):
    """Refuses operations that draw random numbers, before they draw."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _NoRuleError(f"{func} draws random numbers")
        return func(*args, **(kwargs or {}))


class _Walk:
    """One run of a graph, with a :class:`Random` for each value that depends on a mask."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root, self.graph = root, graph
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.values: dict[fx.Node, Any] = {}

    def run(self, input: Tensor) -> Moments:
        for node in self.graph.nodes:
            args = fx.node.map_arg(node.args, self.values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, self.values.__getitem__)
            if node.op == "placeholder":
                self.values[node] = input
            elif node.op == "get_attr":
                self.values[node] = operator.attrgetter(node.target)(self.root)
            elif node.op == "output":
                result = args[0]
            else:
                self.values[node] = self.call(node, args, kwargs)
        if isinstance(result, Random):
            with torch.autocast(result.mean.device.type, enabled=False):
                return Moments(result.mean, result.variance())
        if not isinstance(result, Tensor) or not result.is_floating_point():
            raise NotImplementedError(
                f"method='moments' needs a model that returns one floating-point tensor, {got(result)}"
            )
        return Moments(_wide(result), torch.zeros_like(_wide(result)))

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a node that calls a module, a function or a method."""
        name, place = _name(self.root, node), _place(node)
        random = [each for each in (*args, *kwargs.values()) if _is_random(each)]
        source = args[0] if args else kwargs.get("input")
        module = self.module(node) if node.op == "call_module" else _as_module(node, args, kwargs)
        if isinstance(module, nn.Module) and is_known(module) and not is_ours(module):
            try:
                module = make(module)[0]
            except ValueError as error:
                raise _no_rule(name, place, str(error)) from error
        if type(module) in DROPOUTS or (random and _base(module) is not None):
            if node.op == "call_module" and (
                len(node.args) + len(node.kwargs) > 1 or has_other_hooks(self.module(node))
            ):
                raise _no_rule(name, place, "it has hooks, or arguments besides its input")
            if getattr(module, "inplace", False):
                self.check_overwritten(node)
            return self.propagate(node, module, source)
        if not random:
            return self.run_plain(node, args, kwargs)
        if node.target in RESHAPES and isinstance(source, Random) and len(random) == 1:
            y = _reshaped(source, _evaluated(self.root, node, (source.mean, *args[1:]), kwargs))
            if y is None:
                raise _no_rule(name, place, "it joins or splits dimension 0")
            return y
        if isinstance(source, Random) and (args[1] if node.target is getattr else node.target) in SIZES:
            return _evaluated(self.root, node, (source.mean, *args[1:]), kwargs)
        if node.target in SUMS and len(args) == 2 and not kwargs:
            if node.target in IN_PLACE:
                self.check_overwritten(node)
            return _sum(*args, name, place)
        raise _no_rule(name, place)

    def propagate(self, node: fx.Node, module: Any, source: Any) -> Any:
        x = source if isinstance(source, Random) else Random(_wide(source))
        try:
            with torch.autocast(x.mean.device.type, enabled=False):
                if base := _base(module):
                    return RULES[base](module, x)
                if x is not source and not source.is_floating_point():
                    raise _NoRuleError(f"an input of {source.dtype}")
                y = DROPOUTS[type(module)](module, x, node)
                return source if y is x else y
        except _NoRuleError as error:
            raise _no_rule(_name(self.root, node), _place(node), str(error)) from None

    def module(self, node: fx.Node) -> nn.Module:
        return self.root.get_submodule(str(node.target))

    def run_plain(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what depends on no mask, unless it drops in a way of its own."""
        name, place = _name(self.root, node), _place(node)
        if node.op == "call_module":
            for module in self.module(node).modules():
                if is_dropout(module) and probability_of(module) != 0:  # such as those of a fused layer
                    raise _no_rule(name, place)
        if node.target is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise _no_rule(name, place, "it normalizes by the batch where the dropout is on")
        try:
            with _NoDraws():  # type: ignore[no-untyped-call]
                return _evaluated(self.root, node, args, kwargs)
        except _NoRuleError as error:
            raise _no_rule(name, place, str(error)) from None

    def check_overwritten(self, node: fx.Node) -> None:
        """Refuse to compute out of place what a later node reads as overwritten."""
        source = next(iter(node.all_input_nodes))
        while True:
            later = [user for user in source.users if self.order[user] > self.order[node]]
            if later:
                reason = f"it overwrites what is used again at {_place(later[0])!r}"
                raise _no_rule(_name(self.root, node), _place(node), reason)
            above = source.all_input_nodes
            if len(above) != 1 or not _same_memory(self.values[source], self.values[above[0]]):
                return
            (source,) = above


class _NoRuleError(Exception):
    """Why a rule refuses."""


def _no_rule(name: str, place: str, reason: str = "") -> NotImplementedError:
    why = f" ({reason})" if reason else ""
    where = repr(place) if place else "the model itself"
    return NotImplementedError(
        f"method='moments' has no rule for {name} at {where}{why}; accepted: {ACCEPTED}"
    )


def _place(node: fx.Node) -> str:
    """The path of the module that is called, or of the one that calls."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = str(node.target) if node.op == "call_module" else stack[-1][0] if stack else ""
    return path.partition(".")[2]  # without that of the model in its copy


def _name(root: nn.Module, node: fx.Node) -> str:
    if node.op == "call_module":
        return qualified_name(type(root.get_submodule(str(node.target))))
    if node.op == "call_method":
        return f"torch.Tensor.{node.target}"
    function: Any = node.target
    return resolve_name(function) or f"{function.__module__.lstrip('_')}.{function.__name__}"


def _evaluated(root: nn.Module, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_random(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, Random) or any(_is_random(each) for each in items)


def _same_memory(a: Any, b: Any) -> bool:
    a, b = (each.mean if isinstance(each, Random) else each for each in (a, b))
    both = isinstance(a, Tensor) and isinstance(b, Tensor)
    return both and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _wide(x: Tensor) -> Tensor:
    """In float64, or in float32 for all shorter types."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_module(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module that does what a function does; None if there is none."""
    if (factory := FUNCTIONS.get(node.target)) is None:
        return None
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    try:
        return factory(*args["input" not in kwargs :], **rest)
    except TypeError:  # it has arguments that the module has not, such as a key
        return None


# The rules of layers that draw nothing: from the module and its random input to its output.


def _linear(module: Any, x: Random) -> Random:
    if x.mean.dim() < 2:
        raise _NoRuleError("its input has no dimension but that of the features")
    weight, bias = _parameters(module, x)
    both = Map(lambda x: F.linear(x, weight), lambda v: F.linear(v, weight.square()))
    return x.through(both, F.linear(x.mean, weight, bias))


def _conv(function: Callable[..., Tensor], module: Any, x: Random) -> Random:
    if module.padding_mode != "zeros":
        raise _NoRuleError(f"padding_mode={module.padding_mode!r}")
    if x.mean.dim() != module.weight.dim():
        raise _NoRuleError("its input has no batch dimension")
    weight, bias = _parameters(module, x)
    rest = (module.stride, module.padding, module.dilation, module.groups)
    return x.through(
        Map(lambda x: function(x, weight, None, *rest), lambda v: function(v, weight.square(), None, *rest)),
        function(x.mean, weight, bias, *rest),
    )


def _parameters(module: Any, x: Random) -> tuple[Tensor, Tensor | None]:
    bias = None if module.bias is None else module.bias.to(x.mean.dtype)
    return module.weight.to(x.mean.dtype), bias


def _batch_norm(dims: tuple[int, ...], module: Any, x: Random) -> Random:
    if module.running_mean is None:
        raise _NoRuleError("track_running_stats=False")
    if x.mean.dim() not in dims:
        raise _NoRuleError(f"an input of shape {tuple(x.mean.shape)}")
    shape = (1, -1, *(1,) * (x.mean.dim() - 2))
    stats = (module.running_mean, module.running_var, module.weight, module.bias)
    mean, variance, weight, bias = (None if each is None else each.to(x.mean.dtype) for each in stats)
    scale = (variance + module.eps).rsqrt() * (1 if weight is None else weight)
    y = F.batch_norm(x.mean, mean, variance, weight, bias, training=False, eps=module.eps)
    return x.through(scaled(scale.reshape(shape)), y)


def _relu(_: Any, x: Random) -> Random:
    """Frey & Hinton's moments, from what lies beyond a = |t|: no squares of means cancel for large a."""
    variance = x.variance(of_recent=True)
    deviation = variance.sqrt()
    noisy = deviation > 0
    t = torch.where(noisy, x.mean / torch.where(noisy, deviation, 1), 0)
    a = t.abs().clamp(max=40)  # both tails are 0 from there on
    tail = torch.special.erfc(a / math.sqrt(2)) / 2
    density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    excess = density - a * tail  # E max(z - a, 0) of a standard normal z
    second = (a * a + 1) * tail - a * density  # E max(z - a, 0)^2
    above = t > 0
    slope = torch.where(above, 1 - tail, tail) * noisy
    after = variance * (second - excess.square() + torch.where(above, 1 - 2 * tail, 0))
    bent = (after - slope.square() * variance).clamp(min=0)  # what is no multiple of the input's noise
    y = x.through(scaled_by_row(slope), F.relu(x.mean) + deviation * excess).plus(bent, x.masks)
    return replace(y, recent=(Term(after - slope.square() * x.shared()),))


def _pool(dims: int, module: Any, x: Random) -> Random:
    if getattr(module, "ceil_mode", False) or (
        not getattr(module, "count_include_pad", True) and module.padding
    ):
        raise _NoRuleError("windows at the border have fewer elements: ceil_mode, or count_include_pad=False")
    sizes = module.kernel_size if isinstance(module.kernel_size, tuple) else (module.kernel_size,) * dims
    count = getattr(module, "divisor_override", None) or math.prod(sizes)
    return _averaged(module, x, dims, x.mean.new_tensor(1 / count))


def _adaptive_pool(dims: int, module: Any, x: Random) -> Random:
    sizes = x.mean.shape[-dims:]
    wanted = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * dims
    share = x.mean.new_ones(())
    for size, outputs in zip(sizes, wanted, strict=True):
        outputs = size if outputs is None else outputs
        i = torch.arange(outputs, device=x.mean.device)
        length = -(-(i + 1) * size // outputs) - i * size // outputs  # from floor to ceil
        share = share.unsqueeze(-1) / length.to(x.mean.dtype)
    return _averaged(module, x, dims, share)


def _averaged(module: Any, x: Random, dims: int, share: Tensor) -> Random:
    """``module`` weighs each element of a window by ``share``."""
    if x.mean.dim() <= dims:
        raise _NoRuleError("its input has no batch dimension")
    return x.through(Map(module, lambda v: module(v) * share), module(x.mean))


def _mean(module: _Mean, x: Random) -> Random:
    dims = sorted(dims_of(x.mean.shape, module.dims))
    if not dims or 0 in dims:
        raise _NoRuleError("it averages over dimension 0")
    share = 1 / math.prod(x.mean.shape[dim] for dim in dims)

    def apply(x: Tensor) -> Tensor:
        return x.mean(dims, module.keepdim)

    return x.through(Map(apply, lambda v: apply(v) * share), apply(x.mean))


def _identity(_: Any, x: Random) -> Random:
    return x


def _reshaped(x: Random, mean: Tensor) -> Random | None:
    """None unless each row of dimension 0 stays a row."""
    if mean.dim() < 2 or len(mean) != len(x.mean) or mean.numel() != x.mean.numel():
        return None
    shape = mean.shape[1:]

    def apply(x: Tensor) -> Tensor:
        return x.reshape(len(x), *shape)

    return x.through(Map(apply, apply, mixes=False), mean)


def _flatten(module: Any, x: Random) -> Random:
    if (y := _reshaped(x, module(x.mean))) is None:
        raise _NoRuleError("it joins or splits dimension 0")
    return y


def _sum(a: Any, b: Any, name: str, place: str) -> Random:
    if isinstance(a, Random) and isinstance(b, Random):
        if a.mean.shape != b.mean.shape:
            raise _no_rule(name, place, "the shapes differ")
        if common := sorted({_place(mask) for mask in a.masks & b.masks}):
            raise _no_rule(name, place, f"both sides depend on {', '.join(map(repr, common))}")
        factors = [each.factors for each in (a, b) if each.factors is not None]
        return Random(
            a.mean + b.mean,
            a.terms + b.terms,
            a.recent + b.recent,
            torch.cat(factors) if factors else None,
            a.masks | b.masks,
        )
    x, other = (a, b) if isinstance(a, Random) else (b, a)
    mean = x.mean + (other.to(x.mean) if isinstance(other, Tensor) else other)
    if mean.shape != x.mean.shape:
        raise _no_rule(name, place, "it repeats random elements")
    return replace(x, mean=mean)


# The rules of dropouts: from the module, its input and the node of the call.


def _drop(
    module: Any, x: Random, node: fx.Node, shared: set[int], p: float, scale_by_keep: bool = True
) -> Random:
    """``y = x + x (m/q - 1)``: the second part has mean 0 and is uncorrelated with the first."""
    T, _ = threshold_and_scale(p)
    module.eval()(x.mean)  # raises for a shape that it does not take
    if T in (0, 2**32):
        return x if T else Random(torch.zeros_like(x.mean))
    q, odds = T / 2**32, (2**32 - T) / T  # Var m/q
    inner = x.mean.shape[1:]
    sizes = [1 if dim in shared else size for dim, size in enumerate(inner, 1)]
    masks = frozenset([node])
    if sizes == list(inner):
        y = x.plus((x.variance(of_recent=True) + x.mean.square()) * odds, masks)
    elif math.prod(sizes) == 1:
        kept = x.through(scaled(1 / math.sqrt(q)), x.mean)
        y = kept.plus(None, masks, x.mean.unsqueeze(0) * math.sqrt(odds))
    else:
        if x.factors is not None or any(term.mixed for term in x.recent):
            raise _NoRuleError("elements that share a mask depend on each other before it")
        ones = torch.eye(math.prod(sizes), dtype=x.mean.dtype, device=x.mean.device)
        factors = ones.reshape(-1, 1, *sizes) * x.mean * math.sqrt(odds)
        y = x.plus(x.variance(of_recent=True) * odds if x.terms else None, masks, factors)
    return y if scale_by_keep else y.through(scaled(q), y.mean * q)


def _dropout(module: Any, x: Random, node: fx.Node) -> Random:
    return _drop(module, x, node, dims_of(x.mean.shape, module.broadcast_dims), module.p)


def _relu_dropout(module: Any, x: Random, node: fx.Node) -> Random:
    return _drop(module, _relu(module, x), node, set(), module.p)


def _channels(batched: int | None, module: Any, x: Random, node: fx.Node) -> Random:
    """``batched`` is the number of dimensions with a batch, and None if there always is one."""
    dims = channel_dims(x.mean, module.p, batched=batched in (None, x.mean.dim()))
    return _drop(module, x, node, set(dims), module.p)


def _drop_path(module: Any, x: Random, node: fx.Node) -> Random:
    return _drop(module, x, node, set(range(x.mean.dim())), module.drop_prob, module.scale_by_keep)


def _stochastic_depth(module: Any, x: Random, node: fx.Node) -> Random:
    return _drop(module, x, node, set(range(x.mean.dim())), module.p)


def _locked(module: Any, x: Random, node: fx.Node) -> Random:
    return _drop(module, x, node, {1} if module.batch_first and x.mean.dim() > 2 else {0}, module.p)


class _Mean(NamedTuple):
    """The arguments of ``x.mean``."""

    dims: tuple[int, ...]
    keepdim: bool


def _mean_of(dim: Any, keepdim: bool = False) -> _Mean:
    return _Mean(tuple(dim) if isinstance(dim, list | tuple) else (dim,), keepdim)


def _dropping(kind: Callable[[float], nn.Module]) -> Callable[..., nn.Module]:
    def build(p: float = 0.5, training: bool = True, inplace: bool = False) -> nn.Module:
        module = kind(p)
        module.inplace = inplace  # type: ignore[assignment]
        return module if training else nn.Identity()

    return build


def _path_dropping(drop_prob: float = 0.0, training: bool = False, scale_by_keep: bool = True) -> nn.Module:
    return layers.DropPath(drop_prob, scale_by_keep) if training else nn.Identity()


RULES: dict[type, Callable[[Any, Random], Random]] = {
    nn.Linear: _linear,
    nn.Conv1d: partial(_conv, F.conv1d),
    nn.Conv2d: partial(_conv, F.conv2d),
    nn.Conv3d: partial(_conv, F.conv3d),
    nn.BatchNorm1d: partial(_batch_norm, (2, 3)),
    nn.BatchNorm2d: partial(_batch_norm, (4,)),
    nn.BatchNorm3d: partial(_batch_norm, (5,)),
    nn.ReLU: _relu,
    nn.AvgPool1d: partial(_pool, 1),
    nn.AvgPool2d: partial(_pool, 2),
    nn.AvgPool3d: partial(_pool, 3),
    nn.AdaptiveAvgPool1d: partial(_adaptive_pool, 1),
    nn.AdaptiveAvgPool2d: partial(_adaptive_pool, 2),
    nn.AdaptiveAvgPool3d: partial(_adaptive_pool, 3),
    nn.Flatten: _flatten,
    nn.Identity: _identity,
    _Mean: _mean,
}
DROPOUTS: dict[type, Callable[[Any, Random, fx.Node], Random]] = {
    layers.Dropout: _dropout,
    layers.ReLUDropout: _relu_dropout,
    layers.Dropout1d: partial(_channels, 3),
    layers.Dropout2d: partial(_channels, None),
    layers.Dropout3d: partial(_channels, 5),
    layers.DropPath: _drop_path,
    layers.StochasticDepth: _stochastic_depth,
    layers.LockedDropout: _locked,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    "relu": nn.ReLU,
    "relu_": partial(nn.ReLU, inplace=True),
    torch.relu_: partial(nn.ReLU, inplace=True),
    torch.mean: _mean_of,
    "mean": _mean_of,
    F.avg_pool1d: nn.AvgPool1d,
    F.avg_pool2d: nn.AvgPool2d,
    F.avg_pool3d: nn.AvgPool3d,
    F.adaptive_avg_pool1d: nn.AdaptiveAvgPool1d,
    F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    F.adaptive_avg_pool3d: nn.AdaptiveAvgPool3d,
    F.dropout: _dropping(layers.Dropout),
    F.dropout1d: _dropping(layers.Dropout1d),
    F.dropout2d: _dropping(layers.Dropout2d),
    F.dropout3d: _dropping(layers.Dropout3d),
    torch.dropout: lambda p, train: _dropping(layers.Dropout)(p, train),
    functional.dropout: _dropping(layers.Dropout),
    functional.dropout1d: _dropping(layers.Dropout1d),
    functional.dropout2d: _dropping(layers.Dropout2d),
    functional.dropout3d: _dropping(layers.Dropout3d),
    functional.drop_path: _path_dropping,
}
RESHAPES = {torch.flatten, torch.reshape, "flatten", "reshape", "view", "contiguous"}
SIZES = {"size", "dim", "shape", "ndim", "device"}
IN_PLACE = {operator.iadd, "add_"}
SUMS = {operator.add, torch.add, "add", *IN_PLACE}
ACCEPTED = (
    ", ".join(qualified_name(kind) for kind in (*RULES, *DROPOUTS) if kind is not _Mean)
    + ", the functions of these, and sums of branches with different dropouts"
)


def _base(module: Any) -> type | None:
    """The class that has a rule and whose forward ``module`` has."""
    kind = type(module)
    bases = kind.__mro__ if isinstance(module, nn.Module) else (kind,)
    return next((base for base in bases if base in RULES and set(_added(kind, base)) <= HARMLESS), None)


def _added(kind: type, base: type) -> set[str]:
    """The names that a subclass defines."""
    return {name for cls in kind.__mro__ if cls not in base.__mro__ for name in vars(cls)}
