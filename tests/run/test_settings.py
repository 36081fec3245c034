"""What each setting says about itself, and what follows from it."""

import dataclasses

import numpy as np
import pytest
from absl import flags

from fdjax.algorithms import ALGORITHMS
from fdjax.errors import InputError
from fdjax.run import settings
from fdjax.run.settings import FLAGS, FOLDERS, SETTINGS, Settings, of_role


def test_every_setting_has_a_record():
    assert SETTINGS.keys() == {field.name for field in dataclasses.fields(Settings)}
    for name, setting in SETTINGS.items():
        assert setting.help, name
        setting.check(name, getattr(Settings(), name))  # the default is a good value
    roles = ("static", "traced", "data", "partition", "run")
    assert sum(len(of_role(role)) for role in roles) == len(SETTINGS)


@pytest.mark.parametrize("name", [n for n, s in FLAGS.items() if s.kind in (int, float) and s.low > -np.inf])
def test_numbers_have_bounds(name):
    setting = SETTINGS[name]
    setting.check(name, setting.kind(setting.low) if not setting.above else setting.kind(setting.low) + 1e-9)
    with pytest.raises(InputError, match=f"^--{name}=.*: expected a"):
        setting.check(name, setting.kind(setting.low) if setting.above else setting.kind(setting.low) - 1)


def test_what_only_changes_arrays_or_the_place_is_not_compiled():
    """Two such runs are compiled once; the batch is no larger than the largest client."""
    one = settings.make(algorithm="fedprox", mu=0.5, seed=1, dataset="synthetic", alpha=0.5, devices=2, chunk=1)
    other = settings.make(algorithm="fedprox", rounds=99, eval_every=5, memory_limit=1.0, partition_seed=3)
    assert one.static(100) == other.static(100)
    assert one.static(100) != settings.make(algorithm="fedprox", momentum=0.5).static(100)
    assert settings.make(batch_size=0).static(7) == settings.make(batch_size=50).static(7)
    cosine = [settings.make(schedule="cosine", rounds=rounds).static(100) for rounds in (2, 3)]
    assert cosine[0] != cosine[1]  # the schedule ends with the last round


def test_what_a_resumed_run_may_change():
    expected = {"rounds", "data_dir", "proxy_dir", "cache_dir", "writers", "devices", "lifting", "memory_limit"}
    expected |= {"delta", "accountant", "batch_accounting"}
    expected |= {
        "stop_at_accuracy",
        "stop_at_bytes",
        "patience",
        "min_delta",
        "stop_metric",
        "client_history",
        "targets",
    }
    assert settings.make().resumable == expected
    assert settings.make(schedule="cosine").resumable == expected - {"rounds"}
    calibrated = settings.make(privacy="client", clip=1.0, target_epsilon=2.0)
    assert calibrated.resumable == expected - {"rounds", "delta", "accountant", "batch_accounting"}
    assert set(FOLDERS) == {"data_dir", "proxy_dir", "cache_dir", "writers"}


def test_names_are_settings_hparams_and_options_of_the_method():
    flat = settings.make(algorithm="dsfl", proxy="noise", era_temperature=0.2, aggregation="era_logits", rounds=3)
    nested = settings.make(
        {"era_temperature": 0.2}, {"aggregation": "era_logits"}, algorithm="dsfl", proxy="noise", rounds=3
    )
    assert flat == nested
    assert flat.public()["aggregation"] == "era_logits"
    assert settings.make(rounds=np.int64(3), participation=np.float64(0.5)) == settings.make(
        rounds=3, participation=0.5
    )
    with pytest.raises(InputError, match="unknown hparam of fedavg 'temperature'"):
        settings.make(temperature=2.0)
    with pytest.raises(InputError, match="unknown option of fedavg 'aggregation'; there are none"):
        settings.make(aggregation="era")


def test_hparams_that_follow_others_are_resolved():
    made = settings.make(algorithm="feddistill", learning_rate=0.5, local_epochs=3)
    assert dict(made.hparams)["teacher_learning_rate"] == 0.5
    assert dict(made.hparams)["teacher_epochs"] == 3
    assert isinstance(made.public()["teacher_epochs"], int)
    assert made.check() == made


@pytest.fixture
def parsed(monkeypatch):
    """Flags of a program with these defaults, parsed from these arguments."""

    def parse(*arguments, skip=(), **defaults):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        for kind in ("string", "integer", "float", "boolean"):
            define = getattr(flags, f"DEFINE_{kind}")
            monkeypatch.setattr(
                flags, f"DEFINE_{kind}", lambda *a, define=define, **more: define(*a, flag_values=values, **more)
            )
        settings.define_flags(skip, **defaults)
        values(["program", *arguments])
        return values

    return parse


def test_flags_are_settings(parsed):
    values = parsed("--algorithm=fedprox", "--mu=0.3", "--rounds=4", "--nostandardize", batch_size=7, skip=("chunk",))
    found = settings.from_flags(seed=3)
    expected = {"algorithm": "fedprox", "rounds": 4, "standardize": False, "batch_size": 7, "seed": 3}
    assert found == settings.make(mu=0.3, **expected)
    assert "chunk" not in values
    assert settings.from_flags(algorithm="fedavg", mu=None) == settings.make(
        **expected | {"algorithm": "fedavg", "seed": 0}
    )
    with pytest.raises(InputError, match="unknown hparam of fedavg 'mu'"):
        settings.from_flags(algorithm="fedavg")


def test_help_explains_choices_and_hparams_of_every_method(parsed):
    values = parsed()
    for name, method in ALGORITHMS.items():
        assert f"{name}: {method.summary}" in values["algorithm"].help
        for hparam, record in method.hparams.items():
            text = values[hparam].help
            assert name in text
            assert f"default {record.default}" in text
            assert record.help in text
        for option, allowed in method.options.items():
            assert f"{', '.join(allowed)}" in values[option].help
    assert "sgd, adam, adamw" in values["optimizer"].help
