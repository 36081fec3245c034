"""Generalized FedAvg (FedOpt), and of it FedAvgM, FedAdagrad, FedAdam and FedYogi.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization" (ICLR 2021),
Algorithms 1 (any ClientOpt and ServerOpt) and 2 (the adaptive three).

    client:  x_i <- x_t;  K_i steps x_i <- ClientOpt(x_i, g_i, eta_l);  D_i = x_i - x_t                    (Algorithm 1)
    server:  D_t = (1/|S|) sum_{i in S} D_i;  x_{t+1} = ServerOpt(x_t, -D_t, eta)                          (Algorithm 1)

`server_rule` is ServerOpt, with D = D_t, powers and roots element by element:

    adam      m <- b1 m + (1 - b1) D;  v <- b2 v + (1 - b2) D^2;                   x <- x + eta m / (sqrt(v) + tau)
    yogi      m as adam's;  v <- v - (1 - b2) D^2 sign(v - D^2);                   x as adam's             (Algorithm 2)
    adagrad   m as adam's;  v <- v + D^2;                                          x as adam's
    momentum  m <- b1 m + D;                                                       x <- x + eta m             (FedAvgM)
    optax     the optimiser of the flags --server_optimizer=... and others after server_; what these leave open is the
              clients'. From Python any transformation: `generalized`

b1 = `beta_m`, b2 = `beta_v`, eta = `server_learning_rate`; m starts at 0 and v at `sqrt_v0`^2, which is tau^2 unless
given (the paper: v_{-1} >= tau^2). The paper has b1 = .9 and b2 = .99, but b1 = 0 with adagrad, and tunes eta and tau.

Sent: x_t down and x_i up, 4P bytes each way; D_t is the mean of the x_i less x_t. The server keeps m and v, 2P.

`bias_correction` = on is the authors' code (Keras' Adam, its Yogi alike) and Flower's FedAdam, not the paper: the rate
eta sqrt(1 - b2^t) / (1 - b1^t), t = 1, 2, ...; both start v at 0 (`sqrt_v0`=0). `weighting` = examples: D_i by n_i;
FedAvg is then momentum with b1 = 0, eta = 1, to float32's rounding, as x_t is subtracted and added. Server momentum in
FedDF's and FedNTD's code, m <- b1 m + (x_t - mean), x_{t+1} = x_t - m, is momentum with eta = 1; FedBE's has (1 - b1) D
for D, so eta = 1 - b1. "Server adaptive" of FedDF's code is adam with b1 = 0, b2 = .99, tau = .01, v = 0.

Deviations: ClientOpt's state is fresh in each round or kept (`--optimizer_state=kept`). Statistics of BatchNorm are no
parameters: they become their mean. A round in which nobody counts is no step.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fdjax.algorithms import fedavg
from fdjax.client.trained import on_trained
from fdjax.contract import Algorithm, Broadcast
from fdjax.errors import InputError
from fdjax.exchange import reductions
from fdjax.method import LOCAL_TRAINING, HParam, Method, Task, learning_rate
from fdjax.types import Array, PyTree

_BELOW_1, _OF_RULE = 0.999999, ("server_rule", "adam", "yogi", "adagrad")

ServerOpt = Callable[[Mapping[str, Any], Array], optax.GradientTransformation]
# (hparams, round []) -> the server's optimiser; its `init` is given hparams of 0, so a first state depends on none


class _Moments(NamedTuple):
    """What the adaptive three keep."""

    count: jax.Array  # [] int32: server steps done
    m: PyTree
    v: PyTree  # of no meaning before the first step


def adaptive(rule: str, hparams: Mapping[str, Any], *, corrected: bool = False) -> optax.GradientTransformation:
    """Algorithm 2 for `rule` adam, yogi or adagrad, as an optimiser of the gradient -D."""
    eta, b1, b2, tau, root = (hparams[n] for n in ("server_learning_rate", "beta_m", "beta_v", "tau", "sqrt_v0"))

    def second(v, square):
        if rule == "adagrad":
            return v + square
        return b2 * v + (1 - b2) * square if rule == "adam" else v - (1 - b2) * square * jnp.sign(v - square)

    def init(params):
        return _Moments(jnp.int32(0), *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates, state, params=None):
        first, t = state.count == 0, state.count + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        v = jax.tree.map(lambda v, g: second(jnp.where(first, root**2, v), jnp.square(g)), state.v, updates)
        rate = eta * jnp.sqrt(1 - b2**t) / (1 - b1**t) if corrected else eta
        return jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + tau), m, v), _Moments(t, m, v)

    return optax.GradientTransformation(init, update)


def generalized(task: Task, server_opt: ServerOpt) -> Algorithm:
    """Algorithm 1 with any ServerOpt; ClientOpt is `task.training.optimizer`, (learning rate, round) -> optimiser.

    A file of one's own: `build=lambda task: generalized(task, lambda h, round: optax.lion(h["server_learning_rate"]))`.
    """
    average = reductions.weighted_mean if task.options.get("weighting") == "examples" else reductions.mean

    def server(ctx, state, mean):
        x = state["params"]
        gradient = jax.tree.map(lambda x, mean: x - mean, x, mean)
        optimizer = on_trained(server_opt(ctx.hparams, ctx.round), x, task.training.trained)
        update, optimizer_state = optimizer.update(gradient, state["optimizer"], x)
        return {"params": optax.apply_updates(x, update), "optimizer": optimizer_state}, {}

    def init_server(ctx, params):
        unknown = collections.defaultdict(lambda: jnp.float32(0))
        optimizer = on_trained(server_opt(unknown, ctx.round), params, task.training.trained)
        return {"params": params, "optimizer": optimizer.init(params)}

    averaged = fedavg.fedavg(task)
    exchange = averaged.round[0]._replace(
        broadcast=lambda ctx, state: Broadcast(state["params"]), reduce=average(), server=server
    )
    return averaged._replace(
        init_server=init_server,
        round=(exchange,),
        central=lambda ctx, state, x: ctx.model.apply(state["params"], x),
        model_of=lambda ctx, server, state: server["params"],
    )


def fedopt(task: Task) -> Algorithm:
    """Generalized FedAvg of the task's model; hparams: see METHOD. Raises InputError for a correction of no moments."""
    rule, corrected = task.options["server_rule"], task.options["bias_correction"] == "on"
    if corrected and rule not in ("adam", "yogi"):
        raise InputError(f"--bias_correction=on: --server_rule={rule} has none; leave it out, or use adam or yogi")
    rules: dict[str, ServerOpt] = {
        "momentum": lambda h, round: optax.sgd(h["server_learning_rate"], h["beta_m"]),
        "optax": lambda h, round: task.serving.optimizer(h["server_learning_rate"], round),
    }
    return generalized(task, rules.get(rule, lambda h, round: adaptive(rule, h, corrected=corrected)))


METHOD = Method(
    name="fedopt",
    summary="Generalized FedAvg (Reddi et al. 2021): FedAdam, FedYogi, FedAdagrad, FedAvgM, or any server optimiser",
    build=fedopt,
    hparams={
        **LOCAL_TRAINING,
        "server_learning_rate": learning_rate(0.03, "learning rate of the server's step"),
        "beta_m": HParam(0.9, high=_BELOW_1, help="decay of the first moment", only=(*_OF_RULE, "momentum")),
        "beta_v": HParam(0.99, high=_BELOW_1, help="decay of the second moment", only=_OF_RULE[:3]),
        "tau": HParam(1e-3, above=True, help="added to the root of the second moment", only=_OF_RULE),
        "sqrt_v0": HParam("tau", help="root of the second moment at first", only=_OF_RULE),
    },
    options={
        "server_rule": ("adam", "yogi", "adagrad", "momentum", "optax"),
        "bias_correction": ("off", "on"),
        "weighting": ("uniform", "examples"),
    },
    one_architecture=True,
    averages=True,
    stages=("server",),
    stages_for=("server_rule", "optax"),
    example_fits=1,
)
