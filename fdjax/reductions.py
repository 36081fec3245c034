"""What the server makes of many uploads, as sums of partials.

A partial is computed for one client; partials add, so the same reduction works across a chunk, a scan, devices, cohorts
and hosts, and no two uploads need to exist at once.
"""

import jax
import jax.numpy as jnp

from fdjax.types import Reduction


def weighted_mean() -> Reduction:
    """sum_k w_k x_k / sum_k w_k, leaf by leaf; w_k = n_k unless the engine is told otherwise.

    An upload of weight 0 leaves no trace, also when it is not finite. Without any weight the summary is 0.

    Source: McMahan et al. (2017), Algorithm 1, last line of the server.
    """

    def partial(upload, weight):
        return jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0), upload), weight

    def finish(total):
        weighted, weight = total
        return jax.tree.map(lambda x: x / jnp.where(weight > 0, weight, 1), weighted)

    return Reduction(partial, finish)
