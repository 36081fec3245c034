"""benchmarks.fd_table1 and benchmarks.exchange_bytes: exact bits and bytes, every row, the files, one-line errors."""

import json

import numpy as np
import programs
import pytest
from choices import some

from benchmarks import cases, exchange_bytes, fd_table1
from fdjax.algorithms import ALGORITHMS
from fdjax.exchange.traffic import Traffic
from fdjax.run import experiment, report, settings
from fdjax.run.runner import Result

TABLE = ["--model=mclr", "--clients=2", "--samples_per_client=60", "--iterations=3", "--batch_size=16"]
EXCHANGE = ["--model=mclr", "--num_clients=6", "--train_fraction=0.1", "--min_size=1", "--proxy_size=50", "--rounds=2"]
MCLR = 784 * 10 + 10


def rows(folder):
    """Cells of the table's lines, by the first one or two."""
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines][1:]


@pytest.mark.exhaustive
def test_a_tiny_table_of_fd_is_complete_and_its_payload_exact(tmp_path):
    done = programs.run("benchmarks.fd_table1", *TABLE, "--eval_every=16", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    table = {(row[0], row[1]): row for row in rows(tmp_path)}
    assert len(table) == 4 * 5
    assert table["FD", "2"][2] == "72.30"
    assert table["FD", "2"][4:8:2] == ["mean of the devices", "102,400"]
    assert table["FD", "2"][7] == "102,400"
    assert table["FL", "2"][4:8:2] == ["central model", "1,228,439,552"]
    assert table["FL", "2"][7] == f"{16 * 2 * 32 * MCLR:,}"
    assert {table["FD", str(count)][3] for count in (4, 6, 8, 10)} == {"not run"}
    assert {row[3] for name, row in table.items() if "FAug" in name[0]} == {"not run"}
    assert table["FD + FAug", "10"][2] == "86.42"
    assert table["FL + FAug", "4"][6] == "1,276,326,272"
    low, high = (int(x) for x in (table["FD", "2"][8] + " to " + table["FD", "2"][8]).split(" to ")[:2])
    assert 30 <= low <= high < 60
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told["runs"]) == {"FD, 2 devices", "FL, 2 devices"}
    (run,) = told["runs"]["FD, 2 devices"]
    assert run["bytes_per_participant"] == {"up": [400], "down": [400]}
    assert run["settings"]["partition"] == "scarce"
    assert f"{100 * run['final']['local_accuracy']:.2f}" == table["FD", "2"][3]
    assert (tmp_path / "curves.png").stat().st_size > 0
    text = (tmp_path / "table.md").read_text()
    assert "FD's payload is the published one exactly." in text
    assert "mnist_sample in place of MNIST" in text
    assert "60 images a device in place of 2,000" in text
    assert "FAug is not run here" in text
    again = programs.run("benchmarks.fd_table1", *TABLE, "--eval_every=16", f"--out={tmp_path}")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


@pytest.mark.parametrize("rounds", [1, 3, 16])
@pytest.mark.parametrize(("algorithm", "floats"), [("fd", 100), ("fedavg", 1_199_882)])
def test_the_papers_payload_is_counted_for_sixteen_rounds_whatever_is_run(algorithm, floats, rounds):
    chosen = settings.make(
        algorithm=algorithm, model="fd_cnn", partition="scarce", num_clients=2, samples_per_client=100, rounds=rounds
    )
    traffic = experiment.traffic_of(experiment.build(chosen))
    sent = {way: np.dot(traffic.per_participant(way), traffic.participants) for way in ("up", "down")}
    history = {f"bytes_{way}": np.cumsum([size] * rounds).tolist() for way, size in sent.items()}
    result = Result(chosen, history, {}, {}, traffic, 0.0, 0.0, {})
    assert fd_table1.bits(result) == 16 * 2 * floats * 32
    if algorithm == "fd":
        assert fd_table1.bits(result) == fd_table1.PUBLISHED["fd"].bits
    else:  # the paper does not count the 32 + 64 + 128 + 10 biases
        assert fd_table1.bits(result) - 16 * 2 * 32 * 234 == fd_table1.PUBLISHED["fedavg"].bits


def test_one_federation_for_all_methods_and_a_row_that_fails_is_only_a_row(tmp_path):
    chosen = "--algorithms=fedavg,fedgkt,dsfl,local,centralized"
    done = programs.run_here("benchmarks.exchange_bytes", *EXCHANGE, chosen, "--devices=1", f"--out={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "fedgkt failed: model 'mclr' extracts no features" in (tmp_path / "table.md").read_text()
    table = {row[0]: row for row in rows(tmp_path)}
    assert list(table) == chosen.partition("=")[2].split(",")
    assert table["fedgkt"][5] == "failed"
    assert table["fedavg"][1:5] == [f"{4 * MCLR:,}", f"{4 * MCLR:,}", "", "1"]
    assert table["dsfl"][1:5] == ["2,000", "2,000", "", f"{4 * MCLR / 2000:.3g}"]
    assert table["local"][1:5] == ["0", "0", "", ""]
    whose = {name: row[6] for name, row in table.items() if name != "fedgkt"}
    assert whose == {
        "fedavg": "central", "dsfl": "central", "local": "mean of clients", "centralized": "all data pooled"
    }  # fmt: skip
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told["failed"]) == {"fedgkt"}
    assert set(told["seconds_per_round"]) == set(told["runs"]) == set(whose)
    assert all(value > 0 for value in told["seconds_per_round"].values())
    shared = ("proxy", "proxy_size", "partition", "alpha", "seed")
    kept = [{name: run["settings"][name] for name in shared} for (run,) in told["runs"].values()]
    assert all(one == kept[0] for one in kept)
    assert kept[0]["proxy"] == "held_out"
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.exhaustive
def test_coded_bytes_and_a_net_in_two_parts(tmp_path):
    flags = ["--model=2nn", "--server_model=mclr", "--server_epochs=1", "--local_epochs=1", "--rounds=2"]
    done = programs.run(
        "benchmarks.exchange_bytes", *EXCHANGE[1:-1], *flags, "--algorithms=cfd,fedgkt", f"--out={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    table = {row[0]: row for row in rows(tmp_path)}
    raw = 50 * 10 * 4
    assert 0 < int(table["cfd"][1].replace(",", "")) < raw / 10
    told = json.loads((tmp_path / "results.json").read_text())
    (run,) = told["runs"]["fedgkt"]
    assert (run["settings"]["model"], run["settings"]["models"]) == ("mclr", "2nn:6")
    up = run["rounds"]["bytes_up"][-1] / (2 * 6)
    assert up == pytest.approx(4 * (200 + 10 + 1) * 550 / 6)  # 600 examples, of which 50 are proxy data
    note = "fedgkt: clients have 2nn in two parts, the server mclr on the features"
    assert note in (tmp_path / "table.md").read_text()


def test_bytes_of_the_set_up_are_counted_once():
    """Both are called "bytes_up" and "bytes_down"; those of rounds are cumulative and begin with the set-up's."""
    chosen = settings.make(algorithm="fedavg", model="mclr", num_clients=4, participation=0.5, rounds=2)
    traffic = Traffic(round=(), setup=(), participants=(2,), sizes=(4,))
    history = {"bytes_up": [40.0 + 10, 40.0 + 20], "bytes_down": [8.0 + 6, 8.0 + 12]}
    setup = {"bytes_up": 40.0, "bytes_down": 8.0, "train_loss": 1.0}
    result = Result(chosen, history, {"round": [1, 2]}, {}, traffic, 0.0, 0.0, setup)
    assert [report.bytes_until(result, rounds) for rounds in (0, 1, 2)] == [48, 64, 80]
    assert cases.bytes_a_round(result) == 16
    assert exchange_bytes.sent(result) == (5, 3)
    assert exchange_bytes.sent_once(result) == 12


def test_no_method_loses_what_it_understands():
    for name, method in ALGORITHMS.items():
        assert not {*cases.without_others(name)} & {*method.hparams, *method.options}
    assert {"gamma", "bits_up"} <= {*cases.without_others("fedavg")}


BAD = [
    ("fd_table1", ["--clients=3"], "--clients: '3' is no column of Table 1; its columns are 2, 4, 6, 8, 10"),
    ("fd_table1", ["--methods=faug"], "--methods: 'faug' is not run here; known: fd, fedavg"),
    ("fd_table1", ["--clients=10", "--samples_per_client=601"], "num_clients * samples_per_client = 6010"),
    ("exchange_bytes", ["--algorithms=fedvg"], "unknown algorithm 'fedvg' (did you mean 'fedavg'?)"),
    ("exchange_bytes", ["--algorithms=fd", "--server_steps=5"], "--server_steps is of none of fd"),
    ("exchange_bytes", ["--rounds=0"], "--rounds=0: expected a whole number of at least 1"),
]


@pytest.mark.parametrize(
    ("name", "given", "message"), some(BAD, BAD[0], BAD[3]), ids=[given[-1] for _, given, _ in BAD]
)
def test_bad_flags_are_one_line(name, given, message, tmp_path):
    done = programs.run_here(f"benchmarks.{name}", *given, f"--out={tmp_path}")
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert message in line
    assert "Traceback" not in done.stderr
