"""Private names of PyTorch: in ``diffopt._torch`` alone, and each still there."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd import forward_ad, graph
from torch.nn.attention import SDPBackend, sdpa_kernel

import diffopt
from diffopt._model import standing
from diffopt._torch import (
    attention,
    autograd,
    checkpoint,
    compiling,
    engine,
    functorch,
    modes,
    operations,
)
from diffopt._torch.feature import optional, private
from diffopt._torch.version import check_torch

PACKAGE = Path(diffopt.__file__).parent


#: What PyTorch's documentation lists: operations on lists of tensors, and the operators of ATen.
DOCUMENTED = ("torch._foreach_", "torch.ops.aten.")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_names(source: str) -> Iterator[str]:
    """Names of modules of PyTorch, or in them, that begin with an underscore."""
    tree = ast.parse(source)
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    bound = alias.asname or "torch"
                    modules[bound] = alias.name if alias.asname else "torch"
                    if is_private(alias.name):
                        yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                modules[alias.asname or alias.name] = name
                if is_private(name):
                    yield name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            parts = [node.attr]
            inner = node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in modules and is_private(node.attr):
                yield ".".join([modules[inner.id], *reversed(parts)])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            for argument in node.args:
                value = getattr(argument, "value", None)
                if isinstance(value, str) and value.startswith("torch.") and is_private(value):
                    yield value


def test_the_search_finds_private_names() -> None:
    source = """
import torch, torch._dynamo as dynamo
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch._C import _functorch
import_module("torch._decomp")
torch._C._nn.gelu, forward_ad._current_level, F._x, torch.nn.Module.__call__, self._torch
"""
    assert set(private_names(source)) == {
        *("torch._dynamo", "torch._C._functorch", "torch._decomp", "torch._C", "torch._C._nn"),
        *("torch.autograd.forward_ad._current_level", "torch.nn.functional._x"),
    }


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if "_torch" not in p.parts]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_are_used_in_one_place(path: Path) -> None:
    found = {n for n in private_names(path.read_text()) if not n.startswith(DOCUMENTED)}
    assert not found, f"{path.name} uses {sorted(found)}: wrap it in diffopt/_torch"


#: Each private name that is used, and where.
NAMES = [
    ("torch.utils._pytree", "tree_flatten"),
    ("torch.utils._pytree", "tree_unflatten"),
    ("torch.utils._pytree", "tree_leaves"),
    ("torch.utils._pytree", "tree_map"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch.utils.checkpoint", "_CheckpointFrame"),
    ("torch._C._functorch", "peek_interpreter_stack"),
    ("torch._C._functorch", "get_interpreter_stack"),
    ("torch._C._functorch", "is_batchedtensor"),
    ("torch._C._functorch", "_unwrap_batched"),
    ("torch._C._functorch", "_add_batch_dim"),
    ("torch._functorch.pyfunctorch", "temporarily_pop_interpreter_stack"),
    ("torch._C._autograd", "_get_current_graph_task_keep_graph"),
    ("torch._C._autograd", "_get_sequence_nr"),
    ("torch._C", "_current_graph_task_id"),
    ("torch._C._autograd", "_top_saved_tensors_default_hooks"),
    ("torch._C", "DisableTorchFunction"),
    ("torch.autograd.graph", "_engine_run_backward"),
    ("torch._C._functorch", "is_functorch_wrapped_tensor"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("torch._C", "_is_any_autocast_enabled"),
    ("torch._C", "_DisableAutocast"),
    ("torch._inductor.compile_fx", "compile_fx"),
    ("torch._inductor", "config"),
    ("torch.ops.mkldnn", "_linear_pointwise"),
    ("torch._inductor", "cpu_vec_isa"),
    ("torch._inductor.cpu_vec_isa", "pick_vec_isa"),
    ("torch._inductor.cpu_vec_isa", "valid_vec_isa_list"),
    ("torch._inductor.cpu_vec_isa", "x86_isa_checker"),
    ("torch._C", "_len_torch_function_stack"),
    ("torch._C", "_get_math_sdp_enabled"),
    ("torch._C", "_set_sdp_use_math"),
    ("torch._C._functorch", "is_legacy_batchedtensor"),
    ("torch._C", "_vmapmode_increment_nesting"),
    ("torch._C", "_vmapmode_decrement_nesting"),
    ("torch._ops", "OpOverload"),
    ("torch._C", "_VariableFunctions"),
    ("torch._C", "_nn"),
    ("torch._C", "_FunctionBase"),
    ("torch", "_fused_adam_"),
    ("torch", "_fused_adamw_"),
    ("torch._C._nn", "flatten_dense_tensors"),
    ("torch.distributed.tensor._api", "_FromTorchTensor"),
    ("torch.distributed.tensor._redistribute", "NestedRedistribute"),
]

#: Those that were not there in the oldest PyTorch that is supported.
NEW = [("torch.distributed.tensor._redistribute", "NestedRedistribute")]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_private_names_are_there(module: str, name: str) -> None:
    """One that is gone is no error for users: its feature is. Here it is one, to be found early."""
    if (module, name) in NEW and torch.__version__ < (2, 13):
        pytest.skip("its feature is refused with this PyTorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing TorchInductor gives some
        assert optional(module, name) is not None


def test_the_list_of_names_is_complete() -> None:
    used = {None}
    for path in (PACKAGE / "_torch").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            if isinstance(node, ast.Call) and name in ("optional", "private"):
                used.add(getattr(node.args[1], "value", None))
    assert used - {None, "forward_ad"} <= {name for _, name in NAMES}
    assert "_get_sequence_nr" in used


def test_a_missing_name_costs_its_feature_alone() -> None:
    assert optional("torch._nowhere", "name") is None
    assert optional("torch._C", "_nothing") is None
    lost = private("torch._C", "_nothing", "tasks")
    with pytest.raises(NotImplementedError, match=r"^tasks cannot .* no torch._C._nothing"):
        lost(1, two=2)


def test_functorch() -> None:
    autograd.load_decompositions()
    x = torch.randn(3, 4)
    inside: list[object] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        level = functorch.only_level()
        assert level is not None
        parts = functorch.unwrapped(x, level)
        assert parts is not None
        inside.append((parts[0].shape, parts[1], functorch.is_wrapped(x)))
        assert functorch.in_functorch()
        with functorch.outside():
            inside.append(functorch.in_functorch())
            result = 2 * parts[0].movedim(parts[1], 0)
        return functorch.wrapped(result, level)

    assert torch.equal(torch.vmap(doubled, in_dims=1)(x), 2 * x.T)
    assert inside == [((3, 4), 1, True), False]
    assert functorch.only_level() is None
    assert not functorch.in_functorch()
    assert functorch.active_transform() is None
    kinds: list[bool] = []
    names: list[str | None] = []

    def noted(x: torch.Tensor) -> torch.Tensor:
        kinds.append(functorch.in_derivative())
        names.append(functorch.active_transform())
        assert functorch.only_level() is None or not kinds[-1]
        return x.sin()

    torch.vmap(noted)(x[0])
    torch.func.grad(noted)(x[0, 0])
    torch.func.jvp(noted, (x,), (x,))
    assert kinds == [False, True, True]
    assert names == ["vmap", "grad", "jvp"]
    assert not functorch.is_wrapped(x)
    assert functorch.unwrapped(x, 1) is None
    assert functorch.unwrapped("x", 1) is None


def test_compiling() -> None:
    x = torch.ones(2, 2)
    assert compiling.is_overload(torch.ops.aten.sin.default)
    assert not compiling.is_overload(torch.ops.aten.sin)
    assert not compiling.is_overload(torch.sin)
    with torch.autocast("cpu", dtype=torch.bfloat16), compiling.without_autocast():
        assert (x @ x).dtype == torch.float32
    with compiling.without_autocast():
        assert (x @ x).dtype == torch.float32


def test_the_default_device() -> None:
    assert modes.default_device() == torch.device("cpu")
    with torch.device("meta"):
        assert modes.default_device() == torch.device("meta")
        assert torch.nn.functional.relu(torch.ones(1)).device == modes.default_device()
    torch.set_default_device("meta")
    try:
        assert modes.default_device() == torch.device("meta")
    finally:
        torch.set_default_device(None)
    assert modes.default_device() == torch.device("cpu")


def ways_of_attention() -> list[SDPBackend]:
    return torch.nn.attention._cur_sdpa_kernel_backends()


@pytest.mark.parametrize("are_known", [True, False])
def test_attention_by_separate_operations(monkeypatch: pytest.MonkeyPatch, are_known: bool) -> None:
    """The same as PyTorch's own context does, and afterwards what was before."""
    assert attention._ARE_KNOWN
    monkeypatch.setattr(attention, "_ARE_KNOWN", are_known)
    for before in ([SDPBackend.FLASH_ATTENTION], [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
        with sdpa_kernel(before):
            allowed = ways_of_attention()
            with attention.only_math():
                assert ways_of_attention() == [SDPBackend.MATH]
            assert ways_of_attention() == allowed


def test_forward_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not autograd.in_forward_mode()
    with forward_ad.dual_level():
        assert autograd.in_forward_mode()
    monkeypatch.delattr(forward_ad, "_current_level")
    assert autograd.in_forward_mode()  # where nobody knows


@pytest.mark.parametrize("keep", [True, False])
def test_whether_a_pass_keeps_its_graph(keep: bool) -> None:
    x, told = torch.ones(2, requires_grad=True), []
    y = x.sin()
    y.register_hook(lambda g: told.append(engine.keeps_graph()))
    y.sum().backward(retain_graph=keep)
    assert told == [keep]


def test_the_end_of_a_backward_pass() -> None:
    """It comes once for a pass, after all of it, and not where it fails."""
    x, told = torch.ones(2, requires_grad=True), list[object]()

    def hooked(g: torch.Tensor) -> None:
        told.append(engine.graph_task())
        engine.at_its_end(lambda: told.append("end"))
        if len(told) > 2:
            raise ZeroDivisionError

    y = x.sin()
    y.register_hook(hooked)
    y.sum().backward(retain_graph=True)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    first, end, second = told
    assert end == "end"
    assert -1 < first < second
    assert engine.graph_task() == -1


def test_gradient_edges() -> None:
    """Of a custom Function's node, PyTorch's own keeps the graph alive; of the others, the node."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
            return 2 * g

    x = torch.ones(2, requires_grad=True)
    for made in (x, x.sin(), x.split(1)[1], Twice.apply(x)):
        edge, expected = autograd.gradient_edge(made), graph.get_gradient_edge(made)
        assert (edge.node, edge.output_nr) == (expected.node, expected.output_nr)
        assert (edge.ownership_token is None) == (expected.ownership_token is None)


def test_flattened(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.arange(6.0).reshape(2, 3).T, torch.ones(()), torch.ones(0, 2)]
    expected = torch.tensor([0.0, 3, 1, 4, 2, 5, 1])
    assert torch.equal(operations.flattened(tensors), expected)
    monkeypatch.setattr(operations, "_flatten", None)
    assert torch.equal(operations.flattened(tensors), expected)


def test_sequence_numbers() -> None:
    since = autograd.present_sequence()
    y = torch.ones(2, requires_grad=True).sin()
    assert since <= y.grad_fn._sequence_nr() < autograd.present_sequence()


def test_decompositions_are_loaded_without_a_warning() -> None:
    """Warnings are errors here, and this is a new process."""
    code = (
        "import warnings; warnings.simplefilter('error');"
        "from diffopt._torch.autograd import load_decompositions; load_decompositions();"
        "import sys; assert 'torch._decomp.decompositions_for_jvp' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)


def test_checkpoints_are_told_by_their_frames_or_else_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert checkpoint.HAS_FRAME
    layer = nn.Linear(2, 2)
    told = []
    enter = graph.saved_tensors_hooks.__enter__

    def noted(self: graph.saved_tensors_hooks) -> None:
        told.append(checkpoint.belongs_to_checkpoint(self))
        enter(self)

    x = torch.ones(1, 2, requires_grad=True)
    with monkeypatch.context() as patch:
        patch.setattr(graph.saved_tensors_hooks, "__enter__", noted)
        torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        with graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            layer(x)
    assert told == [True, False]

    monkeypatch.setattr(
        graph.saved_tensors_hooks, "__enter__", standing._enter_hooks_of_no_checkpoint
    )

    def loss_fn(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum()

    loss_fn(layer, x)
    with pytest.raises(NotImplementedError, match="Call the layer without it"):
        diffopt.unroll(layer, diffopt.SGD(layer.parameters(), lr=0.1), [x], loss_fn)


def test_an_old_pytorch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_torch()

    class GradientEdge(NamedTuple):
        node: object
        output_nr: int

    monkeypatch.setattr(graph, "GradientEdge", GradientEdge)
    with pytest.raises(ImportError, match=r"PyTorch 2.9 or later, .*pip install 'torch>=2.9'"):
        check_torch()
