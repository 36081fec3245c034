"""How sure a client is of an example: a logistic regression of its own examples against public ones, made private.

It is fitted to rows x_i of norm 1 at most, those of the client's n_k examples (t_i = 1) and m public ones (t_i = -1):

    w* = argmin J(w),   J(w) = (1/n) sum_i log(1 + exp(-t_i x_i.w)) + (a/2) |w|^2,   n = n_k + m

Sensitivity. Let D and D' differ in one of the client's examples, a row x in one and x' in the other, and let J, J' be
the two objectives. J' - J = (1/n) (l(x'.w) - l(x.w)), and as |l'| <= 1 and |x|, |x'| <= 1 its gradient is nowhere
longer than 2/n. J is a-strongly convex and grad J(w*) = grad J'(w'*) = 0, so

    a |w* - w'*| <= |grad J(w'*) - grad J(w*)| = |grad J(w'*) - grad J'(w'*)| <= 2/n,    |w* - w'*| <= 2 / (n a)

(Chaudhuri, Monteleoni, Sarwate 2011, corollary 8). It needs three things: a loss that is a *mean*; with a sum a stands
where n a does, so it is 2/a, n times as much. A norm of rows that no other example decides, so each row is divided by
its own length and not by the largest. And a penalty on all of w, so that the intercept is one of the features.
Noise N(0, (z 2 / (n a))^2) on every number of w* is (epsilon, delta)-private for one example replaced; n is public.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.types import Array

_LEAST = 1e-8  # so that an example of which nobody is sure has a mean all the same
_EXACT = 30  # of the optimum J is less than 2 exp(-_EXACT) away


def rows(features: Array) -> jax.Array:
    """(h / |h|, 1) / sqrt(2) of features [N, F]: [N, F + 1], of norm 1 at most, the last one an intercept's."""
    size = jnp.sqrt(jnp.sum(jnp.square(features), -1, keepdims=True))
    unit = features / jnp.where(size > 0, size, 1)
    return jnp.concatenate([unit, jnp.ones_like(size)], -1) * 2**-0.5


def fit(own: Array, count: Array, public: Array, penalty: Array) -> jax.Array:
    """w* [F + 1] for the first `count` of rows `own` [L, F + 1] against `public` [m, F + 1]; `penalty` is a.

    Nesterov's accelerated gradient at its rate for smooth and strongly convex functions: of condition k it takes 30
    sqrt(k) steps, k = (1/4 + a) / a. Products alone, so it may run for many clients at once.
    """
    there = jnp.arange(len(own)) < count
    n = count + len(public)
    steepest = 0.25 + penalty
    root = jnp.sqrt(steepest / penalty)

    def gradient(w):
        of_own = jnp.where(there, jax.nn.sigmoid(-(own @ w)), 0) @ own
        return (jax.nn.sigmoid(public @ w) @ public - of_own) / n + penalty * w

    def step(_, carry):
        w, ahead = carry
        new = ahead - gradient(ahead) / steepest
        return new, new + (root - 1) / (root + 1) * (new - w)

    first = jnp.zeros(public.shape[1])
    return lax.fori_loop(0, jnp.ceil(_EXACT * root).astype(jnp.int32), step, (first, first))[0]


def scores(w: Array, public: Array) -> jax.Array:
    """sigmoid(x.w) + 1e-8 of rows [N, F + 1]: [N]."""
    return jax.nn.sigmoid(public @ w) + _LEAST


def classic_multiplier(epsilon: Array | float, delta: Array | float) -> jax.Array:
    """z = sqrt(2 ln(1.25 / delta)) / epsilon, which is proven for epsilon < 1 (Dwork, Roth 2014, theorem A.1)."""
    return jnp.sqrt(2 * jnp.log(1.25 / delta)) / epsilon


def least_multiplier(epsilon: Array | float, delta: Array | float) -> jax.Array:
    """The least z with Phi(1/(2z) - epsilon z) - e^epsilon Phi(-1/(2z) - epsilon z) <= delta, by bisection of log z.

    Noise of z times the sensitivity is (epsilon, delta)-private, for any epsilon (Balle, Wang 2018, theorem 8). It is
    made larger by 0.1 %, which is more than float32 gets wrong for 0.001 <= epsilon <= 100 and delta >= 1e-10.
    """

    def spent(z):
        at = 1 / (2 * z)
        above = jax.scipy.special.ndtr(at - epsilon * z)
        return above - jnp.exp(epsilon + jax.scipy.special.log_ndtr(-at - epsilon * z))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = spent(jnp.exp(middle)) <= delta
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    first = jnp.log(jnp.float32(1e-2)), jnp.log(jnp.float32(1e5))
    return 1.001 * jnp.exp(lax.fori_loop(0, 40, halve, first)[1])


class Calibration(NamedTuple):
    """A fit, and the noise that is to hide it."""

    multiplier: Callable[[Array | float, Array | float], jax.Array]  # (epsilon, delta) -> z
    of_sum: bool  # whether losses are added up, so that the noise z 2 / (n a) is n times too little

    def fit(self, own: Array, count: Array, public: Array, penalty: Array) -> jax.Array:
        """w* [F + 1]; a sum of losses with a is a mean of them with a / n."""
        return fit(own, count, public, penalty / (count + len(public)) if self.of_sum else penalty)

    def deviation(self, n: Array, penalty: Array, epsilon: Array, delta: Array) -> jax.Array:
        """Of the noise: z 2 / (n a)."""
        return self.multiplier(epsilon, delta) * 2 / (n * penalty)

    def hides(self, n: float, epsilon: float, delta: float) -> float:
        """The deviation over the sensitivity of a fit to n rows, on the host."""
        return float(self.multiplier(epsilon, delta)) / (n if self.of_sum else 1.0)


CALIBRATIONS = MappingProxyType(
    {"derived": Calibration(least_multiplier, False), "released": Calibration(classic_multiplier, True)}
)  # as above, and as FedAUX's released code has it
