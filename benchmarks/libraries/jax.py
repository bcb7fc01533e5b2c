"""JAX: the loop as a ``lax.scan`` with ``jax.checkpoint`` around each step, under ``jit``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from cases import WORKLOADS, Problem
from jax import lax

Values = dict[str, jax.Array]


def prepare(problem: Problem) -> Callable[[], Values]:
    if problem.case.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    device = jax.devices("gpu" if problem.case.device.startswith("cuda") else "cpu")[0]

    def put(x: Any) -> jax.Array:
        return jax.device_put(x.detach().cpu().numpy(), device)

    start = {name: put(x) for name, x in problem.model.named_parameters()}
    # Every step's batch, in one array with a leading axis for the tasks and one for the steps.
    xs, ys = (
        jnp.stack([jnp.stack([put(b[i]) for b in batches]) for batches in problem.batches])
        for i in range(2)
    )
    queries = tuple(jnp.stack([put(q[i]) for q in problem.queries]) for i in range(2))
    apply, loss_fn = FORWARD[WORKLOADS[problem.case.workload].family], mse
    if WORKLOADS[problem.case.workload].classes:
        loss_fn = cross_entropy
    update = partial(RULES[problem.case.optimizer], **problem.options)

    @jax.checkpoint
    def step(carry: Any, batch: Any) -> Any:
        params, state, t = carry
        grads = jax.grad(lambda p: loss_fn(apply(p, batch[0]), batch[1]))(params)
        return (*update(params, grads, state, t), t + 1), None

    def task_loss(params: Values, batches: Any, query: Any) -> jax.Array:
        zeros = jax.tree.map(jnp.zeros_like, params)
        carry = (params, (zeros, zeros), jnp.zeros((), jnp.int32))
        (params, _, _), _ = lax.scan(step, carry, batches)
        return loss_fn(apply(params, query[0]), query[1])

    @jax.jit
    def gradient(params: Values, batches: Any, queries: Any) -> Values:
        def mean(p: Values) -> jax.Array:
            return jax.vmap(task_loss, (None, 0, 0))(p, batches, queries).mean()

        def single(p: Values) -> jax.Array:
            return task_loss(p, *jax.tree.map(lambda x: x[0], (batches, queries)))

        return jax.grad(single if problem.case.tasks == 1 else mean)(params)

    compiled = gradient.lower(start, (xs, ys), queries).compile()
    return lambda: jax.block_until_ready(compiled(start, (xs, ys), queries))


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), y[..., None], -1)
    return -chosen.mean()


def mse(y: jax.Array, target: jax.Array) -> jax.Array:
    return ((y - target) ** 2).mean()


# The rules of torch.optim: (params, grads, two moments, t) -> (params, two moments).


def sgd(params: Values, grads: Values, state: Any, t: Any, *, lr: float) -> Any:
    return jax.tree.map(lambda x, g: x - lr * g, params, grads), state


def momentum(params: Values, grads: Values, state: Any, t: Any, *, lr: float, momentum: float):
    buffer = jax.tree.map(lambda m, g: momentum * m + g, state[0], grads)
    return jax.tree.map(lambda x, m: x - lr * m, params, buffer), (buffer, state[1])


def adam(params: Values, grads: Values, state: Any, t: Any, *, lr: float) -> Any:
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
    square = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, state[1], grads)
    rate, debias = lr / (1 - 0.9 ** (t + 1)), 1 - 0.999 ** (t + 1)
    new = jax.tree.map(
        lambda x, m, v: x - rate * m / (_root(v / debias) + 1e-8), params, mean, square
    )
    return new, (mean, square)


def rmsprop(params: Values, grads: Values, state: Any, t: Any, *, lr: float) -> Any:
    square = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g * g, state[0], grads)
    new = jax.tree.map(lambda x, g, v: x - lr * g / (_root(v) + 1e-8), params, grads, square)
    return new, (square, state[1])


def _root(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


RULES = {"sgd": sgd, "momentum": momentum, "adam": adam, "rmsprop": rmsprop}


# The networks of models.py, over parameters by PyTorch's names and in PyTorch's layouts.


def _linear(p: Values, name: str, x: jax.Array) -> jax.Array:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def _conv(p: Values, name: str, x: jax.Array, stride: int = 1) -> jax.Array:
    weight = p[f"{name}.weight"]
    around = (weight.shape[-1] // 2,) * 2
    y = lax.conv_general_dilated(x, weight, (stride, stride), (around, around))
    return y + p[f"{name}.bias"][:, None, None] if f"{name}.bias" in p else y


def _normalised(p: Values, name: str, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    y = (x - x.mean(axes, keepdims=True)) * lax.rsqrt(x.var(axes, keepdims=True) + 1e-5)
    shape = (-1,) + (1,) * (x.ndim - 2) if axes != (-1,) else (-1,)
    return y * p[f"{name}.weight"].reshape(shape) + p[f"{name}.bias"].reshape(shape)


def _batch_norm(p: Values, name: str, x: jax.Array) -> jax.Array:
    return _normalised(p, name, x, (0, 2, 3))


def _count(p: Values, pattern: str) -> int:
    return 1 + max(int(m[1]) for n in p if (m := re.match(pattern, n)))


def mlp(p: Values, x: jax.Array) -> jax.Array:
    last = _count(p, r"(\d+)\.")
    for i in range(0, last, 2):
        x = _linear(p, str(i), x if i == 0 else jax.nn.relu(x))
    return x


def conv4(p: Values, x: jax.Array) -> jax.Array:
    for i in range(4):
        x = jax.nn.relu(_batch_norm(p, f"norms.{i}", _conv(p, f"convs.{i}", x)))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return _linear(p, "head", x.reshape(x.shape[0], -1))


def resnet18(p: Values, x: jax.Array) -> jax.Array:
    x = jax.nn.relu(_batch_norm(p, "norm", _conv(p, "stem", x)))
    for i in range(8):
        at, stride = f"blocks.{i}", 2 if i in (2, 4, 6) else 1
        y = jax.nn.relu(_batch_norm(p, f"{at}.norm1", _conv(p, f"{at}.conv1", x, stride)))
        y = _batch_norm(p, f"{at}.norm2", _conv(p, f"{at}.conv2", y))
        if f"{at}.shortcut.weight" in p:
            x = _batch_norm(p, f"{at}.norm3", _conv(p, f"{at}.shortcut", x, stride))
        x = jax.nn.relu(x + y)
    return _linear(p, "head", x.mean((2, 3)))


def gpt(p: Values, x: jax.Array) -> jax.Array:
    x = p["tokens.weight"][x] + p["positions.weight"]
    n, length, dim = x.shape
    heads = dim // 32 if dim >= 64 else 2
    future = jnp.triu(jnp.full((length, length), -jnp.inf), 1)
    for i in range(_count(p, r"layers\.(\d+)\.")):
        at = f"layers.{i}"
        split = _linear(p, f"{at}.qkv", _normalised(p, f"{at}.norm1", x, (-1,)))
        q, k, v = jnp.moveaxis(split.reshape(n, length, 3, heads, dim // heads), (2, 3), (0, 2))
        scores = q @ k.swapaxes(-2, -1) / math.sqrt(dim // heads) + future
        mixed = (jax.nn.softmax(scores) @ v).swapaxes(1, 2).reshape(n, length, dim)
        x = x + _linear(p, f"{at}.out", mixed)
        up = _linear(p, f"{at}.up", _normalised(p, f"{at}.norm2", x, (-1,)))
        x = x + _linear(p, f"{at}.down", jax.nn.gelu(up, approximate=True))
    return _linear(p, "head", _normalised(p, "norm", x, (-1,)))


FORWARD = {"mlp": mlp, "conv4": conv4, "resnet18": resnet18, "gpt": gpt}
