"""What a method's functions return is checked where it comes in: one line with method, exchange, function and file."""

import functools

import engine_cases as cases
import jax
import jax.numpy as jnp
import pytest

from fdjax.contract import ENSEMBLE, Broadcast, Reduction, Upload
from fdjax.errors import InputError
from fdjax.exchange import reductions
from fdjax.exchange.wrappers import Codec, coded


def algorithm(**functions):
    """FD with some functions of its exchange replaced."""
    built, _ = cases.simulation("fd", participants=(2, 3), cohorts=(("mclr", 3), ("mclr", 4)))
    return built._replace(round=(built.round[0]._replace(**functions),))


def shapes(algorithm):
    """Trace a round. Raises what the checks raise."""
    task = cases.task(cohorts=(("mclr", 3), ("mclr", 4)))
    simulation = cases.bind(algorithm, task, (2, 3), chunk=2)
    federation, hparams = cases.federation(cohort_sizes=(3, 4)), cases.hparams_of("fd")
    simulation.run.lower(start(simulation, federation), federation, hparams, 1)


def start(simulation, federation):
    """A state of shapes alone, which compiles nothing."""
    return jax.eval_shape(simulation.pure.init, 0, federation)


def client(result):
    return lambda ctx, received, state, data: result(state)


def table_of_all(ctx, server):
    return Broadcast((), own=server)


BAD = {
    "a broadcast of the wrong cohort": (
        {"broadcast": table_of_all},
        r"^fd, exchange train: broadcast \(test_check\.py:\d+\) returned own rows of shape \(7, 4, 4\) for cohort 0, "
        r"expected one row for each of its 3 clients: \(3, \.\.\.\); cut tables of all clients by task\.ids",
    ),
    "no broadcast": (
        {"broadcast": lambda ctx, server: server},
        r"broadcast \(test_check\.py:\d+\) returned a \w+, expected a Broadcast\(shared, own\)",
    ),
    "no upload": (
        {"client": client(lambda state: (state, jnp.zeros(3), {}))},
        r"client \(test_check\.py:\d+\) returned \(dict, \w+, dict\), expected \(state, Upload\(tree\), metrics\)",
    ),
    "another structure": (
        {"client": client(lambda state: ({"w": state}, Upload(()), {}))},
        r"client .* returned a state of structure \{'w': .*\}, expected what it was given: \{'Dense_0': ",
    ),
    "another shape": (
        {"client": client(lambda state: ({"Dense_0": {"bias": jnp.zeros(3), "kernel": state["Dense_0"]["kernel"]}},
                                         Upload(()), {}))},
        r"returned a state whose leaf Dense_0/bias is float32\[3\], expected float32\[4\] as it was given",
    ),
    "another dtype": (
        {"server": lambda ctx, server, summary: (server.astype(jnp.bfloat16), {})},
        r"^fd, exchange train: server \(test_check\.py:\d+\) returned a state whose leaf is bfloat16\[7, 4, 4\], "
        r"expected float32\[7, 4, 4\]",
    ),
    "a metric that is no number": (
        {"server": lambda ctx, server, summary: (server, {"spread": jnp.zeros(2)})},
        r"server .* returned a metric 'spread' of shape \(2,\), expected one number",
    ),
    "a metric twice": (
        {"server": lambda ctx, server, summary: (server, {"train_loss": 0.0})},
        r"^fd: metric 'train_loss' is given twice in a round; name them apart",
    ),
    "bytes that are no number": (
        {"client": client(lambda state: (state, Upload(jnp.zeros(()), bytes=jnp.zeros(2)), {}))},
        r"an Upload whose bytes has shape \(2,\), expected \[\]",
    ),
    "a round that is no tuple of functions": (
        {"client": 3}, r"^fd, exchange exchange: client is an int, expected a function",
    ),
    "a reduction that was not called": (
        {"reduce": reductions.mean}, r"^fd, exchange train: reduce is a function, expected a Reduction or a dict",
    ),
    "a state with no array in it": (
        {"server": lambda ctx, server, summary: ("table", {})},
        r"server \(test_check\.py:\d+\) returned a state with a str in it, expected arrays alone",
    ),
    "partials of different cohorts": (
        {"reduce": Reduction(lambda ctx, upload, weight: jnp.zeros(1 + ctx.cohort), lambda ctx, total: total)},
        r"^fd, exchange train: the partials of reduce differ in shape between cohorts 0 and 1 \(\['float32\[1\]'\] and "
        r"\['float32\[2\]'\]\); reduce them per_cohort",
    ),
    "metrics of different cohorts": (
        {"client": lambda ctx, received, state, data: (state, Upload(jnp.zeros((4, 4))), {f"loss{ctx.cohort}": 0.0})},
        r"^fd, exchange <lambda>: client gives other metrics in other cohorts \(loss0 and loss1\); give the same",
    ),
    "an hparam that is none": (
        {"server": lambda ctx, server, summary: (server * ctx.hparams["gama"], {})},
        r"^unknown hyperparameter \(in ctx\.hparams\) 'gama' \(did you mean 'gamma'\?\)",
    ),
    "something shared that nobody knows": (
        {"shares": "means"}, r"^unknown kind of what is shared \(fd, exchange train\) 'means'; known: logits, params",
    ),
    "an unknown way to combine": (
        {"reduce": reductions.mean()._replace(combine="total")},
        r"^unknown way to combine \(fd, exchange train: reduce\) 'total'; known: max, min, stack, sum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("functions", BAD.values(), ids=BAD)
def test_what_comes_back_wrong_is_one_line(functions):
    replaced, message = functions
    with pytest.raises(InputError, match=message) as error:
        shapes(algorithm(**replaced))
    assert "\n" not in str(error.value)


def test_a_reduction_of_another_type():
    with pytest.raises(InputError, match=r"^fd, exchange train: reduce\['a'\] is a str, expected a Reduction"):
        shapes(algorithm(reduce={"a": "mean"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"personal": None}, "^fd names neither a central model nor personal ones: nothing can be tested"),
        ({"personal": None, "central": ENSEMBLE}, "^fd tests an ensemble, but names no personal models"),
        ({"round": ()}, "^fd has no exchange in a round; give at least one"),
        ({"setup": algorithm}, r"^fd: setup is no tuple of exchanges; write setup=\(exchange,\)"),
    ],
)
def test_algorithms_that_nobody_could_run(fields, message):
    with pytest.raises(InputError, match=message):
        shapes(algorithm()._replace(**fields))


def test_an_ensemble_needs_the_full_evaluation():
    with pytest.raises(InputError, match="tests an ensemble of personal models: use --local_eval=full or auto"):
        cases.bind(algorithm()._replace(central=ENSEMBLE), cases.task(), (5,), full_eval=False)


def test_models_of_different_numbers_of_classes():
    task = cases.task(cohorts=(("mclr", 3), ("five", 4)))
    simulation = cases.bind(algorithm(), task, (2, 3))
    with pytest.raises(InputError, match=r"models differ in their number of classes \(mclr 4, five 5\)"):
        simulation.init(0, cases.federation(cohort_sizes=(3, 4)))


def test_a_codec_whose_memory_the_client_does_not_keep():
    codec = Codec(
        lambda ctx, tree: tree, lambda ctx, code: code, lambda ctx, code, memory: (jnp.float32(1), memory), "sent"
    )
    built = algorithm()
    wrapped = built._replace(round=(coded(built.round[0], up=codec),))
    with pytest.raises(InputError, match=r"^a codec of exchange train keeps what was sent as 'sent' of a"):
        shapes(wrapped)


def test_a_method_as_a_functools_partial_has_no_place_to_name():
    def server(ctx, server, summary, scale):
        return server * scale

    with pytest.raises(InputError, match=r"^fd, exchange train: server returned a \w+, expected \(server"):
        shapes(algorithm(server=functools.partial(server, scale=2)))


@pytest.mark.parametrize("logits", [jnp.zeros(10), jnp.zeros((10, 7)), "logits"], ids=["one axis", "classes", "text"])
def test_a_predictor_that_gives_no_logits(logits):
    task = cases.task()
    built, _ = cases.simulation("fd")
    simulation = cases.bind(built._replace(personal=lambda ctx, server, state, x: logits), task, (5,))
    federation, hparams = cases.federation(), cases.hparams_of("fd")
    message = r"^fd: personal \(test_check\.py:\d+\) returned .*, expected logits float32\[\d+, 4\]"
    with pytest.raises(InputError, match=message):
        simulation.evaluate.lower(start(simulation, federation), federation, hparams)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.uint8, jnp.int16])
def test_small_numbers_are_summed_without_overflow(dtype):
    built, _ = cases.simulation("fd")
    partial = Reduction(lambda ctx, upload, weight: jnp.asarray(200, dtype), lambda ctx, total: total)
    (train,) = built.round
    counting = train._replace(
        client=lambda ctx, received, state, data: (state, Upload(()), {}),
        reduce=partial,
        server=lambda ctx, server, total: (total, {}),
        broadcast=lambda ctx, server: Broadcast((), zeros(7)),
    )
    counted = built._replace(round=(counting,), init_server=lambda ctx, params: jnp.int32(0))
    simulation = cases.bind(counted, cases.task(), (7,), chunk=2)
    federation = cases.federation()
    state, _ = simulation.run(simulation.init(0, federation), federation, cases.hparams_of("fd"), 1)
    assert state.server == 6 * (1 if dtype is jnp.bool_ else 200)  # one of the seven holds nothing


def zeros(clients):
    return jnp.zeros((clients, cases.CLASSES, cases.CLASSES))
