"""What the distillations of a round do to accuracy: the params before and after each, tested where it happens.

A client's are tested on its own test part, the server's on the whole test set. A server whose net is no model of the
data by itself, as FedGKT's is not, is tested with the participants' parts, on their own test parts. The method's
functions see nothing of this: they note params, and the engine tests them after they have returned.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client import testing
from fdjax.client.data import ClientData, whole
from fdjax.client.distillation import Distillation, accuracies
from fdjax.contract import ENSEMBLE, Algorithm, Context
from fdjax.engine import lift
from fdjax.engine.client_means import or_nan
from fdjax.engine.layout import Layout, Row
from fdjax.engine.moment import Moment, context
from fdjax.engine.storage import Storage
from fdjax.errors import InputError
from fdjax.types import Array, PyTree

Values = dict[str, jax.Array]

_NAMES = "before_distillation_accuracy", "after_distillation_accuracy"


def watched(layout: Layout, ctx: Context) -> tuple[Context, list[Distillation]]:
    """The context with a list for what is distilled, and that list; nothing is noted if nobody asked."""
    noted: list[Distillation] = []
    return (ctx._replace(distillations=noted) if layout.before_distillation else ctx), noted


@jax.named_scope("evaluate")
def of_client(noted: list[Distillation], layout: Layout, moment: Moment, client: Array, counts: Array) -> Values:
    """A client's accuracies on its own test part, by name; NaN without one, or if it does not count."""
    if not noted:
        return {}
    return dict(zip(_NAMES, accuracies(noted, _own_tests(moment, client, counts), layout.own_batch), strict=True))


def means(values: Sequence[Values], weights: Sequence[jax.Array]) -> Values:
    """The cohorts' values [S_j], as means over the clients that have one, weighted by `weights` [S_j]; else NaN."""
    found: Values = {}
    for name in _NAMES:
        pairs = [(of[name], weight) for of, weight in zip(values, weights, strict=True) if name in of]
        if not pairs:
            continue
        value, weight = (jnp.concatenate(each) for each in zip(*pairs, strict=True))
        weight = jnp.where(jnp.isnan(value), 0, weight)
        found[name] = jnp.vdot(jnp.where(weight > 0, value, 0), weight) / or_nan(jnp.sum(weight))
    return found


@jax.named_scope("evaluate")
def of_server(
    noted: list[Distillation],
    algorithm: Algorithm,
    layout: Layout,
    moment: Moment,
    servers: tuple[PyTree, PyTree],
    rows: Sequence[Row],
    weights: Sequence[jax.Array],
    storages: Sequence[Storage | None],
) -> Values:
    """The accuracies of what the server distilled, by name: of its states `servers`, before and after the exchange.

    `rows` are the participants after their part of it, and `weights` what they count for.
    """
    if not noted:
        return {}
    if algorithm.central is not None and algorithm.central is not ENSEMBLE:
        both = accuracies(noted, whole(moment.federation.test), layout.eval_batch)
        return {f"server_{name}": value for name, value in zip(_NAMES, both, strict=True)}
    values = []
    for j, row in enumerate(rows):
        of_cohort, _ = lift.over_clients(
            _with_server(algorithm, layout, j), (moment, servers), (row, weights[j]), layout.lifting,
            storage=storages[j], stage="distillation", names=row.client,
        )  # fmt: skip
        values.append(of_cohort)
    return {f"server_{name}": value for name, value in means(values, weights).items()}


def _with_server(algorithm: Algorithm, layout: Layout, cohort: int) -> lift.Client:
    """One client's accuracies with either state of the server."""
    model, personal = layout.cohorts[cohort].model, algorithm.personal
    assert personal is not None  # as there is no central model

    def client(shared, row_and_weight: Any) -> tuple[Values, lift.Partials]:
        (moment, servers), (row, weight) = shared, row_and_weight
        ctx = context(moment, model, keys.stream(moment.key, "client", row.client), row.client, cohort)
        data = _own_tests(moment, row.client, weight > 0)

        def accuracy(server):
            return testing.test(lambda x: personal(ctx, server, row.state, x), data, layout.own_batch).mean()[0]

        return dict(zip(_NAMES, map(accuracy, servers), strict=True)), lift.Partials()

    return client


def _own_tests(moment: Moment, client: Array, counts: Array) -> ClientData:
    """The client's own test part, none of it if it does not count."""
    holdings = moment.federation.test_holdings
    rank = jnp.argmax(jnp.asarray(moment.federation.client) == client)
    count = jnp.where(counts, jnp.asarray(holdings.count)[rank], 0)
    return ClientData(moment.federation.test, holdings.order, jnp.asarray(holdings.start)[rank], count)


def check_told(algorithm: Algorithm, layout: Layout, metrics: Values) -> None:
    """Raises InputError if a round noted no distillation although somebody asked for them."""
    if layout.before_distillation and not any(name.endswith(_NAMES) for name in metrics):
        raise InputError(
            f"--before_distillation: {algorithm.name} says that it distils, but no fit of a round is by "
            "task.distilling or task.serving, and none of its loops calls client.distillation.note; let one of them"
        )
