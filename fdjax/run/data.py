"""Settings of what the clients learn from, and of who holds what of it."""

import dataclasses
import functools
from typing import Any

from fdjax import data
from fdjax.data import own as own_data
from fdjax.data import own_partition
from fdjax.data.encoding import CATEGORIES, MISSING
from fdjax.data.proxy import DEFAULT_SIZE
from fdjax.data.texts import UNITS
from fdjax.run.setting import setting_field

_data = functools.partial(setting_field, role="data")
DATA_FILES = ("dataset", "proxy", "test_data", "partition")  # settings that may name a user's own file of data
_partition = functools.partial(setting_field, None, role="partition")
_file_option = functools.partial(setting_field, None, role="data")


def _resolve_proxy(given: Any) -> str:
    return own_data.resolve(given, "proxy", {**data.PROXIES, **data.SOURCES})


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The settings of data, which `Settings` has among its own."""

    dataset: str = _data(
        "mnist_sample", "the data set, or the path of one of your own", choices=data.SOURCES, noun="data set",
        resolve=lambda given: own_data.resolve(given, "dataset", data.SOURCES),
    )  # fmt: skip
    data_dir: str | None = _data(None, "folder of the data set's files", str, resumable=True, folder=True)
    cache_dir: str | None = _data(
        None, "folder for decoded tfds sets; default $FDJAX_CACHE or ~/.cache/fdjax", str, resumable=True, folder=True
    )
    labels: str | None = _data(None, "only examples of these labels, which become 0, 1, ...: e.g. 0,2,20", str)
    target: str | None = _file_option("table of your own: the column of labels", str)
    owner: str | None = _file_option("table: the column of who holds each row, whose partition is natural", str)
    ignore: str | None = _file_option("table: columns that are no inputs, with commas between them", str)
    row_id: str | None = _file_option("table: a column of ids, no input, in which none should be there twice", str)
    header: bool | None = _file_option(
        "table: whether the first row of a CSV names the columns, which are 0, 1, ... otherwise; default: if it has no "
        "numbers", bool,
    )  # fmt: skip
    categories: str | None = _file_option("table: what texts become; default one_hot", str, choices=CATEGORIES)
    missing: str | None = _file_option("table: what becomes of missing values; default refuse", str, choices=MISSING)
    image_size: int | None = _file_option("images of your own: height and width that they become", int, low=1)
    unit: str | None = _file_option("texts of your own: what a token is; default character", str, choices=UNITS)
    length: int | None = _file_option(
        "texts: tokens of a sequence, whose label is the next one; default 80", int, low=1
    )
    stride: int | None = _file_option("texts: tokens from one sequence to the next; default 1", int, low=1)
    vocabulary: int | None = _file_option(
        "texts: number of tokens that are known, by frequency; default all; a folder of PFLlib: its inputs are so many "
        "tokens, not numbers",
        int,
        low=2,
    )
    test_data: str | None = _file_option(
        "file or folder of the test part of your own data", str,
        resolve=lambda given: own_data.resolve(given, "test_data"),
    )  # fmt: skip
    test_fraction: float | None = _file_option(
        "share of your own data that is tested on, where they come without a test part; default 0.2", float,
        low=0, above=True, high=1, below=True,
    )  # fmt: skip
    test_by: str | None = _file_option(
        "of what that is a share; default label", str,
        choices={"label": "of the examples of every label", "owner": "of every owner's examples"},
    )  # fmt: skip
    split_by_client: float | None = _data(
        None, "share of each client's examples that it trains on, the rest being its test, where both parts of the "
        "data set are merged before the partition (PFLlib's 0.75); default: the data set's own parts", float,
        low=0, above=True, high=1, below=True,
    )  # fmt: skip
    writers: str | None = _data(
        None, "npz with the writers of mnist's images (train_writer, test_writer)", str, resumable=True, folder=True
    )

    partition: str | None = _data(
        None,
        "who holds what; default natural where the data have owners, else iid; or an npz of your own",
        str,
        choices=data.PARTITIONS,
        resolve=lambda given: own_partition.resolve(given, data.PARTITIONS),
    )
    num_clients: int | None = _data(
        None, "number of clients; default 30 for synthetic, all for writer, else 10", int, low=1
    )
    alpha: float | None = _partition("concentration of a Dirichlet partition, or alpha of synthetic", float, low=0)
    beta: float | None = _partition("concentration of the quantity partition, or beta of synthetic", float, low=0)
    iid: bool | None = _data(None, "synthetic: whether all clients draw from one distribution", bool)
    samples_per_client: int | None = _data(
        None, "synthetic: examples of every client, instead of lognormally many; scarce: before labels are cut", int,
        low=1,
    )  # fmt: skip
    shards_per_client: int | None = _partition("partitions shards and shards_fedntd", int, low=1)
    labels_per_client: int | None = _partition("partitions labels and jiang", int, low=1)
    min_size: int | None = _partition("least examples of a client: dirichlet_a, _e, _f, quantity", int, low=0)
    scarce_labels: int | None = _partition("partition scarce: labels of a client that are cut", int, low=0)
    scarce_size: int | None = _partition("partition scarce: examples that are left of each of them", int, low=0)
    merge: bool | None = _partition("partition writer: several writers to a client", bool)
    standardize: bool = _data(True, "inputs to mean 0 and std 1 per channel; otherwise images are in [0, 1]")
    train_fraction: float = _data(
        1.0, "fraction of the training examples that is used, drawn by partition_seed", low=0, above=True, high=1
    )
    validation_fraction: float = _data(
        0.0, "fraction of these, less proxy data, that nobody trains on and every evaluation tests too; 0: none",
        low=0, high=1, below=True,
    )  # fmt: skip
    partition_seed: int | None = _data(
        None, "seed of the partition and of synthetic data; default: seed", int, low=0, high=2**63 - 1
    )

    proxy: str | None = _data(
        None, "proxy data, by default none: the name of a data set, the path of one of your own, or a kind", str,
        choices={**data.PROXIES, **data.SOURCES}, noun="proxy data", resolve=_resolve_proxy,
    )  # fmt: skip
    proxy_dir: str | None = _data(
        None, "folder of the proxy data's files; default data_dir", str, resumable=True, folder=True
    )
    proxy_size: int = _data(DEFAULT_SIZE, "number of proxy examples", low=1)

    @property
    def partition_name(self) -> str:
        """The partition that `partition` names or defaults to: `natural` where the data say who holds what."""
        natural = self.dataset == "synthetic" or self.owner is not None or own_data.has_owners(self.dataset)
        return self.partition or ("natural" if natural else "iid")

    @property
    def dataset_title(self) -> str:
        """The data set as tables call it, with the file of a user's own."""
        return own_data.title(self.dataset)

    @property
    def partition_title(self) -> str:
        """The partition likewise."""
        return own_partition.title(self.partition_name)

    @property
    def proxy_title(self) -> str:
        """The proxy data likewise; empty without."""
        return own_data.title(self.proxy or "")

    @property
    def data_files(self) -> dict[str, str]:
        """The files that a user's own data came from, by the values of the settings that name them."""
        files = {name: own_data.file_of(name) for name in (self.dataset, self.proxy, self.test_data)}
        files[self.partition] = own_partition.file_of(self.partition)
        return {name: file for name, file in files.items() if name and file}
