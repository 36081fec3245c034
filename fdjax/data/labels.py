"""A part of a data set: the examples of some of its labels."""

import numpy as np

from fdjax.errors import InputError
from fdjax.types import Source


def of_labels(source: Source, labels: str) -> Source:
    """The source's examples of `labels`, numbers with commas between them, which become 0, 1, ... in that order.

    Owners keep their ids. Raises InputError for what are not two or more different labels of the source, and for one
    that has no example.
    """
    texts = [text.strip() for text in labels.split(",")]
    chosen = [int(text) for text in texts if text.isdecimal()]
    if len(chosen) < len(texts) or len({*chosen}) < len(chosen) or len(chosen) < 2:
        raise InputError(f"--labels={labels}: expected two or more different labels, such as 0,2,20")
    if max(chosen) >= source.num_classes:
        raise InputError(
            f"--labels={labels}: {source.name} has the labels 0 to {source.num_classes - 1}; give some of these"
        )
    for label in chosen:
        for part, y in (("training", source.train_y), ("test", source.test_y)):
            if not np.any(y == label):
                raise InputError(f"--labels={labels}: {source.name} has no {part} example of {label}; leave it out")
    number = np.full(source.num_classes, -1, np.int32)
    number[chosen] = np.arange(len(chosen))
    train, test = (number[y] >= 0 for y in (source.train_y, source.test_y))
    return source._replace(
        train_x=source.train_x[train],
        train_y=number[source.train_y[train]],
        test_x=source.test_x[test],
        test_y=number[source.test_y[test]],
        num_classes=len(chosen),
        train_owner=None if source.train_owner is None else source.train_owner[train],
        test_owner=None if source.test_owner is None else source.test_owner[test],
        labels=f"{source.label_space}: {', '.join(map(str, chosen))}",
    )
