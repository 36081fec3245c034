"""`python -m fdjax.data` and the picture of a partition."""

import subprocess
import sys

import numpy as np
import pytest
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
        (["--dataset=mnits"], "error: unknown data set 'mnits'"),
        (["--num_clients=9999"], "error: num_clients=9999 for 6000 examples"),
        (["partition=iid"], "error: unexpected argument 'partition=iid'"),
        (["--dataset=idx"], "error: idx needs data_dir"),
    ],
)
def test_program_ends_in_one_line(flags, message):
    result = run(*flags)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 2), (50, 10), (51, 10), (3000, 100)])
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
