"""Posteriors over models: distributions that the models of a round's clients are taken for draws of."""

import jax
import jax.numpy as jnp

from fdjax import keys
from fdjax.client.trained import is_statistic, path_of
from fdjax.contract import Stack
from fdjax.exchange.stacked import present
from fdjax.types import PyTree

KINDS = ("gaussian", "directions", "dirichlet")
_SHRUNK = 0.1


def sample(kind: str, mean: PyTree, stack: Stack, concentration: jax.Array, key: jax.Array) -> PyTree:
    """A model drawn from the posterior `kind` of the clients' models w_k, whose average by n_k is `mean`, w.

    gaussian    N(w, diag sum_k (n_k / n) (w_k - w)^2)
    directions  of each tensor, with d_k = w_k - w and u_k = d_k / |d_k|, of mean mu and variance s^2 over k,
                w + mean_k |d_k| (mu + 0.1 s e),  e ~ N(0, 1)
    dirichlet   sum_k g_k n_k w_k / sum_k g_k n_k,  g ~ Dirichlet(`concentration`)

    Running statistics of BatchNorm are those of w but for the last one. Source: Chen and Chao (2021), FedBE; the second
    one is their code's.
    """
    models, there = present(stack), (stack.weight > 0).astype(jnp.float32)
    share = stack.weight / jnp.sum(stack.weight)

    def over(weights, values):
        return jnp.tensordot(weights / jnp.sum(weights), values, 1)

    if kind == "dirichlet":
        drawn = jax.nn.softmax(jax.random.loggamma(key, concentration, share.shape) + jnp.log(share))
        return jax.tree.map(lambda w: over(drawn, w), models)

    def of_tensor(number, w, each):
        noise, away = jax.random.normal(keys.stream(key, "tensor", number), w.shape), each - w[None]
        if kind == "gaussian":
            return w + jnp.sqrt(over(share, away**2)) * noise
        length = jnp.sqrt(jnp.sum(away**2, tuple(range(1, away.ndim)), keepdims=True))
        unit = away / jnp.where(length > 0, length, 1)
        mu = over(there, unit)
        return w + over(there, length) * (mu + _SHRUNK * jnp.sqrt(over(there, (unit - mu[None]) ** 2)) * noise)

    pairs = zip(jax.tree.leaves_with_path(mean), jax.tree.leaves(models), strict=True)
    drawn = [w if is_statistic(path_of(path)) else of_tensor(i, w, each) for i, ((path, w), each) in enumerate(pairs)]
    return jax.tree.unflatten(jax.tree.structure(mean), drawn)
