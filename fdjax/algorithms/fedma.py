"""FedMA: hidden units matched layer by layer and then averaged, so that nets of different starts can become one.

Wang, Yurochkin, Sun, Papailiopoulos, Khazaeni, "Federated Learning with Matched Averaging" (ICLR 2020), Algorithm 1,
by its code (IBM/FedMA): we had not the text, so equation numbers are missing. A round has an exchange for each layer:

    client:  n = 1: train the whole net.  n > 1: layer n - 1 <- the matched one, frozen like those below it; the inputs
             of layer n <- moved to where their units are now; train the layers from n to N for `retrain_epochs`
    server:  n < N: match the clients' units (`exchange/matching.py`: a Beta-Bernoulli process's MAP by the Hungarian
             method) and average what is matched.  n = N: a class's weights are averaged by the examples of it

One round is one-shot FedMA. With more, the communication variant, clients take back of the common net the units that
theirs were matched to: they stay as wide as they were, while the common net grows.

The model's widths are the **capacity** of the common net. Clients' nets have the first `client_width` of each hidden
layer's units, rounded; the common one has as many as the matching gives, up to the capacity; the rest is masked.

Sent, of real widths: up, each layer of the client's net and K numbers of examples; down, the common hidden layers, and
for each of the client's units its place; from the second round on also the units that it takes back, its whole net.

Ours: nets begin with draws of their own; a client that was not in the last round takes back the units that most nets
have; a class that nobody in a round holds has the mean of all; the prior's mean is 0 for biases too (the code: 0.1);
the capacity is exact (the code: 700 units and one). `centre` = mean averages what is matched, which gives copies of one
net that net; the code's `centre` = posterior pulls it to 0. Optimisers start afresh in each exchange. In one round of
`test_learning.py`, Dirichlet(0.5): 0.858, 0.808, 0.798; the plain mean of nets that started apart 0.127, 0.412, 0.288.
"""

import jax
import jax.numpy as jnp

from fdjax.client import losses
from fdjax.client.training import Amount, fit_observing, local_work
from fdjax.contract import Algorithm, Broadcast, Exchange, Upload, own_model
from fdjax.exchange import chain, matching, reductions
from fdjax.exchange.stacked import apply_each, present
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, epochs


def fedma(task: Task) -> Algorithm:
    """FedMA of the task's model; hparams and options: see METHOD."""
    net, K = chain.chain_of(task.model, task.inputs, "fedma"), task.classes
    layers, last, by_prior = net.layers, len(net.layers) - 1, task.options["centre"] == "posterior"

    def trained(n, ctx, params, masks, data):
        """The params with layers n and above trained, the mean loss, and how often each label was seen [K]."""
        free, chosen = {path for layer in layers[n:] for path in (layer.kernel, layer.bias)}, task.training.trained
        training = task.training._replace(trained=lambda path: path in free and (chosen is None or chosen(path)))

        def objective(params, x, y, key):
            z = ctx.model.apply(net.masked(params, masks), x, key)
            return losses.cross_entropy(z, y, training.label_smoothing), ()

        return fit_observing(
            training, objective, lambda seen, y, weight: weight @ jax.nn.one_hot(y, K), jnp.zeros(K), params, data, ctx,
            epochs=Amount(ctx.hparams["retrain_epochs"]) if n else local_work(ctx), keeps=False,
        )  # fmt: skip

    def start(ctx, received, state):
        """The net to begin a round with, and the bytes that it took to have it."""
        masks = net.narrowed(ctx.hparams["client_width"])
        drawn = net.masked(state["params"], masks, scaled=True)
        again = net.masked(net.chosen(received.shared["params"], received.own), masks)
        params = jax.tree.map(lambda own, common: jnp.where(ctx.round > 0, common, own), drawn, again)
        return params, masks, jnp.where(ctx.round > 0, net.size(masks), 0)

    def go_on(n, ctx, received, state):
        """The net with the matched layer n - 1, and the bytes of that and of its units' places."""
        params, places = layers[n - 1].put(state["params"], received.shared["weights"]), received.own
        params = layers[n].put(params, chain.inputs_moved(layers[n].of(params), places))
        masks = _with(state["masks"], n - 1, received.shared["mask"])
        return params, masks, net.layer_size(n - 1, masks) + 4 * jnp.sum(state["masks"][n - 1])

    def match_layer(n):
        layer = layers[n]

        def broadcast(ctx, server):
            rows, new = task.ids(ctx.cohort), server["next"]
            if not n:
                return Broadcast({"params": server["params"]}, own=tuple(place[rows] for place in server["places"]))
            sent = {"weights": layers[n - 1].of(new["params"]), "mask": new["masks"][n - 1]}
            return Broadcast(sent, own=new["places"][n - 1][rows])

        def client(ctx, received, state, data):
            params, masks, down = go_on(n, ctx, received, state) if n else start(ctx, received, state)
            params, loss, counts = trained(n, ctx, params, masks, data)
            up = net.layer_size(n, masks) + (4 * K if n == last else 0)
            sent = reductions.Weighted(layer.of(params), counts) if n == last else layer.of(params)
            return (
                {"params": params, "masks": masks},
                Upload(sent, up, down),
                {f"retrain_loss_{n + 1}" if n else "train_loss": loss},
            )

        def serve(ctx, server, stack):
            prior = matching.Prior(*(ctx.hparams[name] for name in ("unit_variance", "prior_variance", "gamma")))
            width, here = jnp.sum(net.narrowed(ctx.hparams["client_width"])[n]), stack.weight > 0
            units = apply_each(layer.vectors, present(stack))
            found = matching.match(units, here, width, ctx.key, prior, ctx.hparams["sweeps"])
            theirs = matching.common_units(units, found, width, prior if by_prior else None)
            new = server["next"]
            new = {
                "params": layer.put(new["params"], layer.from_vectors(theirs)),
                "masks": _with(new["masks"], n, jnp.float32(found.count > 0)),
                "places": _with(new["places"], n, matching.places_of_all(found, stack.client, here, task.clients)),
            }
            return {**server, "next": new}, {f"width_{n + 1}": jnp.sum(new["masks"][n])}

        def finish(ctx, server, weights):
            new = {**server["next"], "params": layer.put(server["next"]["params"], weights)}
            return {**new, "next": new}, {}

        step = (reductions.class_mean(), finish) if n == last else (reductions.stack(), serve)
        return Exchange(broadcast, client, *step, name=f"layer {n + 1}")

    def init_server(ctx, params):
        places = tuple(jnp.tile(jnp.arange(width, dtype=jnp.int32), (task.clients, 1)) for width in net.widths)
        first = {"params": params, "masks": net.narrowed(1.0), "places": places}
        return {**first, "next": first}

    return Algorithm(
        init_server=init_server,
        init_client=lambda ctx, params: {"params": own_model(ctx, params), "masks": net.narrowed(1.0)},
        round=tuple(map(match_layer, range(len(layers)))),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
        model_of=lambda ctx, server, state: server["params"],
    )


def _with(items, index, item):
    return (*items[:index], item, *items[index + 1 :])


METHOD = Method(
    name="fedma",
    summary="FedMA (Wang et al. 2020): hidden units matched layer by layer, then averaged; the model's widths are room",
    build=fedma,
    hparams={
        **LOCAL_TRAINING,
        "retrain_epochs": epochs("local_epochs", "epochs of the layers above after each that was matched"),
        "client_width": HParam(0.5, high=1.0, above=True, help="share of the model's hidden units in clients' nets"),
        "unit_variance": HParam(1.0, above=True, help="variance of clients' units about the common ones"),
        "prior_variance": HParam(1.0, above=True, help="variance of the common units about 0"),
        "gamma": HParam(7.0, above=True, help="mass of the process: the larger, the more common units"),
        "sweeps": HParam(5, integer=True, high=1000, help="sweeps in which each net is matched anew"),
    },
    options={"centre": ("mean", "posterior")},
    one_architecture=True,
    parts=True,
    keeps_optimizer=None,
)
