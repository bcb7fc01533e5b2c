"""Models that are refused, and the words they are refused with."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import scripted
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import diffopt

X = torch.linspace(-1.0, 1.0, 12).reshape(4, 3)


def train(model: nn.Module, loss_fn: Any = None, steps: int = 3) -> diffopt.Unrolled:
    inner = diffopt.SGD(model.parameters(), lr=0.1)
    return diffopt.unroll(model, inner, steps, loss_fn or (lambda m, t: m(X).square().mean()))


class Calls(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self._call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._call(self, x)


def data_parallel() -> None:
    train(nn.DataParallel(nn.Linear(3, 2)))


def sharded() -> None:
    class FullyShardedDataParallel(nn.Sequential):  # making a real one needs a process group
        pass

    train(nn.Sequential(FullyShardedDataParallel(nn.Linear(3, 2))))


def torch_script() -> None:
    train(nn.Sequential(scripted(nn.Linear(3, 2))))


def not_built_yet() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))
    inner = diffopt.SGD(model[0].parameters(), lr=0.1)
    diffopt.unroll(model, inner, 3, lambda m, t: m(X).square().mean())


def made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 2)
    train(model)


def renormalizing_embedding() -> None:
    train(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), lambda m, t: m(torch.arange(3)).sum())


def frequency_scaled_embedding() -> None:
    model = nn.Embedding(3, 2, scale_grad_by_freq=True)
    train(model, lambda m, t: m(torch.arange(3)).sum())


def legacy_backward_hook() -> None:
    model = nn.Linear(3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.register_backward_hook(lambda module, inner, outer: None)
    train(model)


def cached_parametrizations() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    with parametrize.cached():
        train(model)


def reentrant_checkpoint() -> None:
    train(Calls(lambda m, x: checkpoint(m.layer, x.requires_grad_(), use_reentrant=True)))


def reentrant_checkpoint_after_the_unroll() -> None:
    model = Calls(lambda m, x: checkpoint(m.layer, x.requires_grad_(), use_reentrant=True))
    fast = train(model, lambda m, t: m.layer(X).square().mean())
    fast(X.clone()).sum().backward()


def clamped_in_place() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.layer.weight.clamp_(min=0.0)
        return m.layer(x)

    train(Calls(forward))


def clamped_through_data() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.layer.weight.data.clamp_(min=0.0)
        return m.layer(x)

    train(Calls(forward))


class KeepsAList(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
        self.weights = [self.first.weight]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(x, self.weights[0]))


def parameters_kept_in_a_list() -> None:
    train(KeepsAList())


def sparse_gradient() -> None:
    train(nn.Embedding(3, 2, sparse=True), lambda m, t: m(torch.arange(3)).sum())


def complex_parameters() -> None:
    train(nn.Linear(3, 2, dtype=torch.cfloat))


REFUSED: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "DataParallel, DistributedDataParallel": (
        data_parallel,
        NotImplementedError,
        "the model is wrapped in DataParallel, whose replicas would not see the fast weights: "
        "pass the module inside, model.module",
    ),
    "FSDP": (
        sharded,
        NotImplementedError,
        "submodule '0' is sharded by FSDP, whose gathering of weights PyTorch cannot differentiate "
        "twice: pass it unsharded, or shard it with diffopt.distributed.shard",
    ),
    "TorchScript": (
        torch_script,
        NotImplementedError,
        "submodule '0' is a RecursiveScriptModule, which holds its parameters where no others can "
        "stand: pass the module it was scripted from",
    ),
    "lazy layer that is not built": (
        not_built_yet,
        ValueError,
        "submodule '1' is a LazyLinear whose 'weight' has no shape yet: call the model on a batch "
        "first, and build the optimizer afterwards",
    ),
    "model made in inference_mode": (
        made_in_inference_mode,
        NotImplementedError,
        "the model has a 'weight' that was made in torch.inference_mode(), which cannot be "
        "trained: build the model outside of it",
    ),
    "Embedding with max_norm": (
        renormalizing_embedding,
        NotImplementedError,
        "submodule '0' changes its weights in place (max_norm): scale its output instead, or "
        "divide the weights by their norms in a parametrization",
    ),
    "Embedding with scale_grad_by_freq": (
        frequency_scaled_embedding,
        NotImplementedError,
        "the model scales every gradient that passes it (scale_grad_by_freq), also those of the "
        "meta-gradient: scale the inner gradient in grad_transform",
    ),
    "register_backward_hook": (
        legacy_backward_hook,
        NotImplementedError,
        "the model has a hook of register_backward_hook, which would act on the meta-gradient as "
        "well: use register_full_backward_hook",
    ),
    "parametrize.cached() around the unroll": (
        cached_parametrizations,
        NotImplementedError,
        "torch.nn.utils.parametrize.cached() is active, which would keep the parametrized weights "
        "of the first step: enter it inside loss_fn",
    ),
    "checkpoint(use_reentrant=True)": (
        reentrant_checkpoint,
        NotImplementedError,
        "a layer calls torch.utils.checkpoint with use_reentrant=True, which can be differentiated "
        "neither with respect to given tensors nor twice: pass use_reentrant=False",
    ),
    "checkpoint(use_reentrant=True), in fast(x)": (
        reentrant_checkpoint_after_the_unroll,
        NotImplementedError,
        "a layer calls torch.utils.checkpoint with use_reentrant=True, which can be differentiated "
        "neither with respect to given tensors nor twice: pass use_reentrant=False",
    ),
    "parameter changed in place by the loss": (
        clamped_in_place,
        NotImplementedError,
        "the loss of step 0 changes parameter 'layer.weight' in place, which has no derivative: "
        "compute what it needs from the parameter, as a parametrization does",
    ),
    "parameter changed through .data by the loss": (
        clamped_through_data,
        NotImplementedError,
        "the loss of step 0 changes parameter 'layer.weight' in place, which has no derivative: "
        "compute what it needs from the parameter, as a parametrization does",
    ),
    "parameters kept in a Python list": (
        parameters_kept_in_a_list,
        NotImplementedError,
        "step 0 uses the model's own parameter 'first.weight' and not the value that it has in "
        "the unroll, which stands in the module: do not keep parameters in a list, a closure or a "
        "global, but take them from the module (an nn.ParameterList holds a list)",
    ),
    "sparse gradients": (
        sparse_gradient,
        NotImplementedError,
        "the gradient of 'weight' is sparse (torch.sparse_coo): use a dense one, such as "
        "nn.Embedding(..., sparse=False) gives",
    ),
    "complex parameters": (
        complex_parameters,
        NotImplementedError,
        "parameter '0' is complex: optimize its torch.view_as_real instead",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    attempt, error, words = REFUSED[kind]
    with pytest.raises(error) as raised:
        attempt()
    assert words in str(raised.value)


@pytest.mark.parametrize("kind", ["in place", "through .data"])
def test_a_refused_model_is_what_it_was(kind: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.layer.weight
        (weight.data if kind == "through .data" else weight.detach()).clamp_(min=0.0)
        return m.layer(x)

    model = Calls(forward)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotImplementedError, match="in place"):
        train(model)
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


def test_the_original_of_a_parameter_may_be_used_beside_it() -> None:
    """As in a proximal term: the distance to the initial weights."""
    model = nn.Linear(3, 2)
    start = list(model.parameters())

    def loss_fn(m: Any, t: int) -> Tensor:
        distance = sum((p - p0).square().sum() for p, p0 in zip(m.parameters(), start, strict=True))
        return m(X).square().mean() + distance

    train(model, loss_fn)(X).sum().backward()
    assert model.weight.grad is not None
