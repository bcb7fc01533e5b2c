"""The processes of ``test_kills``: runs in a folder that are killed some time after a given
evaluation of the loss.

This one imports PyTorch, which takes longest, and forks one for each line of its input: the
arguments of ``main`` as JSON. For each it prints the status of its end, as JSON, too.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch import nn

import diffopt


def main(
    folder: str | None, adjoint: str, last: int, seconds: float, count: str, result: str
) -> None:
    """One run.

    Args:
        folder: of a durable run; None for one that is not.
        last: after which evaluation it is killed; 0 for never.
        seconds: how long after it.
        count: a file that gets one byte for each evaluation: ``f`` in the forward pass, ``b`` in
            the backward pass.
        result: a file for what comes out, to the last bit.
    """
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    lr = torch.tensor(0.02, requires_grad=True)
    evaluations = os.open(count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    direction, taken = b"f", 0

    def loss(model: nn.Module, t: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal taken
        taken += 1
        if taken == last:
            kill.start()
        os.write(evaluations, direction)
        time.sleep(0.002)
        return model(x).square().mean() + (model[0].weight * lr).sum(), model[3].bias.exp()

    kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    kill.daemon = True
    storage = None if folder is None else diffopt.Durable(folder, every=5)
    how = {"segmented": diffopt.Segmented(8, storage), "binomial": diffopt.Binomial(5, storage)}
    opt = diffopt.Adam(model.parameters(), lr=lr)
    fast = diffopt.unroll(model, opt, 60, loss, adjoint=how[adjoint])
    total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
    total = total + sum(fast.aux).sum()
    direction = b"b"
    total.backward()
    found = [total, lr.grad, torch.rand(1), *(p.grad for p in model.parameters())]
    Path(result).write_text(str([v.hex() for y in found for v in y.flatten().tolist()]))


def child(line: str) -> None:
    """Run and end."""
    code = 1
    try:
        main(**json.loads(line))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            child(line)
        _, status = os.waitpid(process, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
