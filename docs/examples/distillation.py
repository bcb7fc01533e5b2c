"""Dataset distillation: ten images to train on instead of six hundred.

One synthetic image for each digit, learned so that a network trained on these ten alone does well
on real digits ([Wang et al., 2018](https://arxiv.org/abs/1811.10959)). The images and the learning
rate are learned by the gradient through the whole training run. Each outer step starts from another
random network, so that the images serve networks they have not seen. The baseline is
ten real images, one for each digit, drawn at random.

Tensors in a batch that require grad get a gradient, like everything else.
"""

import shared
import torch
import torch.nn.functional as F

import diffopt

args = shared.arguments(
    __doc__,
    outer=(400, "updates of the images"),
    inner=(30, "steps of one training run"),
    draws=(10, "networks, and sets of real images, for the result"),
)

# %%
# ## Real digits, and ten images to be learned

real, test = shared.digits(600, 1000, seed=args.seed)
images = (0.5 + 0.1 * torch.randn(10, 64)).requires_grad_()
log_lr = torch.tensor(-1.0, requires_grad=True)
labels = torch.arange(10)


def network():
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def loss_fn(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def train(model, images, lr=lambda step: log_lr.exp()):
    opt = diffopt.SGD(model.parameters(), lr=lr)
    return diffopt.unroll(model, opt, [(images, labels)] * args.inner, loss_fn)


# %%
# ## Learning the images

outer = torch.optim.Adam([{"params": [images], "lr": 0.05}, {"params": [log_lr], "lr": 0.02}])
history = []
for _ in shared.bar(args.outer):
    loss = loss_fn(train(network(), images), real)
    outer.zero_grad()
    loss.backward()
    outer.step()
    with torch.no_grad():
        images.clamp_(0, 1)  # ink, as in the real ones
    history.append(loss.item())

# %%
# ## Against ten real images
#
# On networks that were not seen in learning. The baseline may choose its learning rate.


@torch.no_grad()
def accuracy(pick, **options):
    scores = []
    for draw in range(args.draws):
        torch.manual_seed(1000 + draw)
        trained = train(network(), pick(), **options)
        scores.append((trained(test[0]).argmax(1) == test[1]).float().mean())
    return torch.stack(scores).mean().item()


def one_of_each():
    return torch.stack([x[torch.randint(len(x), ())] for x in by_digit])


by_digit = [real[0][real[1] == digit] for digit in range(10)]
distilled = accuracy(lambda: images)
baseline = max(accuracy(one_of_each, lr=lr) for lr in (0.03, 0.1, 0.3, 1.0))
result = {"distilled": distilled, "ten real images": baseline}
print(f"test accuracy of new networks after {args.inner} steps, mean of {args.draws}")
print(f"  on the ten learned images    {distilled:.1%}")
print(f"  on ten real images           {baseline:.1%}")
print(f"learned rate {log_lr.exp():.2f}")

# %%
# ## The picture

with shared.picture(args, 2, 10, figsize=(11, 2.6)) as axes:
    rows = zip(axes, (images.detach(), one_of_each()), ("learned", "real"), strict=True)
    for row, x, name in rows:
        for ax, image in zip(row, x, strict=True):
            ax.imshow(image.reshape(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
