"""Two optimizers of equal weights, of which one skips dead groups: no bit may tell which."""

import torch
from helpers.right import ADAMW, OPTIMIZERS, SGD, device_of, fresh

from cges_kernels.backends.extension import BUILT

EXECUTORS = [name for name in ("cpu", "cuda") if name in BUILT]  # those that skip dead groups
SHAPE = (40, 300)
DEAD, LIVE, DYING = 1, 2, 5  # rows: dead, alive, and dying while its momentum is not yet zero
PENALTY = dict(group_lasso=2.0, exclusive_lasso=1e-4, group_by="filter", freeze_zeros="group")
RULES = {"momentum": (SGD, dict(momentum=0.9)), "plain": (SGD, {}), "adamw": (ADAMW, {})}


class Twins:
    """Two optimizers of equal weights: the first skips dead groups, the second does not."""

    def __init__(self, executor, rule=SGD, shape=SHAPE, dtype=torch.float32, **options):
        w = fresh(shape, dtype).to(device_of(executor))
        w[DEAD::3] = 0.0
        w[DYING] *= 0.5 / w[DYING].norm()
        self.weights = [torch.nn.Parameter(w.clone()) for _ in range(2)]
        self.optimizers = [
            OPTIMIZERS[rule]([p], lr=0.05, skip_dead=skip, backend=executor, **{**PENALTY, **options})
            for p, skip in zip(self.weights, (True, False))
        ]

    def step(self, times=1, of_dead=None):
        """Steps both and compares them. ``of_dead`` is the dead row's gradient, which should not be read."""
        for _ in range(times):
            self.give_grads(of_dead)
            for optimizer in self.optimizers:
                optimizer.step()
            self.check()

    def give_grads(self, of_dead=None):
        """Gives both the same new gradient."""
        p = self.weights[0]
        grad = fresh(p.shape, p.dtype).to(p.device)
        grad[DYING] *= 0.01
        if of_dead is not None:
            grad[DEAD] = of_dead
        for p in self.weights:
            p.grad = grad.clone()

    def check(self):
        """Weights and states of both agree to the bit."""
        assert torch.equal(*self.weights)
        states = [optimizer.state[p] for p, optimizer in zip(self.weights, self.optimizers)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    def each(self, f):
        """Calls f for both."""
        for p, optimizer in zip(self.weights, self.optimizers):
            f(p, optimizer)

    def skip(self):
        """Whether the first skips its dead row: what is written there without its knowledge stays."""
        p = self.weights[0]
        p.data[DEAD] = 1.0
        p.grad = fresh(p.shape, p.dtype).to(p.device)
        self.optimizers[0].step()
        return bool((p[DEAD] == 1.0).all())
