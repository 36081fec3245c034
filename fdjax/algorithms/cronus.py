"""Cronus.

Chang, Shejwalkar, Shokri, Houmansadr, "Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge
Transfer" (2019). We had its description in two later papers (FedGEMS; a survey) and no official code, so equation
numbers are missing here. Client k has private data D_k and a model of any architecture; the public set X has no labels.

    first phase:  train on D_k by CE
    upload:       p_k(x) = softmax(f_k(x)) for x in X
    server:       Y(x) = robust mean of p_1(x), ..., p_m(x), for each x by itself
    client:       train on D_k and {(x, Y(x))} together, by CE with the hard and the soft targets

The robust mean is the filter of Diakonikolas et al. (2017): see `robust.filtered_mean`. A filter takes those for wrong
who differ, and where clients hold few labels those who know x's label do: expect less of it the less data are alike.

Sent: see `exchange`; probabilities up, Y and ids down.

The descriptions leave open, and we chose:
- `aggregation` is the filter, or the median or trimmed mean of every coordinate, or the geometric median of each x.
- `faulty`, 0.2 unless chosen, is the fraction of the uploads that the filter drops for each x, there being no threshold
  below which it drops none, and that the trimmed mean drops at each end.
- The two sets are shuffled into the same batches, each example of either counting alike.
- The first phase is the first round, of `first_epochs` epochs (`local_epochs` unless set). A client that comes later
  begins with a consensus.
- A median of probabilities need not sum to 1; it is used as it is.

Deviations: a round may use a fresh subset of X and not all of it. Augmentation, if any, is of public examples too.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import local, losses
from fdjax.exchange import proxy as exchange
from fdjax.exchange import robust
from fdjax.types import Algorithm

HPARAMS: dict[str, float | str] = {"learning_rate": 0.01, "local_epochs": 1, "first_epochs": "local_epochs"}
OPTIONS = {
    "aggregation": ("filter", "median", "trimmed_mean", "geometric_median"),
    "faulty": ("0.2", "0.1", "0.3", "0.4"),
}
_WEISZFELD = 256  # steps; 32 can be off by 0.05 in a probability where the median is near an upload


class _Union(NamedTuple):
    """A client's own examples and then, if there are targets, the public ones; all with probabilities [B, K]."""

    own: local.ClientData
    public: local.Targets
    more: jax.Array  # [] int32: how many public examples there are

    @property
    def count(self):
        return self.own.count + self.more

    def take(self, position):
        mine = position < self.own.count
        x, y = self.own.take(jnp.where(mine, position, 0))
        public_x, targets = self.public.take(jnp.where(mine, 0, position - self.own.count))
        hard = jax.nn.one_hot(y, targets.shape[-1])
        either = mine.reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(either, x, public_x), jnp.where(mine[:, None], hard, targets)


def cronus(task: local.Task) -> Algorithm:
    """Cronus; hparams: `learning_rate`, `local_epochs`, `first_epochs`; options: `aggregation`, `faulty`."""
    faulty = float(task.options["faulty"])
    reduction = {
        "filter": lambda: robust.filtered_mean(faulty, rows=True),
        "median": robust.coordinate_median,
        "trimmed_mean": lambda: robust.trimmed_mean(faulty),
        "geometric_median": lambda: robust.geometric_median(_WEISZFELD, rows=True),
    }[task.options["aggregation"]]()

    def client(model, received, params, data, proxy, hparams, key):
        def loss(params, x, targets):
            return losses.soft_cross_entropy(targets, model.apply(params, x))

        public = received.data(proxy)
        union = _Union(data, public, exchange.epochs(public.count, received, data))
        number = jnp.where(hparams["round"] == 0, hparams["first_epochs"], hparams["local_epochs"])
        params, train_loss = local.fit(task.training, loss, params, union, hparams, key, epochs=number)
        upload = jax.nn.softmax(exchange.predict(model, params, proxy, received))
        return params, upload, {"train_loss": train_loss}

    def server(state, consensus, proxy, hparams, key):
        return exchange.following(task, state, consensus, key), {}

    return Algorithm(
        name="cronus",
        hparams=HPARAMS,
        init_server=lambda key: exchange.first(task, key),
        init_client=lambda model, key: model.init(key),
        broadcast=lambda state, cohort: state,
        client=client,
        reduction=reduction,
        server=server,
        personal=lambda params: params,
    )
