"""FedDKC: FedGKT with the clients' knowledge made alike before the server learns from it.

Wu, Sun, Wang, Liu, Pan, Zhang, Li, Gao, "Exploring the Distributed Knowledge Congruence in Proxy-data-free Federated
Distillation" (ACM TIST 2024). We had its abstract: clients of other architectures and data give outputs of other
sharpness, so they are refined until they agree in it. The equations are our concretisation. Of logits z of an example

    r(z) = softmax(z / tau),  tau > 0 such that      max_c r(z)_c = peak            KKR, kernel-based refinement
                                                     H(r(z)) = entropy              SKR, searching-based refinement

tau is found by bisection, example by example: the peak falls as it rises, the entropy rises. The server learns from
r(z_k) in the place of softmax(z_k / T); all else, what is sent and what FedGKT leaves open is in `fedgkt.py`.

Ours: both are searched for; `peak` = 0.5, `entropy` = 1 nat. Logits that are all equal stay so. What no tau gives (a
peak of 1/K or less, or of 1, an entropy of log K or more) is come as near to as a tau of 1e-3 to 1e3 times the range of
the logits does.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.algorithms import fedgkt
from fdjax.client import losses
from fdjax.contract import Algorithm
from fdjax.method import HParam, Task

_HALVINGS, _WIDEST = 30, 6.9  # of the logarithm of tau, which is at most so far from that of the logits' range


def refined(logits: jax.Array, wanted: jax.Array, by_entropy: bool) -> jax.Array:
    """z / tau [..., K], whose softmax has the wanted peak or entropy."""
    width = jnp.max(logits, -1, keepdims=True) - jnp.min(logits, -1, keepdims=True)
    scaled = logits / jnp.where(width > 0, width, 1)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        r = jax.nn.softmax(scaled / jnp.exp(middle), -1)
        sharp = losses.entropy(r) < wanted if by_entropy else jnp.max(r, -1) > wanted
        sharp = sharp[..., None]
        return jnp.where(sharp, middle, low), jnp.where(sharp, high, middle)

    ends = jnp.full_like(width, -_WIDEST), jnp.full_like(width, _WIDEST)
    low, high = lax.fori_loop(0, _HALVINGS, halve, ends)
    return scaled / jnp.exp((low + high) / 2)


def feddkc(task: Task) -> Algorithm:
    """FedDKC; hparams and options: see METHOD."""
    by_entropy = task.options["refinement"] == "skr"

    def refine(ctx, logits):
        wanted = ctx.hparams["entropy" if by_entropy else "peak"]
        return ctx.hparams["temperature"] * refined(logits, wanted, by_entropy)  # the divergence divides by it

    return fedgkt.fedgkt(task, refine)


METHOD = fedgkt.METHOD._replace(
    name="feddkc",
    summary="FedDKC (Wu et al. 2024): FedGKT with clients' outputs refined to one peak or one entropy",
    build=feddkc,
    hparams={
        **fedgkt.METHOD.hparams,
        "peak": HParam(0.5, high=1.0, above=True, help="largest probability of outputs", only=("refinement", "kkr")),
        "entropy": HParam(1.0, help="entropy of outputs, in nats", only=("refinement", "skr")),
    },
    options={"refinement": ("kkr", "skr")},
)
