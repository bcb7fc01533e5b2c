"""``diffopt.unroll``: differentiate through training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from diffopt._compile.compiled import CompiledStep
from diffopt._loop import progress as _progress
from diffopt._loop.loop import Loop
from diffopt._loop.setting import Monitor
from diffopt._loop.verify import Ledger
from diffopt._model.modes import Modes
from diffopt._model.slots import ModuleSlots
from diffopt._step.capture import Captured
from diffopt._step.generators import Generators
from diffopt._step.group import Group
from diffopt._step.loss import InnerLoss, TaskLosses
from diffopt._step.microbatches import Microbatches, parts_of
from diffopt._step.observe import Observer
from diffopt._step.parts import PartsLoss
from diffopt._step.parts_step import PartsStep
from diffopt._step.step import InnerStep
from diffopt._step.transform import GradTransform
from diffopt._unroll.arguments import (
    LossFn,
    batches_of,
    check_graphs,
    check_options,
    check_surroundings,
    chosen_adjoint,
    own_loss,
    own_loss_without_batch,
    plain_int,
)
from diffopt._unroll.node import run_connected, run_detached
from diffopt._unroll.problem import inner_problem
from diffopt._unroll.processes import agree, meeting
from diffopt._unroll.sharded import share_out
from diffopt._unroll.start import Initial, buffers_at_start, start_state, take_over
from diffopt._unroll.unrolled import Unrolled
from diffopt._values.state import State
from diffopt._values.tree import map_tensors, tensors_in
from diffopt.adjoint import Adjoint


@meeting
def unroll(
    model: nn.Module,
    opt: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: int | Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    segment: int | None = None,
    adjoint: Adjoint | None = None,
    initial: Initial = None,
    grad_transform: GradTransform | None = None,
    max_cotangent_norm: float | None = None,
    verify: bool = False,
    tasks: int | None = None,
    compile: bool = False,
    microbatches: int | Microbatches | None = None,
    group: Any = None,
    monitor: Monitor | None = None,
    progress: bool = False,
) -> Unrolled:
    """Train ``model`` for some steps, as a differentiable function of everything it is made of.

    The gradient of whatever is computed from the result reaches the initial parameters,
    optimizer state, hyperparameters, tensors in the batches, the model's other parameters, and
    every tensor that ``loss_fn`` or ``grad_transform`` captured, through ``backward()`` and
    ``torch.autograd.grad`` alike. With the default adjoint, and every other that is not said to be
    approximate, it is exact, and differentiable again.

    Args:
        model: any module. It is afterwards what it was, also when ``loss_fn`` raises. Where
            parameters are ``DTensor``s, call on every process of their mesh, with equal batches.
        opt: a ``diffopt`` or ``torch.optim`` optimizer over some or all of the model's
            parameters: the inner variables; or a list of them over disjoint parameters. Its state
            and param groups are the start. After
            ``import diffopt.higher`` also the pair that ``higher.innerloop_ctx`` yields, or the
            ``fmodel`` and a list of its optimizers, which are then left as a loop of
            ``dopt.step(loss)`` would have left them.
        steps: an int T: ``loss_fn(model, t)`` is called with t = 0, ..., T-1. Or batches:
            ``loss_fn(model, batch)`` is called with each; a batch is any pytree. What cannot be
            indexed is read into a list; what can, but is no list or tuple, is indexed anew
            whenever a step is computed.
        loss_fn: returns a scalar loss or ``(loss, aux)``, a pytree whose tensors stay connected;
            or, as some models do, a mapping or an
            object that holds it as ``loss``. Its ``model`` is the user's own module
            holding the current fast weights. It may run several times for a step, so it has to be
            a function of the model, the batch, captured tensors and random numbers. None: the
            model returns its own loss, from ``model(batch)``, ``model(**batch)`` where the batch
            is a mapping, or, for an int, ``model()``.
        segment: short for ``adjoint=diffopt.Segmented(segment)``.
        adjoint: how the derivative is computed. Default: ``diffopt.MemoryBudget()``, or
            ``diffopt.Segmented(1)`` with ``verify``.
        initial: an earlier ``Unrolled`` to continue from (its optimizer state wins over
            ``opt``'s), or initial values by name for some or all inner variables and buffers, such
            as a ``state_dict()`` of the model. What the earlier one trained and ``opt`` does not
            hold stands in the model as constants, and is handed on.
        grad_transform: ``f(grads) -> grads``, a differentiable change to the dict of inner
            gradients, by parameter name. The shapes stay; a parameter whose name is left out is
            left alone by the update. With ``tasks`` it is given one task's.
        max_cotangent_norm: before each step's vector-Jacobian product, scale the cotangent of
            the updated parameters to at most this joint norm, against exploding meta-gradients.
        verify: compare every step that is computed again with the first pass, bit for bit, and
            raise a ``RuntimeError`` that names step and tensor where they differ: ``loss_fn`` keeps
            state, data changed, a kernel is nondeterministic. Costs one more gradient a step, and
            a dozen passes over the state for each computation of it; a number is kept per tensor.
            Steps whose graph is kept, all of them with ``StoreAll``, are not computed again.
        tasks: N, to adapt N tasks at once: every batch tensor leads with the task dimension, and
            so do the results (``losses`` is (N, T)). Each task starts from the same values, unless
            ``initial`` has one for each. Equal to N unrolls, random numbers apart, which every task
            draws for itself; ``loss_fn`` runs under ``torch.vmap``.
        compile: trace the step and its derivative once, and run them as code compiled for this
            and all later calls with the model. ``loss_fn`` is not run again, so it has to have no
            effect but its result. What cannot be compiled runs as ever, after a
            ``CompileWarning`` that says why. See "Compiled steps" in the documentation.
        microbatches: m, or a ``diffopt.Microbatches``, to split each step's batch into m parts
            along its first dimension, of which one has its graph alive at a time, in both
            directions. The step is that of the whole batch, whose loss is the mean over the parts
            weighted by their numbers of examples; random numbers are drawn and buffers advance part
            by part. ``aux`` is a list of the parts', and ``grad_transform`` is given the whole
            batch. No graph of a step is kept, so each is evaluated once more on the way back.
            BatchNorm in training mode is refused, as are ``tasks`` and ``compile``. A backward pass
            that is itself recorded holds all parts of a step.
        group: a ``torch.distributed`` process group, all of whose processes call ``unroll``, each
            with its share of every batch. The inner gradients are averaged over them before
            ``grad_transform``, weighted by ``microbatches``' weights where it is given and else
            equally, and everything but the batches is the same; ``losses`` and buffers are each
            process's own. Call ``backward()`` on all of them; then
            ``diffopt.distributed.mean_grads`` gives the gradient of the mean of the outer losses.
            ``max_cotangent_norm`` bounds the mean of what flows back.
        monitor: ``f(step, cotangent)``, called on the way back, from the last step to the first,
            with what flows to the parameters after each step, by name (a name that nothing flows
            to is left out), before ``max_cotangent_norm`` bounds it: where a meta-gradient
            explodes, vanishes or becomes NaN. With every adjoint that goes back step by step; it
            is given copies, is not differentiated, and what it returns is not used.
        progress: show a tqdm bar, forward and backward; needs the package ``tqdm``.

    Returns:
        the trained values. Under ``torch.no_grad()`` they carry no graph and nothing is kept.

    Raises:
        TypeError: a wrong kind of argument, such as an optimizer class that is not known.
        ValueError: a wrong value, such as a loss that is not a scalar or that does not depend
            on any inner variable, or an optimizer parameter that is not the model's; or both
            ``segment`` and ``adjoint``.
        NotImplementedError: what is refused, such as a model wrapped in ``DataParallel``.
        ImportError: ``progress=True`` without tqdm.
        RuntimeError: with ``group``, on all processes, where one failed or does something else;
            in the backward pass, where a step computed again is not what it was: it uses
            other tensors, or an input was changed in place since.

    Cost: by the adjoint. With the default, where the graphs of all steps fit into a quarter of the
    free memory, they are held and each step is computed once; else as many graphs and states as
    fit, and the others are computed again. A backward pass that is itself recorded
    (``create_graph=True``, an unroll inside an unroll) holds T states and then T cotangents, and
    the graph of one step at a time, whatever the adjoint and its storage are.

    Examples:
        >>> import torch, diffopt
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> loss_fn = lambda model, batch: ((model(batch[0]) - batch[1]) ** 2).mean()
        >>> inner = diffopt.SGD(model.parameters(), lr=lr)
        >>> fast = diffopt.unroll(model, inner, [(x, y)] * 5, loss_fn)
        >>> loss_fn(fast, (x, y)).backward()
        >>> model.weight.grad.shape, lr.grad.shape
        (torch.Size([1, 2]), torch.Size([]))
    """
    adjoint = chosen_adjoint(segment, adjoint, verify)
    check_options(
        {"loss_fn": loss_fn, "grad_transform": grad_transform, "monitor": monitor},
        {"verify": verify, "compile": compile, "progress": progress},
        max_cotangent_norm,
        tasks,
    )
    if group is not None and compile:
        raise NotImplementedError(
            "compile=True with group: the exchange between processes cannot be compiled with the "
            "step. Leave one of them out"
        )
    counted = isinstance(plain_int(steps), int)
    parts = parts_of(microbatches, model, counted=counted, tasks=tasks, compile=compile)
    problem = inner_problem(model, opt, tasks)
    take_over(problem, initial, tasks)
    share_out(problem, adjoint, group, tasks, compile)
    steps = plain_int(steps)
    batches = batches_of(steps)
    count = steps if isinstance(steps, int) else len(batches)
    first_step = initial.step if isinstance(initial, Unrolled) else problem.first_step
    inputs = [x for batch in _distinct(batches) for x in tensors_in(batch)]
    hyper = [x for group in problem.opt.param_groups for x in tensors_in(_options(group))]
    values = tensors_in(dict(initial)) if isinstance(initial, Mapping) else ()
    check_surroundings(
        [*problem.params.values(), *problem.model.buffers(), *inputs, *hyper, *values]
    )
    devices = {x.device for x in (*problem.params.values(), *problem.model.buffers(), *inputs)}
    connected = torch.is_grad_enabled() and problem.connected
    if connected:
        check_graphs(problem.opt)
    modes = Modes(model, devices)
    if max_cotangent_norm == math.inf:
        max_cotangent_norm = None

    slots = problem.slots(initial.buffers if isinstance(initial, Unrolled) else ())
    start = start_state(problem, buffers_at_start(slots, initial), initial, tasks)
    shards = slots.shards
    if shards is not None:
        start = shards.state_of_parts(start)
    constants = {n: x for n, x in problem.constants.items() if n not in slots.buffers}
    generators = Generators(devices)
    originals = {**problem.inner, **slots.constants}
    observer = Observer(generators, originals, constants, slots.move)
    captured = Captured()
    captured.offer([*inputs, *hyper, *constants.values(), *problem.inner.values()])
    step = (InnerStep if parts is None else PartsStep)(
        _inner_loss(slots, loss_fn, steps, batches, first_step, tasks, parts),
        problem.opt,
        problem.inner_groups,
        first_step=first_step,
        grad_transform=grad_transform or problem.grad_transform,
        group=group,
    )
    if isinstance(step, PartsStep):
        step.generators, step.with_gradient = generators, {}
    if compile:
        step = CompiledStep(
            step,
            generators=generators,
            counted=isinstance(steps, int),
            indexed=not isinstance(batches, tuple),
            given=[*problem.inner.values(), *slots.buffers.values()],
        )
        captured.offer(step.environment)
        observer.watch(step.environment)
    loop = Loop(
        step,
        start,
        count,
        captured=captured,
        observer=observer,
        generators=generators,
        modes=modes,
        options=problem.options,
        progress=_progress.Progress(count, progress),
        connected=connected,
        max_cotangent_norm=max_cotangent_norm,
        monitor=monitor,
        tasks=tasks,
        ledger=Ledger() if verify and connected else None,
    )
    agreeing = [] if group is None else [(group, start.params)]
    if shards is not None:
        agreeing += [(Group(g), problem.inner) for over in shards.meshes for g in over.groups]
    for processes, params in agreeing:
        agree(
            processes,
            params,
            adjoint,
            numbers_of_steps=count,
            first_steps=first_step,
            optimizers=(type(problem.opt).__name__, problem.inner_groups),
            max_cotangent_norms=max_cotangent_norm,
            numbers_of_tasks=tasks,
            settings_of_verify=verify,
            grad_modes=connected,
            whether_there_is_a_grad_transform=grad_transform is not None,
            ways_of_weighting_microbatches=parts and (parts.reduction, parts.weight is not None),
        )
    if connected:
        guarded = [*inputs, *hyper, *constants.values()]
        if shards is not None:  # of which the loop is given the parts, whose versions stay
            guarded += problem.inner.values()
        final, losses, aux = run_connected(loop, adjoint, guarded)
    else:
        final, losses, aux = run_detached(loop)
    opt_state = {**problem.carried, **final.opt}
    final = State(step.loss.precision.narrowed(final.params), opt_state, final.buffers)
    if shards is not None:
        final = shards.state_of_wholes(final)
    chosen = {*chain.from_iterable(problem.groups), *slots.constants}
    params = {name: x for name, x in problem.params.items() if name in chosen}
    if tasks is not None:
        losses = losses.T if count else losses.new_zeros(tasks, 0)
    result = Unrolled(slots, final, params, losses, aux, first_step + count, tasks)
    problem.deliver(result)
    return result


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _distinct(batches: Any) -> list[Any]:
    """The batches that exist already, each once; batches indexed on demand are not made."""
    if isinstance(batches, Tensor):
        return [batches]
    if not isinstance(batches, tuple):
        return []
    return list({id(batch): batch for batch in batches}.values())


def _inner_loss(
    slots: ModuleSlots,
    loss_fn: LossFn | None,
    steps: Any,
    batches: Sequence[Any],
    first_step: int,
    tasks: int | None,
    parts: Microbatches | None,
) -> InnerLoss:
    counted = isinstance(steps, int)
    # A compiled function has no second derivative: its original is called.
    function = getattr(loss_fn, "_torchdynamo_orig_callable", loss_fn)
    if function is None:
        function = own_loss_without_batch if counted else own_loss
    inference = torch.is_inference_mode_enabled()  # whose tensors no gradient can be taken with

    def item_at(t: int) -> Any:
        if counted:
            return first_step + t
        return map_tensors(torch.Tensor.clone, batches[t]) if inference else batches[t]

    if tasks is not None:
        return TaskLosses(slots, function, item_at, first_step, tasks)
    if parts is None:
        return InnerLoss(slots, function, item_at, first_step)
    loss = PartsLoss(slots, function, item_at, first_step)
    loss.microbatches = parts
    return loss
