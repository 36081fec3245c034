"""FML, federated mutual learning: each client's own net and a copy of the common one learn from one another.

Shen, Zhang, Jia, Zhang, Huang, Zhou, Kuang, Wu, Wu, "Federated Mutual Learning" (arXiv 2006.16765, 2020), by the
authors' code; we had no equation numbers. Client k has a net w_k of any architecture; the common net is the meme.

    client:  m_k <- m;  E epochs, for each batch, of both at once, each with the other's outputs fixed:
             L(w_k) = alpha CE(p_k, y) + (1 - alpha) KL(q_k || p_k),   p_k = softmax(w_k(x))
             L(m_k) = beta  CE(q_k, y) + (1 - beta)  KL(p_k || q_k),   q_k = softmax(m_k(x))
    server:  m <- (1/S) sum_k m_k over the S participants

Sent: m down and m_k up, 4P(m) bytes each way. w_k stays and goes on from round to round; a client predicts with it.

Ours: both nets have one optimiser, which is fresh in every round (the code: two, which go on), so a clip by the norm is
of both. `weighting` = examples averages by n_k. `train_loss` is L(w_k) + L(m_k). alpha is the hparam `own_weight`, beta
`meme_weight`.

In `test_learning.py` the meme has 0.585, 0.630, 0.602 of the whole test set, clients alone 0.230, 0.249, 0.235; on
their own labels the clients' nets have 0.891, 0.920, 0.878, FedAvg's one net 0.701, 0.719, 0.695, and training alone
0.922, 0.937, 0.928: what a client's own net learns from the meme does not pay there, nor with 15 rounds (0.932, 0.946,
0.937 and 0.929, 0.946, 0.941). Where 10 of 100 clients take part (`benchmarks.local_distillation`) the meme is 2.4 to
7.7 points above FedAvg's net, and forgets less than any other there but FedKD's.
"""

from jax import lax

from fdjax import keys
from fdjax.client import losses
from fdjax.client.training import fit, local_work, of_several
from fdjax.contract import Algorithm, Upload
from fdjax.exchange import averaging, reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task


def fml(task: Task) -> Algorithm:
    """FML of the task's model, the meme; hparams and options: see METHOD."""
    average = reductions.mean if task.options["weighting"] == "uniform" else reductions.weighted_mean
    training = of_several(task.training)

    def learn(hard_weight, z, other, y):
        soft = losses.kl_divergence(lax.stop_gradient(other), z)
        return hard_weight * losses.cross_entropy(z, y, training.label_smoothing) + (1 - hard_weight) * soft

    def train(ctx, received, own, data):
        def loss(nets, x, y, key):
            z = ctx.model.apply(nets["own"], x, keys.stream(key, "own"))
            common = task.model.apply(nets["meme"], x, keys.stream(key, "meme"))
            return learn(ctx.hparams["own_weight"], z, common, y) + learn(ctx.hparams["meme_weight"], common, z, y)

        nets = {"own": own, "meme": received.shared}
        nets, train_loss = fit(training, loss, nets, data, ctx, epochs=local_work(ctx), keeps=False)
        return nets["own"], Upload(nets["meme"]), {"train_loss": train_loss}

    return averaging.beside_own_models(averaging.exchange(train, reduce=average()))


_SHARE = "share of the labels in the loss of "
METHOD = Method(
    name="fml",
    summary="FML (Shen et al. 2020): each client's own net and a common one learn from one another",
    build=fml,
    hparams={
        **LOCAL_TRAINING,
        "own_weight": HParam(0.5, high=1.0, help=_SHARE + "a client's own net (alpha)"),
        "meme_weight": HParam(0.5, high=1.0, help=_SHARE + "the common one (beta)"),
    },
    options={"weighting": ("uniform", "examples")},
    keeps_optimizer=None,
)
