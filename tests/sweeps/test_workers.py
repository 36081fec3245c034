"""Workers of a sweep: every trial ends once and right, whatever happens to workers and storage."""

import subprocess
import sys
import time

import optuna
import pytest
import sqlalchemy.exc
from optuna.trial import TrialState
from sweep_cases import TINY, finish

from benchmarks import sweep_kills
from fdjax.errors import InputError
from sweeps import run, storage


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/x.db"


@pytest.fixture
def instant(monkeypatch):
    """Workers whose trials are complete as soon as they are asked for, for tests of who runs which."""

    def run_trials(runner, asked):
        for trial in asked:
            runner.worker.finish(trial, TrialState.COMPLETE, 0.5)

    monkeypatch.setattr(run.Runner, "run", run_trials)


def dead_process():
    """The name of a worker whose process has ended."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    return f"{storage._location()}|{dead.pid}|1.0|a"


def sweep(study, url, size=8):
    """All trials of the finished study, and those that count."""
    trials = finish(study, url, size)
    counted = [t for t in trials if not storage.given_up(t)]
    assert [t.state for t in counted] == [TrialState.COMPLETE] * study.total
    return trials, counted


@pytest.fixture
def clock(monkeypatch):
    """The time that workers see: it stands until a test adds seconds to it."""
    shift = [0.0]
    now = time.time()
    monkeypatch.setattr(storage.time, "time", lambda: now + shift[0])
    return lambda seconds: shift.__setitem__(0, shift[0] + seconds)


@pytest.mark.usefixtures("instant")
@pytest.mark.parametrize("kind", ["sqlite:///{}/x.db", "journal:{}/x.log"])
def test_trials_of_dead_workers_are_run_again(kind, tmp_path, clock):
    """Workers that ended with all params, with half of them, on another machine, and before they gave their name."""
    url = kind.format(tmp_path)
    shared = run.open_study(TINY, url)
    names = dead_process(), "elsewhere|1|1.0|b"
    for name in names:
        shared.ask(TINY.distributions).set_user_attr("worker", name)
    shared.ask({"learning_rate": TINY.distributions["learning_rate"]}).set_user_attr("worker", names[0])
    shared.ask()
    clock(2 * storage.UNNAMED)
    trials, counted = sweep(TINY, url, size=3)
    assert [t.state for t in trials[:4]] == [TrialState.FAIL] * 4
    assert [t.user_attrs.get("replaces") for t in trials] == [None] * 4 + [0, 1, 2, 3] + [None] * 4
    assert sorted(map(key, counted)) == sorted(key_of(TINY.point(n)) for n in range(8))


def key_of(params):
    return tuple(sorted(params.items()))


def key(trial):
    return key_of(trial.params)


@pytest.mark.usefixtures("instant")
def test_a_replacement_is_replaced_and_steps_left_undone_are_taken(url):
    """Workers that ended: as the replacement ran, after FAIL was told, and as a replacement was added twice."""
    shared, dead = run.open_study(TINY, url), dead_process()
    worker = storage.Worker(TINY, shared)
    first, second, third = worker.ask(3)
    for trial in (first, second, third):
        trial.set_user_attr("worker", dead)
    shared.tell(second.number, state=TrialState.FAIL)
    shared.tell(third.number, state=TrialState.FAIL)
    known = shared.trials
    worker._add_replacement(known[third.number], known)  # as two workers do that read the same
    worker._add_replacement(known[third.number], known)
    replacement, other = worker.ask(2), shared.trials[4]
    assert [t.number for t in replacement] == [3]  # and the second one was asked for and given up
    assert (other.user_attrs["replaces"], other.state) == (third.number, TrialState.FAIL)
    replacement[0].set_user_attr("worker", dead)
    trials, counted = sweep(TINY, url)
    assert sorted(map(key, counted)) == sorted(key_of(TINY.point(n)) for n in range(8))
    assert sum(t.user_attrs.get("replaces") == third.number for t in trials) == 2


@pytest.mark.usefixtures("instant")
def test_a_worker_taken_for_dead_changes_nothing_any_more(url):
    shared = run.open_study(TINY, url)
    slow, other = storage.Worker(TINY, shared), storage.Worker(TINY, shared)
    (trial,) = slow.ask(1)
    shared.tell(trial.number, state=TrialState.FAIL)
    assert run.Runner(slow, 1, None)._report(trial, {"round": [1], "central_accuracy": [0.5]})  # it is to stop
    slow.finish(trial, TrialState.COMPLETE, 0.5, evaluations={})
    assert shared.trials[0].state == TrialState.FAIL
    assert "evaluations" not in shared.trials[0].user_attrs
    assert other.recover(shared.trials)
    assert shared.trials[1].params == trial.params
    _, counted = sweep(TINY, url)
    assert len({key(t) for t in counted}) == 8


def test_who_holds_a_trial(url, clock):
    shared = run.open_study(TINY, url)
    worker = storage.Worker(TINY, shared)
    (own,) = worker.ask(1)
    nameless, beating, silent = (shared.ask() for _ in range(3))
    beating.set_user_attr("worker", "elsewhere|1|1.0|b")
    silent.set_user_attr("worker", "elsewhere|1|1.0|c")
    shared.set_user_attr("beat elsewhere|1|1.0|b", storage.time.time() - storage.GRACE / 2)
    shared.set_user_attr("beat elsewhere|1|1.0|c", storage.time.time() - 2 * storage.GRACE)

    def lost():
        return [t.number for t in shared.trials if not worker._is_held(t, shared.user_attrs)]

    # Its own too: a worker looks when it runs nothing, so it lost hold of that trial.
    assert lost() == [own.number, silent.number]
    clock(storage.UNNAMED + 60)
    assert lost() == [own.number, nameless.number, beating.number, silent.number]


@pytest.mark.usefixtures("instant")
def test_one_trial_too_many_is_not_run(url):
    shared, dead = run.open_study(TINY, url), dead_process()
    asked = storage.Worker(TINY, shared).ask(9)
    assert [t.number for t in asked] == list(range(8))
    assert storage.given_up(shared.trials[8])
    for trial in (*asked, shared.ask(TINY.distributions)):  # the last one is too many, and nobody has given it up
        trial.set_user_attr("worker", dead)
    trials, counted = sweep(TINY, url)
    assert [t.user_attrs.get("replaces") for t in trials[10:]] == list(range(8))
    assert len({key(t) for t in counted}) == 8


@pytest.mark.usefixtures("instant")
def test_trials_of_a_worker_that_was_stopped_are_free_at_once(url, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    shared = run.open_study(TINY, url)
    with monkeypatch.context() as patch:
        patch.setattr(run.Runner, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            run.work(TINY, shared, 3)
    assert [t.state for t in shared.trials] == [TrialState.FAIL] * 3 + [TrialState.WAITING] * 3
    assert len({key(t) for t in sweep(TINY, url)[1]}) == 8


@pytest.mark.exhaustive
def test_what_breaks_twice_is_not_tried_again(url, monkeypatch):
    study = TINY._replace(space={"mu": (0.0, 1.0)})
    monkeypatch.setattr(run.Runner, "_run_batch", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            finish(study, url)
    trials = finish(study, url)
    assert [t.state for t in trials] == [TrialState.FAIL] * 4
    assert [t.user_attrs.get("reason") for t in trials] == [None] * 2 + ["ZeroDivisionError: division by zero"] * 2
    assert [t.params for t in trials[2:]] == [t.params for t in trials[:2]]


def test_a_pruner_does_not_see_what_a_dead_worker_reported(url):
    pruner = optuna.pruners.ThresholdPruner(lower=2.0, n_warmup_steps=2)
    study = TINY._replace(space={"mu": (0.0,)}, pruner=pruner, fixed=dict(TINY.fixed) | {"rounds": 4})
    shared = run.open_study(study, url)
    trial = shared.ask(study.distributions)
    for done in (1, 2, 3):
        trial.report(0.1, done)
    trial.set_user_attr("worker", dead_process())
    _, after = finish(study, url)
    assert after.state == TrialState.PRUNED
    assert after.user_attrs["evaluations"]["round"] == [0, 1, 2]
    assert sorted(after.intermediate_values) == [1, 2]


@pytest.mark.usefixtures("instant")
def test_a_pruner_that_hides_trials_leaves_the_plan_as_it_is(url):
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=4, reduction_factor=2)
    trials = finish(TINY._replace(pruner=pruner), url, size=3)
    assert [t.params for t in trials] == [TINY.point(n) for n in range(8)]


def test_a_killed_child_that_nobody_waited_for_is_dead(url):
    shared = run.open_study(TINY, url)
    worker = storage.Worker(TINY, shared)
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    created = storage.psutil.Process(child.pid).create_time()
    shared.ask().set_user_attr("worker", f"{storage._location()}|{child.pid}|{created:.2f}|a")
    assert worker._is_held(shared.trials[0], {})
    child.kill()
    while storage.psutil.Process(child.pid).status() != storage.psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not worker._is_held(shared.trials[0], {})
    child.communicate()


def test_a_storage_that_does_not_answer_is_waited_for(monkeypatch, capsys):
    slept, answers = [], iter([OSError(28, "No space left on device"), sqlalchemy.exc.OperationalError("x", {}, None)])
    monkeypatch.setattr(storage.time, "sleep", slept.append)

    def write(text):
        for error in answers:
            raise error
        return text

    assert storage.patiently(write, text="written") == "written"
    assert slept == [1.0, 2.0]
    assert "No space left on device" in capsys.readouterr().err


def test_workers_may_create_a_database_at_the_same_moment(url, monkeypatch):
    slept, errors = [], iter([
        sqlalchemy.exc.OperationalError("table studies already exists", {}, ValueError()),
        sqlalchemy.exc.IntegrityError("UNIQUE constraint failed: alembic_version.version_num", {}, ValueError()),
    ])  # fmt: skip

    class Disturbed(optuna.storages.RDBStorage):
        def __init__(self, *args, **kwargs):
            for error in errors:
                raise error
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(storage.time, "sleep", slept.append)
    monkeypatch.setattr(optuna.storages, "RDBStorage", Disturbed)
    assert optuna.get_all_study_names(storage.open_storage(url)) == []
    assert len(slept) == 2


_AT_ONCE = """
import os, sys, optuna
from sweeps.storage import open_storage
ready, go = os.pipe()
children = []
for _ in range(8):
    if not (child := os.fork()):
        os.close(go)
        os.read(ready, 1)
        try:
            shared = optuna.create_study(study_name="a", storage=open_storage(sys.argv[1]), load_if_exists=True)
            shared.set_user_attr(f"beat {os.getpid()}", 1)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\\n")
            os._exit(1)
        os._exit(0)
    children.append(child)
os.close(go)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_workers_that_begin_at_once_on_a_new_study_all_end_well(tmp_path):
    """Without turns and second tries, most of these 8 die of tables that another one has just made."""
    url = f"sqlite:///{tmp_path}/new.db"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", _AT_ONCE, url], capture_output=True, text=True)
    assert found.stdout.split("\n")[0] == str([0] * 8), found.stderr
    shared = optuna.load_study(study_name="a", storage=storage.open_storage(url))
    assert len(shared.user_attrs) == 8


@pytest.mark.usefixtures("instant")
def test_workers_that_fail_are_an_error_only_while_trials_are_left(url, capsys):
    """What the others completed is told in any case."""
    plan = TINY.check()
    shared = run.open_study(plan, url)
    with pytest.raises(InputError, match="workers ended early, with exit codes -9, 1, and trials are left"):
        run._tell_states(plan, shared, url, [-9, 1])
    assert "tiny: no trial" in capsys.readouterr().out
    finish(TINY, url)
    run._tell_states(plan, shared, url, [-9])
    told = capsys.readouterr()
    assert "tiny: 8 complete" in told.out
    assert "workers ended early, with exit codes -9;" in told.err


@pytest.mark.exhaustive
def test_killed_workers_cost_no_trial_and_double_none(tmp_path):
    """Two kills of a worker that holds trials; `python -m benchmarks.sweep_kills` has fifty at random times."""
    calm, wild = (f"sqlite:///{tmp_path}/{name}.db" for name in ("calm", "wild"))
    sweep_kills.undisturbed(calm, 6, rounds=1000)
    hits = sweep_kills.disturbed(wild, kills=2, batch=2, trials=6, seconds=None, rounds=1000)
    expected, found = sweep_kills.values(calm), sweep_kills.values(wild)
    assert len(expected) == 6
    assert expected.keys() == found.keys()
    states = sweep_kills.states(wild)
    assert states["complete"] == 6
    assert states["given up"] >= hits > 0
    assert {*states} == {"complete", "given up"}
    for params, (values, losses) in expected.items():
        assert found[params][0] == pytest.approx(values, abs=1e-5)
        assert found[params][1] == pytest.approx(losses, rel=1e-5)
