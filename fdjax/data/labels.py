"""A part of a data set: the examples of some of its labels."""

import numpy as np

from fdjax.errors import InputError, unknown
from fdjax.types import Source


def of_labels(source: Source, labels: str) -> Source:
    """The source's examples of `labels`, with commas between them, which become 0, 1, ... in that order.

    They are names of `Source.classes` where the source has such, numbers otherwise. Owners keep their ids. Raises
    InputError for what are not two or more different labels of the source, and for one that has no example.
    """
    texts = [text.strip() for text in labels.split(",")]
    names = source.classes or tuple(map(str, range(source.num_classes)))
    if source.classes and (strange := [text for text in texts if text not in names]):
        raise unknown(f"label of {source.name} (--labels={labels}):", strange[0], names)
    chosen = [
        names.index(text) if source.classes else int(text) for text in texts if source.classes or text.isdecimal()
    ]
    if len(chosen) < len(texts) or len({*chosen}) < len(chosen) or len(chosen) < 2:
        example = ",".join(names[:2]) if source.classes else "0,2,20"
        raise InputError(f"--labels={labels}: expected two or more different labels, such as {example}")
    if max(chosen) >= source.num_classes:
        raise InputError(
            f"--labels={labels}: {source.name} has the labels 0 to {source.num_classes - 1}; give some of these"
        )
    called = [names[label] for label in chosen]
    for label, name in zip(chosen, called, strict=True):
        for part, y in (("training", source.train_y), ("test", source.test_y)):
            if not np.any(y == label):
                raise InputError(f"--labels={labels}: {source.name} has no {part} example of {name}; leave it out")
    number = np.full(source.num_classes, -1, np.int32)
    number[chosen] = np.arange(len(chosen))
    test = number[source.test_y] >= 0
    kept = source.training(number[source.train_y] >= 0)
    return kept._replace(
        train_y=number[kept.train_y],
        test_x=source.test_x[test],
        test_y=number[source.test_y[test]],
        num_classes=len(chosen),
        test_owner=None if source.test_owner is None else source.test_owner[test],
        labels=f"{source.label_space}: {', '.join(called)}",
        classes=tuple(called) if source.classes else (),
    )
