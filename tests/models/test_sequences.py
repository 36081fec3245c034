"""Nets on sequences of tokens and on tables with categories."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import models
from fdjax.errors import InputError
from fdjax.models import Features, sequences

TOKENS, LENGTH, CLASSES = 7, 6, 5
SMALL = {
    "char_lstm": {"width": 4, "layers": 2, "embedding": 3},
    "transformer": {"width": 6, "layers": 2, "heads": 3},
}


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, TOKENS, (3, LENGTH)), jnp.int32)


def drawn(model):
    """Params of which no bias is 0 and no scale is 1."""
    rng, shapes = np.random.default_rng(1), jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: np.float32(0.5 * rng.normal(size=leaf.shape)), shapes)


def built(name, **options):
    model = models.build(name, (LENGTH,), CLASSES, Features(TOKENS), **{**SMALL[name], **options})
    return model, drawn(model)


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def lstm_layer(params, x):
    """[L, D] -> [L, H], gate by gate."""
    width = params["kernel"].shape[0]
    h, c, every = np.zeros(width), np.zeros(width), []
    for now in x:
        z = now @ params["input"] + h @ params["kernel"] + params["bias"]
        i, f, g, o = (z[k * width : (k + 1) * width] for k in range(4))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        every.append(h)
    return np.array(every)


def test_lstm_is_its_definition(tokens):
    model, params = built("char_lstm")
    p = in_float64(params)
    for row, logits in zip(np.asarray(tokens), jax.jit(model.apply)(params, tokens), strict=True):
        h = p["Embedding_0"]["embedding"][row]
        for layer in ("LSTMLayer_0", "LSTMLayer_1"):
            h = lstm_layer(p[layer], h)
        np.testing.assert_allclose(logits, h[-1] @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], atol=1e-5)


def normed(h, params):
    centred = h - h.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attending(p, x, heads, last):
    """[L, D] -> [L, D], or the last position alone, head by head and position by position."""
    length, width = x.shape
    each = width // heads
    h = normed(x, p["LayerNorm_0"])
    query, both = (h @ p[d]["kernel"] + p[d]["bias"] for d in ("Dense_0", "Dense_1"))
    read = np.zeros_like(x)
    for head in range(heads):
        mine = slice(head * each, (head + 1) * each)
        key = both[:, 2 * head * each : (2 * head + 1) * each]
        value = both[:, (2 * head + 1) * each : 2 * (head + 1) * each]
        for i in range(length):
            weights = np.exp(key @ query[i, mine] / np.sqrt(each))
            read[i, mine] = weights @ value / weights.sum()
    x = x + read @ p["Dense_2"]["kernel"] + p["Dense_2"]["bias"]
    hidden = gelu(normed(x, p["LayerNorm_1"]) @ p["Dense_3"]["kernel"] + p["Dense_3"]["bias"])
    x = x + hidden @ p["Dense_4"]["kernel"] + p["Dense_4"]["bias"]
    return normed(x[-1], p["LayerNorm_2"]) if last else x


def test_transformer_is_its_definition(tokens):
    model, params = built("transformer")
    p = in_float64(params)
    for row, logits in zip(np.asarray(tokens), jax.jit(model.apply)(params, tokens), strict=True):
        placed = p["_Placed_0"]
        h = placed["Embedding_0"]["embedding"][row] + placed["positions"]
        h = attending(p["_Attending_1"], attending(p["_Attending_0"], h, 3, False), 3, True)
        np.testing.assert_allclose(logits, h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], atol=1e-5)


def test_gradients_of_the_recurrence_are_those_of_a_plain_loop(rng):
    given = jnp.asarray(rng.normal(size=(5, 2, 12)), jnp.float32)
    kernel, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 12), (5, 2, 3)))

    def plain(given, kernel):
        h = c = jnp.zeros((2, 3))
        every = []
        for now in given:
            i, f, g, o = jnp.split(now + h @ kernel, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            every.append(h)
        return jnp.stack(every)

    ours, theirs = (
        jax.jit(jax.grad(lambda a, b, f=f: jnp.sum(weight * f(a, b)), (0, 1)))(given, kernel)
        for f in (sequences.recurrence, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.parametrize("size", [7, 3000])  # by a product, and by additions
def test_gradient_of_an_embedding(rng, size):
    table, index = rng.normal(size=(size, 3)).astype(np.float32), rng.integers(0, size, (4, 5))
    index[0] = index[1]  # a row that is read twice has both slopes
    slope = rng.normal(size=(4, 5, 3)).astype(np.float32)
    expected = np.zeros((size, 3))
    np.add.at(expected, index, slope)
    found = jax.jit(jax.grad(lambda t: jnp.sum(sequences.rows_of(t, jnp.asarray(index)) * slope)))(table)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_same_under_vmap(tokens):
    for name in SMALL:
        model, params = built(name, layers=1)
        both = jax.tree.map(lambda leaf: np.stack([leaf, 2 * leaf]), params)

        @jax.jit
        def slope(params, model=model):
            return jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, tokens))))(params)

        together = jax.jit(jax.vmap(slope))(both)
        for k in range(2):
            alone = slope(jax.tree.map(lambda leaf, k=k: leaf[k], both))
            jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-4, atol=1e-5), together, alone)


def test_dropout_of_a_transformer(tokens):
    model, params = built("transformer", dropout=0.5)
    apply = jax.jit(model.apply)
    in_test, again = apply(params, tokens), apply(params, tokens)
    in_training = apply(params, tokens, jax.random.key(1))
    np.testing.assert_array_equal(in_test, again)
    assert not np.allclose(in_test, in_training)


def test_embedded_columns(rng):
    sizes = (0, 4, 0, 9)
    model = models.build("embedded_mlp", (4,), 3, Features(categories=sizes), width=8, layers=1)
    params = drawn(model)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    x[:, 1], x[:, 3] = rng.integers(0, 4, 6), rng.integers(0, 9, 6)
    p = in_float64(params)
    x[0, 1] = x[1, 3] = 0  # levels that no training row has are the vector 0
    tables = [p["_Columns_0"][f"column_{j}"]["embedding"][x[:, j].astype(int)] * (x[:, [j]] > 0) for j in (1, 3)]
    h = np.concatenate([x[:, [0, 2]], *tables], 1)
    assert h.shape[1] == 2 + 2 + 5
    h = np.maximum(h @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"], 0)
    expected = h @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(params, x), expected, atol=1e-5)
    plain = models.build("embedded_mlp", (4,), 3)  # without categories, columns are numbers
    assert jax.eval_shape(plain.apply, drawn(plain), x).shape == (6, 3)


TOKENS_OF_80 = Features(80)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: models.build("2nn", (80,), 80, TOKENS_OF_80), "'2nn' takes numbers, but the data have tokens; choose"),
        (lambda: models.build("char_lstm", (80,), 80), "'char_lstm' takes tokens, but the data have numbers; choose"),
        (lambda: models.build("char_lstm", (80,), 80, TOKENS_OF_80, width=0), "width, layers and embedding of at"),
        (lambda: models.build("transformer", (80,), 80, TOKENS_OF_80, heads=7), "a width that the heads divide"),
        (lambda: models.build("char_lstm", (80,), 80, tokens=80), "unknown option of model 'char_lstm'"),
        (
            lambda: models.build("2nn", (3,), 2, Features(categories=(0, 3, 0))),
            "would take the codes of categories",
        ),
        (lambda: models.build("embedded_mlp", (3,), 2, Features(categories=(0, 3))), "for each of F columns; got"),
    ],
)
def test_what_does_not_fit_is_one_line(make, error):
    with pytest.raises(InputError, match=error) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_inputs_of_another_type_are_refused(tokens):
    model, params = built("char_lstm")
    with pytest.raises(InputError, match="takes tokens, int32"):
        model.apply(params, tokens.astype(jnp.float32))
