"""FedAvg and its kin, FedDistill and the evaluation against NumPy in float64, on logistic regression."""

import chex
import engine_cases as cases
import jax
import numpy as np
import pytest

from fdjax import keys
from fdjax.algorithms import ALGORITHMS
from fdjax.client import losses
from fdjax.client.data import ClientData
from fdjax.contract import Context, Received
from fdjax.exchange import averaging

ROUNDS, EPOCHS, RATE = 2, 2, 0.3  # two rounds, so that what clients keep between rounds is seen
BATCHES = {"minibatches": 4, "full batch": 64}  # the largest client has 12 examples
TEMPERATURE, WEIGHT = 3.0, 0.7


def simulate_rounds(name, batch_size, federation=None, **hparams):
    """(initial state, state, metrics) on the host."""
    _, simulation = cases.simulation(name, batch_size=batch_size)
    given = cases.hparams_of(name, learning_rate=RATE, local_epochs=EPOCHS, **hparams)
    return run(simulation, federation or cases.federation(), given)


def run(simulation, federation, hparams):
    """The same of any simulation."""
    start = jax.device_get(simulation.init(0, federation))
    state, report = jax.device_get(simulation.run(simulation.init(0, federation), federation, hparams, ROUNDS))
    return start, state, report.metrics


def rows_of(stacked):
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(len(cases.COUNTS))]


def common(batch_size):
    return {"participants": cases.PARTICIPANTS, "batch_size": batch_size, "epochs": EPOCHS, "learning_rate": RATE}


@pytest.mark.parametrize("batch_size", BATCHES.values(), ids=BATCHES)
def test_fedavg(batch_size):
    start, state, metrics = simulate_rounds("fedavg", batch_size)
    server, losses = start.server, []
    for r in range(ROUNDS):
        server, loss = cases.fedavg_round(server, cases.federation(), cases.round_key(0, r), **common(batch_size))
        losses.append(loss)
    chex.assert_trees_all_close(state.server, server, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["train_loss"], losses, rtol=1e-5)


def test_fedprox():
    start, state, metrics = simulate_rounds("fedprox", 4, mu=0.8)
    server, losses = start.server, []
    for r in range(ROUNDS):
        server, loss = cases.fedavg_round(server, cases.federation(), cases.round_key(0, r), **common(4), mu=0.8)
        losses.append(loss)
    chex.assert_trees_all_close(state.server, server, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["train_loss"], losses, rtol=1e-5)


def test_fedprox_of_no_mu_is_fedavg():
    _, near, _ = simulate_rounds("fedprox", 4, mu=0.0)
    _, averaged, _ = simulate_rounds("fedavg", 4)
    chex.assert_trees_all_close(near.server, averaged.server, rtol=1e-6, atol=1e-7)


def test_fedavg_with_an_objective_of_ones_own():
    """Three lines like FedNTD's: CE plus beta KL to the received model, both without the logit of the true class."""

    def objective(ctx, start, params, x, y, key):
        z, teacher = (ctx.model.apply(w, x) for w in (params, start))
        others = 1e9 * jax.nn.one_hot(y, cases.CLASSES)
        return losses.cross_entropy(z, y) + ctx.hparams["beta"] * losses.kl_divergence(teacher - others, z - others)

    beta, task = np.float32(0.9), cases.task()
    simulation = cases.bind(averaging.with_objective(task, objective), task, (cases.PARTICIPANTS,))
    hparams = cases.hparams_of("fedavg", learning_rate=RATE, local_epochs=EPOCHS) | {"beta": beta}
    start, state, metrics = run(simulation, cases.federation(), hparams)

    def without(logits, y):
        z = np.array(logits)
        z[np.arange(len(y)), y] = -np.inf
        return z

    server, clients = start.server, cases.clients_of(cases.federation())
    for r in range(ROUNDS):
        uploads, means, weights, key = [], [], [], cases.round_key(0, r)
        for row in cases.participants_of(key, len(clients), cases.PARTICIPANTS):
            i, x, y = clients[row]
            if not len(y):
                continue
            model, teacher, losses_of_epoch = cases.Logistic(server), cases.Logistic(server), []
            for epoch in range(EPOCHS):
                order, losses_of_epoch = cases.epoch_order(keys.stream(key, "client", i), epoch, len(y)), []
                for first in range(0, len(order), 4):
                    b = order[first : first + 4]
                    z, label = model(x[b]), y[b]
                    p, q = (cases.softmax(without(logits, label)) for logits in (z, teacher(x[b])))
                    true = np.arange(len(b)), label
                    ratio = np.log(np.where(q > 0, q, 1) / np.where(p > 0, p, 1))
                    assert (q[true] == 0).all()
                    losses_of_epoch.append((cases.cross_entropy(z, label) + beta * (q * ratio).sum(-1)).mean())
                    slope = cases.softmax(z) - np.eye(cases.CLASSES)[label] + beta * (p - q)
                    model.W, model.b = model.W - RATE * x[b].T @ slope / len(b), model.b - RATE * slope.mean(0)
            uploads.append(model.params())
            means.append(np.mean(losses_of_epoch))
            weights.append(len(y))
        server = cases.weighted_average(uploads, weights)
        np.testing.assert_allclose(metrics["train_loss"][r], np.average(means, weights=weights), rtol=1e-5)
    chex.assert_trees_all_close(state.server, server, rtol=1e-4, atol=1e-5)


CENTRAL = {  # where a method's server keeps the central model's parameters
    "fedavg": lambda server: server,
    "fedopt": lambda server: server["params"],
    "fedprox": lambda server: server,
    "fedssd": lambda server: server,
    "fedntd": lambda server: server,
    "fedlsd": lambda server: server,
    "fedavg_kd": lambda server: server,
    "fedmlb": lambda server: server,
    "fedcad": lambda server: server,
    "feddistill_plus": lambda server: server["params"],
    "fedgkd": lambda server: server.params,
    "fedgkd_vote": lambda server: server.params,
    "feddistill": lambda server: server,
    "centralized": lambda server: server,
    "feddf": lambda server: server[0],
    "fedaux": lambda server: server,
    "cfd": lambda server: server["params"],
    "dsfl": lambda server: server.params,
    "fedad": lambda server: server.params,
    "fedgems": lambda server: server["params"],
    "fedgen": lambda server: server["params"],
    "fedma": lambda server: server["params"],
    "fedbe": lambda server: server,
    "fedftg": lambda server: server["params"],
    "fedzkt": lambda server: server["params"],
    "fedkd": lambda server: server["params"],
    "fml": lambda server: server,
    "mhat": lambda server: server.params,
}


@pytest.mark.exhaustive
def test_methods_of_one_seed_start_from_the_same_central_weights():
    federation, task = cases.federation(), cases.task()
    starts = {}
    for name, method in ALGORITHMS.items():
        choices = method.choices({})
        if not method.split and callable(method.algorithm(task._replace(options=choices)).central):
            _, simulation = cases.simulation(name)
            starts[name] = [CENTRAL[name](jax.device_get(simulation.init(seed, federation)).server) for seed in (0, 1)]
    assert starts.keys() == {*CENTRAL}
    for seed in (0, 1):
        expected = jax.jit(lambda seed: cases.model().init(keys.stream(jax.random.key(seed), "server")))(seed)
        chex.assert_trees_all_close(starts["fedavg"][seed], expected, rtol=1e-6)
        for name in starts:
            chex.assert_trees_all_equal(starts[name][seed], starts["fedavg"][seed])
    assert np.abs(starts["fedavg"][0]["Dense_0"]["kernel"] - starts["fedavg"][1]["Dense_0"]["kernel"]).max() > 0.1


@pytest.mark.parametrize("batch_size", BATCHES.values(), ids=BATCHES)
def test_feddistill(batch_size):
    start, state, metrics = simulate_rounds("feddistill", batch_size, temperature=TEMPERATURE, weight=WEIGHT)
    server, teachers, losses = start.server, rows_of(start.clients[0]), []
    for r in range(ROUNDS):
        server, teachers, loss = cases.feddistill_round(
            server, teachers, cases.federation(), cases.round_key(0, r), **common(batch_size),
            temperature=TEMPERATURE, weight=WEIGHT,
        )  # fmt: skip
        losses.append(loss)
    chex.assert_trees_all_close(state.server, server, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(rows_of(state.clients[0]), teachers, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.stack([metrics["train_loss"], metrics["teacher_loss"]], -1), losses, rtol=1e-5)


def test_feddistill_teachers_start_apart():
    start, *_ = simulate_rounds("feddistill", 4)
    kernels = start.clients[0]["Dense_0"]["kernel"]
    assert all(np.abs(a - b).max() > 0.1 for i, a in enumerate(kernels) for b in kernels[:i])
    assert all(np.abs(a - start.server["Dense_0"]["kernel"]).max() > 0.1 for a in kernels)


def test_feddistill_has_a_rate_and_epochs_of_its_own_for_the_teacher():
    start, still, _ = simulate_rounds("feddistill", 4, teacher_learning_rate=0.0)
    chex.assert_trees_all_equal(still.clients, start.clients)
    _, longer, _ = simulate_rounds("feddistill", 4, teacher_epochs=EPOCHS + 3)
    _, usual, _ = simulate_rounds("feddistill", 4)
    _, given, _ = simulate_rounds("feddistill", 4, teacher_epochs=EPOCHS, teacher_learning_rate=RATE)
    chex.assert_trees_all_equal(given, usual)
    assert np.abs(longer.clients[0]["Dense_0"]["kernel"] - usual.clients[0]["Dense_0"]["kernel"]).max() > 1e-3


def test_feddistill_without_distillation_is_fedavg():
    """Run as a whole they shuffle differently: FedDistill's client takes its key apart, one for the teacher and one for
    the student. With full batches the order is of no matter, and with the student's key FedAvg's client is the same."""
    full = BATCHES["full batch"]
    _, averaged, metrics = simulate_rounds("fedavg", full)
    _, distilled, with_teacher = simulate_rounds("feddistill", full, weight=0.0)
    chex.assert_trees_all_close(distilled.server, averaged.server, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(with_teacher["train_loss"], metrics["train_loss"], rtol=1e-5)

    federation, key = cases.federation(), jax.random.key(4)
    data = ClientData(federation.train, federation.train_holdings.order, np.int32(8), np.int32(12))
    model = cases.model()
    params, teacher = model.init(jax.random.key(0)), model.init(jax.random.key(1))

    def client(name, state, key, **hparams):
        ((exchange,), given) = cases.simulation(name)[0].round, cases.hparams_of(name, **hparams)

        @jax.jit
        def work(params, state, key):
            ctx = Context(model, 0, np.int32(0), given, np.int32(0), key, None)
            return exchange.client(ctx, Received(params, (), ()), state, data)[1].tree

        return work(params, state, key)

    distilled = client("feddistill", teacher, key, weight=0.0)
    chex.assert_trees_all_close(distilled, client("fedavg", (), keys.stream(key, "student")), rtol=1e-5, atol=1e-6)


def test_a_client_does_not_depend_on_its_neighbours():
    """Teachers never see the server: with fewer examples at one client all others' stay, bit for bit."""
    federation = cases.federation()
    count = np.array(federation.train_holdings.count)
    count[0] -= 4  # of the 7 clients' rows the first is the largest one
    holdings = federation.train_holdings._replace(count=cases.replicated(count, federation))
    other = federation._replace(train_holdings=holdings)
    _, before, _ = simulate_rounds("feddistill", 4)
    _, after, _ = simulate_rounds("feddistill", 4, other)
    chex.assert_trees_all_equal(rows_of(after.clients[0])[1:], rows_of(before.clients[0])[1:])
    assert not np.array_equal(after.server["Dense_0"]["kernel"], before.server["Dense_0"]["kernel"])


@pytest.mark.parametrize("name", ["fedavg", "feddistill"])
def test_evaluation(name):
    _, simulation = cases.simulation(name)
    federation, hparams = cases.federation(), cases.hparams_of(name)
    state, _ = simulation.run(simulation.init(0, federation), federation, hparams, ROUNDS)
    scalars, clients = jax.device_get(simulation.evaluate(state, federation, hparams))
    state, test, holdings = jax.device_get((state, federation.test, federation.test_holdings))
    x, central = (test.x.astype(float) - 0.25) / 1.5, cases.Logistic(state.server)

    def score(model, part=slice(None)):
        z, y = model(x[part]), test.y[part]
        return ((z.argmax(1) == y).mean(), cases.cross_entropy(z, y).mean()) if len(y) else (np.nan, np.nan)

    accuracy, loss = score(central)
    np.testing.assert_allclose([scalars["central_accuracy"], scalars["central_loss"]], [accuracy, loss], rtol=1e-5)
    personal = [central] * 7 if name == "fedavg" else [cases.Logistic(p) for p in rows_of(state.clients[0])]
    parts = [holdings.order[s : s + n] for s, n in zip(holdings.start, holdings.count, strict=True)]
    own, own_loss = np.array([score(model, part) for model, part in zip(personal, parts, strict=True)]).T
    np.testing.assert_allclose(clients["own_accuracy"], own, rtol=1e-6)
    np.testing.assert_allclose(clients["own_loss"], own_loss, rtol=1e-4)
    full, full_loss = np.array([score(model) for model in personal]).T
    n = np.asarray(federation.train_holdings.count)
    assert (n > 0).sum() == 6  # a client without examples has no model of its own to speak of
    np.testing.assert_allclose(scalars["local_accuracy"], full[n > 0].mean(), rtol=1e-6)
    np.testing.assert_allclose(scalars["local_loss"], full_loss[n > 0].mean(), rtol=1e-5)
    if name == "feddistill":
        np.testing.assert_allclose(clients["local_accuracy"], full, rtol=1e-6)

    # Across the clients that have something to be tested on: one of the seven has not.
    tested = holdings.count > 0
    assert tested.sum() == 6
    expected = {
        "own_accuracy": own[tested].mean(),
        "own_loss": own_loss[tested].mean(),
        "own_accuracy_weighted": (n * own)[tested].sum() / n[tested].sum(),
        "own_accuracy_by_test_size": (holdings.count * own)[tested].sum() / holdings.count.sum(),
        "worst_client": own[tested].min(),
        "quantile_10": np.quantile(own[tested], 0.1),
        "client_std": own[tested].std(),
    }
    for key, value in expected.items():
        np.testing.assert_allclose(scalars[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_evaluation_without_any_test_part_is_no_number():
    _, simulation = cases.simulation("fedavg")
    federation = cases.federation()
    count = cases.replicated(np.zeros(7, np.int32), federation)
    nothing = federation._replace(test_holdings=federation.test_holdings._replace(count=count))
    start, hparams = simulation.init(0, nothing), cases.hparams_of("fedavg")
    scalars, _ = jax.device_get(simulation.evaluate(start, nothing, hparams))
    across = ("own_accuracy", "own_loss", "own_accuracy_weighted", "worst_client", "quantile_10", "client_std")
    assert all(np.isnan(scalars[name]) for name in across)


def test_followed_hparams():
    """A default that names another hparam takes its value, given or not."""
    resolve = ALGORITHMS["feddistill"].resolve
    assert resolve({})["teacher_learning_rate"] == np.float32(0.01)
    followed = resolve({"learning_rate": 0.5, "local_epochs": 7})
    assert (followed["teacher_learning_rate"], followed["teacher_epochs"]) == (0.5, 7)
    own = resolve({"learning_rate": 0.5, "teacher_learning_rate": 0.25})
    assert (own["learning_rate"], own["teacher_learning_rate"]) == (0.5, 0.25)
    assert {value.dtype for name, value in own.items() if name.endswith("epochs")} == {np.dtype(np.int32)}
