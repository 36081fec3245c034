"""Models with plain convolutions: noticed once, and right wherever a federation puts them."""

import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import models
from fdjax.engine import lift
from fdjax.models import layers, notice


class Net(nn.Module):
    conv: type[nn.Module]
    wrapped: bool = False

    @nn.compact
    def __call__(self, x):
        conv = nn.remat(self.conv) if self.wrapped else self.conv
        return nn.Dense(3)(conv(4, (3, 3), padding="SAME", name="conv")(x).reshape(x.shape[0], -1))


def notices(caplog, module):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="absl"):
        models.from_linen(module, (6, 6, 1), "mine")
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("wrapped", [False, True])
def test_plain_convolutions_are_noticed_once(caplog, wrapped):
    (line,) = notices(caplog, Net(nn.Conv, wrapped))
    assert "'mine'" in line
    assert "fdjax.models.layers.Conv" in line


def test_our_convolutions_are_not(caplog):
    assert notices(caplog, Net(layers.Conv)) == []


def test_other_devices_get_no_notice(caplog, monkeypatch):
    monkeypatch.setattr(notice.jax, "default_backend", lambda: "gpu")
    assert notices(caplog, Net(nn.Conv)) == []


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_plain_convolutions_train_alike_under_every_chunk(rng, chunk):
    model, ours = (models.from_linen(Net(conv), (6, 6, 1)) for conv in (nn.Conv, layers.Conv))
    x = jnp.asarray(rng.normal(size=(5, 4, 6, 6, 1)), jnp.float32)

    def trained(model):
        def one(params, x):
            step = lambda _, p: jax.tree.map(  # noqa: E731
                lambda p, g: p - 0.1 * g, p, jax.grad(lambda p: jnp.mean(model.apply(p, x) ** 2))(p)
            )
            return jnp.zeros(()), lift.Partials(sum=jax.lax.fori_loop(0, 3, step, params))

        lifting = lift.Lifting("shard_map", lift.make_mesh(jax.devices()[:2]), chunk)
        return jax.jit(lambda p, x: lift.over_clients(one, p, x, lifting))(params, x)[1].sum

    params = ours.init(jax.random.key(0))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, trained(model), trained(ours))
