"""`python -m fdjax.data` and the picture of a partition."""

import subprocess
import sys

import numpy as np
import pytest
from choices import some
from PIL import Image

from fdjax.data import draw_partition, partition
from fdjax.errors import InputError


def run(*flags):
    command = [sys.executable, "-W", "error", "-m", "fdjax.data", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_program_tells_and_draws(tmp_path):
    out = tmp_path / "deep" / "partition.png"
    result = run("--partition=dirichlet_a", "--alpha=0.3", "--num_clients=10", f"--out={out}")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "mnist_sample dirichlet_a alpha=0.3 seed=0"
    assert lines[1] == "clients: 10; examples held: 6,000 of 6,000"
    assert sum(line.startswith("client ") for line in lines) == 10
    with Image.open(out) as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--partition=dirichlet_z"], "error: unknown partition 'dirichlet_z'"),
        *some([
            (["--dataset=mnits"], "error: unknown data set 'mnits'"),
            (["--num_clients=9999"], "error: num_clients=9999 for 6000 examples"),
            (["partition=iid"], "error: unexpected argument 'partition=iid'"),
            (["--dataset=idx"], "error: idx needs data_dir"),
        ]),
    ],
)  # fmt: skip
def test_program_ends_in_one_line(flags, message):
    result = run(*flags)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("num_clients", "num_classes"), some([(1, 2), (50, 10), (51, 10), (3000, 100)], (51, 10)))
def test_pictures(tmp_path, num_clients, num_classes):
    labels = np.arange(6000) % num_classes
    holdings = partition("iid", labels, num_clients, 0, num_classes=num_classes)
    draw_partition(holdings, labels, num_classes, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 4), axis=0)) > 10


def test_unwritable_picture(tmp_path):
    labels = np.arange(60) % 10
    holdings = partition("iid", labels, 6, 0, num_classes=10)
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.png", tmp_path / "x.nosuchformat", tmp_path / "x"):
        with pytest.raises(InputError, match="give a file such as"):
            draw_partition(holdings, labels, 10, path)


def test_data_of_your_own(tmp_path):
    """Owners are the clients, unless a partition is given, here of both parts of the data."""
    rows = [f"{i % 13},{i % 7},{'lh'[i % 2]},{'nse'[i % 3]}\n" for i in range(91)]
    (tmp_path / "people.csv").write_text("age,days,income,site\n" + "".join(rows))
    np.savez(tmp_path / "mine.npz", client=np.arange(91) % 2)
    people = [f"--dataset={tmp_path}/people.csv", "--target=income", "--test_by=owner", "--owner=site"]
    told = run(*people)
    assert told.stdout.splitlines()[:2] == ["people natural seed=0", "clients: 3; examples held: 73 of 73"]
    own = (f"--partition={tmp_path}/mine.npz", "--split_by_client=0.75", f"--write_pfllib={tmp_path}/out")
    lines = run(*people, *own).stdout.splitlines()
    assert lines[:2] == [f"people mine ({tmp_path}/mine.npz) seed=0", "clients: 2; examples held: 67 of 67"]
    with np.load(tmp_path / "out" / "train" / "0.npz", allow_pickle=True) as file:
        ours = file["data"].item()["x"]
    with np.load(tmp_path / "out" / "train" / "1.npz", allow_pickle=True) as file:
        both = np.concatenate([ours, file["data"].item()["x"]]).astype(float)
    np.testing.assert_allclose([both.mean(axis=0), both.std(axis=0)], [[0, 0], [1, 1]], atol=1e-5)
