"""Labels of few bits and a real arithmetic coder of them, in exact numbers."""

import itertools
import math
from fractions import Fraction

import numpy as np


class Coder:
    """An arithmetic coder in exact fractions, and the model that both ends follow."""

    def __init__(self, message=None):
        self.low, self.width, self.counts, self.message = Fraction(0), Fraction(1), {}, message

    def code(self, context, alphabet, symbol=None):
        """Encode `symbol`, or decode one from the message."""
        seen = self.counts.setdefault(context, [0] * alphabet)
        parts = [Fraction(2 * n + 1, 2 * sum(seen) + alphabet) for n in seen]
        edges = [sum(parts[:s], Fraction(0)) for s in range(alphabet + 1)]
        if symbol is None:
            at = (self.message - self.low) / self.width
            symbol = max(s for s in range(alphabet) if edges[s] <= at)
        self.low, self.width = self.low + self.width * edges[symbol], self.width * parts[symbol]
        seen[symbol] += 1
        return symbol

    def rows(self, known, top, symbols=None):
        """Encode `symbols` [n, K] or, without, decode them."""
        out = []
        for i, old in enumerate(known.tolist()):
            new = None if symbols is None else symbols[i].tolist()
            if not self.code("changed", 2, None if new is None else int(new != old)):
                out.append(old)
                continue
            left, line = top, []
            for k in range(len(old) - 1):
                line.append(self.code((k, left), left + 1, None if new is None else new[k]) if left else 0)
                left -= line[-1]
            out.append([*line, left])
        return np.array(out)

    def sent(self):
        """(number of bits, the number they write): the shortest that lies within the interval whatever follows."""
        bits = math.ceil(math.log2(1 / self.width)) + 1
        return bits, Fraction(math.ceil(self.low * 2**bits), 2**bits)


def coded(symbols, known, top):
    encoder = Coder()
    encoder.rows(known, top, symbols)
    return math.floor(-math.log2(encoder.width) / 8) + 2


def nearest(p, top):
    """Of all whole numbers [K] with sum `top`, those that are nearest to top p, row by row."""
    lattice = np.array([s for s in itertools.product(range(top + 1), repeat=p.shape[1]) if sum(s) == top])
    return lattice[((lattice[None] - top * p[:, None]) ** 2).sum(-1).argmin(1)]
