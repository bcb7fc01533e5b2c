"""DARTS: search a small cell of a convolutional network by gradient.

A cell has a choice of operations on each of its edges. The search trains all of them at once, mixed
by the softmax of architecture parameters, and learns these by the gradient of the validation loss
through the training of the weights ([Liu et al., 2019](https://arxiv.org/abs/1806.09055), who look
one step ahead; here it is three). Then the strongest operations are kept, and the cell is trained
anew. The baseline are random cells from the same space, trained in the same way, with the same
weights to start from and the same batches.

The architecture parameters are a tensor that the model uses: `unroll` is not told about them.
"""

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(80, "updates of the architecture"),
    ahead=(3, "steps of training for each of them"),
    inner=(120, "steps of training a cell from scratch"),
    cells=(16, "random cells"),
    repeats=(2, "trainings of each cell"),
)
CHANNELS, NODES = 8, 3

# %%
# ## The space of cells
#
# A cell has an input and three nodes. Each node is the sum of what comes over its edges from all
# before it. So there are six edges, with one operation of five on each: 15,625 cells.


def convolution(size):
    return torch.nn.Sequential(
        torch.nn.ReLU(),
        torch.nn.Conv2d(CHANNELS, CHANNELS, size, padding=size // 2, groups=CHANNELS),
        torch.nn.Conv2d(CHANNELS, CHANNELS, 1),
        torch.nn.GroupNorm(1, CHANNELS),
    )


OPERATIONS = {
    "skip": torch.nn.Identity,
    "average": lambda: torch.nn.AvgPool2d(3, 1, 1),
    "maximum": lambda: torch.nn.MaxPool2d(3, 1, 1),
    "conv 3": lambda: convolution(3),
    "conv 5": lambda: convolution(5),
}
EDGES = [(a, b) for b in range(1, NODES + 1) for a in range(b)]


class Edge(torch.nn.ModuleList):
    def __init__(self):
        super().__init__(make() for make in OPERATIONS.values())

    def forward(self, x, choice):
        """``choice`` is the number of an operation, or a weight for each."""
        if isinstance(choice, int):
            return self[choice](x)
        return sum(weight * operation(x) for weight, operation in zip(choice, self, strict=True))


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, CHANNELS, 3, padding=1)
        self.edges = torch.nn.ModuleList(Edge() for _ in EDGES)
        self.head = torch.nn.Linear(NODES * CHANNELS, 10)

    def forward(self, x, cell):
        """``cell`` has a choice for each edge."""
        nodes = [self.stem(x.reshape(-1, 1, 8, 8))]
        for end in range(1, NODES + 1):
            coming = zip(EDGES, self.edges, cell, strict=True)
            nodes.append(sum(edge(nodes[a], choice) for (a, b), edge, choice in coming if b == end))
        return self.head(torch.cat([node.mean((2, 3)) for node in nodes[1:]], 1))


search_set, validation, test = shared.digits(500, 500, 797, seed=args.seed)


def batches(data, steps):
    x, y = data
    return [(x[pick], y[pick]) for pick in torch.randint(len(x), (steps, 64))]


def loss_of(cell):
    def loss_fn(model, batch):
        x, y = batch
        return F.cross_entropy(model(x, cell()), y)

    return loss_fn


# %%
# ## The search
#
# Each update of the architecture looks through a few steps of training, which are then kept.


def search():
    torch.manual_seed(args.seed)
    model = Network()
    logits = torch.zeros(len(EDGES), len(OPERATIONS), requires_grad=True)
    loss_fn = loss_of(lambda: logits.softmax(1))
    inner = diffopt.Adam(model.parameters(), lr=0.01)
    outer = torch.optim.Adam([logits], lr=0.1)
    weights, history = None, []
    for _ in shared.bar(args.outer):
        steps = batches(search_set, args.ahead)
        ahead = diffopt.unroll(model, inner, steps, loss_fn, initial=weights)
        loss = loss_fn(ahead, *batches(validation, 1))
        outer.zero_grad()
        loss.backward()
        outer.step()
        weights = ahead.detach()
        history.append(logits.detach().softmax(1))
    return torch.stack(history)


# %%
# ## Against random cells
#
# Trained on all that the search has seen, from scratch.

both = tuple(torch.cat(parts) for parts in zip(search_set, validation, strict=True))


@torch.no_grad()
def accuracy(cell):
    loss_fn, scores = loss_of(lambda: cell), []
    for repeat in range(args.repeats):
        torch.manual_seed(1000 + repeat)
        model = Network()
        inner = diffopt.Adam(model.parameters(), lr=0.01)
        trained = diffopt.unroll(model, inner, batches(both, args.inner), loss_fn)
        x, y = test
        scores.append((trained(x, cell).argmax(1) == y).float().mean())
    return torch.stack(scores).mean().item()


shares = search()
found = shares[-1].argmax(1).tolist()
randomly = torch.randint(len(OPERATIONS), (args.cells, len(EDGES))).tolist()
others = [accuracy(cell) for cell in shared.tqdm(randomly, desc="random cells")]
result = {
    "found": accuracy(found),
    "mean of random cells": sum(others) / len(others),
    "best of random cells": max(others),
}
print(f"test accuracy after {args.inner} steps, mean of {args.repeats} trainings")
for name, score in result.items():
    print(f"  {name:<22} {score:.1%}")
print(
    f"better than {sum(score < result['found'] for score in others)} of {len(others)} random cells"
)
for (a, b), choice in zip(EDGES, found, strict=True):
    print(f"  node {a} to {b}: {list(OPERATIONS)[choice]}")

# %%
# ## The picture

with shared.picture(args, 1, 2, figsize=(11, 3.4)) as (left, right):
    left.imshow(shares[-1].tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set(title="Share of each operation", xticks=range(len(OPERATIONS)))
    left.set_xticklabels(list(OPERATIONS))
    left.set_yticks(range(len(EDGES)), [f"{a} to {b}" for a, b in EDGES])
    left.grid(False)
    right.hist(others, bins=12, range=(0, 1), color=shared.GREY, label="random cells")
    right.axvline(result["found"], color=shared.BLUE, label="found")
    right.set(title="Test accuracy", xlabel="accuracy", ylabel="cells")
    right.legend(loc="upper left")
