"""One process of ``test_kills``: a run in a folder that kills itself some seconds
after the first evaluation of the loss.

Arguments: the folder, the adjoint's name, seconds until the kill (0: never), a file that gets one
byte for each evaluation of the loss. Prints what came out, to the last bit.
"""

import os
import signal
import sys
import threading
import time

import torch
from torch import nn

import diffopt


def main(folder: str, adjoint: str, seconds: float, count: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    x = torch.randn(16, 3)
    lr = torch.tensor(0.02, requires_grad=True)
    evaluations = os.open(count, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def loss(model: nn.Module, t: int) -> torch.Tensor:
        if seconds and kill.ident is None:
            kill.start()
        os.write(evaluations, b".")
        time.sleep(0.002)
        return model(x).square().mean() + (model[0].weight * lr).sum()

    kill = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    kill.daemon = True
    storage = None if folder == "none" else diffopt.Durable(folder, every=5)
    how = {"segmented": diffopt.Segmented(8, storage), "binomial": diffopt.Binomial(5, storage)}
    opt = diffopt.Adam(model.parameters(), lr=lr)
    fast = diffopt.unroll(model, opt, 60, loss, adjoint=how[adjoint])
    total = fast.losses.sum() + sum(p.square().sum() for p in fast.params.values())
    total.backward()
    found = [total, lr.grad, torch.rand(1), *(p.grad for p in model.parameters())]
    print([v.hex() for y in found for v in y.flatten().tolist()])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
