"""Group distillation against NumPy in float64: the poster's losses, and our equations around them."""

import chex
import engine_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.contract import Context, Received, Upload
from fdjax.errors import InputError
from fdjax.exchange.wrappers import without_traffic
from fdjax.run import experiment, settings

K, BATCH, ROUNDS, EPOCHS, RATE = cases.CLASSES, 4, 3, 2, 0.1
MODELS, PROXY = "group_distillation", "group_distillation_proxy"
FML = {"divergence": "forward"}
LEVELS = {"levels": "2"}
UNIFORM = {"similarity": 0.0}  # no weight at all: all scores are 0
DECAY = 0.5


def simulated(name, options=None, rounds=ROUNDS, **hparams):
    """States before and after the rounds, metrics, and the simulation with its federation and hparams."""
    _, simulation = cases.simulation(name, options=options)
    federation, given = cases.federation(), cases.hparams_of(name, learning_rate=RATE, **hparams)
    start = jax.device_get(cases.begin(simulation, federation, given))
    state, report = jax.device_get(
        simulation.run(cases.begin(simulation, federation, given), federation, given, rounds)
    )
    return start, state, report, (simulation, federation, given)


def by_client(federation, tree):
    """States of rows, in a dict by client id."""
    ids = np.asarray(federation.client)
    return {int(i): jax.tree.map(lambda leaf, row=row: leaf[row], tree) for row, i in enumerate(ids)}


def of_group(tree, g):
    return jax.tree.map(lambda leaf: leaf[g], tree)


def soft_loss_and_slope(direction, z, other):
    """The divergence between softmax(z) and the fixed softmax(other), and its derivative by z."""
    log_p, log_q = cases.log_softmax(z), cases.log_softmax(other)
    p, q = np.exp(log_p), np.exp(log_q)
    if direction == "forward":  # KL(other || oneself)
        return (q * (log_q - log_p)).sum(-1), p - q
    loss = (p * (log_p - log_q)).sum(-1)  # KL(oneself || other), whose derivative has one's own entropy in it
    return loss, p * (log_p - log_q - loss[:, None])


def step(net, x, slope):
    net.W, net.b = net.W - RATE * x.T @ slope / len(x), net.b - RATE * slope.mean(0)


def mutual(direction, shared, private, alpha, beta, x, y, key):
    """Both nets trained at once, each with the other fixed: their params, and mean cross-entropies of both."""
    student, teacher, ce = cases.Logistic(shared), cases.Logistic(private), []
    for epoch in range(EPOCHS):
        order = cases.epoch_order(key, epoch, len(y))
        for first in range(0, len(y), BATCH):
            b = order[first : first + BATCH]
            z_s, z_t, hard = student(x[b]), teacher(x[b]), np.eye(K)[y[b]]
            ce.append([cases.cross_entropy(z, y[b]).sum() for z in (z_s, z_t)])
            slopes = [
                (1 - w) * (cases.softmax(z) - hard) + w * soft_loss_and_slope(direction, z, other)[1]
                for w, z, other in ((alpha, z_s, z_t), (beta, z_t, z_s))
            ]
            step(student, x[b], slopes[0])
            step(teacher, x[b], slopes[1])
    return student.params(), teacher.params(), np.sum(ce, 0) / (EPOCHS * len(y))


@pytest.mark.exhaustive
def test_one_group_is_fml_with_forward_divergences():
    """Shen et al. (2020): L_local = a CE + (1 - a) KL(meme || local), L_meme = b CE + (1 - b) KL(local || meme).

    Everybody has a meme, which starts a round as the server's, whose next one is their mean, each counting alike.
    """
    a, b = 0.7, 0.6
    given = {"kappa": 0.0, "alpha_max": 2 * (1 - b), "beta_max": 2 * (1 - a), "consistency": 0.3}
    start, state, _, (_, federation, _) = simulated(MODELS, FML, **UNIFORM | given)
    np.testing.assert_array_equal(start.server["teacher"], [2, 1, 0, 0, 0, 0, 0])  # the client 1 holds nothing
    meme = of_group(start.server["students"], 0)
    private = {i: each["teacher"] for i, each in by_client(federation, start.clients[0]).items()}
    clients = cases.clients_of(federation)
    for r in range(ROUNDS):
        key, memes = cases.round_key(0, r), []
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, x, y = clients[row]
            if len(y):
                mine = keys.stream(key, "client", i)
                new, private[i], _ = mutual("forward", meme, private[i], 1 - b, 1 - a, x, y, mine)
                memes.append(new)
        meme = cases.weighted_average(memes, [1] * len(memes))
    chex.assert_trees_all_close(of_group(state.server["students"], 0), meme, rtol=1e-4, atol=1e-5)
    for i, each in by_client(federation, state.clients[0]).items():
        chex.assert_trees_all_close(each["teacher"], private[i], rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), meme, of_group(start.server["students"], 0))
    assert max(jax.tree.leaves(moved)) > 0.1


def test_rounds_of_groups_on_levels():
    """Three levels by examples: groups under 0 and 6, level one, and 3, level two; weights follow the losses."""
    given = {"kappa": 2.0, "alpha_max": 1.2, "beta_max": 0.8, "consistency": 0.4, "memory": DECAY}
    start, state, report, (simulation, federation, hparams) = simulated(
        MODELS, {"levels": "3", "paths": "next"}, **{"similarity": 0.0, "complementarity": 1.0} | given
    )
    teacher = start.server["teacher"]
    level = {1: 0, 2: 0, 5: 0, 4: 1, 0: 1, 6: 2, 3: 2}
    assert all(level[t] == level[s] + 1 for s, t in enumerate(teacher) if t != s)
    assert teacher[3] == 3
    assert teacher[6] == 6
    assert {s for s, t in enumerate(teacher) if s == t} == {1, 3, 6}
    leads = {int(t) for s, t in enumerate(teacher) if t != s}
    group = [s if s in leads else int(teacher[s]) for s in range(7)]
    parent = [int(t) for t in teacher]
    students = {g: of_group(start.server["students"], g) for g in range(7)}
    mine = by_client(federation, start.clients[0])
    private = {i: each["teacher"] for i, each in mine.items()}
    ce, clients, alphas = {}, cases.clients_of(federation), []

    def below(g):
        return {s for s in range(7) if group[s] == g} | {
            s for h in range(7) if h != g and parent[h] == g and h in leads for s in below(h)
        }

    for r in range(ROUNDS):
        key, uploads, weights = cases.round_key(0, r), {}, []
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, x, y = clients[row]
            if not len(y):
                continue
            gap = np.subtract(*ce.get(i, (0, 0)))
            alpha, beta = (min(most / (1 + np.exp(-2.0 * g)), 0.9) for most, g in ((1.2, gap), (0.8, -gap)))
            weights.append((alpha, len(y)))
            uploads[i], private[i], seen = mutual(
                "reverse", students[group[i]], private[i], alpha, beta, x, y, keys.stream(key, "client", i)
            )
            ce[i] = DECAY * ce[i] + (1 - DECAY) * seen if i in ce else seen
        alphas.append(np.average([w for w, _ in weights], weights=[n for _, n in weights]))
        means = {}
        for g in sorted({*group}, key=lambda g: -level[g]):  # from the top
            members = sorted(below(g) & {*uploads})
            if members:
                means[g] = cases.weighted_average([uploads[s] for s in members], [1] * len(members))
                if parent[g] != g:
                    means[g] = cases.weighted_average([means[g], means[parent[g]]], [0.6, 0.4])
        students |= means
    np.testing.assert_allclose(report.metrics["soft_weight"], alphas, rtol=1e-4)
    assert abs(alphas[-1] - 0.6) > 0.01
    for g in {*group}:
        chex.assert_trees_all_close(of_group(state.server["students"], g), students[g], rtol=1e-4, atol=1e-5)
    for i, each in by_client(federation, state.clients[0]).items():
        chex.assert_trees_all_close(each["teacher"], private[i], rtol=1e-4, atol=1e-5)
    P, traffic = cases.FEATURES * K + K, simulation.traffic(federation, hparams)
    assert [traffic.per_participant(way) for way in ("up", "down")] == [(4 * P,), (4 * P,)]
    assert (traffic.setup[0][0].up, traffic.setup[0][0].down) == (4 * K, 0)


def proxy_round(z, y_proxy, server, teacher, present, given):
    """Our equations: weights [C, C], from everybody's logits, losses and revenues."""
    C = len(teacher)
    W = np.zeros((C, C))
    for i in range(C):
        parts = []
        if teacher[i] != i:
            peers = [j for j in range(C) if j != i and teacher[j] == teacher[i] and present[j] and teacher[j] != j]
            student = np.zeros(C)
            if present[teacher[i]]:
                student[teacher[i]] = 1 - given["rho"]
            worth = [np.exp(server["revenue"][i, j] / given["revenue_temperature"]) for j in peers]
            for j, w in zip(peers, worth, strict=True):
                student[j] = given["rho"] * w / sum(worth)
            gap = server["ce"][i] - server["ce"][teacher[i]] if server["known"][teacher[i]] else 0
            if student.sum():
                alpha = min(given["alpha_max"] / (1 + np.exp(-given["kappa"] * gap)), 0.9)
                parts.append(alpha * student / student.sum())
        students = [s for s in range(C) if teacher[s] == i and s != i]
        if any(present[s] for s in students):
            gap = server["ce"][i] - np.mean([server["ce"][s] for s in students if server["known"][s]])
            beta = min(given["beta_max"] / (1 + np.exp(-given["kappa"] * gap)), 0.9)
            here = np.isin(np.arange(C), [s for s in students if present[s]])
            parts.append(beta * here / here.sum())
        if parts:
            W[i] = np.mean(parts, 0)
    return W


def test_rounds_on_proxy_data():
    """Two levels by examples: who is asked, tried and listened to, and what everybody learns from whom.

    The other direction has another mixture alone, which `test_one_mixture_has_the_gradient_of_all` has.
    """
    direction = "reverse"
    given = {"kappa": 1.5, "alpha_max": 1.2, "beta_max": 0.8, "rho": 0.4, "revenue_temperature": 0.02, "memory": DECAY}
    start, state, report, (_, federation, _) = simulated(
        PROXY, LEVELS, **{"similarity": 0.0, "complementarity": 1.0} | given
    )
    teacher, C, n = start.server["teacher"], 7, cases.PER_ROUND
    clients, proxy = cases.clients_of(federation), jax.device_get(federation.proxy)
    x_proxy = (proxy.x.astype(np.float64) - 0.25) / 1.5
    nets = by_client(federation, start.clients[0])
    server = {"ce": np.zeros(C), "known": np.zeros(C, bool), "revenue": np.zeros((C, C))}
    ids, tried_ever, down = start.server["ids"], 0, []
    for r in range(ROUNDS):
        key = cases.round_key(0, r)
        rows = cases.participants_of(key, len(clients), cases.PARTICIPANTS)
        active = [clients[row] for row in rows if len(clients[row][2])]
        present = np.isin(np.arange(C), [i for i, *_ in active])
        z = {i: cases.Logistic(nets[i])(x_proxy[ids]) for i, *_ in active}
        for i, *_ in active:
            ce = cases.cross_entropy(z[i], proxy.y[ids]).mean()
            server["ce"][i] = DECAY * server["ce"][i] + (1 - DECAY) * ce if server["known"][i] else ce
            server["known"][i] = True
        peers = np.array([
            [i != j and teacher[i] == teacher[j] not in (i, j) and present[j] for j in range(C)] for i in range(C)
        ])  # fmt: skip
        drawn = np.asarray(jax.random.categorical(keys.stream(key, "server"), np.where(peers, 0.0, -np.inf)))
        W = proxy_round(z, proxy.y, server, teacher, present, given)
        second, bytes_down = keys.stream(key, "exchange", 1), 0
        new = {}
        for i, x, y in active:
            local, a, net = keys.stream(second, "client", i), W[i].sum(), cases.Logistic(nets[i])

            def positions(stage):
                return np.asarray(jax.random.randint(stage, (BATCH,), 0, n))

            if peers[i].any():
                b, trial = positions(keys.stream(local, "trial")), cases.Logistic(nets[i])
                inputs = x_proxy[ids][b]
                step(trial, inputs, soft_loss_and_slope(direction, trial(inputs), z[drawn[i]][b])[1])
                gain = cases.cross_entropy(net(x), y).mean() - cases.cross_entropy(trial(x), y).mean()
                old = server["revenue"][i, drawn[i]]
                server["revenue"][i, drawn[i]] = DECAY * old + (1 - DECAY) * max(gain, 0)
                tried_ever += gain > 0
            local = keys.stream(local, "train")
            for epoch in range(EPOCHS):
                order, epoch_key = cases.epoch_order(local, epoch, len(y)), jax.random.fold_in(local, epoch)
                for index, first in enumerate(range(0, len(y), BATCH)):
                    b = order[first : first + BATCH]
                    p = positions(keys.stream(keys.stream(epoch_key, "loss", index), "proxy"))
                    inputs = x_proxy[ids][p]
                    hard = (1 - a) * (cases.softmax(net(x[b])) - np.eye(K)[y[b]])
                    soft = sum(
                        W[i, j] * soft_loss_and_slope(direction, net(inputs), z[j][p])[1] for j in np.flatnonzero(W[i])
                    )
                    grads = x[b].T @ hard / len(b), hard.mean(0)
                    if a:
                        grads = grads[0] + inputs.T @ soft / BATCH, grads[1] + soft.mean(0)
                    net.W, net.b = net.W - RATE * grads[0], net.b - RATE * grads[1]
            new[i] = net.params()
            bytes_down += 4 * n * K * (int(a > 0) + int(peers[i].any())) + 4
        nets |= new
        down.append(bytes_down / len(active))
        ids = np.asarray(jax.random.choice(keys.stream(second, "server"), cases.PROXIES, (n,), replace=False))
    assert tried_ever >= 2
    np.testing.assert_allclose(state.server["revenue"], server["revenue"], atol=1e-5)
    np.testing.assert_allclose(state.server["ce"], server["ce"], rtol=1e-4)
    for i, params in by_client(federation, state.clients[0]).items():
        chex.assert_trees_all_close(params, nets[i], rtol=1e-3, atol=1e-5)
    sent = report.sent[1][0]
    np.testing.assert_allclose(np.asarray(sent.down) / sent.participants, down)


@pytest.mark.parametrize(("name", "options"), [(MODELS, FML), (PROXY, LEVELS)], ids=["models", "proxy"])
@pytest.mark.exhaustive
def test_without_soft_labels_it_is_local_training(name, options):
    _, state, _, (_, federation, hparams) = simulated(name, options, alpha_max=0.0, beta_max=0.0)
    alone = ALGORITHMS["local"].algorithm(cases.task())
    if name == PROXY:  # whose training is its second exchange, which has keys of its own
        first = without_traffic(lambda ctx, received, params, data: (params, Upload(()), {}))
        (only,) = alone.round
        train = only._replace(client=lambda ctx, *given: only.client(ctx.at("train"), *given))
        alone = alone._replace(round=(first._replace(name="nothing"), train))
    simulation = cases.bind(alone, cases.task(), (cases.PARTICIPANTS,))
    alone = simulation.run(simulation.init(0, federation), federation, hparams, ROUNDS)[0]
    mine = state.clients[0]["teacher"] if name == MODELS else state.clients[0]
    chex.assert_trees_all_equal(mine, alone.clients[0])


@pytest.mark.exhaustive
def test_without_a_part_for_peers_it_does_not_matter_who_they_are():
    runs = [simulated(PROXY, LEVELS | {"peers": peers}, rho=0.0)[1] for peers in ("revenue", "uniform")]
    chex.assert_trees_all_equal(runs[0].clients, runs[1].clients)
    with_peers = simulated(PROXY, LEVELS | {"peers": "uniform"}, **UNIFORM, rho=0.5)[1]
    without = simulated(PROXY, LEVELS | {"peers": "uniform"}, **UNIFORM, rho=0.0)[1]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), with_peers.clients, without.clients)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_noise_on_histograms_changes_who_teaches():
    exact, noised = (simulated(MODELS, FML, histogram_noise=noise)[0].server for noise in (0.0, 20.0))
    assert (exact["teacher"] != noised["teacher"]).any()


def test_teacher_and_student_draw_from_keys_of_their_own():
    seen = {"teacher": [], "student": []}

    def model(name):
        def apply(params, x, key):
            jax.debug.callback(seen[name].append, jax.random.key_data(key))
            return cases.model().apply(params, x, key)

        return cases.model()._replace(apply=apply)

    class Two:
        count = np.int32(2)

        def take(self, position):
            return jnp.ones((len(position), cases.FEATURES)), position % K

    method = ALGORITHMS[MODELS]
    task = cases.task(options=method.choices({}))._replace(model=model("student"))
    ctx = Context(model("teacher"), 0, np.int32(0), cases.hparams_of(MODELS), np.int32(0), jax.random.key(3), None)
    params = cases.model().init(jax.random.key(0))
    state = {"teacher": params, "losses": jnp.zeros(2), "known": jnp.float32(0)}
    learn = method.algorithm(task).round[0].client
    jax.jit(lambda: learn(ctx, Received((), params, ()), state, Two()))()
    jax.effects_barrier()
    batches = [keys.stream(jax.random.fold_in(ctx.key, epoch), "loss", 0) for epoch in range(EPOCHS)]
    for name, drawn in seen.items():
        wanted = [jax.random.key_data(keys.stream(batch, name)) for batch in batches]
        np.testing.assert_array_equal(np.sort(drawn, axis=0), np.sort(wanted, axis=0))


FLOATS = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr"}
IMAGES = {"dataset": "mnist_sample", "samples_per_client": None, "train_fraction": 0.02}
STATISTICS = IMAGES | {"model": "fedgen_cnn", "norm": "batch", "norm_statistics": "local"}


@pytest.mark.parametrize(
    ("name", "fields", "hparams", "message"),
    [
        (MODELS, {"options": {"paths": "next"}}, {}, "levels without an edge: by --levels=cohorts levels of 4 clients"),
        (PROXY, {"options": {"paths": "above"}, "proxy": "held_out", "proxy_size": 9}, {}, "levels without an edge"),
        (MODELS, {"options": {"paths": "down"}}, {}, "unknown paths 'down'; known: above, any, next"),
        (MODELS, {}, {"alpha_max": 2.0}, "--alpha_max=2.0: expected a number from 0 to 1.8"),
        (PROXY, {"proxy": "held_out"}, {"memory": 1.0}, "--memory=1.0: expected a number from 0 to 0.99"),
        (MODELS, STATISTICS, {}, "--norm_statistics=local: group_distillation averages params and statistics"),
        (PROXY, {"proxy": "held_out"}, {"revenue_temperature": 0.0}, "--revenue_temperature=0.0: expected a finite nu"),
        (PROXY, {}, {}, "group_distillation_proxy needs proxy data, with labels; give --proxy=held_out"),
    ],
)
def test_what_cannot_work(name, fields, hparams, message):
    with pytest.raises(InputError) as error:
        experiment.build(settings.make(hparams, algorithm=name, **FLOATS | fields))
    assert str(error.value).startswith(message)
