"""Makes `mnist_sample.npz`, the part of MNIST that this package ships, byte for byte.

    python -m fdjax.data.make_sample --data_dir=<tfds folder> --writers=<npz> --out=mnist_sample.npz

Of each digit the sample holds its share of 6,000 training and 1,000 test images, drawn without replacement with a fixed
seed, in the order in which tfds serves them, with the NIST writer of each. MNIST is the work of Yann LeCun, Corinna
Cortes and Christopher Burges, made from NIST Special Databases 1 and 3, under the licence CC BY-SA 3.0; the images of
the sample are unchanged and remain under it. The same bytes need the same zlib.
"""

import sys

import numpy as np
from absl import app, flags

from fdjax.data.sources import load
from fdjax.errors import InputError


def stratified(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` sorted indices into labels [N], of each class round(size * N_c / N) by largest remainder."""
    rng = np.random.default_rng(seed)
    share = np.bincount(labels) * size / len(labels)
    quota = np.floor(share).astype(int)
    quota[np.argsort(quota - share, kind="stable")[: size - quota.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == c))[:q] for c, q in enumerate(quota)]
    return np.sort(np.concatenate(drawn))


def define_flags() -> None:
    flags.DEFINE_string("data_dir", None, "folder in which tfds prepared mnist", required=True)
    flags.DEFINE_string("writers", None, "npz with train_writer [60000] and test_writer [10000]", required=True)
    flags.DEFINE_string("out", "mnist_sample.npz", "file to write")


def main(argv: list[str]) -> None:
    del argv
    try:
        mnist = load("mnist", data_dir=flags.FLAGS.data_dir, writers=flags.FLAGS.writers)
    except InputError as error:
        sys.exit(f"error: {error}")
    assert mnist.train_owner is not None
    assert mnist.test_owner is not None
    train, test = stratified(mnist.train_y, 6000, 0), stratified(mnist.test_y, 1000, 1)
    np.savez_compressed(
        flags.FLAGS.out,
        train_x=mnist.train_x[train],
        train_y=mnist.train_y[train].astype(np.uint8),
        train_owner=mnist.train_owner[train].astype(np.int16),
        test_x=mnist.test_x[test],
        test_y=mnist.test_y[test].astype(np.uint8),
        test_owner=mnist.test_owner[test].astype(np.int16),
    )


if __name__ == "__main__":
    define_flags()  # here, so that two programs can be imported side by side
    app.run(main)
