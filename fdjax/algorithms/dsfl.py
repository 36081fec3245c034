"""DS-FL, distillation-based semi-supervised federated learning.

Itahara, Nishio, Koda, Morikura, Yamamoto, "Distillation-Based Semi-Supervised Federated Learning for Communication-
Efficient Collaborative Training with Non-IID Private Data" (2021). We had its abstract and its laboratory's later code
(BlazeFL, SCARLET), so equation numbers are missing here. Client k has a model w_k of any architecture, the server has a
model w; o_t is the subset of the unlabelled open data that round t uses.

    update:     train w_k on the private data by CE
    predict:    p_k(x) = softmax(w_k(x)) for x in o_t
    aggregate:  p(x) = (1 / m) sum_k p_k(x)
                target(x) = softmax(p(x) / T), of probabilities and not of logits        ERA
                target(x) = p(x)                                                         SA
    distil:     clients and server minimise CE(target(x), softmax(w(x))) over x in o_t

A round is two exchanges, `update_and_predict` and `distil`. The server's model is the central one. The laboratory's
code distils at the start of the next round instead. T sharpens only what is not sharp already: see `reductions.era`.
CE has the gradient of the KL divergence; there is no T^2.

Sent: the ids of o_t down (4n bytes, none where o_t is all open data) and p_k up (4nK), then the targets down (4nK).
Models stay where they are.

Choices, `aggregation`:
- era: the paper's, T = `era_temperature` = 0.1
- sa: simple aggregation, the paper's comparison
- enhanced_era: p_c^beta / sum_c p_c^beta, SCARLET's, beta = `era_beta` = 2
- era_logits: clients send logits z_k and target(x) = softmax(mean_k z_k(x) / T), which some re-implementations call ERA

`soft_label_cache` = on is SCARLET's cache (`exchange/label_cache.py`); `selection` leaves proxy examples out, as
Selective-FD does (`exchange/selection.py`). Both have figures there.

Deviations: every model starts from an initialisation of its own. Epochs, batch size and learning rate of the
laboratory's code are not our defaults but for `distill_epochs` = 5.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import train_locally
from fdjax.contract import Algorithm, Broadcast, Context, Exchange, Upload, own_model, predict_with_own_model
from fdjax.errors import InputError
from fdjax.exchange import label_cache, proxy, reductions, selection
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, temperature
from fdjax.types import PyTree


class _Server(NamedTuple):
    params: PyTree
    ids: Any  # of the round's open data
    targets: Any  # [n, K] of those that were last predicted; `Labelled` if they are selected


def dsfl(task: Task, say: Callable[[Context, PyTree, Any], jax.Array] | None = None) -> Algorithm:
    """DS-FL; `era_temperature` (T) and `era_beta` are each used by one of the aggregations; hparams: see METHOD.

    `say`, of the server's params and the ids, is for methods whose clients distil other targets than the server does.
    """
    nothing = jnp.zeros((task.proxy_per_round, task.classes)) if say else proxy.no_labels(task)
    cache = task.options.get("soft_label_cache") == "on"
    if cache and task.options.get("selection", "off") != "off":
        raise InputError(
            f"--soft_label_cache=on with --selection={task.options['selection']}: the cache knows no examples without "
            "a label; give one of them"
        )
    aggregation = task.options.get("aggregation", "sa")

    def sharpen(mean, hparams):
        if aggregation == "sa":
            return mean
        if aggregation == "enhanced_era":
            return reductions.enhanced_era(mean, hparams["era_beta"])
        return reductions.era(mean, hparams["era_temperature"])

    def update_and_predict(ctx, received, params, data):
        params, loss = train_locally(task.training, params, data, ctx.at("update"))
        logits = proxy.predict(ctx, params, received.shared)
        return params, Upload(logits if aggregation == "era_logits" else jax.nn.softmax(logits)), {"train_loss": loss}

    def aggregate(ctx, server, mean):
        targets = proxy.each(lambda mean: sharpen(mean, ctx.hparams), mean)
        params, loss = proxy.distil(task, ctx.at("distil"), server.params, server.ids, targets)
        metrics = {"server_loss": loss, "target_entropy": proxy.mean_of(losses.entropy, targets)}
        told = targets if say is None else say(ctx, params, server.ids)
        return server._replace(params=params, targets=told), metrics

    def distil(ctx, received, params, data):
        params, loss = proxy.distil(task, ctx.at("distil"), params, received.known, received.shared)
        return params, Upload(()), {"distill_loss": loss}

    def choose_subset(ctx, server, summary):
        return server._replace(ids=proxy.draw_ids(task, ctx.key)), {}

    algorithm = Algorithm(
        init_server=lambda ctx, params: _Server(params, proxy.draw_ids(task, ctx.key), nothing),
        init_client=own_model,
        round=(
            Exchange(
                lambda ctx, server: Broadcast(server.ids), update_and_predict, reductions.mean(), aggregate,
                shares="logits" if aggregation == "era_logits" else "probabilities",
            ),
            Exchange(
                lambda ctx, server: Broadcast(server.targets, known=server.ids), distil, reductions.nothing(),
                choose_subset,
            ),
        ),
        central=lambda ctx, server, x: ctx.model.apply(server.params, x),
        personal=predict_with_own_model,
    )  # fmt: skip
    if cache:
        return label_cache.cached(task, algorithm)
    return selection.selecting(task, algorithm, logits=aggregation == "era_logits")


METHOD = Method(
    name="dsfl",
    summary="DS-FL (Itahara et al. 2021): sharpened mean of outputs on proxy data",
    build=dsfl,
    hparams={
        **LOCAL_TRAINING,
        **proxy.distillation(epochs=5),
        "era_temperature": temperature(0.1, "sharpens the mean", ("aggregation", "era", "era_logits")),
        "era_beta": HParam(2.0, help="sharpens the mean", only=("aggregation", "enhanced_era")),
        **label_cache.HPARAM,
        **selection.HPARAMS,
    },
    options={"aggregation": ("era", "sa", "enhanced_era", "era_logits")} | label_cache.OPTION | selection.OPTION,
    proxy="unlabelled",
    stages=("distill",),
    keeps_models=True,
    example_fits=1,
    needs_numbers_for=selection.DISTANCES,
    distils=True,
)
