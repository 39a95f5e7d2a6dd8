"""Lion (Chen et al. 2023) as an update rule of the Triton executor, which needs no more of a rule."""

import triton
import triton.language as tl

from cges_kernels.backends.triton.tables import ADDRESS_LR, HYPER_LR, PROX_ALONE, RUNNING, Constant
from cges_kernels.backends.triton.updates import KernelRule, lerp, load_grad_sign, load_number

# Lion's numbers, in columns of `hyper` that each rule uses as it likes.
HYPER_WEIGHT1, HYPER_WEIGHT2, HYPER_DECAY = map(Constant, range(2, 5))


def fill_lion(row, options):
    """Write Lion's numbers into a row of `hyper`."""
    row[HYPER_WEIGHT1], row[HYPER_WEIGHT2] = (1 - beta for beta in options["betas"])
    row[HYPER_DECAY] = options["weight_decay"]


@triton.jit
def load_lion(tensor, row, grad_scale):
    """The scalars of lion_update."""
    lr, decay = load_number(row, HYPER_LR, ADDRESS_LR), tl.load(row + HYPER_DECAY)
    weights = tl.load(row + HYPER_WEIGHT1), tl.load(row + HYPER_WEIGHT2)
    return lr, 1 - lr * decay, weights, load_grad_sign(row, grad_scale)


@triton.jit
def lion_update(w, grad, states, phase, lion):
    """(z, (new exp_avg,)) of Lion."""
    lr, kept, weights, grad_sign = lion
    g = grad_sign * grad
    exp_avg = tl.where(phase == RUNNING, states[0], 0.0)
    ahead = lerp(exp_avg, g, weights[0])
    step = tl.where(ahead > 0, lr, tl.where(ahead < 0, -lr, 0.0))
    return tl.where(phase == PROX_ALONE, w, kept * w - step), (lerp(exp_avg, g, weights[1]),)


LION = KernelRule(fill_lion, load_lion, lion_update)
