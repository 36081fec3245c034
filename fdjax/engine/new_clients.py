"""Clients that never train: tested as they are, and at the end after fine-tuning on their own examples."""

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import keys
from fdjax.client import testing
from fdjax.client.data import ClientData
from fdjax.client.training import train_locally
from fdjax.contract import Algorithm, HParams
from fdjax.engine import lift
from fdjax.engine.layout import Layout, State, rows_of
from fdjax.engine.moment import Moment, context
from fdjax.types import Array, Federation


def never_train(layout: Layout) -> np.ndarray:
    """[C] bool, by rows of the federation."""
    sizes = [cohort.size for cohort in layout.cohorts]
    return np.concatenate([np.arange(size) >= trains for size, trains in zip(sizes, layout.may_train, strict=True)])


def as_they_are(layout: Layout, accuracy: jax.Array, loss: jax.Array, tested: Array) -> dict[str, jax.Array]:
    """Means over the new clients of what each reaches on its own test part; nothing where there are none."""
    if not any(layout.new):
        return {}
    counts = jnp.asarray(tested & never_train(layout), jnp.float32)
    return {"new_accuracy": _mean(accuracy, counts), "new_loss": _mean(loss, counts)}


def fine_tune(
    algorithm: Algorithm, layout: Layout, state: State, federation: Federation, hparams: HParams
) -> dict[str, jax.Array]:
    """The same after each has trained, on its own examples alone, the model that it would predict with.

    Clients of all kinds go through this on the devices that hold their states; those that train have no examples here.
    """
    model_of = algorithm.params_of_client
    assert model_of is not None
    assert layout.fine_tuning is not None
    training, epochs = layout.fine_tuning
    key = keys.stream(jax.random.wrap_key_data(state.root), "fine-tune", state.round)
    moment = Moment(
        federation, hparams, jnp.int32(0), key
    )  # the rate is that of the first round, whatever the schedule
    scores = []
    for j, (cohort, part) in enumerate(zip(layout.cohorts, layout.slices, strict=True)):

        def client(shared, row_and_test, model=cohort.model, j=j):
            (server, moment), (row, start, count) = shared, row_and_test
            ctx = context(moment, model, keys.stream(moment.key, "client", row.client), row.client, j)
            params = model_of(ctx, server, row.state)
            data = ClientData(moment.federation.train, moment.federation.train_holdings.order, row.start, row.count)
            params, _ = train_locally(training, params, data, ctx, epochs=jnp.int32(epochs))
            own = ClientData(moment.federation.test, moment.federation.test_holdings.order, start, count)
            return testing.test(lambda x: model.apply(params, x), own, layout.own_batch), lift.Partials()

        new = np.arange(cohort.size) >= layout.may_train[j]
        row = rows_of(federation, federation.train_holdings, part, state.clients[j])
        row = row._replace(count=jnp.where(new, row.count, 0))
        test = federation.test_holdings.start[part], jnp.where(new, federation.test_holdings.count[part], 0)
        score, _ = lift.over_clients(
            client, (state.server, moment), (row, *test), layout.lifting._replace(narrow=()),
            storage=layout.storages[j], stage="fine-tuning", names=row.client,
        )  # fmt: skip
        scores.append(score)
    accuracy = jax.tree.map(lambda *x: jnp.concatenate(x), *scores).mean()[0]
    counts = jnp.asarray((federation.test_holdings.count > 0) & never_train(layout), jnp.float32)
    return {"new_accuracy_tuned": _mean(accuracy, counts)}


def _mean(values: jax.Array, counts: jax.Array) -> jax.Array:
    """NaN where none counts."""
    total = jnp.sum(counts)
    return jnp.sum(jnp.where(counts > 0, values, 0)) / jnp.where(total > 0, total, jnp.nan)
