"""Hidden units of many nets matched to units that they have in common, by the maximum of a Beta-Bernoulli posterior.

Unit l of net j is a vector w_jl: its incoming weights and its bias. It is a noisy copy, of variance s^2, of a common
unit, which is drawn from a Gaussian of mean 0 and variance s0^2; which of them a net has is a Beta-Bernoulli process of
mass gamma. Given the other nets' choices, net j's most probable one maximises the sum of (as FedMA's code has it)

    common unit i that c_i of the others have:  |w_jl / s^2 + G_i|^2 / (1 / s^2 + L_i) - |G_i|^2 / L_i
                                                + log(c_i / (J - c_i))
    the k-th new one:                           |w_jl / s^2|^2 / (1 / s^2 + 1 / s0^2) - 2 log k + 2 log(gamma / J)

over one-to-one assignments, G_i = sum of w / s^2 over those matched to i, L_i = 1 / s0^2 + c_i / s^2, J nets. That is
a linear assignment, which the Hungarian method solves. Nets come in one after another; then, in `sweeps` sweeps of
random order, each is taken out and put back.

There is room for U common units, a static number: places that nobody has are the new units, so no net can need more.
Letters: S nets, U places, D weights of a unit.

Sources: Yurochkin et al. (2019); Wang et al. (2020), FedMA, and its code, whose logarithm takes c_i to be 10 at most.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fdjax.exchange.stacked import apply_each
from fdjax.types import Array

_MOST = 10.0  # nets that count in log(c / (J - c))


class Prior(NamedTuple):
    """What is believed of units before any is seen."""

    variance: Array | float = 1.0  # s^2, of a net's unit about the common one
    prior_variance: Array | float = 1.0  # s0^2, of common units about 0
    gamma: Array | float = 7.0  # the larger, the more common units


class Matching(NamedTuple):
    """Which place each unit has. Places of units that a net does not have are those that it leaves free."""

    place: jax.Array  # [S, U] int32: of unit l of each net; a permutation of the places
    count: jax.Array  # [U] float32: nets that have the unit at a place, 0 where there is none


class _Common(NamedTuple):
    """The common units while nets come and go."""

    place: jax.Array  # [S, U]
    total: jax.Array  # [U, D]: G
    count: jax.Array  # [U]: c


def match(units: jax.Array, present: Array, width: Array, key: jax.Array, prior: Prior, sweeps: Array) -> Matching:
    """Match the first `width` units of every net that is `present`.

    Args:
      units: [S, U, D], zeros where a net is not present.
      present: [S] bool.
      width: [] int32, at most U.
      key: consumed, for the order of the sweeps.
      prior: see above.
      sweeps: [] int32; 0 leaves it at one pass.
    """
    nets, places, _ = units.shape
    real = jnp.arange(places) < width
    scaled = jnp.where(real[None, :, None], units, 0) / prior.variance
    J = jnp.maximum(jnp.sum(present), 1).astype(jnp.float32)

    def put(net, common: _Common) -> _Common:
        chosen = _assign(scaled[net], real, common, prior, J)
        # The first net has the choice of all places: its units keep theirs.
        chosen = jnp.where(jnp.any(common.count > 0), chosen, jnp.arange(places, dtype=jnp.int32))
        unit = jnp.argsort(chosen)
        return _Common(common.place.at[net].set(chosen), common.total + scaled[net][unit], common.count + real[unit])

    def take_out(net, common: _Common) -> _Common:
        unit = jnp.argsort(common.place[net])
        count = common.count - real[unit]
        return common._replace(total=jnp.where((count > 0)[:, None], common.total - scaled[net][unit], 0), count=count)

    def step(number, common):
        sweep = number // nets  # the first pass is in order, and has nothing to take out
        order = jax.random.permutation(jax.random.fold_in(key, sweep), nets)
        net = jnp.where(sweep > 0, order[number % nets], number)
        common = lax.cond(present[net] & (sweep > 0), take_out, lambda net, common: common, net, common)
        return lax.cond(present[net], put, lambda net, common: common, net, common)

    stay = jnp.tile(jnp.arange(places, dtype=jnp.int32), (nets, 1))
    start = _Common(stay, jnp.zeros(units.shape[1:]), jnp.zeros(places))
    common = lax.fori_loop(0, nets * (1 + sweeps), step, start)
    return Matching(common.place, common.count)


def profits(units: jax.Array, total: jax.Array, count: jax.Array, prior: Prior, J: Array) -> jax.Array:
    """What it is worth to have each of a net's units at each place, [U, U]; `units` and `total` [U, D] are w / s^2, G.

    The k-th place that nobody has is for the k-th new unit.
    """
    own, new = 1 / prior.variance, 1 / prior.prior_variance
    count = count[None]
    known = new + count * own
    square, others = jnp.sum(units**2, 1)[:, None], jnp.sum(total**2, 1)[None]
    likeness = (square + 2 * units @ total.T + others) / (own + known) - others / known
    common = jnp.minimum(jnp.maximum(count, 1), _MOST)
    likeness = likeness + jnp.log(common / jnp.maximum(J - common, 0.5))
    number = jnp.maximum(jnp.cumsum(count == 0, 1), 1)
    fresh = square / (own + new) - 2 * jnp.log(number) + 2 * jnp.log(prior.gamma / J)
    return jnp.where(count > 0, likeness, fresh)


def _assign(units: jax.Array, real: jax.Array, common: _Common, prior: Prior, J: Array) -> jax.Array:
    """The place of each of a net's units, [U] int32; what is not real takes what is left."""
    worth = profits(units, common.total, common.count, prior, J)
    row, column = optax.assignment.hungarian_algorithm(jnp.where(real[:, None], -worth, 0))
    return jnp.zeros(len(real), jnp.int32).at[row].set(column.astype(jnp.int32))


def common_units(units: jax.Array, matching: Matching, width: Array, prior: Prior | None = None) -> jax.Array:
    """The common units [U, D] of matched ones [S, U, D] (zeros for nets that are not present), 0 where there is none.

    They are means of what is matched; with a prior, means of the posterior, which are nearer to 0.
    """
    real = (jnp.arange(units.shape[1]) < width)[None, :, None]
    moved = apply_each(lambda net: net[0][jnp.argsort(net[1])], (jnp.where(real, units, 0), matching.place))
    count = matching.count[:, None]
    more = 0.0 if prior is None else prior.variance / prior.prior_variance
    return jnp.where(count > 0, jnp.sum(moved, 0) / jnp.maximum(count + more, 1), 0)


def places_of_all(matching: Matching, client: Array, present: Array, clients: int) -> jax.Array:
    """Which places each of all clients' units have, [C, U] int32: as matched, `client` [S] being the nets' clients.

    Clients whose nets were not among them are given the places that most nets have.
    """
    common = jnp.argsort(-matching.count, stable=True).astype(jnp.int32)
    found = jnp.where(jnp.asarray(present)[:, None], matching.place, common[None])
    return jnp.tile(common, (clients, 1)).at[client].set(found)
