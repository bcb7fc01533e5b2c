"""MAML++: a loss after every inner step, and a learned rate for every layer and step.

[Antoniou et al. (2019)](https://arxiv.org/abs/1810.09502) make MAML train better by, among other
things, a *multi-step loss*: the query loss after every inner step counts, the last one more and
more; and by *rates per layer and step*. The tasks are few-shot classification of handwritten
digits: five of them, one image of each, every image turned by an angle of its own, shuffled labels.
The result is measured on images that learning has not seen; the baseline is MAML with one rate.

The inner loss returns the query loss as its second result. What it returns there stays connected:
`fast.aux` has the query loss before each step, at the cost of a number for each.
"""
