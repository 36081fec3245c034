"""The moment of a call: what every function of a method may read, and the context that it is given of that."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.contract import Context, HParams
from fdjax.errors import InputError, unknown
from fdjax.types import Array, Federation, Model


class Moment(NamedTuple):
    """What every call of an exchange may read, as a pytree of arrays: the data, and the values of this moment."""

    federation: Federation
    hparams: HParams
    round: jax.Array  # [] int32
    key: jax.Array  # the exchange's own


def context(
    moment: Moment, model: Model, key: jax.Array, client: Array | int = -1, cohort: int = 0, work: Array | float = 1.0
) -> Context:
    """The context of one call."""
    client, work = jnp.asarray(client, jnp.int32), jnp.asarray(work, jnp.float32)
    return Context(model, cohort, client, _HParams(moment.hparams), moment.round, key, moment.federation.proxy, work)


class _HParams(dict):
    """Hyperparameters by name; another name is one line."""

    def __missing__(self, name: str):
        if not self:
            raise InputError(f"hyperparameter {name!r} is asked for in init_server or init_client, which have none")
        raise unknown("hyperparameter (in ctx.hparams)", name, self)
