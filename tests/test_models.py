"""Models that are odd in one way or another: the exact gradient, or an error that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from plain import Training, check
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
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
    norms = nn.BatchNorm1d(5), nn.LayerNorm(5)
    return layer_that(
        nn.Linear(3, 5), nn.GELU(), *norms, nn.Dropout(0.3), checkpointed=checkpointed
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


# Weights that are computed from others.


def with_parametrized(change: Callable[[nn.Linear], Any]) -> nn.Module:
    model = mlp()
    change(model[0])
    change(model[2])
    return model


def old_style(name: str) -> Callable[[nn.Linear], Any]:
    def change(layer: nn.Linear) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            getattr(nn.utils, name)(layer)

    return change


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


def own_parametrization() -> nn.Module:
    model = mlp(nn.Linear(5, 5), nn.Tanh())
    parametrize.register_parametrization(model[2], "weight", Symmetric())
    return model


def cached_inside_the_loss() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        with parametrize.cached():
            return m.body(m.body(x).sin())

    body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    parametrizations.weight_norm(body[0])
    return Calls(forward, body=body).double()


# Parameters held in other ways than by a layer each.


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.many = nn.ParameterList([torch.randn(3, 5), torch.randn(5, 1)])
        self.named = nn.ParameterDict({"scale": torch.rand(5), "shift": torch.randn(())})

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.many[0] * self.named["scale"] + self.named["shift"]).tanh()
        return hidden @ self.many[1]


class LowRank(nn.Module):
    """A frozen layer and a trained product of two thin matrices beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 5)
        self.down = nn.Parameter(torch.randn(3, 1))
        self.up = nn.Parameter(0.1 * torch.randn(1, 5))  # at 0 Adam is too curved to difference
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.base(x) + x @ self.down @ self.up).tanh())


def low_rank() -> nn.Module:
    model = LowRank().double()
    model.base.weight.requires_grad_(False)
    return model


def constant_layers() -> nn.Module:
    model = mlp(nn.Linear(5, 5), nn.Tanh())
    model[2].register_parameter("strength", nn.Parameter(torch.ones(3)))  # used by nothing
    return model


def channels_last() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        images = x.T.reshape(1, 3, 2, 4).repeat(8, 1, 1, 1) * x.sum(1).reshape(8, 1, 1, 1)
        return m.last(m.conv(images).tanh().mean((2, 3)))

    model = Calls(forward, conv=nn.Conv2d(3, 4, 2), last=nn.Linear(4, 1)).double()
    return model.to(memory_format=torch.channels_last)


# Losses that take derivatives, or call the model in other ways.


def gradient_penalty() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return m.body(x)
        x = x.clone().requires_grad_()
        y = m.body(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + 0.3 * slope.square().sum(1, keepdim=True)

    return Calls(forward, body=mlp())


def functional_call_inside() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        scaled = {name: 1.5 * p for name, p in m.body.named_parameters()}
        each = torch.vmap(lambda row: torch.func.functional_call(m.body, scaled, (row,)))
        return each(x)

    return Calls(forward, body=mlp())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


def custom_function() -> nn.Module:
    return Calls(
        lambda m, x: m.last(Cube.apply(m.first(x))),
        first=nn.Linear(3, 5),
        last=nn.Linear(5, 1),
    ).double()


class ReadsItsWeightAgain(torch.autograd.Function):
    """A linear map that looks its weight up once more on the way back, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, g @ ctx.layer.weight, g.T @ x


def reads_its_weight_again() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        hidden = m.first(x).tanh()
        return ReadsItsWeightAgain.apply(m.last, hidden, m.last.weight) + m.last.bias

    return Calls(forward, first=nn.Linear(3, 5), last=nn.Linear(5, 1)).double()


# Models that something has been done to.


def compiled(how: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = mlp()
        if how == "in place":
            model.compile(backend="eager")
            return model
        if how == "a layer":
            model[0] = torch.compile(model[0], backend="eager")
            return model
        wrapped: Any = torch.compile(model, backend="eager")
        return wrapped

    return make


def lazily_built() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(1)).double()
    model(X)
    return model


def default_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x.reshape(2, 4, 3)).chunk(3, -1)
        return m.last(F.scaled_dot_product_attention(q, k, v, is_causal=True)).reshape(8, 1)

    return Calls(forward, qkv=nn.Linear(3, 12), last=nn.Linear(4, 1)).double()


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
    "weight_norm": lambda: with_parametrized(parametrizations.weight_norm),
    "weight_norm, other dimension": lambda: with_parametrized(
        lambda layer: parametrizations.weight_norm(layer, dim=1)
    ),
    "weight_norm, old style": lambda: with_parametrized(old_style("weight_norm")),
    "spectral_norm": lambda: with_parametrized(parametrizations.spectral_norm),
    "spectral_norm, old style": lambda: with_parametrized(old_style("spectral_norm")),
    **{
        f"orthogonal ({name})": lambda name=name: with_parametrized(
            lambda layer: parametrizations.orthogonal(layer, orthogonal_map=name)
        )
        for name in ("matrix_exp", "cayley", "householder")
    },
    "own parametrization": own_parametrization,
    "parametrize.cached() inside the loss": cached_inside_the_loss,
    "pruned weights": lambda: with_parametrized(
        lambda layer: prune.l1_unstructured(layer, "weight", 0.4)
    ),
    "ParameterList and ParameterDict": lambda: Lists().double(),
    "low-rank adapters (LoRA)": low_rank,
    "a parameter that nothing uses": constant_layers,
    "channels_last memory": channels_last,
    "gradient penalty in the loss": gradient_penalty,
    "functional_call and vmap in the loss": functional_call_inside,
    "custom autograd Function": custom_function,
    "custom Function that reads its weight again": reads_its_weight_again,
    "compiled model": compiled("as a whole"),
    "compiled in place": compiled("in place"),
    "compiled layer": compiled("a layer"),
    "lazily built layers": lazily_built,
    "scaled_dot_product_attention": default_attention,
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

# What the backward pass of an outer evaluation, too, would call: that is as PyTorch has it.
INSIDE_ONLY = {
    "tensor hook that changes the gradient",
    "hook on a parameter",
    "module hooks, forward and backward",
}


def of_weights(model: Any) -> Tensor:
    return sum((p.square().sum() for p in model.parameters()), start=torch.zeros(()))


def below_diagonal(v: Tensor) -> Tensor:
    return v.tril(-1) if v.dim() == 2 else v


@pytest.mark.parametrize("kind", EXACT)
def test_exact(kind: str) -> None:
    check(
        Training(
            EXACT[kind],
            loss,
            of_weights if kind in INSIDE_ONLY else outer,
            without("strength"),
            reference=REFERENCES.get(kind),
            cut=kind in CUT,
            rounds="cayley" in kind or "householder" in kind,
            along=below_diagonal if "householder" in kind else lambda v: v,
        )
    )
