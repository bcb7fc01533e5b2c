"""An unrolled GAN: a generator that looks ahead at what the discriminator will learn.

The generator of a GAN learns against the discriminator of the moment. It may then put all that it
makes into one place, and move to another when the discriminator has learned to see it. An unrolled
GAN learns against the discriminator a few steps later, with the gradient through these steps, and
crowding does not pay ([Metz et al., 2017](https://arxiv.org/abs/1611.02163)). The data are those of
the paper, eight narrow Gaussians on a ring. The number of Gaussians that the generator reaches is
counted with and without looking ahead; everything else is the same.

What the generator makes is a tensor in the discriminator's batch, so the gradient reaches the
generator through every step.
"""

import math

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(1000, "updates of the generator"),
    unrolled=(5, "steps that the generator looks ahead"),
    runs=(3, "generators of each kind"),
)
BATCH, NOISE, MODES, SPREAD = 128, 16, 8, 0.05
SHOWN = 5

# %%
# ## The ring, and the two players

angle = torch.arange(MODES) * (2 * math.pi / MODES)
centres = torch.stack([angle.cos(), angle.sin()], 1)


def real(n):
    return centres[torch.randint(MODES, (n,))] + SPREAD * torch.randn(n, 2)


def network(inputs, outputs, width=64):
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, outputs),
    )


def loss_fn(discriminator, batch):
    """Of the discriminator; the generator's is its negative."""
    true, made = (discriminator(x) for x in batch)
    return F.softplus(-true).mean() + F.softplus(made).mean()


# %%
# ## Training
#
# The discriminator's look ahead is thrown away. Then it takes one real step, from where it was: an
# unroll that continues from the last one has its weights and the state of its Adam.


def train(ahead, seed):
    """What the generator makes, ``SHOWN`` times along the way."""
    torch.manual_seed(seed)
    generator, discriminator = network(NOISE, 2), network(2, 1)
    inner = diffopt.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999))
    outer = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
    present = diffopt.unroll(discriminator, inner, 0, loss_fn)
    seen = []
    for step in shared.bar(args.outer, f"{ahead} steps ahead, seed {seed}"):
        batch = real(BATCH), generator(torch.randn(BATCH, NOISE))
        future = diffopt.unroll(discriminator, inner, [batch] * ahead, loss_fn, initial=present)
        outer.zero_grad()
        (-loss_fn(future, batch)).backward()
        outer.step()
        with torch.no_grad():
            batch = real(BATCH), generator(torch.randn(BATCH, NOISE))
            present = diffopt.unroll(discriminator, inner, [batch], loss_fn, initial=present)
            if (step + 1) % (args.outer // SHOWN) == 0:
                seen.append(generator(torch.randn(2000, NOISE)))
    return seen


def covered(points):
    """(Gaussians that have at least 1 % of the points, share of the points that are in any).

    A point is in a Gaussian up to three standard deviations from its centre.
    """
    distance, nearest = torch.cdist(points, centres).min(1)
    inside = distance < 3 * SPREAD
    counts = torch.bincount(nearest[inside], minlength=MODES)
    return (counts >= 0.01 * len(points)).sum().item(), inside.float().mean().item()


# %%
# ## With and without looking ahead

kinds = {"the discriminator of the moment": 0, f"{args.unrolled} steps ahead": args.unrolled}
seen = {
    name: [train(ahead, args.seed + run) for run in range(args.runs)]
    for name, ahead in kinds.items()
}
result = {name: [covered(points[-1]) for points in runs] for name, runs in seen.items()}
print(f"after {args.outer} updates, {args.runs} runs each; of {MODES} Gaussians")
for name, runs in result.items():
    modes, shares = zip(*runs, strict=True)
    print(
        f"  {name:<32} {', '.join(map(str, modes))} reached;"
        f" {sum(shares) / len(shares):.0%} of what is made lies in one"
    )

# %%
# ## The picture
#
# What the first generator of each kind makes along the way. The circles are the Gaussians.

with shared.picture(args, 2, SHOWN, figsize=(11, 5.2), sharex=True, sharey=True) as rows:
    colors = shared.ORANGE, shared.BLUE
    for row, (name, runs), color in zip(rows, seen.items(), colors, strict=True):
        row[0].set_title(name)
        for i, (axes, points) in enumerate(zip(row, runs[0], strict=True), 1):
            axes.scatter(*centres.T.numpy(), s=150, facecolors="none", edgecolors=shared.GREY)
            axes.scatter(*points[:500].T.numpy(), s=3, color=color)
            axes.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[])
            axes.set_xlabel(f"update {i * (args.outer // SHOWN)}")
            axes.grid(False)
