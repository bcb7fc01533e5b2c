"""One process of ``test_kills``: a run in a folder that is killed some time after a given
evaluation of the loss.

Arguments: the folder, the adjoint's name, the number of that evaluation (0: never), the seconds
after it, a file that gets one byte for each evaluation: ``f`` in the forward pass, ``b`` in the
backward pass. Prints what came out, to the last bit.
"""

import os
import signal
import sys
import threading
import time

import torch
from torch import nn

import diffopt


def main(folder: str, adjoint: str, last: int, seconds: float, count: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    lr = torch.tensor(0.02, requires_grad=True)
    evaluations = os.open(count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    direction, taken = b"f", 0

    def loss(model: nn.Module, t: int) -> torch.Tensor:
        nonlocal taken
        taken += 1
        if taken == last:
            kill.start()
        os.write(evaluations, direction)
        time.sleep(0.002)
        return model(x).square().mean() + (model[0].weight * lr).sum()

    kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    kill.daemon = True
    storage = None if folder == "none" else diffopt.Durable(folder, every=5)
    how = {"segmented": diffopt.Segmented(8, storage), "binomial": diffopt.Binomial(5, storage)}
    opt = diffopt.Adam(model.parameters(), lr=lr)
    fast = diffopt.unroll(model, opt, 60, loss, adjoint=how[adjoint])
    total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
    direction = b"b"
    total.backward()
    found = [total, lr.grad, torch.rand(1), *(p.grad for p in model.parameters())]
    print([v.hex() for y in found for v in y.flatten().tolist()])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
