"""FedAUX: a net pre-trained on auxiliary data, and an ensemble weighted by how sure each client is of them.

Sattler, Korjakow, Rischke, Samek, "FedAUX: Leveraging Unlabeled Auxiliary Data in Federated Learning" (2021; TNNLS
2023). We had its abstract and its released code, so equation numbers are missing. The auxiliary data are the run's
proxy data, D_neg (a fifth, option `negatives`) and D_dist (the rest). h are features, z logits, s certainties.

    set-up:  the server trains the extractor h_0 by SimCLR on all auxiliary data       (`client/contrastive.py`)
             client k fits w_k, a logistic regression on normalised h_0: its own examples against D_neg, makes it
             private, w_k + N(0, sigma^2), and sends s_k(x) = sigmoid(w_k.x) + 1e-8 for x in D_dist
    client:  FedAvg's, from the net that has h_0 and then the server's last one
    server:  the uniform mean of the params, then for x in D_dist, by Adam, minimises
             KL(softmax(sum_k s_k(x) z_k(x) / sum_k s_k(x)) || softmax(z(x))), no temperature

sigma is 2 / (n a), n = n_k + |D_neg| and a = `score_penalty`, times the multiplier for `score_epsilon` and
`score_delta`, for a mean of losses, as `exchange/certainty.py` derives. The released code minimises their sum, of which
2 / (n a) is n times too little: `calibration` = released is its fit and noise, whose true epsilon the run tells. Its
rows are divided by the largest norm and its intercept is free, which leaks more; ours in neither case. The guarantee is
for one example of a client replaced, and for the scores alone: params are sent as they are. --privacy is refused.

Sent: in the set-up h_0 down, 4 |D_dist| up; in a round 4P each way. A client keeps its scores in the server's place.

Ours: parts without overlap (the code's may); SimCLR's views, steps and projection; teachers in test mode; an Adam that
starts afresh in a round; the clients' optimiser is that of --optimizer (the paper's is Adam, 1e-3); one architecture;
no proximal term (the code has one). All have the auxiliary data. With equal `scores` and `pretraining` off it is FedDF.

A 2nn, Dirichlet(0.01), 5 rounds, means of three seeds (`test_learning.py`): with Adam FedAvg has 0.611, neither part
0.560, pre-training alone 0.592, exact scores alone 0.624, both 0.671. With SGD at 0.1 FedAvg has 0.757, equal scores
0.702, exact ones 0.799, those of epsilon 8 0.789, of epsilon 0.1 (a = 0.1) 0.654, and pre-training costs 8 points.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fdjax.algorithms import fedavg
from fdjax.client import contrastive, losses, testing
from fdjax.client.trained import paths_read
from fdjax.client.training import fit, of_stage
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, params_of_server, unchanged
from fdjax.exchange import certainty, proxy, reductions
from fdjax.exchange.parts import only, with_zeros
from fdjax.exchange.privacy import OwnRelease
from fdjax.exchange.traffic import Known
from fdjax.exchange.wrappers import after, without_traffic
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs, learning_rate

_BATCH, _BUDGET = 256, ("score_epsilon", "score_delta")
_SCORED, _SIMCLR = ("scores", "private", "exact"), ("pretraining", "simclr")


def fedaux(task: Task) -> Algorithm:
    """FedAUX of the task's model; hparams and options: see METHOD."""
    negative, distilled = proxy.in_two(task.proxy_size, float(task.options["negatives"]))
    calibration = certainty.CALIBRATIONS[task.options["calibration"]]
    certain, private = task.options["scores"] != "equal", task.options["scores"] == "private"
    shapes, x = jax.eval_shape(task.model.init, jax.random.key(0)), task.model.example(task.inputs)
    of_extractor = paths_read(task.model.features, shapes, x)
    plain = fedavg.fedavg(task)
    (averaging,) = plain.round
    adam = task.distilling._replace(optimizer=lambda rate, round: optax.adam(rate))

    def rows_of(params):
        return lambda x: certainty.rows(task.model.features(params, x).reshape(len(x), -1))

    def pretrain(ctx, params, summary):
        params, loss = contrastive.pretrain(
            ctx.model.features, params, ctx.proxy, ctx.key, steps=ctx.hparams["pretrain_steps"],
            learning_rate=ctx.hparams["pretrain_learning_rate"], batch_size=adam.batch_size, trained=adam.trained,
        )  # fmt: skip
        return params, {"contrastive_loss": loss}

    def send_extractor(ctx, params):
        of_proxy = testing.predict(rows_of(params), ctx.proxy, _BATCH)
        return Broadcast(only(params, of_extractor), known=(of_proxy[negative], of_proxy[distilled]))

    def score(ctx, received, state, data):
        own = testing.predict_first(rows_of(with_zeros(received.shared, shapes)), data, task.largest, _BATCH)
        public, asked = received.known
        a, metrics = ctx.hparams["score_penalty"], {}
        w = calibration.fit(own, data.count, public, a)
        if private:
            sigma = calibration.deviation(data.count + len(public), a, *(ctx.hparams[name] for name in _BUDGET))
            w, metrics = w + sigma * jax.random.normal(ctx.at("noise").key, w.shape), {"score_noise": sigma}
        scores = certainty.scores(w, asked)
        return scores, Upload(scores), {"mean_score": jnp.mean(scores), **metrics}

    def look_at(ctx, sent):
        """Logits on D_dist, and what they weigh."""
        scores = sent["scores"].tree if certain else jnp.ones(len(distilled))
        return proxy.predict(ctx, sent["params"], distilled), scores[:, None]

    def train(ctx, received, scores, data):
        _, upload, metrics = averaging.client(ctx, received, (), data)
        return scores, Upload({"params": upload.tree, "scores": Known(scores)}), metrics

    def distil(ctx, params, summary):
        chosen = jax.random.permutation(ctx.at("subset").key, len(distilled))[: task.proxy_per_round]

        def loss(params, x, teacher, key):
            return losses.kl_divergence(teacher, ctx.model.apply(params, x, key))

        targets = proxy.targets(ctx, jnp.asarray(distilled)[chosen], summary["logits"][chosen])
        params, distill_loss = fit(
            adam, loss, summary["params"], targets, ctx.at("distil"), keeps=False, **of_stage(ctx, "distill")
        )
        return params, {"distill_loss": distill_loss}

    def hides(hparams, held):
        n, budget = float(np.max(held)) + len(negative), [hparams[name] for name in _BUDGET]  # where it hides least
        return calibration.hides(n, *budget) if private else 0.0

    release = OwnRelease("certainty scores", "one example of a client replaced", _BUDGET[1], hides)
    scoring = Exchange(send_extractor, score, reductions.nothing(), unchanged, releases=(release,))
    waiting = without_traffic(lambda ctx, received, state, data: (state, Upload(()), {}))
    pretraining = waiting._replace(server=pretrain, name="pretrain")
    reduce = {"params": reductions.mean(lambda sent: sent["params"])}
    reduce |= {"logits": after(look_at, reductions.elementwise_mean())}
    return plain._replace(
        init_client=lambda ctx, params: jnp.zeros(len(distilled)) if certain else (),
        setup=(pretraining,) * (task.options["pretraining"] == "simclr") + (scoring,) * certain,
        round=(averaging._replace(client=train, reduce=reduce, server=distil, shares=""),),
        model_of=params_of_server,
    )


METHOD = Method(
    name="fedaux",
    summary="FedAUX (Sattler et al. 2021): a net pre-trained on proxy data, an ensemble weighted by certainties",
    build=fedaux,
    hparams={
        **LOCAL_TRAINING,
        "pretrain_learning_rate": learning_rate(1e-3, "learning rate of SimCLR")._replace(only=_SIMCLR),
        "pretrain_steps": epochs(500, "steps of SimCLR")._replace(only=_SIMCLR),
        "score_penalty": HParam(0.01, low=1e-4, high=100.0, help="a, of the logistic regression", only=_SCORED),
        "score_epsilon": HParam(0.1, low=1e-3, high=100.0, help="epsilon of the scores", only=_SCORED[:2]),
        "score_delta": HParam(1e-5, low=1e-10, high=0.1, help="delta of the scores", only=_SCORED[:2]),
        "distill_learning_rate": learning_rate(5e-5, "learning rate of the server's distillation"),
        "distill_epochs": epochs(1, "epochs of the server's distillation"),
    },
    options={"pretraining": ("simclr", "off"), "scores": ("private", "exact", "equal")}
    | {"calibration": ("derived", "released"), "negatives": ("0.2", "0.1", "0.5")},
    proxy="unlabelled",
    one_architecture=True,
    parts=True,
    distill_batch_size=128,
    needs_numbers_for=(_SIMCLR,),
    distils=True,
)
