"""Private names of PyTorch: where they are used, that they exist, and what a missing one does."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.fx.traceback
from torch import Tensor, nn

import thinned
from process import output
from thinned import torch_state

PACKAGE = Path(thinned.__file__).parent
HOME = PACKAGE / "torch_state.py"
FILES = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent.parent / "benchmarks").glob("*.py")]

PRIVATE = re.compile(r"_[a-zA-Z]\w*")
# Modules of torch that are private without an underscore.
EXPERIMENTAL = re.compile(r"torch\.(fx\.experimental|fx\.traceback|([\w.]+\.)?_[a-zA-Z])")


def _trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in FILES}


def _looked_up(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every name that a file takes from another object: by attribute, import, or as a string alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{name.name}") for name in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w.]+", node.value)
        ):
            yield node.lineno, node.value


def _own(tree: ast.Module) -> Iterator[str]:
    """The private names that classes of a file define, as methods, class attributes, or on self and cls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef):
                    yield each.name
                elif isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                    yield each.target.id


def private_names(trees: dict[Path, ast.Module]) -> list[str]:
    """Uses of private names of torch in files other than torch_state.py, each with its place."""
    own = {name for path, tree in trees.items() if path != HOME for name in _own(tree)}
    torchs = {
        part
        for _, name in _looked_up(trees[HOME])
        for part in name.split(".")
        if PRIVATE.fullmatch(part) and part != "__future__" and not name.startswith("sys.")
    }
    found = []
    for path, tree in trees.items():
        if path == HOME:
            continue
        for line, name in _looked_up(tree):
            *owner, last = name.split(".")
            foreign = PRIVATE.fullmatch(last) and owner and owner[0] not in ("sys", "thinned")
            if (foreign and last not in own) or last in torchs - own or EXPERIMENTAL.match(name):
                found.append(f"{path.name}:{line} {name}")
    return found


def test_private_names_of_torch_are_in_one_file() -> None:
    assert private_names(_trees()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._functorch import config",
        "from torch.nn.modules.dropout import _DropoutNd",
        "from torch.fx.experimental.proxy_tensor import proxy_call",
        "torch._C._current_graph_task_id()",
        "x._base",
        "self._flat_weights_names",
        "f._dynamo_marked_constant = True",
        "getattr(module, '_is_replica', False)",
        "sys.modules['torch._dynamo']",
    ],
)
def test_a_private_name_elsewhere_is_found(line: str) -> None:
    assert private_names({HOME: _trees()[HOME], Path("a.py"): ast.parse(line)})


ALONE = f"""
    import importlib.util
    spec = importlib.util.spec_from_file_location("alone", {str(HOME)!r})
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    print(alone.MISSING)
"""


def test_every_name_that_is_looked_up_exists() -> None:
    assert output(ALONE) == "[]\n"


def test_every_name_that_torch_sets_exists() -> None:
    """Those are found when they are used only, or are no attributes that thinned could look up."""
    from torch._functorch import config as partitioner
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
    from torch.distributed.fsdp import _common_utils

    compiled = torch.compile(nn.Linear(1, 1))
    assert torch_state.COMPILED in torch_state.children_of(compiled)
    assert torch_state.WRAPPERS == (
        torch_state.COMPILED,
        _common_utils.FSDP_WRAPPED_MODULE,
        checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE,
    )
    assert hasattr(partitioner, "activation_memory_budget")
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged)
    assert torch_state.ragged_dim(x) == 1
    assert len(torch_state.seqlens(x)) == 2
    assert torch_state.is_replica(nn.Linear(1, 1)._replicate_for_data_parallel())
    before = torch_state.let_compiled_checkpoints_count(True)
    assert before is not None  # the setting exists
    assert torch_state.let_compiled_checkpoints_count(before)


def test_the_functions_of_recomputations_are_known() -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            seen.append(torch_state.function_of(ctx))
            return x.clone()

    seen: list[Any] = []
    Function.apply(torch.ones(1, requires_grad=True))
    assert seen == [Function]


def test_a_constant_is_one_when_compiled() -> None:
    """Without the mark Dynamo traces the function, and refuses what it calls."""
    asked = []

    @torch_state.constant_when_compiled
    def opaque(size: int) -> int:
        asked.append(size)
        return len(repr(id(Path))) * 0 + size  # a graph break if it is traced

    @torch.compile(fullgraph=True, backend="eager", dynamic=False)
    def call(x: Tensor) -> Tensor:
        return x * opaque(x.shape[0])

    for size in (3, 3, 5):
        assert call(torch.ones(size))[0] == size
    assert asked == [3, 5]


def test_what_is_never_inlined_breaks_the_graph() -> None:
    @torch_state.never_inlined
    def aside(x: Tensor) -> Tensor:
        return x + 1

    @torch.compile(fullgraph=True, backend="eager")
    def call(x: Tensor) -> Tensor:
        return aside(x * 2)

    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        call(torch.ones(1))


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("torch_state_again", HOME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_current_graph_task_id"),
        (torch._C._functorch, "is_legacy_batchedtensor"),
        (torch._C._autograd, "_get_creation_meta"),
        (torch._functorch.utils, "enable_single_level_autograd_function"),
        (torch.autograd.forward_ad, "_current_level"),
        (torch.autograd.function, "_SingleLevelFunction"),
        (torch.fx.experimental.proxy_tensor, "get_proxy_slot"),
        (nn.Module, "_call_impl"),
        (nn.Module, "_get_name"),
        (nn.Module, "_replicate_for_data_parallel"),
    ],
)
def test_a_needed_name_that_is_missing_is_told_at_import(
    holder: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(holder, name)
    words = rf"(?s)thinned \S+ needs .*{re.escape(torch.__version__)} has not.*{name}.*use PyTorch 2\.11 to 2"
    with pytest.raises(ImportError, match=words):
        _load()


def test_budgets_of_regions_are_needed_since_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_get_memory_budget_annotation"
    monkeypatch.delattr(torch.fx.traceback, name, raising=False)
    if torch.__version__ >= "2.13":
        with pytest.raises(ImportError, match=name):
            _load()
    else:
        assert _load().MISSING == []


@pytest.mark.parametrize(
    ("holder", "name", "function", "feature"),
    [
        (torch._functorch.vmap, "_add_batch_dim", "add_batch_dim", "vmap"),
        (torch.overrides, "_get_current_function_mode_stack", "modes_of_thread", "intercept"),
        (torch.overrides, "_push_mode", "push_mode", "intercept"),
        (nn.functional, "_canonical_mask", "canonical_mask", "MultiheadAttention"),
    ],
)
def test_a_guarded_name_that_is_missing_refuses_the_feature(
    holder: Any, name: str, function: str, feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(holder, name)
    module = _load()
    assert [name] == module.MISSING
    with pytest.raises(RuntimeError, match=f"{feature}.* has not.*{name}.*use PyTorch 2.11"):
        getattr(module, function)()


def test_a_jagged_tensor_without_a_name_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"jagged tensor needs .*Tensor\._ragged_idx"):
        torch_state.ragged_dim(torch.ones(2))


def test_a_budget_without_its_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = torch.fx.Graph()
    monkeypatch.setitem(sys.modules, "torch._functorch.config", ModuleType("torch._functorch.config"))
    with pytest.raises(RuntimeError, match=r"compiled code needs .*activation_memory_budget"):
        torch_state.budget_of(graph.placeholder("x"))


def test_fake_tensors_without_their_class_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch._subclasses.fake_tensor"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with pytest.raises(RuntimeError, match=r"law of other devices needs .*FakeTensorMode"):
        torch_state.fake_tensors()


def refuse() -> Any:
    raise RuntimeError("no such name")


def test_an_intercept_that_is_refused_has_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context = thinned.intercept(key=thinned.Key(1))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["thinned.models.intercept"], "modes_of_thread", refuse)
        with pytest.raises(RuntimeError, match="no such name"):
            context.__enter__()
    with context:
        nn.functional.dropout(torch.ones(3))
    assert context.count == 1


def test_an_address_that_is_refused_has_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, recompute = nn.Sequential(thinned.Dropout(0.5)), sys.modules["thinned.models.checkpoint"]
    context = thinned.address(model, seed=1, step=0)
    with monkeypatch.context() as patch:
        patch.setattr(recompute, "checkpoint_generator", refuse)
        patch.setattr(recompute, "_checkpoint_patch", type(recompute._checkpoint_patch)())
        with pytest.raises(RuntimeError, match="no such name"):
            context.__enter__()
    assert recompute._thread.counting == []  # else checkpoints would go on counting in it
