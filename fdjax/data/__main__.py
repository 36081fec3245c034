"""Partitions a data set, tells the clients' sizes and labels, and draws them.

python -m fdjax.data --dataset=mnist_sample --partition=dirichlet_a --alpha=0.3 --num_clients=10 --out=partition.png
python -m fdjax.data --dataset=people.csv --target=income --owner=site
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from fdjax.data import (
    PARTITIONS,
    SOURCES,
    count_labels,
    draw_partition,
    load,
    merged,
    own,
    own_partition,
    own_test_part,
    partition,
    refitted,
    split_by_client,
    write_pfllib,
)
from fdjax.errors import InputError, show_warning
from fdjax.types import Holdings, Source


def _table(rows: dict[str, str]) -> str:
    return "".join(f"\n  {name}: {text}" for name, text in rows.items())


def define_flags() -> None:
    flags.DEFINE_string("dataset", "mnist_sample", f"data set, the path of one of your own, or one of{_table(SOURCES)}")
    for name in own.OPTIONS:
        _DEFINE.get(name, flags.DEFINE_string)(name, None, "of data of your own, as for python -m fdjax")
    flags.DEFINE_string("data_dir", None, "folder of the data set's files")
    flags.DEFINE_string("cache_dir", None, "folder for decoded tfds sets; by default $FDJAX_CACHE or ~/.cache/fdjax")
    flags.DEFINE_string("writers", None, "npz with the writers of mnist's images")
    flags.DEFINE_string(
        "partition", None, "partition, by default natural where data of your own have owners, else iid; an npz of your "
        f"own, or one of{_table(PARTITIONS)}",
    )  # fmt: skip
    flags.DEFINE_integer("num_clients", None, "number of clients, by default 10 or as many as owners", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the partition", lower_bound=0)
    flags.DEFINE_string("out", None, "picture to write, such as partition.png")
    flags.DEFINE_float(
        "split_by_client", None, "merge both parts of the data, and let each client train on this share of its own",
        lower_bound=1e-9, upper_bound=1 - 1e-9,
    )  # fmt: skip
    flags.DEFINE_string("write_pfllib", None, "folder to write the partition to, as PFLlib and HtFLlib read it")
    flags.DEFINE_float("alpha", None, "of the Dirichlet partitions")
    flags.DEFINE_float("beta", None, "of quantity")
    flags.DEFINE_float("sampling_ratio", None, "of dirichlet_e")
    flags.DEFINE_integer("min_size", None, "least examples of a client: dirichlet_a, _e, _f, quantity")
    flags.DEFINE_integer("group", None, "clients per group: dirichlet_b")
    flags.DEFINE_boolean("recut", None, "of dirichlet_b: equal parts, as the released code")
    flags.DEFINE_integer("shards_per_client", None, "of shards and shards_fedntd")
    flags.DEFINE_integer("labels_per_client", None, "of labels and jiang")
    flags.DEFINE_integer("samples_per_client", None, "of scarce: a client's examples before labels are cut")
    flags.DEFINE_integer("scarce_labels", None, "of scarce: labels of a client that are cut")
    flags.DEFINE_integer("scarce_size", None, "of scarce: examples that are left of each of them")
    flags.DEFINE_boolean("merge", None, "of writer: put several writers into one client")


_OPTIONS = (
    "alpha",
    "beta",
    "sampling_ratio",
    "min_size",
    "group",
    "recut",
    "shards_per_client",
    "labels_per_client",
    "samples_per_client",
    "scarce_labels",
    "scarce_size",
    "merge",
)
_DEFINE = {
    "header": flags.DEFINE_boolean,
    "test_fraction": flags.DEFINE_float,
    **dict.fromkeys(("image_size", "length", "stride", "vocabulary"), flags.DEFINE_integer),
}
_MOST_LINES = 20


def main(argv: list[str]) -> None:
    warnings.showwarning = show_warning
    try:
        if len(argv) > 1:
            raise InputError(f"unexpected argument {argv[1]!r}; options look like --partition=iid")
        _run(flags.FLAGS)
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)  # as of every program of ours


def _run(given: flags.FlagValues) -> None:
    dataset = own.resolve(given.dataset, "dataset", SOURCES)
    source = _source(given, dataset)
    options = {name: given[name].value for name in _OPTIONS if given[name].value is not None}
    natural = given.owner is not None or own.has_owners(dataset)
    name = own_partition.resolve(given.partition or ("natural" if natural else "iid"), PARTITIONS)
    holdings = _holdings(given, name, source, options)
    if given.split_by_client is not None:
        source, holdings = split_by_client(source, holdings, given.split_by_client, given.seed)
        source = refitted(source)
    own_tests = own_test_part(
        source.train_y,
        holdings,
        source.test_y,
        source.num_classes,
        given.seed,
        train_owner=source.train_owner,
        test_owner=source.test_owner,
        only_own=given.split_by_client is not None,
    )
    table = count_labels(holdings, source.train_y, source.num_classes)
    size, kinds = holdings.count, (table > 0).sum(axis=1)
    title = " ".join(
        [source.name, own_partition.title(name), *(f"{k}={v}" for k, v in options.items()), f"seed={given.seed}"]
    )
    lines = [
        title,
        f"clients: {len(size):,}; examples held: {size.sum():,} of {len(source.train_y):,}",
        f"examples per client: min {size.min():,}, median {np.median(size):,.0f}, max {size.max():,}",
        f"labels per client: min {kinds.min()}, median {np.median(kinds):.0f}, max {kinds.max()}",
        f"own test parts: {own_tests.count.sum():,} rows of {len(source.test_y):,} test examples, "
        f"min {own_tests.count.min():,}",
    ]
    rows = zip(size[:_MOST_LINES], table, strict=False)
    lines += [f"client {k}: {n:,} examples; by label: {' '.join(map(str, row))}" for k, (n, row) in enumerate(rows)]
    if len(size) > _MOST_LINES:
        lines.append(f"and {len(size) - _MOST_LINES:,} more clients")
    if given.out:
        draw_partition(holdings, source.train_y, source.num_classes, given.out, title, source.classes)
        lines.append(f"wrote {given.out}")
    if given.write_pfllib:
        config = {"alpha": given.alpha or 0, "partition": own_partition.title(name), "non_iid": name != "iid"}
        write_pfllib(Path(given.write_pfllib).expanduser(), source, holdings, own_tests, **config)
        lines.append(f"wrote {given.write_pfllib}: train/ and test/ of {len(size):,} clients, config.json")
    sys.stdout.write("\n".join(lines) + "\n")


def _source(given: flags.FlagValues, dataset: str) -> Source:
    """The data set with its options; with split_by_client both of its parts as one."""
    options = {name: given[name].value for name in ("writers", *own.OPTIONS) if given[name].value is not None}
    if "seed" in own.options_of(dataset):
        options["seed"] = given.seed
    source = load(dataset, data_dir=given.data_dir, cache_dir=given.cache_dir, **options)
    return source if given.split_by_client is None else merged(source)


def _holdings(given: flags.FlagValues, name: str, source: Source, options: dict[str, Any]) -> Holdings:
    """Who holds what of its training examples."""
    total = len(source.train_y)
    if own_partition.is_known(name):
        return own_partition.holdings(name, np.arange(total), total)
    num_clients = given.num_clients
    if num_clients is None and name not in ("writer", "natural"):
        num_clients = 10
    owner, classes = source.train_owner, source.num_classes
    return partition(name, source.train_y, num_clients, given.seed, owner=owner, num_classes=classes, **options)


if __name__ == "__main__":
    define_flags()  # here, so that two programs can be imported side by side
    app.run(main)
