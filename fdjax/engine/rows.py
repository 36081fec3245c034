"""The rows of a round's participants, or of all clients: taken from the federation and the states, and put back."""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.contract import HParams
from fdjax.engine import participation
from fdjax.engine.layout import Layout, Row, State, rows_of
from fdjax.engine.lift import Stored
from fdjax.engine.participation import Drawn
from fdjax.engine.storage import keep_by_rows
from fdjax.types import Federation, PyTree

Chosen = tuple[Drawn | None, ...]  # the participants of each cohort, None for all that train


def draw(layout: Layout, federation: Federation, key: jax.Array) -> Chosen:
    """The participants of each cohort in the round of `key`, in the order of their work."""
    table = federation.cumulative
    return tuple(
        participation.draw(
            layout.policy, keys.stream(key, "participants", j), cohort.size, layout.may_train[j],
            layout.participants[j], None if table is None else table[layout.slices[j]],
        )
        for j, cohort in enumerate(layout.cohorts)
    )  # fmt: skip


def of_round(
    layout: Layout, federation: Federation, state: State, chosen: Chosen, key: jax.Array, hparams: HParams
) -> tuple[Row, ...]:
    """The rows [S_j] of the participants of each cohort in the round of `key`."""
    rows = []
    for j, drawn in enumerate(chosen):
        if drawn is None:
            row, present = _all_that_train(layout, federation, state, j), layout.may_train[j]
        else:
            row, present = _of(layout, federation, state, j, drawn), jnp.sum(drawn.times > 0)
        own = keys.stream(key, "effort", j)
        effort = participation.effort(layout.policy, own, len(row.client), present, hparams)
        rows.append(row._replace(work=effort.work, weight=jnp.where(effort.sends, row.weight, 0)))
    return tuple(rows)


def of_all(layout: Layout, federation: Federation, state: State) -> tuple[Row, ...]:
    """The rows [C_j] of all clients, those that never train being absent."""
    return tuple(_all_that_train(layout, federation, state, j) for j in range(len(layout.cohorts)))


def scatter(layout: Layout, state: State, rows: tuple[Row, ...], chosen: Chosen) -> tuple[PyTree, ...]:
    """The states of all clients, those of the participants replaced by what is in their rows."""
    new = tuple(
        row.state.tree if drawn is None else _put(clients, layout.storages[j].row(drawn.rank), row.state.tree)
        for j, (clients, row, drawn) in enumerate(zip(state.clients, rows, chosen, strict=True))
    )
    return keep_by_rows(new, layout.lifting.mesh)


def _put(clients: PyTree, at: jax.Array, new: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.at[at].set(y, mode="drop"), clients, new)  # an empty place is of no row


def _all_that_train(layout: Layout, federation: Federation, state: State, cohort: int) -> Row:
    row = rows_of(federation, federation.train_holdings, layout.slices[cohort], state.clients[cohort])
    trains = jnp.arange(len(row.client)) < layout.may_train[cohort]
    return row if layout.may_train[cohort] == len(row.client) else _present(row, trains)


def _of(layout: Layout, federation: Federation, state: State, cohort: int, drawn: Drawn) -> Row:
    part, holdings = layout.slices[cohort], federation.train_holdings
    at = part.start + jnp.minimum(drawn.rank, part.stop - part.start - 1)
    row = Row(
        client=jnp.where(drawn.times > 0, federation.client[at], len(federation.client)),
        start=holdings.start[at],
        count=holdings.count[at],
        state=Stored(_take(state.clients[cohort], layout.storages[cohort].row(drawn.rank))),
        active=jnp.ones(len(at), bool),
        weight=drawn.times if layout.policy.alike else holdings.count[at].astype(jnp.float32),
        work=jnp.ones(len(at)),
    )
    return _present(row, drawn.times > 0)


def _take(clients: PyTree, at: jax.Array) -> PyTree:
    return jax.tree.map(lambda x: x.at[at].get(mode="clip"), clients)


def _present(row: Row, present: jax.Array) -> Row:
    """A client that is absent is one without examples."""
    return row._replace(count=jnp.where(present, row.count, 0), weight=jnp.where(present, row.weight, 0))
