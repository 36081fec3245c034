"""Settings of what the clients learn from, and of who holds what of it."""

import dataclasses
import functools

from fdjax import data
from fdjax.run.setting import setting_field

_data = functools.partial(setting_field, role="data")
_partition = functools.partial(setting_field, None, role="partition")


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The settings of data, which `Settings` has among its own."""

    dataset: str = _data("mnist_sample", "the data set", choices=data.SOURCES, noun="data set")
    data_dir: str | None = _data(None, "folder of the data set's files", str, resumable=True, folder=True)
    cache_dir: str | None = _data(
        None, "folder for decoded tfds sets; default $FDJAX_CACHE or ~/.cache/fdjax", str, resumable=True, folder=True
    )
    labels: str | None = _data(None, "only examples of these labels, which become 0, 1, ...: e.g. 0,2,20", str)
    writers: str | None = _data(
        None, "npz with the writers of mnist's images (train_writer, test_writer)", str, resumable=True, folder=True
    )

    partition: str | None = _data(
        None, "who holds what; default natural for synthetic, else iid", str, choices=data.PARTITIONS
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
        None, "proxy data, by default none: the name of a data set, or a kind", str,
        choices={**data.PROXIES, **data.SOURCES}, noun="proxy data",
    )  # fmt: skip
    proxy_dir: str | None = _data(
        None, "folder of the proxy data's files; default data_dir", str, resumable=True, folder=True
    )
    proxy_size: int = _data(1000, "number of proxy examples", low=1)

    @property
    def partition_name(self) -> str:
        """The partition that `partition` names or defaults to."""
        return self.partition or ("natural" if self.dataset == "synthetic" else "iid")
