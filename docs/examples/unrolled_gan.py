"""An unrolled GAN: a generator that looks ahead at what the discriminator will learn.

The generator of a GAN learns against the discriminator of the moment, and may put all that it makes
into one place, then flee to the next. Against a discriminator that has taken a few more steps
already, a derivative that goes *through* these steps, it does not pay to crowd ([Metz et al.,
2017](https://arxiv.org/abs/1611.02163)). The data are theirs, eight narrow Gaussians on a ring. What
is counted are the Gaussians that the generator reaches, with and without unrolling; everything else is
the same.

What it makes is a tensor that the discriminator's loss uses, so the gradient finds its way to the
generator through every step.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(2000, "updates of the generator"),
    unrolled=(5, "steps that the generator looks ahead"),
)
BATCH, MODES, SPREAD = 128, 8, 0.02

# %%
# ## The ring, and the two players


def real(n):
    angle = torch.randint(MODES, (n,)) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], 1) + SPREAD * torch.randn(n, 2)


def network(inputs, outputs, width=64):
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, outputs),
    )


def loss_fn(discriminator, batch):
    true, made = (discriminator(x) for x in batch)
    return F.softplus(-true).mean() + F.softplus(made).mean()


def train(unrolled):
    """The generator, and what it made along the way."""
    torch.manual_seed(args.seed)
    generator, discriminator = network(16, 2), network(2, 1)
    inner = diffopt.Adam(discriminator.parameters(), lr=DLR, betas=(0.5, 0.999))
    outer = torch.optim.Adam(generator.parameters(), lr=GLR, betas=(0.5, 0.999))
    state = diffopt.unroll(discriminator, inner, 0, loss_fn)
    seen = []
    for step in shared.bar(args.outer, f"{unrolled} steps ahead"):
        batch = real(BATCH), generator(torch.randn(BATCH, 16))
        ahead = diffopt.unroll(discriminator, inner, [batch] * unrolled, loss_fn, initial=state)
        outer.zero_grad()
        (-loss_fn(ahead, batch)).backward()
        outer.step()
        with torch.no_grad():  # the step that the discriminator really takes
            batch = real(BATCH), generator(torch.randn(BATCH, 16))
            state = diffopt.unroll(discriminator, inner, [batch], loss_fn, initial=state)
        if step % (args.outer // 4 or 1) == 0 or step == args.outer - 1:
            seen.append(made(generator))
    return generator, seen


@torch.no_grad()
def made(generator, n=2000):
    return generator(torch.randn(n, 16))


def covered(points):
    """Gaussians that at least 1 % of the points lie in, and the share of points in any."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    centres = torch.stack([angle.cos(), angle.sin()], 1)
    distance, nearest = torch.cdist(points, centres).min(1)
    inside = distance < 3*SPREAD
    counts = torch.bincount(nearest[inside], minlength=MODES)
    return (counts >= 0.01 * len(points)).sum().item(), inside.float().mean().item()
