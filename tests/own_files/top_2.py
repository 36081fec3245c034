"""A metric of one's own: how often the label is among the two largest logits."""

import jax.numpy as jnp

import fdjax

METRIC = fdjax.Metric(
    "top_2",
    per_example=lambda logits, y: jnp.any(jnp.argsort(-logits)[:, :2] == y[:, None], axis=-1),
    unit="%",
    summary="share of examples whose label is among the two largest logits",
)
