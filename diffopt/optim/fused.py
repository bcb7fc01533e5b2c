"""Adam's update in one pass over memory, by the kernel of ``torch.optim.Adam(fused=True)``.

The kernel writes into its arguments, so it is given copies: four passes instead of ten.

Limits: on the CPU, for options that are plain numbers and where nothing is recorded, traced or
mapped; elsewhere the rule is put together from ``lists``. Both agree up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffopt._torch.operations import fused_adam
from diffopt.optim.lists import WIDE, Tensors, may_overwrite
from diffopt.optim.scalars import values_unknown
from diffopt.optim.terms import Entries, Hyper, column, tensors_of, with_entries


def adam(
    hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]
) -> tuple[Tensors, list[Entries]] | None:
    """Parameters and state after a step of Adam or AdamW; None where the kernel does not serve."""
    kernel = fused_adam(bool(hyper["decoupled_weight_decay"]))
    if kernel is None or not _serves(hyper, params, grads, states):
        return None
    keys = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if hyper["amsgrad"] else [])]
    new = {key: [x.clone() for x in column(states, key, params)] for key in keys}
    new["step"] = list(torch._foreach_add([s["step"] for s in states], 1.0))
    params = [x.clone() for x in params]
    kernel(
        params,
        [g.contiguous() for g in grads],
        new["exp_avg"],
        new["exp_avg_sq"],
        new.get("max_exp_avg_sq", []),
        new["step"],
        lr=hyper["lr"],
        beta1=hyper["betas"][0],
        beta2=hyper["betas"][1],
        weight_decay=hyper["weight_decay"],
        eps=hyper["eps"],
        amsgrad=bool(hyper["amsgrad"]),
        maximize=bool(hyper["maximize"]),
    )
    return params, with_entries(states, new)


def _serves(hyper: Hyper, params: Tensors, grads: Tensors, states: list[Entries]) -> bool:
    one_eps = isinstance(hyper["eps"], (float, int))  # and not one for each parameter
    if not one_eps or tensors_of([hyper]) or values_unknown():
        return False
    moments = [x for s in states for key, x in s.items() if key != "step"]
    dtype = params[0].dtype
    return (
        dtype in WIDE
        and may_overwrite(params, grads, moments)  # what are copies of these
        and all(
            type(x) in (Tensor, torch.nn.Parameter) and x.is_cpu and x.dtype is dtype
            for x in (*params, *grads, *moments)
        )
        and all(x.is_contiguous() for x in (*params, *moments))
    )
