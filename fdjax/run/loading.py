"""From settings to data on the host: the data set, who holds what of it, and the proxy data."""

from typing import Any, NamedTuple

import numpy as np

from fdjax import data
from fdjax.data import own as own_data
from fdjax.data import own_partition
from fdjax.data.holdings import from_counts
from fdjax.errors import InputError
from fdjax.run.settings import Settings, cohorts_of, of_role
from fdjax.types import Holdings, Source


class Loaded(NamedTuple):
    """Data of a run, on the host."""

    source: Source  # without the examples that became proxy or validation data
    holdings: Holdings
    proxy: data.Proxy | None

    @property
    def classes(self) -> int:
        """K: the source's labels, and those that only proxy data have."""
        return self.source.num_classes + (0 if self.proxy is None else self.proxy.more_labels)


def load(settings: Settings) -> Loaded:
    """The data set, who holds what of it, and the proxy data.

    Raises InputError for settings that no data fit, and for data that do not fit into the host's memory.
    """
    try:
        return _load(settings)
    except MemoryError as error:
        raise InputError(
            f"--dataset={settings.dataset_title} does not fit into memory here ({error}); give fewer clients or "
            "examples"
        ) from None


def _load(settings: Settings) -> Loaded:
    of_source, of_partition = _options(settings)
    source = data.load(settings.dataset, data_dir=settings.data_dir, cache_dir=settings.cache_dir, **of_source)
    source = data.checked(source)
    _check_numbers(settings, source)
    if settings.split_by_client is not None:
        source = data.merged(source)
    total = len(source.train_y)
    source = source._replace(train_index=np.arange(total, dtype=np.int32))
    owners = None if source.train_owner is None else int(source.train_owner.max()) + 1
    if settings.labels is not None:
        source = data.of_labels(source, settings.labels)
    if not settings.standardize:
        source = source._replace(mean=(0.0,), std=(1.0,))
    source = _fraction(source, settings.train_fraction, settings.data_seed)
    source, proxy = _take_proxy(settings, source)
    source = data.take_validation(source, settings.validation_fraction, settings.data_seed)
    holdings = _partition(settings, source, owners, total, of_partition)
    if settings.split_by_client is not None:
        source, holdings = data.split_by_client(source, holdings, settings.split_by_client, settings.data_seed)
    if settings.standardize and len(source.train_y) != total:
        source = data.refitted(source)
    if settings.method.pooled:
        holdings = from_counts(np.asarray(holdings.order), np.asarray(holdings.count).sum(keepdims=True))
    return Loaded(source, holdings, proxy)


def _partition(settings: Settings, source: Source, owners: int | None, total: int, options: dict[str, Any]) -> Holdings:
    """Who holds what of a source that is what is left of `total` training examples and of so many owners."""
    if own_partition.is_known(settings.partition):
        if options:
            raise InputError(f"--{min(options)}: --partition={settings.partition_title} is as it is; leave it out")
        once = settings.privacy in ("example", "means")
        assert source.train_index is not None
        holdings = own_partition.holdings(settings.partition_name, source.train_index, total, once=once)
        if settings.num_clients not in (None, len(holdings.count)):
            raise InputError(
                f"--num_clients={settings.num_clients}, but --partition={settings.partition_title} has "
                f"{len(holdings.count)} clients; give as many, or none"
            )
        return holdings
    return data.partition(
        settings.partition_name,
        source.train_y,
        _clients(settings),
        settings.data_seed,
        owner=source.train_owner,
        owners=owners,  # also those of which nothing is left, so that natural clients stay who they are
        num_classes=source.num_classes,
        **options,
    )


def _check_numbers(settings: Settings, source: Source) -> None:
    """Raises InputError for tokens and codes where the method computes with inputs, which it can with numbers alone."""
    method = settings.method
    with_option = next((choice for choice in settings.options if choice in method.needs_numbers_for), None)
    if not (source.vocabulary or any(source.categories)) or not (method.needs_numbers or with_option):
        return
    also = f" with --{'='.join(with_option)}" if with_option else ""
    what, instead = ("tokens", "") if source.vocabulary else ("codes of categories", "give categories=one_hot, or ")
    raise InputError(
        f"--dataset={settings.dataset_title}: {method.name}{also} makes, changes or compares inputs as numbers, but "
        f"these are {what}; {instead}choose another {with_option[0] if with_option else 'method'}"
    )


def _options(settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of the data set and those of the partition, as far as they are given."""

    def given(names):
        return {name: getattr(settings, name) for name in names if getattr(settings, name) is not None}

    of_source = given(("writers", "iid", "samples_per_client", *own_data.OPTIONS))
    if "seed" in own_data.options_of(settings.dataset):
        of_source["seed"] = settings.data_seed
    if "standardize" in own_data.options_of(settings.dataset):
        of_source["standardize"] = settings.standardize
    of_partition = given(sorted(of_role("partition")))
    if settings.partition_name == "scarce" and "samples_per_client" in of_source:
        of_partition["samples_per_client"] = of_source.pop("samples_per_client")
    if settings.dataset == "synthetic":
        ours = not own_partition.is_known(settings.partition)
        if ours and settings.partition_name.startswith(("dirichlet", "quantity")):
            raise InputError(
                f"--partition={settings.partition_name} of synthetic: --alpha and --beta would be both the data's and "
                "the partition's; use natural or iid"
            )
        of_source |= {name: of_partition.pop(name) for name in ("alpha", "beta") if name in of_partition}
        of_source |= given(("num_clients",)) | {"seed": settings.data_seed}
    return of_source, of_partition


def _clients(settings: Settings) -> int | None:
    """The number of clients that the partition is asked for; None if the data know it."""
    if settings.partition_name == "natural" and settings.dataset == "synthetic":
        return None  # it was asked of the data set
    if settings.num_clients is None and settings.partition_name not in ("writer", "natural"):
        return 30 if settings.dataset == "synthetic" else 10
    return settings.num_clients


def _fraction(source: Source, fraction: float, seed: int) -> Source:
    """The source with a random fraction of its training examples."""
    if fraction == 1:
        return source
    size = len(source.train_y)
    keep = np.sort(np.random.default_rng(seed).choice(size, max(1, round(fraction * size)), replace=False))
    return source.training(keep)


def _take_proxy(settings: Settings, source: Source) -> tuple[Source, data.Proxy | None]:
    """The source without what it gave up for proxy data, and the proxy data, labelled if the method needs labels."""
    if settings.proxy is None:
        return source, None
    source, proxy = data.take_proxy(
        source,
        settings.proxy,
        settings.proxy_size,
        settings.data_seed,
        labels=settings.labels,
        join_labels=settings.method.joins_labels,
        header=settings.header,
        data_dir=settings.proxy_dir or settings.data_dir,
        cache_dir=settings.cache_dir,
    )
    method = settings.method
    for_option = next((choice for choice in settings.options if choice in method.labels_for), None)
    if (method.proxy == "labelled" or for_option) and not proxy.labelled:
        with_option = f" with --{'='.join(for_option)}" if for_option else ""
        raise InputError(
            f"{method.name}{with_option} needs labelled proxy data, but --proxy={settings.proxy_title} has none of the "
            f"{source.num_classes} labels of {source.name}; give --proxy=held_out, or a data set of the same labels"
        )
    return source, proxy


def cohort_sizes(settings: Settings, clients: int) -> tuple[tuple[str, int], ...]:
    """(model, clients) of each cohort, in order. Raises InputError unless they add up."""
    if settings.models is None:
        return ((settings.model, clients),)
    cohorts = cohorts_of(settings.models)
    total = sum(size for _, size in cohorts)
    if total != clients:
        raise InputError(f"--models={settings.models} names {total} clients, but the partition has {clients}")
    return cohorts
