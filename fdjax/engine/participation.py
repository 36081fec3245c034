"""Who takes part in a round: so many clients of each cohort, drawn uniformly without replacement."""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.engine.layout import Layout, Row, State, rows_of
from fdjax.types import Federation, PyTree

Chosen = jax.Array | None  # [S_j] int32: rows of a cohort; None for all of them


def choose(layout: Layout, key: jax.Array) -> tuple[Chosen, ...]:
    """The participants of each cohort in the round of `key`, in the order of their work."""
    chosen = []
    for j, (cohort, size) in enumerate(zip(layout.cohorts, layout.participants, strict=True)):
        if size == cohort.size:
            chosen.append(None)
        else:
            drawn = jax.random.choice(keys.stream(key, "participants", j), cohort.size, (size,), replace=False)
            chosen.append(jnp.sort(drawn))
    return tuple(chosen)


def gather(layout: Layout, federation: Federation, state: State, chosen: tuple[Chosen, ...]) -> tuple[Row, ...]:
    """The rows [S_j, ...] of the participants of each cohort."""
    rows = []
    for part, clients, index in zip(layout.slices, state.clients, chosen, strict=True):
        everyone = rows_of(federation, federation.train_holdings, part, clients)
        rows.append(everyone if index is None else jax.tree.map(lambda x, index=index: x[index], everyone))
    return tuple(rows)


def scatter(state: State, rows: tuple[Row, ...], chosen: tuple[Chosen, ...]) -> tuple[PyTree, ...]:
    """The states of all clients [C_j, ...], those of the participants replaced by what is in their rows."""
    return tuple(
        row.state if index is None else jax.tree.map(lambda x, new, at=index: x.at[at].set(new), clients, row.state)
        for clients, row, index in zip(state.clients, rows, chosen, strict=True)
    )
