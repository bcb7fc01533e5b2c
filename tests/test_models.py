"""Models that are odd in one way or another: the exact gradient, or an error that says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Training, check
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

X = torch.linspace(-1.0, 1.5, 24, dtype=torch.double).mul(7).sin().reshape(8, 3)
Y = torch.linspace(0.3, -0.7, 8, dtype=torch.double).mul(5).cos().reshape(8, 1)


def loss(model: Any, t: int) -> Any:
    return (model(X + 0.1 * t) - Y).square().mean()


def outer(model: Any) -> Tensor:
    torch.manual_seed(5)
    return (model(X.flip(0)) - Y).pow(4).mean()


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), *between, nn.Linear(5, 1)).double()


class Calls(nn.Module):
    """A model whose forward is given, over submodules that are given."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self._call = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self._call(self, x)


# Models that are exact, by what is odd about them.


def dropout_and_batch_norm() -> nn.Module:
    return mlp(nn.BatchNorm1d(5), nn.Dropout(0.4))


def eval_mode() -> nn.Module:
    return mlp(nn.BatchNorm1d(5), nn.Dropout(0.4)).eval()


def tied_weights() -> nn.Module:
    model = Calls(
        lambda m, x: m.out(m.hidden(m.embed(x).tanh()).tanh()).mean(1, keepdim=True),
        embed=nn.Linear(3, 5, bias=False),
        hidden=nn.Linear(5, 5),
        out=nn.Linear(5, 3),
    )
    model.out.weight = nn.Parameter(torch.randn(5, 3))
    model.hidden.weight = nn.Parameter(torch.randn(5, 5))
    del model.out.weight
    model.out.register_parameter("weight", model.embed.weight)
    model._call = lambda m, x: F.linear(
        m.hidden(m.embed(x).tanh()).tanh(), m.out.weight.T, m.out.bias
    ).mean(1, keepdim=True)
    return model.double()


def one_submodule_under_two_names() -> nn.Module:
    shared = nn.Linear(5, 5)
    return Calls(
        lambda m, x: m.last(m.again(m.once(m.first(x)).tanh()).tanh()),
        first=nn.Linear(3, 5),
        once=shared,
        again=shared,
        last=nn.Linear(5, 1),
    ).double()


def layer_that(*body: nn.Module, checkpointed: bool) -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(checkpoint(m.body, x, use_reentrant=False) if checkpointed else m.body(x))

    return Calls(forward, body=nn.Sequential(*body), last=nn.Linear(5, 1)).double()


def checkpointed_layer(checkpointed: bool = True) -> nn.Module:
    return layer_that(
        nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout(0.3), checkpointed=checkpointed
    )


def checkpointed_layer_that_changes_a_buffer(checkpointed: bool = True) -> nn.Module:
    return layer_that(
        parametrizations.spectral_norm(nn.Linear(3, 5)), nn.Tanh(), checkpointed=checkpointed
    )


def nested_checkpoints() -> nn.Module:
    def inner(m: Any, x: Tensor) -> Tensor:
        return checkpoint(m.a, x, use_reentrant=False).tanh() * 2

    return Calls(
        lambda m, x: m.b(checkpoint(inner, m, x, use_reentrant=False)),
        a=nn.Linear(3, 5),
        b=nn.Linear(5, 1),
    ).double()


def without(*left_out: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Adam over all parameters but some, which are constants of the loop that get a gradient."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [p for name, p in model.named_parameters() if name not in left_out]
        return torch.optim.Adam(trained, lr=0.03, eps=1e-3)

    return optimizer


def tensor_hook() -> nn.Module:
    """Gradient reversal of a learned strength, by a hook."""

    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.first(x).tanh()
        if hidden.requires_grad:
            hidden.register_hook(lambda g: -g * m.strength.exp())
        return m.last(hidden) + 0 * m.strength  # so that the loss is seen to depend on it

    model = Calls(forward, first=nn.Linear(3, 5), last=nn.Linear(5, 1))
    model.strength = nn.Parameter(torch.tensor(0.3))
    return model.double()


def hook_on_a_parameter(once: bool = False) -> nn.Module:
    def register(m: Any) -> None:
        m.first.weight.register_hook(lambda g: g * torch.tensor([1.0, 0.0, 0.5]))

    def forward(m: Any, x: Tensor) -> Tensor:
        if not once:
            register(m)
        return m.last(m.first(x).tanh())

    model = Calls(forward, first=nn.Linear(3, 5), last=nn.Linear(5, 1)).double()
    if once:
        register(model)
    return model


def module_hooks() -> nn.Module:
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    model[1].register_forward_hook(lambda module, args, y: y + 0.2 * args[0])
    model[1].register_full_backward_hook(lambda module, inner, outer: (inner[0] * 0.3,))
    model[2].register_full_backward_pre_hook(lambda module, outer: (outer[0] * 2,))
    return model


EXACT: dict[str, Callable[[], nn.Module]] = {
    "batch normalization and dropout": dropout_and_batch_norm,
    "eval mode": eval_mode,
    "tied weights": tied_weights,
    "one submodule under two names": one_submodule_under_two_names,
    "checkpointed layer": checkpointed_layer,
    "checkpointed layer that changes a buffer": checkpointed_layer_that_changes_a_buffer,
    "checkpoint inside a checkpoint": nested_checkpoints,
    "tensor hook that changes the gradient": tensor_hook,
    "hook on a parameter": hook_on_a_parameter,
    "module hooks, forward and backward": module_hooks,
}


# PyTorch's own loop advances the buffers of a checkpointed layer once more when it recomputes it,
# and then sees another layer than it did: the oracle is the same layer without the checkpoint.
# A hook on a parameter stays there in PyTorch's own loop, so it is registered once.
REFERENCES: dict[str, Callable[[], nn.Module]] = {
    "hook on a parameter": lambda: hook_on_a_parameter(once=True),
    "checkpointed layer": lambda: checkpointed_layer(False),
    "checkpointed layer that changes a buffer": (
        lambda: checkpointed_layer_that_changes_a_buffer(False)
    ),
}


# The power iteration of spectral normalization takes its vectors for constants.
CUT = {"checkpointed layer that changes a buffer", "spectral_norm", "spectral_norm, old style"}


def of_weights(model: Any) -> Tensor:
    return sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))


@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind: str) -> None:
    check(
        Training(
            EXACT[kind],
            loss,
            of_weights if "hook" in kind else outer,  # hooks act on an outer pass, as everywhere
            without("strength"),
            reference=REFERENCES.get(kind),
            cut=kind in CUT,
        )
    )
