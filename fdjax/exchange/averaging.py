"""Federated averaging: the exchange of params whose mean the server takes, and clients that minimise a given loss.

It is what FedAvg and all methods that change its clients alone are made of. In each of them

    client:  w_k <- w;  for E epochs, for each batch b:  w_k <- w_k - eta (grad (mean over b of l(w_k)) + pull(w_k))
    server:  w <- sum_k (n_k / n) w_k,  n = sum_k n_k, over the participants of the round, or another mean

Source: McMahan et al. (2017), Algorithm 1; `pull` is Li et al. (2020), FedProx.
"""

import functools
from collections.abc import Callable
from typing import Protocol

import jax

from fdjax.client import losses
from fdjax.client.training import fit, local_work
from fdjax.contract import (
    Algorithm,
    Broadcast,
    ClientWork,
    Context,
    Exchange,
    Reduction,
    SendBroadcast,
    Upload,
    own_model,
    params_of_server,
    params_of_state,
    predict_with_own_model,
)
from fdjax.exchange import reductions
from fdjax.method import Task
from fdjax.types import PyTree


class Objective(Protocol):
    """Losses [B] of the params w_k on x [B, ...] and y [B]; w is what the client received.

    The key is for a net in training mode.
    """

    def __call__(
        self, ctx: Context, w: PyTree, w_k: PyTree, x: jax.Array, y: jax.Array, key: jax.Array, /
    ) -> jax.Array: ...


class TaughtLoss(Protocol):
    """Losses [B] by cross-entropies `hard` [B] to the labels y [B], a teacher's logits z_g, the client's z [B, K]."""

    def __call__(
        self, ctx: Context, w: PyTree, hard: jax.Array, z_g: jax.Array, z: jax.Array, y: jax.Array, /
    ) -> jax.Array: ...


class Pull(Protocol):
    """What is added to the gradient at w_k, in its form; w is what the client received."""

    def __call__(self, ctx: Context, w: PyTree, w_k: PyTree, /) -> PyTree: ...


def exchange(
    client: ClientWork,
    broadcast: SendBroadcast = lambda ctx, params, /: Broadcast(params),
    reduce: Reduction | None = None,
) -> Exchange:
    """The server's params down, or more by `broadcast`; the clients' up, whose mean the server takes for its own.

    The mean is by n_k unless `reduce` is another one.
    """
    return Exchange(
        broadcast=broadcast,
        client=client,
        reduce=reductions.weighted_mean() if reduce is None else reduce,
        server=lambda ctx, params, mean: (mean, {}),
        shares="params",
    )


def of_one_model(exchange: Exchange) -> Algorithm:
    """The method of this exchange: the server's state is the central model's params, clients keep nothing."""
    return Algorithm(
        init_server=lambda ctx, params: params,
        init_client=lambda ctx, params: (),
        round=(exchange,),
        central=lambda ctx, params, x: ctx.model.apply(params, x),
        model_of=params_of_server,
    )


def beside_own_models(exchange: Exchange) -> Algorithm:
    """The same where each client also has a model of its own, of any architecture, which it keeps and predicts with."""
    own = {"init_client": own_model, "personal": predict_with_own_model, "model_of": params_of_state}
    return of_one_model(exchange)._replace(**own)


def cross_entropy(task: Task) -> Objective:
    """FedAvg's own objective: the cross-entropy of w_k to the labels."""

    def objective(ctx, start, params, x, y, key):
        return losses.cross_entropy(ctx.model.apply(params, x, key), y, task.training.label_smoothing)

    return objective


def distilling(task: Task, loss: TaughtLoss, teacher: Callable[[PyTree], PyTree] = lambda w: w) -> Objective:
    """The objective `loss` of the client's logits and of those of a fixed teacher, in test mode: one forward pass.

    The teacher's params are `teacher` of what the client received: that itself, the global model, if not given.
    """

    def objective(ctx, w, params, x, y, key):
        z = ctx.model.apply(params, x, key)
        hard = losses.cross_entropy(z, y, task.training.label_smoothing)
        return loss(ctx, w, hard, ctx.model.apply(teacher(w), x), z, y)

    return objective


def minimising(
    task: Task, objective: Objective, pull: Pull | None = None, start: Callable[[PyTree], PyTree] = lambda w: w
) -> ClientWork:
    """A client of FedAvg that minimises another loss, from params that are `start` of what it received."""

    def train(ctx, received, state, data):
        w = received.shared
        pull_here = None if pull is None else functools.partial(pull, ctx, w)
        params, loss = fit(
            task.training, lambda params, x, y, key: objective(ctx, w, params, x, y, key), start(w), data, ctx,
            epochs=local_work(ctx), pull=pull_here,
        )  # fmt: skip
        return state, Upload(params), {"train_loss": loss}

    return train


def with_objective(task: Task, objective: Objective, pull: Pull | None = None) -> Algorithm:
    """FedAvg whose clients minimise another loss: w_k <- w_k - eta (grad (mean over b of `objective`) + `pull`).

    A term of the loss that depends on w_k alone costs less as `pull`, its gradient, which is not differentiated.
    The metric `train_loss` is the mean of the objective over the last epoch's batches.
    """
    return of_one_model(exchange(minimising(task, objective, pull)))
