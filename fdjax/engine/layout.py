"""What a simulation carries from round to round, what a round reports, and how clients are laid out."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.client.metric import Metric
from fdjax.engine.lift import Lifting, Stored
from fdjax.engine.participation import Policy
from fdjax.engine.storage import Storage, storage
from fdjax.exchange.traffic import Sent
from fdjax.method import Training
from fdjax.types import Array, Cohort, Federation, Holdings, Model, PyTree


class State(NamedTuple):
    """Everything that changes between rounds."""

    server: PyTree
    clients: tuple[PyTree, ...]
    # one stacked pytree a cohort: on one device [C_j, ...], rows as in the federation; on several as its Storage says
    round: jax.Array  # [] int32: rounds done
    root: jax.Array  # [2] uint32: the root key's data; a typed key on several devices would miss jit's fast path


class FineTuning(NamedTuple):
    """How a client that never trained is fine-tuned before it is tested."""

    training: Training
    epochs: int


class Layout(NamedTuple):
    """What is static about a simulation besides its algorithm."""

    central: Model
    cohorts: tuple[Cohort, ...]
    participants: tuple[int, ...]  # per round, of each cohort; places for them where their number is drawn
    lifting: Lifting
    eval_batch: int = 500
    own_batch: int = 500  # the same for the clients' tests: of their own test parts, which may be small, and all others
    full_eval: bool = True  # test every personal model on the test set too: C passes over it
    own_eval: bool = True  # test every client on its own test part
    central_eval: bool = True  # test the central model, or the ensemble
    drop_nonfinite: bool = False  # leave a client out of a round in which its numbers are not finite
    policy: Policy = Policy()  # how participants are drawn, and what they do
    new: tuple[int, ...] = ()  # clients of each cohort that never train, its last rows; () for none
    fine_tuning: FineTuning | None = None  # of these, at the end
    membership: bool = False  # attack models and uploads at every evaluation
    metrics: tuple[Metric, ...] = ()  # measured wherever accuracy is
    before_distillation: bool = False  # test params before and after each distillation of a round

    @property
    def slices(self) -> list[slice]:
        """The rows of each cohort, which are also the ids of its clients."""
        bounds = np.cumsum((0, *(cohort.size for cohort in self.cohorts)))
        return [slice(int(low), int(high)) for low, high in itertools.pairwise(bounds)]

    @property
    def may_train(self) -> tuple[int, ...]:
        """Clients of each cohort that take part in rounds and in the set-up, its first rows."""
        new = self.new or (0,) * len(self.cohorts)
        return tuple(cohort.size - never for cohort, never in zip(self.cohorts, new, strict=True))

    @property
    def storages(self) -> tuple[Storage, ...]:
        """Where the states of each cohort's clients lie."""
        return tuple(storage(cohort.size, self.lifting) for cohort in self.cohorts)


class Row(NamedTuple):
    """One client, as it is lifted; stacked, some clients of a cohort."""

    client: Array  # [] int32 id; C, which nobody has, in a place that is empty
    start: Array
    count: Array  # 0 for a client that is absent
    state: PyTree  # `Stored` where rows are stacked
    active: Array  # [] bool: False after its numbers were left out of an exchange of this round
    weight: Array  # [] float32: what its upload counts for, n_k unless participants count alike; 0: it sends nothing
    work: Array  # [] float32: share of its epochs that it does


def rows_of(federation: Federation, holdings: Holdings, part: slice, state: PyTree) -> Row:
    """The rows [C_j, ...] of a cohort."""
    size, count = part.stop - part.start, holdings.count[part]
    ones = jnp.ones(size, bool), jnp.asarray(count, jnp.float32), jnp.ones(size)
    return Row(federation.client[part], holdings.start[part], count, Stored(state), *ones)


def classes_of(layout: Layout, federation: Federation) -> dict[str, int]:
    """The number of classes of each personal model, by its name.

    The central model is not among them where it takes other inputs than the data's, as FedGKT's does.
    """
    models = {cohort.model.name: cohort.model for cohort in layout.cohorts}
    return {name: _classes(model, federation.train.x.shape[1:]) for name, model in models.items()}


@functools.lru_cache(maxsize=64)
def _classes(model: Model, inputs: tuple[int, ...]) -> int:
    """Traced once for a model, and not for every function that asks."""
    example = model.example(inputs)
    return jax.eval_shape(lambda x: model.apply(model.init(jax.random.key(0)), x), example).shape[-1]


class NonFinite(NamedTuple):
    """Whose numbers were not finite first, in the first exchange where any were; [R] each for a superstep."""

    clients: jax.Array  # int32: how many, 0 for none
    client: jax.Array  # int32 id, -1
    exchange: jax.Array  # int32: number of the exchange, -1
    leaf: jax.Array  # int32: number of the leaf in {metrics, state, upload}, -1


class Report(NamedTuple):
    """What a round (or the set-up) reports; stacked [R, ...] over the rounds of a superstep."""

    metrics: dict[str, jax.Array]
    # by name: means over participants weighted by n_k, and the server's; NaN where nobody with an example took part
    sent: tuple[tuple[Sent, ...], ...]  # exchange by exchange, cohort by cohort
    nonfinite: NonFinite


def first_rounds(report: Report, rounds: int) -> Report:
    """Those of a superstep's rounds that were run, of a report that has room for more."""
    return jax.tree.map(lambda x: x[:rounds], report)
