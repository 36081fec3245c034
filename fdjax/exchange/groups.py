"""Who learns from whom: teachers matched to students by their labels, along the paths that levels allow, and groups.

Clients stand on levels, such as device, edge and cloud. In a set-up each sends its histogram of labels n_k [K]; with
pi_k = (n_k + s) / sum(n_k + s), s = 0.1, a teacher t suits a student s by

    similarity       1 - JSD(pi_s, pi_t) / log 2
    uniformity       (H(pi_mix) - H(pi_s)) / log K,  pi_mix = (n_s pi_s + n_t pi_t) / (n_s + n_t)
    complementarity  sum_c min(relu(1/K - pi_s,c), pi_t,c) / sum_c relu(1/K - pi_s,c)           (0 if nothing lacks)

and the score is their sum, weighted by hparams of these names; `chance` weighs a random number of [0, 1), to compare
with. The Glasgow poster (see `algorithms/group_distillation.py`) names the three; **all equations here are ours**.

Options: `levels`, one a cohort, the first of --models lowest, or 2 or 3 by the rank of n_k, the largest highest;
`paths`, to any client that is not lower, to those above, or to the next level alone; `students`, those of a teacher
at most: then a linear assignment (the Hungarian method) replaces everybody's own best choice, and who is left over has
no teacher.

A histogram leaks 4K bytes of its client, once. Laplace noise of scale `histogram_noise` on its numbers hides whether an
example was added or removed (epsilon = 1 / scale); an example with another label in its place costs 2 / scale. Numbers
below 0 count as 0 at the server, whoever made the noise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from fdjax.client import losses
from fdjax.client.data import label_counts
from fdjax.contract import Broadcast, Exchange, Stack, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions, stacked
from fdjax.method import HParam, Task
from fdjax.types import Array

HPARAMS = {
    "similarity": HParam(1.0, help="weight of alike labels in a teacher's score"),
    "uniformity": HParam(0.0, help="weight of what a teacher adds to the entropy of labels in its score"),
    "complementarity": HParam(0.0, help="weight of the lacking labels that a teacher has in its score"),
    "chance": HParam(0.0, help="weight of a random number in a teacher's score"),
    "histogram_noise": HParam(0.0, help="scale of the Laplace noise on the numbers of labels that clients send"),
}
OPTIONS = {"levels": ("cohorts", "2", "3"), "paths": ("any", "above", "next"), "students": ("all", "1", "2", "4", "8")}
_SMOOTHING = 0.1  # examples more of each label
_ALONE, _FORBIDDEN = 4.0, 16.0  # costs, where scores are scaled to [-1, 1]


class Criteria(NamedTuple):
    """What suits, each [C, C]: student, teacher."""

    similarity: jax.Array
    uniformity: jax.Array
    complementarity: jax.Array


class Forest(NamedTuple):
    """Groups by the id of their leader, [C] int32."""

    group: jax.Array  # of each client; leaders are in their own
    parent: jax.Array  # of each group: the one above it, or itself


def criteria(histograms: jax.Array) -> Criteria:
    """The criteria for histograms of labels [C, K]."""
    smoothed = histograms + _SMOOTHING
    size = jnp.sum(smoothed, -1)[:, None, None]
    pi = smoothed / jnp.sum(smoothed, -1, keepdims=True)
    student, teacher, K = pi[:, None], pi[None], pi.shape[-1]
    H = losses.entropy(pi)
    divergence = losses.entropy((student + teacher) / 2) - (H[:, None] + H[None]) / 2
    others = jnp.swapaxes(size, 0, 1)
    mixed = losses.entropy((size * student + others * teacher) / (size + others))
    lacks = jax.nn.relu(1 / K - student)
    total = jnp.sum(lacks, -1)
    filled = jnp.sum(jnp.minimum(lacks, teacher), -1) / jnp.where(total > 0, total, 1)
    return Criteria(1 - divergence / np.log(2), (mixed - H[:, None]) / np.log(K), filled)


def check_levels(task: Task) -> None:
    """Raises InputError for levels without an edge: below the highest one, or where it is the only one."""
    sizes, paths = _sizes_of_levels(task), task.options["paths"]
    for level, size in enumerate(sizes):
        candidates = {
            "any": sum(sizes[level:]) - 1,
            "above": sum(sizes[level + 1 :]),
            "next": sum(sizes[level + 1 :][:1]),
        }
        if size == 0 or (candidates[paths] <= 0 and (level + 1 < len(sizes) or len(sizes) == 1)):
            raise InputError(
                f"levels without an edge: by --levels={task.options['levels']} levels of "
                f"{', '.join(map(str, sizes))} clients, so with --paths={paths} number {level} finds no teacher; give "
                "several architectures in --models, --levels=2 or --paths=any, and clients for every level"
            )


def _sizes_of_levels(task: Task) -> list[int]:
    if task.options["levels"] == "cohorts":
        return list(task.sizes)
    number = int(task.options["levels"])
    return np.bincount(np.arange(task.clients) * number // task.clients, minlength=number).tolist()


def levels_of(task: Task, histograms: jax.Array) -> jax.Array:
    """The level [C] of every client, 0 the lowest."""
    of_rank = np.repeat(np.arange(len(sizes := _sizes_of_levels(task)), dtype=np.int32), sizes)
    if task.options["levels"] == "cohorts":
        return jnp.asarray(of_rank)
    rank = jnp.argsort(jnp.argsort(jnp.sum(histograms, -1), stable=True))
    return jnp.asarray(of_rank)[rank]


def edges(levels: jax.Array, paths: str) -> jax.Array:
    """Whether a student [C, .] may learn from a teacher [., C] by their levels, never from itself."""
    student, teacher = levels[:, None], levels[None]
    allowed = {"any": teacher >= student, "above": teacher > student, "next": teacher == student + 1}[paths]
    return allowed & ~jnp.eye(len(levels), dtype=bool)


def assign(scores: jax.Array, allowed: jax.Array, students: str = "all") -> jax.Array:
    """The teacher [C] int32 of every client, itself where it has none: the first best by `scores` [C, C]."""
    C = len(scores)
    alone = jnp.arange(C, dtype=jnp.int32)
    if students == "all":
        best = jnp.argmax(jnp.where(allowed, scores, -jnp.inf), -1).astype(jnp.int32)
        return jnp.where(jnp.any(allowed, -1), best, alone)
    places = int(students)
    costs = jnp.where(allowed, -scores / jnp.maximum(jnp.max(jnp.abs(scores)), 1e-6), _FORBIDDEN)
    by_itself = jnp.where(jnp.eye(C, dtype=bool), _ALONE, _FORBIDDEN)
    row, column = optax.assignment.hungarian_algorithm(jnp.hstack([jnp.repeat(costs, places, axis=1), by_itself]))
    chosen = jnp.where(column < C * places, column // places, row)
    return alone.at[row].set(chosen.astype(jnp.int32))


def forest(teacher: jax.Array) -> Forest:
    """Groups of everybody's `teacher` [C]: a teacher leads its students, and is under its own teacher.

    Clients that choose each other in a circle are one group, led by the first of them, with nothing above it.
    """
    me = jnp.arange(len(teacher), dtype=jnp.int32)
    far, least = teacher, me
    for _ in range(max(1, len(teacher).bit_length())):
        least, far = jnp.minimum(least, least[far]), far[far]
    in_circle = jnp.zeros(len(me), bool).at[far].set(True)
    above = jnp.where(in_circle, least, me)[teacher]
    leads = jnp.zeros(len(me), bool).at[jnp.where(above != me, above, len(me))].set(True, mode="drop")
    return Forest(jnp.where(leads & ~in_circle, me, above), above)


def averaging(trees: Forest, present: Array, consistency: Array) -> jax.Array:
    """How much each group [C, .] takes of each client's [., C] upload; the sum of a row is 1, or 0.

    A group's mean is over its members and those of all groups below it, alike; then, from above, groups are pulled to
    the one above them: mean_g <- (1 - c) mean_g + c mean_parent(g). Where none of them is `present` [C] a group keeps
    what it has, even if others are above it: its row is 0, and so are those of ids that lead no group.
    """
    C = len(trees.group)
    me = jnp.arange(C)

    def climb(_, carry):
        at, left, above, share = carry
        top = trees.parent[at] == at
        above, share = above.at[me, at].set(1), share.at[me, at].add(jnp.where(top, left, left * (1 - consistency)))
        return trees.parent[at], jnp.where(top, 0, left * consistency), above, share

    zeros = jnp.zeros((C, C))
    _, _, above, share = lax.fori_loop(0, C, climb, (me.astype(jnp.int32), jnp.ones(C), zeros, zeros))
    under = above[trees.group].T * jnp.asarray(present)[None]
    number = jnp.sum(under, -1, keepdims=True)
    return jnp.where(number > 0, share @ (under / jnp.maximum(number, 1)), 0)


def by_client(task: Task, stack: Stack, values: jax.Array) -> jax.Array:
    """Values [S, ...] of a stack in a table [C, ...] by client ids, with zeros for those who are not in it."""
    return jnp.zeros((task.clients, *values.shape[1:]), values.dtype).at[stack.client].set(values)


def matching(task: Task) -> Exchange:
    """The set-up: histograms up, and the server (a dict) keeps everybody's "teacher" [C]. Raises InputError."""
    check_levels(task)

    def send_histogram(ctx, received, state, data):
        noise = ctx.hparams["histogram_noise"] * jax.random.laplace(ctx.key, (task.classes,))
        return state, Upload(label_counts(data, task.classes) + noise), {}

    def match(ctx, server, stack):
        histograms = jnp.maximum(by_client(task, stack, stacked.present(stack)), 0)  # with noise some are negative
        present = by_client(task, stack, stack.weight > 0)
        allowed = edges(levels_of(task, histograms), task.options["paths"]) & present[:, None] & present[None]
        found, h = criteria(histograms), ctx.hparams
        scores = sum((h[name] * value for name, value in found._asdict().items()), start=jnp.zeros(allowed.shape))
        scores = scores + h["chance"] * jax.random.uniform(ctx.key, allowed.shape)
        return server | {"teacher": assign(scores, allowed, task.options["students"])}, {}

    return Exchange(lambda ctx, server: Broadcast(()), send_histogram, reductions.stack(), match)
