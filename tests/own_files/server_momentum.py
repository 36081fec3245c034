"""FedAvgM: FedAvg whose server has momentum.

Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification" (2019),
section 4.3. With w the mean of the clients' params and v = 0 at first:

    delta <- w_t - w;  v <- beta v + delta;  w_{t+1} <- w_t - v

Sent: w_t down and w_k up, 4P bytes each way. Deviations: none.

    python -m fdjax --algorithm=server_momentum.py --beta_server=0.7
"""

import jax

from fdjax import Algorithm, Broadcast, Exchange, HParam, Method, Upload, reductions
from fdjax.client.training import fit, local_work, supervised
from fdjax.method import LOCAL_TRAINING


def build(task):
    """A server that keeps (w_t, v)."""

    def broadcast(ctx, server):
        return Broadcast(server["params"])

    def train(ctx, received, state, data):
        loss = supervised(ctx.model, task.training)
        params, mean = fit(task.training, loss, received.shared, data, ctx, epochs=local_work(ctx))
        return state, Upload(params), {"train_loss": mean}

    def step(ctx, server, mean):
        beta = ctx.hparams["beta_server"]
        velocity = jax.tree.map(lambda v, w, m: beta * v + (w - m), server["velocity"], server["params"], mean)
        return {"params": jax.tree.map(lambda w, v: w - v, server["params"], velocity), "velocity": velocity}, {}

    return Algorithm(
        init_server=lambda ctx, params: {"params": params, "velocity": jax.tree.map(lambda w: 0 * w, params)},
        init_client=lambda ctx, params: (),
        round=(Exchange(broadcast, train, reductions.weighted_mean(), step),),
        central=lambda ctx, server, x: ctx.model.apply(server["params"], x),
    )


METHOD = Method(
    name="fedavgm",
    summary="FedAvgM (Hsu et al. 2019): FedAvg whose server has momentum",
    build=build,
    hparams=LOCAL_TRAINING | {"beta_server": HParam(0.9, high=1.0, help="momentum of the server")},
    one_architecture=True,
)
