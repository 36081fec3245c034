"""Matching of hidden units in NumPy and SciPy, float64, written from the equations of PFNM and FedMA."""

import numpy as np
from scipy.optimize import linear_sum_assignment


def expected(nets, room, orders, variance, prior_variance, gamma):
    """The groups by Yurochkin et al. (2019): common units, each a list of (net, unit), that come and go.

    nets: {number: [L, D]}; orders: the first pass, which takes nothing out, and the sweeps.
    """
    J, common = len(nets), []

    def vector(member):
        return nets[member[0]][member[1]]

    def gain(members, w):
        """What w adds to sum_i |sum w / s^2|^2 / (1 / s0^2 + c / s^2) as a member."""

        def of(vectors):
            return sum(
                (sum(v[d] for v in vectors) / variance) ** 2 / (1 / prior_variance + len(vectors) / variance)
                for d in range(len(w))
            )

        vectors = [vector(m) for m in members]
        return of([*vectors, w]) - (of(vectors) if vectors else 0)

    for sweep, order in enumerate(orders):
        for j in order:
            if sweep:
                common = [[m for m in members if m[0] != j] for members in common]
                common = [members for members in common if members]
            new = min(len(nets[j]), room - len(common))
            profit = np.empty((len(nets[j]), len(common) + new))
            for u, w in enumerate(nets[j]):
                for i, members in enumerate(common):
                    c = min(len(members), 10)
                    profit[u, i] = gain(members, w) + np.log(c / (J - c))
                for k in range(new):
                    profit[u, len(common) + k] = gain([], w) - 2 * np.log(k + 1) + 2 * np.log(gamma / J)
            common = [*common, *([] for _ in range(new))]
            for u, i in zip(*linear_sum_assignment(-profit), strict=True):
                common[i].append((j, int(u)))
            common = [members for members in common if members]
    return {frozenset(members) for members in common}
