"""Runs whose uploads are private: what they account for, calibrate and refuse."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import logging

import fdjax
from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run.accounting import Ledger, epsilons
from fdjax.run.batch import batch, experiments
from fdjax.run.settings import make
from fdjax.run.summary import summary

TINY = {
    "dataset": "synthetic", "model": "mclr", "num_clients": 6, "alpha": 0.0, "beta": 0.0, "samples_per_client": 20,
    "rounds": 3, "devices": 1, "progress": False,
}  # fmt: skip
HALF = {"sampling": "poisson", "participation": 0.5}
PRIVATE = TINY | {"privacy": "client", "clip": 1.0, "noise_multiplier": 1.5}
EVERYONE = Ledger("client", 1.0, None, 1, 0)


@pytest.fixture
def quiet():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    yield
    logging.set_verbosity(before)


@pytest.mark.parametrize(
    ("ledger", "noise", "rounds", "rdp", "pld"),
    [
        (EVERYONE, 1.0, 1, 4.7285, 4.3772),
        (EVERYONE, 10.0, 20, 1.9142, 1.7601),
        (EVERYONE._replace(rate=0.01), 1.0, 1000, 2.1014, 1.8282),
    ],
    ids=["once", "composed", "poisson"],
)
def test_epsilons_are_the_published_ones(ledger, noise, rounds, rdp, pld, quiet):
    from dp_accounting.pld import PLDAccountant

    assert epsilons(ledger, noise, rounds, "rdp", 1e-5)[-1] == pytest.approx(rdp, abs=1e-4)
    found = PLDAccountant().compose(ledger.events(noise, rounds)).get_epsilon(1e-5)
    assert found == pytest.approx(pld, abs=1e-4)


def test_privacy_loss_distributions_after_every_round():
    assert epsilons(EVERYONE, 10.0, 3, "pld", 1e-5)[-1] < epsilons(EVERYONE, 10.0, 3, "rdp", 1e-5)[-1]
    assert epsilons(EVERYONE, 1.0, 1, "pld", 1e-5) == (pytest.approx(4.3772, abs=1e-4),)


def test_what_a_run_prints_is_what_dp_accounting_says_by_hand(quiet):
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    result = fdjax.run(**PRIVATE | HALF)
    event = dp.PoissonSampledDpEvent(0.5, dp.GaussianDpEvent(1.5))
    by_hand = [RdpAccountant().compose(event, r).get_epsilon(1e-5) for r in (1, 2, 3)]
    np.testing.assert_allclose(result.rounds["epsilon"], by_hand, rtol=1e-9)
    assert result.privacy["epsilon"] == result.rounds["epsilon"][-1]
    table = summary([result])
    assert "epsilon at delta 1e-05, one client more or less" in table
    assert f"{by_hand[-1]:.4g} (rdp)" in table


@pytest.mark.exhaustive
def test_a_fixed_number_of_participants_is_about_a_client_replaced(quiet):
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    result = fdjax.run(**PRIVATE, participation=0.5, delta=1e-4)
    event = dp.SampledWithoutReplacementDpEvent(6, 3, dp.GaussianDpEvent(0.75))  # replaced: a change of 2 S
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    assert result.privacy["epsilon"] == pytest.approx(accountant.compose(event, 3).get_epsilon(1e-4), rel=1e-9)
    assert result.privacy["relation"] == "one client's data replaced"


def test_several_releases_of_a_round_and_the_set_up():
    twice = EVERYONE._replace(releases=2)
    assert epsilons(twice, 2.0, 5, "rdp", 1e-5)[-1] == pytest.approx(epsilons(EVERYONE, 2.0, 10, "rdp", 1e-5)[-1])
    setup = EVERYONE._replace(in_setup=1)
    assert epsilons(setup, 2.0, 4, "rdp", 1e-5)[-1] == pytest.approx(epsilons(EVERYONE, 2.0, 5, "rdp", 1e-5)[-1])


def test_noise_for_an_epsilon():
    given = {name: value for name, value in PRIVATE.items() if name != "noise_multiplier"}
    result = fdjax.run(**given | HALF, target_epsilon=2.0)
    assert 1.95 < result.privacy["epsilon"] <= 2.0
    assert result.privacy["epsilon"] == result.rounds["epsilon"][-1]
    assert result.privacy["noise_multiplier"] > 1
    assert "rounds" not in result.settings.resumable  # more of them would need more noise


def test_without_noise_epsilon_is_infinite():
    result = fdjax.run(**TINY, privacy="client")
    assert result.rounds["epsilon"] == [math.inf] * 3
    assert np.isfinite(result.final["central_loss"])


@pytest.mark.exhaustive
def test_noise_is_an_axis_of_a_batch():
    """Trials of three noises are one batch, each with its own epsilon, and give what runs of their own give."""
    named = {name: value for name, value in PRIVATE.items() if name != "progress"}
    settings = [make(**named | {"noise_multiplier": z}) for z in (0.0, 0.5, 2.0)]
    trials = experiments(settings)
    assert len({e.signature for e in trials}) == 1
    results = batch(trials, 3).run(trials, lambda done, records: ())
    spent = [r.privacy["epsilon"] for r in results]
    assert spent[0] == math.inf
    assert spent[1] > spent[2] > 0
    alone = fdjax.run(settings[2], progress=False)
    np.testing.assert_allclose(results[2].evaluations["central_loss"], alone.evaluations["central_loss"], rtol=1e-4)
    assert alone.privacy["epsilon"] == spent[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"privacy": "client", "noise_multiplier": 1.0}, "--noise_multiplier=1 without --clip: no noise hides"),
        ({"privacy": "client", "target_epsilon": 2.0}, "--target_epsilon=2 without --clip"),
        (PRIVATE | {"target_epsilon": 2.0}, "--target_epsilon=2 and --noise_multiplier=1.5: the one follows"),
        (PRIVATE | {"delta": 0.0}, "--delta=0.0: expected a number above 0 and below 1"),
        (PRIVATE | {"delta": 1.0}, "--delta=1.0: expected a number above 0 and below 1"),
        ({"privacy": "client", "clip": 1.0, "target_epsilon": 0.0}, "--target_epsilon=0.0: expected a finite number"),
        ({"privacy": "client", "clip": 0.0}, "--clip=0.0: expected a finite number above 0"),
        ({"clip": 1.0}, "--clip=1.0: nothing is private; give --privacy too"),
        ({"target_epsilon": 1.0}, "--target_epsilon=1.0: nothing is private"),
        (PRIVATE | {"sampling": "examples", "participation": 0.5}, "--sampling=examples: who is drawn tells"),
        (PRIVATE | {"accountant": "pld", "participation": 0.5}, "--accountant=pld knows no sampling of so many"),
        (PRIVATE | {"algorithm": "centralized"}, "centralized has one client with all data"),
        (PRIVATE | {"privacy": "means"}, "means by label are not all that fedavg shares; use fd, or another"),
        (PRIVATE | {"algorithm": "faug", "privacy": "means"}, "not all that faug shares; use fd"),
        (PRIVATE | {"algorithm": "fd", "privacy": "means", "local_steps": 5}, "--privacy=means with --local_steps"),
        (PRIVATE | {"count_noise_multiplier": 1.0}, "no counts are private; give --privacy=means"),
        ({"algorithm": "fd", "privacy": "means", "noise_multiplier": 1.0}, "--noise_multiplier=1 without --clip"),
        (PRIVATE | {"algorithm": "local"}, "local sends nothing that could tell; leave it out"),
        (PRIVATE | {"algorithm": "fd"}, "exchange train reduces by stack; use --privacy=local"),
        (PRIVATE | {"sampling": "poisson", "participation": 0.5, "capacity": 3}, "with probability 0.72 some draw"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(given, message):
    with pytest.raises(InputError) as error:
        fdjax.run(**TINY | given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_importing_fdjax_does_not_import_the_accountant():
    code = "import sys, fdjax; print('dp_accounting' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


EXAMPLES = TINY | {"privacy": "example", "clip": 1.0, "noise_multiplier": 2.0, "batch_size": 8, "local_epochs": 2}


def test_examples_are_accounted_for_by_hand(quiet):
    """2 epochs in each of 3 rounds, in steps of 8 of a client's examples."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    result = fdjax.run(**EXAMPLES)
    held = set(result.holdings["n_k"])
    assert len(held) == 1
    (n,) = held
    steps = 3 * 2 * -(-n // 8)
    event = dp.SampledWithoutReplacementDpEvent(n, 8, dp.GaussianDpEvent(1.0))
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    assert result.privacy["epsilon"] == pytest.approx(accountant.compose(event, steps).get_epsilon(1e-5), rel=1e-9)
    assert result.privacy["relation"] == "one example replaced"
    usual = fdjax.run(**EXAMPLES, batch_accounting="poisson")
    event = dp.PoissonSampledDpEvent(8 / n, dp.GaussianDpEvent(2.0))
    assert usual.privacy["epsilon"] == pytest.approx(RdpAccountant().compose(event, steps).get_epsilon(1e-5), rel=1e-9)
    assert "as if batches were Poisson samples" in summary([usual])


@pytest.mark.exhaustive
def test_distillation_from_a_model_and_proxy_data_is_one_fit_on_examples():
    """Without their terms FedCAD and FedSSD are one method, private by example, and spend what FedAvg spends."""
    named = EXAMPLES | {"proxy": "held_out", "proxy_size": 20, "rounds": 1}
    off = {"fedcad": {"distill_weight": 0.0}, "fedssd": {"m_max": 0.0}}
    one, other = (fdjax.run(**named, algorithm=name, **given) for name, given in off.items())
    np.testing.assert_allclose(one.final["central_loss"], other.final["central_loss"], rtol=1e-5)
    assert 0 < one.privacy["epsilon"] == other.privacy["epsilon"] < math.inf
    assert fdjax.run(**named, algorithm="fedcad").final["central_loss"] != one.final["central_loss"]


def test_the_documentation_lists_what_can_be_private_by_example():
    text = (Path(fdjax.__file__).parents[1] / "docs/privacy.md").read_text()
    (row,) = (line for line in text.splitlines() if line.startswith("| `--privacy=example`"))
    able = {name for name, method in ALGORITHMS.items() if method.example_fits}
    assert {*re.findall("`([a-z_]+)`", row)} & {*ALGORITHMS} == able


MEANS = TINY | {
    "algorithm": "fd", "privacy": "means", "clip": 1.0, "noise_multiplier": 3.0, "count_noise_multiplier": 4.0,
}  # fmt: skip


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_means_by_label_are_accounted_for_by_hand(accountant, quiet):
    """Sums of noise 3 and counts of noise 4 are one Gaussian of 2.4, once a round, whoever takes part."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    result = fdjax.run(**MEANS, accountant=accountant, participation=0.5)
    made = {"rdp": RdpAccountant, "pld": PLDAccountant}[accountant]
    by_hand = [made().compose(dp.GaussianDpEvent(2.4), r).get_epsilon(1e-5) for r in (1, 2, 3)]
    np.testing.assert_allclose(result.rounds["epsilon"], by_hand, rtol=1e-9)
    table = summary([result])
    assert "one example more or less in the means, given the models, whose training on it is not hidden" in table
    assert "3 of sums, 4 of counts, 1" in table
    assert result.traffic.per_participant("up") == (400,)


def test_noise_of_means_for_an_epsilon_is_that_of_sums_and_counts(quiet):
    given = {name: value for name, value in MEANS.items() if "noise" not in name}
    result = fdjax.run(**given, target_epsilon=4.0, participation=0.5)
    assert 3.9 < result.privacy["epsilon"] <= 4.0
    assert result.privacy["count_noise_multiplier"] == result.privacy["noise_multiplier"] > 1
    everything = Ledger("means", 1.0, None, 1, 0)
    assert everything.events(2.0, 1) == everything._replace(of_counts=2.0).events(2.0, 1)
    assert epsilons(everything._replace(of_counts=0.0), 2.0, 1, "rdp", 1e-5) == (math.inf,)


def test_local_noise_is_accounted_for_by_hand(quiet):
    """A client's data replaced change its upload by 2 S, in every round, whoever takes part."""
    import dp_accounting as dp
    from dp_accounting.rdp import RdpAccountant

    result = fdjax.run(**PRIVATE | {"algorithm": "fd", "privacy": "local", "participation": 0.5})
    event, relation = dp.GaussianDpEvent(0.75), dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    by_hand = [RdpAccountant(neighboring_relation=relation).compose(event, r).get_epsilon(1e-5) for r in (1, 2, 3)]
    np.testing.assert_allclose(result.rounds["epsilon"], by_hand, rtol=1e-9)


def test_the_client_who_spends_most_counts():
    alone = [
        epsilons(Ledger("example", 1.0, None, 1, 0, (s,)), 2.0, 2, "rdp", 1e-5)[-1] for s in ((9, 8, 4), (8, 8, 2))
    ]
    both = epsilons(Ledger("example", 1.0, None, 1, 0, ((8, 8, 2), (9, 8, 4))), 2.0, 2, "rdp", 1e-5)[-1]
    assert both == max(alone)
    assert alone[0] != alone[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"algorithm": "fd"}, "not all that fd shares of a client's examples is learned by one fit on them"),
        ({"accountant": "pld"}, "--accountant=pld knows no batches of a fixed size"),
        ({"privacy": "client", "batch_accounting": "poisson"}, "no batches are private; give --privacy=example"),
    ],
)
def test_what_cannot_be_private_by_example(given, message):
    with pytest.raises(InputError) as error:
        fdjax.run(**EXAMPLES | given)
    assert message in str(error.value)
