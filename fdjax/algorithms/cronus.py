"""Cronus.

Chang, Shejwalkar, Shokri, Houmansadr, "Cronus: Robust and Heterogeneous Collaborative Learning with Black-Box Knowledge
Transfer" (2019). We had its description in two later papers (FedGEMS; a survey) and no official code, so equation
numbers are missing here. Client k has private data D_k and a model of any architecture; the public set X has no labels.

    first phase:  train on D_k by CE
    upload:       p_k(x) = softmax(f_k(x)) for x in X
    server:       Y(x) = robust mean of p_1(x), ..., p_m(x), for each x by itself
    client:       train on D_k and {(x, Y(x))} together, by CE with the hard and the soft targets

The first phase is the set-up, of all clients; a round is two exchanges, `communicate` and `learn`.

The robust mean is the filter of Diakonikolas et al. (2017): see `robust.filtered_mean`. A filter takes those for wrong
who differ, and where clients hold few labels those who know x's label do: expect less of it the less data are alike.

Sent: the ids of n examples of X down (4n bytes, none where n = M) and p_k up (4nK), then Y down (4nK).

The descriptions leave open, and we chose:
- `aggregation` is the filter, or the median or trimmed mean of every coordinate, or the geometric median of each x.
- `faulty`, 0.2 unless chosen, is the fraction of the uploads that the filter drops for each x, there being no threshold
  below which it drops none, and that the trimmed mean drops at each end.
- The two sets are shuffled into the same batches, each example of either counting alike.
- A median of probabilities need not sum to 1; it is used as it is.

Deviations: a round may use a fresh subset of X and not all of it. Augmentation, if any, is of public examples too.
"""

from fdjax.client.data import Union
from fdjax.client.training import fit, from_probabilities, local_work, train_locally
from fdjax.contract import Algorithm, Upload, own_model, predict_with_own_model
from fdjax.exchange import proxy, robust
from fdjax.exchange.wrappers import without_traffic
from fdjax.method import LOCAL_TRAINING, Method, Task, epochs

_WEISZFELD = 256  # steps; 32 can be off by 0.05 in a probability where the median is near an upload


def cronus(task: Task) -> Algorithm:
    """Cronus; hparams: `learning_rate`, `local_epochs`, `first_epochs`; options: `aggregation`, `faulty`."""
    faulty = float(task.options["faulty"])
    robust_mean = {
        "filter": lambda: robust.filtered_mean(faulty, rows=True),
        "median": robust.coordinate_median,
        "trimmed_mean": lambda: robust.trimmed_mean(faulty),
        "geometric_median": lambda: robust.geometric_median(_WEISZFELD, rows=True),
    }[task.options["aggregation"]]()

    def first_phase(ctx, received, params, data):
        params, train_loss = train_locally(task.training, params, data, ctx, epochs=ctx.hparams["first_epochs"])
        return params, Upload(()), {"train_loss": train_loss}

    def learn(ctx, received, params, data):
        union = Union(data, proxy.targets(ctx, received.known, received.shared), task.training.label_smoothing)
        loss = from_probabilities(ctx.model)
        params, train_loss = fit(task.training, loss, params, union, ctx, epochs=local_work(ctx))
        return params, Upload(()), {"train_loss": train_loss}

    return Algorithm(
        init_server=proxy.no_agreement(task),
        init_client=own_model,
        setup=(without_traffic(first_phase),),
        round=proxy.agree_and_learn(task, robust_mean, learn, "probabilities"),
        personal=predict_with_own_model,
    )


METHOD = Method(
    name="cronus",
    summary="Cronus (Chang et al. 2019): robust mean of outputs on proxy data, learned with the client's own",
    build=cronus,
    hparams=LOCAL_TRAINING | {"first_epochs": epochs("local_epochs", "epochs of the first phase")},
    options={
        "aggregation": ("filter", "median", "trimmed_mean", "geometric_median"),
        "faulty": ("0.2", "0.1", "0.3", "0.4"),
    },
    proxy="unlabelled",
    keeps_models=True,
)
