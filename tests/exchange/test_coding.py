"""CFD's labels of few bits, and what their code spends."""

import itertools

import numpy as np
import pytest
from coding_cases import Coder

from fdjax.exchange import coding


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_quantised_labels_are_the_nearest_of_the_lattice(bits, rng):
    top = 2**bits - 1
    lattice = [s for s in itertools.product(range(top + 1), repeat=3) if sum(s) == top]
    p = rng.dirichlet(np.full(3, 0.4), 50).astype(np.float32)
    symbols = np.asarray(coding.quantise(p, bits))
    assert (symbols.sum(1) == top).all()
    best = np.abs(np.array(lattice)[None] / top - p[:, None]).sum(-1).min(1)
    np.testing.assert_allclose(np.abs(symbols / top - p).sum(1), best, atol=1e-5)
    if bits == 1:
        np.testing.assert_array_equal(symbols.argmax(1), p.argmax(1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_coded_labels_decode_and_take_the_bytes_that_are_counted(bits, rng):
    top = 2**bits - 1
    symbols = np.asarray(coding.quantise(rng.dirichlet(np.full(5, 0.3), 40).astype(np.float32), bits))
    for known in (np.zeros_like(symbols), np.where(rng.random((40, 1)) < 0.7, symbols, symbols[::-1]), symbols):
        encoder = Coder()
        encoder.rows(known, top, symbols)
        number, message = encoder.sent()
        np.testing.assert_array_equal(Coder(message).rows(known, top), symbols)
        counted = float(coding.coded_bytes(symbols, known, bits))
        assert number / 8 <= counted <= number / 8 + 2
        assert counted < bits * symbols.size / 8 + 2 < 4 * symbols.size
    assert counted == 2  # nothing has changed
