"""`python -m fdjax`: bad input ends in one line before anything compiles; --help. What a run leaves: test_runner.py."""

import dataclasses
import json

import jax
import programs
import pytest

from fdjax.errors import InputError
from fdjax.run import report, runner, settings

FAST = {"dataset": "synthetic", "num_clients": 4, "samples_per_client": 20, "model": "mclr", "rounds": 2}


@pytest.fixture
def compiled():
    """The names of XLA compilations since the test began."""
    jax.random.key(0)  # a model's shapes are checked with a key, and making the first one compiles
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


BAD = [
    ({"algorithm": "feddistil"}, {}, "unknown algorithm 'feddistil' (did you mean 'feddistill'?); known: centr"),
    ({"dataset": "mnits"}, {}, "unknown data set 'mnits' (did you mean 'mnist'?); known: cifar10, "),
    ({"partition": "dirichlet_z"}, {}, "unknown partition 'dirichlet_z'"),
    ({"model": "cnn3"}, {}, "unknown model 'cnn3'"),
    ({"optimizer": "sgdm"}, {}, "unknown optimizer 'sgdm' (did you mean 'sgd'?); known: adabelief, adadelta"),
    ({"schedule": "steps"}, {}, "unknown schedule 'steps' (did you mean 'step'?)"),
    ({"augment": "flop"}, {}, "unknown augment 'flop'"),
    ({"local_eval": "some"}, {}, "unknown local_eval 'some'"),
    ({}, {"temperature": 2.0}, "unknown hparam of fedavg 'temperature'; known: learning_rate, local_epochs"),
    ({}, {"learning_rate": -0.1}, "--learning_rate=-0.1: expected a finite number of at least 0"),
    ({}, {"learning_rate": float("nan")}, "--learning_rate=nan: expected a finite number"),
    ({}, {"local_epochs": 0.0}, "--local_epochs=0.0: expected a whole number of at least 1"),
    ({}, {"local_epochs": 1.5}, "--local_epochs=1.5: expected a whole number"),
    ({}, {"local_epochs": float("inf")}, "--local_epochs=inf: expected a whole number"),
    ({}, {"local_epochs": float("nan")}, "--local_epochs=nan: expected a whole number"),
    ({}, {"local_epochs": 1e10}, "--local_epochs=10000000000.0: expected a whole number"),
    ({"algorithm": "feddistill"}, {"temperature": 0.0}, "--temperature=0.0: expected a finite number above 0"),
    ({"algorithm": "feddistill"}, {"weight": 1.5}, "--weight=1.5: expected a number from 0 to 1"),
    ({"rounds": 0}, {}, "--rounds=0: expected a whole number of at least 1"),
    ({"rounds": "3"}, {}, "--rounds='3': expected a whole number of at least 1"),
    ({"rounds": 2.5}, {}, "--rounds=2.5: expected a whole number of at least 1"),
    ({"roundz": 3}, {}, "unknown setting 'roundz' (did you mean 'rounds'?); python -m fdjax --help lists them all"),
    ({"participation": 0.0}, {}, "--participation=0.0: expected a number above 0 and at most 1"),
    ({"participation": float("nan")}, {}, "--participation=nan: expected a number above 0"),
    ({"train_fraction": 1.5}, {}, "--train_fraction=1.5: expected a number above 0 and at most 1"),
    ({"batch_size": -1}, {}, "--batch_size=-1: expected a whole number of at least 0"),
    ({"momentum": float("nan")}, {}, "--momentum=nan: expected a number of at least 0 and below 1"),
    ({"momentum": float("inf")}, {}, "--momentum=inf: expected a number of at least 0 and below 1"),
    ({"memory_limit": float("inf")}, {}, "--memory_limit=inf: expected a finite number"),
    ({"padding": "same"}, {}, "unknown padding 'same'"),
    ({"options": {"weighting": "uniform"}}, {}, "unknown option of fedavg 'weighting'; there are none: leave it out"),
    ({"seed": -1}, {}, "--seed=-1: expected a whole number from 0 to 2147483647"),
    ({"seed": 2**31}, {}, "--seed=2147483648: expected a whole number from 0 to 2147483647"),
    ({"num_clients": 0}, {}, "--num_clients=0: expected a whole number of at least 1"),
    ({"alpha": -1.0}, {}, "--alpha=-1.0: expected a finite number of at least 0"),
    ({"standardize": 1}, {}, "--standardize=1: expected true or false"),
    ({"proxy": "nois"}, {}, "unknown proxy data 'nois' (did you mean 'noise'?); known: cifar10"),
    ({"algorithm": "fedmd"}, {}, "fedmd needs proxy data, with labels; give --proxy=held_out, or another (--help)"),
    # What only the data can tell.
    ({"dataset": "mnist_sample", "partition": "dirichlet_a", "alpha": 0.0}, {}, "alpha=0.0: expected a finite number"),
    ({"partition": "dirichlet_a"}, {}, "--partition=dirichlet_a of synthetic: --alpha and --beta would be both"),
    ({"dataset": "mnist_sample", "num_clients": 6001}, {}, "num_clients=6001 for 6000 examples"),
    ({"dataset": "mnist_sample", "partition": "iid", "shards_per_client": 2}, {}, "partition 'iid' takes no options"),
    ({"dataset": "mnist", "data_dir": "/no/such/folder"}, {}, "mnist: data_dir '/no/such/folder' is no folder"),
    ({"dataset": "idx"}, {}, "idx needs data_dir: give the folder"),
    ({"models": "mclr"}, {}, "--models=mclr: 'mclr' is not of the form name:clients"),
    ({"models": "mclr:\u00b2"}, {}, "--models=mclr:\u00b2: 'mclr:\u00b2' is not of the form name:clients"),
    ({"models": "mclr:2,mclr:0"}, {}, "--models=mclr:2,mclr:0: 'mclr:0' is not of the form"),
    ({"algorithm": "feddistill", "models": "mclr:2,2nn:3"}, {}, "--models=mclr:2,2nn:3 names 5 clients, but the parti"),
    ({"algorithm": "feddistill", "models": "mclr:2,22nn:2"}, {}, "unknown model '22nn' (did you mean '2nn'?)"),
    ({"models": "mclr:2,2nn:2"}, {}, "--models=mclr:2,2nn:2: clients of fedavg have no model of their own"),
    ({"models": "mclr:2,mclr:2"}, {}, "--models=mclr:2,mclr:2: clients of fedavg have no model of their own"),
    ({"model": "cnn1"}, {}, "model 'cnn1' on inputs (60,)"),
    ({"augment": "rotate_crop"}, {}, "--augment=rotate_crop needs images"),
    ({"devices": 99}, {}, "--devices=99, but there are 4; give at most as many"),
    # What is given and would not be used.
    ({"schedule_every": "step"}, {}, "--schedule_every=step means nothing to --schedule=constant; give another sch"),
    ({"data_dir": "/data"}, {}, "--data_dir=/data: --dataset=synthetic reads no files; give a data set that does"),
    ({"dataset": "mnist_sample", "data_dir": "/data"}, {}, "--data_dir=/data: --dataset=mnist_sample reads no files"),
    ({"dataset": "idx", "cache_dir": "/data"}, {}, "--cache_dir=/data: only data sets that tfds prepared are decoded"),
    ({"proxy": "noise"}, {}, "--proxy=noise: fedavg uses no proxy data, and only held_out takes examples from it"),
    ({"proxy_size": 50}, {}, "--proxy_size=50: there are no proxy data; give --proxy too, or leave it out"),
    ({"proxy": "held_out", "proxy_per_round": 5}, {}, "--proxy_per_round=5: fedavg uses no proxy data; leave it out"),
    ({"distill_batch_size": 5}, {}, "--distill_batch_size=5: fedavg trains nothing on proxy data in"),
    ({"padding": "SAME"}, {}, "--padding=SAME: model 'mclr' has no padding; leave it out, or choose of cnn1, "),
    ({"straggler_work": "drop"}, {}, "--straggler_work=drop: there are no stragglers; give --stragglers too, or leave"),
    ({"fine_tune_epochs": 3}, {}, "--fine_tune_epochs=3: there are no new clients; give --new_clients too, or leave"),
    ({"lifting": "vmap", "chunk": 2}, {}, "--chunk=2: --lifting=vmap takes no chunks; leave it out, or give --lifting"),
    ({"algorithm": "fml", "optimizer_state": "kept"}, {}, "--optimizer_state=kept: optimisers of fml start anew in ev"),
    ({}, {"local_steps": 5, "local_epochs": 2}, "--local_steps=5 and --local_epochs=2: steps are in place of epochs"),
    ({"algorithm": "dsfl", "proxy": "noise"}, {"era_beta": 3.0}, "--era_beta=3: dsfl uses it with --aggregation=enh"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "hparams", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_one_line_before_anything_compiles(compiled, fields, hparams, message):
    fields = FAST | fields
    if fields["dataset"] != "synthetic":
        del fields["samples_per_client"]
    with pytest.raises(InputError) as error:
        runner.run(settings.make(hparams=hparams, **fields), progress=False)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert compiled == []


def test_the_ends_of_every_range_are_good():
    settings.make({"learning_rate": 0.0, "local_epochs": 1.0}, seed=2**31 - 1, participation=1.0, momentum=0.0)
    settings.make({"weight": 0.0, "temperature": 1e-3}, algorithm="feddistill")
    settings.make({"weight": 1.0}, algorithm="feddistill", participation=1e-9, batch_size=0)


@pytest.mark.parametrize("inside", ["file", "file/below"])
def test_a_file_in_the_way_of_out(tmp_path, inside):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(InputError, match="cannot write to --out"):
        report.prepare(tmp_path / inside)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_file_in_the_way_of_checkpoints(tmp_path, compiled):
    (tmp_path / "checkpoints").write_text("precious")
    with pytest.raises(InputError, match="cannot write checkpoints to"):
        runner.run(settings.make(**FAST), tmp_path, progress=False)
    assert compiled == []


def test_overwrite_removes_checkpoints_alone(tmp_path):
    """Those of the run in the folder and of a table's runs below it, and nobody else's."""
    own = [tmp_path / "checkpoints", tmp_path / "runs" / "fedavg-seed0" / "checkpoints"]
    others = [tmp_path / "results.json", tmp_path / "project" / "checkpoints" / "3"]
    for path in (*own, others[1]):
        path.mkdir(parents=True)
    others[0].write_text("{}")
    assert report.prepare(tmp_path) == tmp_path
    assert all(path.exists() for path in (*own, *others))
    report.prepare(tmp_path, overwrite=True)
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)


def test_settings_tell_every_default():
    """What a table is made of must be readable beside it, so hparams that nobody gave are there too."""
    public = settings.make(algorithm="feddistill", learning_rate=0.5).public()
    assert {f.name for f in dataclasses.fields(settings.Settings)} - {"hparams", "options"} <= public.keys()
    expected = {"learning_rate": 0.5, "teacher_learning_rate": 0.5, "temperature": 2.0, "weight": 0.5}
    assert {name: public[name] for name in expected} == expected
    assert json.loads(json.dumps(public)) == public


# The program itself.


def run(*flags):
    return programs.run_here("fdjax", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["rounds=3"], "error: unexpected argument 'rounds=3'; settings are flags, e.g. --rounds=20 (see --help)\n"),
        (
            ["--temperature=2"],
            "error: unknown hparam of fedavg 'temperature'; known: learning_rate, local_epochs, local_steps\n",
        ),
        (["--resume", "--overwrite"], "error: --resume and --overwrite exclude each other; give one of them\n"),
    ],
)
def test_ends_in_one_line(tmp_path, flags, message):
    result = run(f"--out={tmp_path}", *flags)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", message)


def test_help_lists_the_flags():
    result = run("--help")
    assert "Traceback" not in result.stderr, result.stderr
    names = {f.name for f in dataclasses.fields(settings.Settings)} - {"hparams", "options"}
    names |= {"learning_rate", "local_epochs", "temperature", "weight", "teacher_learning_rate", "teacher_epochs"}
    names |= {"out", "resume", "overwrite", "checkpoint_every", "coordinator", "num_processes", "process_id"}
    listed = {line.split(":")[0].strip().removeprefix("--").removeprefix("[no]") for line in result.stdout.splitlines()}
    assert names <= listed
    text = " ".join(result.stdout.split())
    assert "feddistill: FedDistill (Jiang et al. 2020)" in text
    assert "mclr: multinomial logistic regression" in text
