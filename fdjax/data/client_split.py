"""Training and test parts that are cut within each client: both parts of a data set merged, then split again."""

import numpy as np

from fdjax.data.holdings import from_counts
from fdjax.errors import InputError
from fdjax.types import Holdings, Source

_NEIGHBOURS = 1000  # pairs of sequences that are looked at


def merged(source: Source) -> Source:
    """The source with its test examples among its training examples, after them; the test part is still there.

    Where the test part is the training part, as it is of data with a test_fraction of 0, each example is there once.
    Raises InputError for sequences of tokens that overlap, of which no random split is one.
    """
    _check_apart(source)
    if np.array_equal(source.train_x, source.test_x) and np.array_equal(source.train_y, source.test_y):
        return source._replace(train_index=None)
    train, test = source.train_owner, source.test_owner
    return source._replace(
        train_x=np.concatenate([source.train_x, source.test_x]),
        train_y=np.concatenate([source.train_y, source.test_y]),
        train_owner=None if train is None or test is None else np.concatenate([train, test]),
        train_index=None,
    )


def split_by_client(source: Source, holdings: Holdings, fraction: float, seed: int) -> tuple[Source, Holdings]:
    """Each client's examples as floor(fraction n_k) of training, at least one, and the rest for its test.

    Which these are is drawn by `seed`. PFLlib and HtFLlib do so with a fraction of 0.75. The clients are the owners of
    the source that is returned, so that each is tested on its own part; the test set is all of these.
    Raises InputError where nobody has an example to test on, and where an example is held twice, so that one could be
    trained and tested on.
    """
    rng, rows = np.random.default_rng([seed, 3]), ([], [])
    order = np.asarray(holdings.order)
    again = len(order) - len(np.unique(order))
    if again:
        raise InputError(
            f"--split_by_client={fraction}: {again:,} of {len(order):,} examples are held twice, and would be in both "
            "parts; give a partition in which each is held once"
        )
    for start, count in zip(np.asarray(holdings.start), np.asarray(holdings.count), strict=True):
        mine = rng.permutation(order[start : start + count])
        cut = min(count, max(1, int(fraction * count)))
        rows[0].append(np.sort(mine[:cut]))
        rows[1].append(np.sort(mine[cut:]))
    counts = [np.asarray([len(each) for each in part]) for part in rows]
    if not counts[1].sum():
        raise InputError(
            f"--split_by_client={fraction}: clients of {counts[0].max(initial=0)} examples or fewer have none left to "
            "test on; give fewer clients"
        )
    train, test = (np.concatenate(part).astype(int) for part in rows)
    owner = [np.repeat(np.arange(len(count), dtype=np.int32), count) for count in counts]
    split = source._replace(
        train_x=source.train_x[train], train_y=source.train_y[train], train_owner=owner[0], train_index=None,
        test_x=source.train_x[test], test_y=source.train_y[test], test_owner=owner[1], owners=(),
    )  # fmt: skip
    return split, from_counts(np.arange(len(train)), counts[0])


def _check_apart(source: Source) -> None:
    """Raises InputError where sequences and their labels are windows of texts that share tokens with the next one.

    They are where more than a quarter of neighbours continue one another after the same number of tokens, and more
    than do so by chance.
    """
    if not source.vocabulary:
        return
    read = np.concatenate([source.train_x, source.train_y[:, None]], axis=1)[: _NEIGHBOURS + 1]
    before, after = read[:-1], read[1:]
    width, shift = read.shape[1], np.zeros(len(before), int)
    for step in range(width - 1, 0, -1):  # the smallest step, of the longest overlap, is written last
        shift[(before[:, step:] == after[:, :-step]).all(axis=1)] = step
    matches = np.bincount(shift, minlength=width)
    step = 1 + int(matches[1:].argmax())
    same_token = np.sum((np.bincount(read.ravel()) / read.size) ** 2)  # how often two tokens are the same by chance
    by_chance = len(shift) * same_token ** (width - step)
    if matches[step] > max(len(shift) / 4, by_chance + 4 * np.sqrt(by_chance)):
        raise InputError(
            f"--split_by_client: a sequence of {source.name} begins {step} tokens after the one before, so that both "
            "parts would share tokens; leave it out and keep the data's own parts (of texts, --test_fraction cuts each "
            f"in time, and --stride={width} leaves no overlap)"
        )
