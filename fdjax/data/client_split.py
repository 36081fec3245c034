"""Training and test parts that are cut within each client: both parts of a data set merged, then split again."""

import numpy as np

from fdjax.data.holdings import from_counts
from fdjax.errors import InputError
from fdjax.types import Holdings, Source


def merged(source: Source) -> Source:
    """The source with its test examples among its training examples, after them; the test part is still there.

    Inputs are standardised as before, by the statistics of what was the training part.
    """
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
    Raises InputError where nobody has an example to test on.
    """
    rng, rows = np.random.default_rng([seed, 3]), ([], [])
    order = np.asarray(holdings.order)
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
