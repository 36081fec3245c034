"""Data sets on the host and how clients share them; nothing here touches a device."""

from fdjax.data.arrays import from_arrays
from fdjax.data.checked import checked
from fdjax.data.client_split import merged, split_by_client
from fdjax.data.held_out import take_validation
from fdjax.data.holdings import count_labels
from fdjax.data.labels import of_labels
from fdjax.data.own_test import own_test_part
from fdjax.data.partitions import PARTITIONS, partition
from fdjax.data.pfllib import write_folder as write_pfllib
from fdjax.data.picture import draw_partition
from fdjax.data.proxy import KINDS as PROXIES
from fdjax.data.proxy import Proxy, take_proxy
from fdjax.data.sources import SOURCES, load
from fdjax.data.statistics import refitted

__all__ = [
    "PARTITIONS", "PROXIES", "SOURCES", "Proxy", "checked", "count_labels", "draw_partition", "from_arrays",
    "load", "merged", "of_labels",
    "own_test_part", "partition", "refitted", "split_by_client", "take_proxy", "take_validation", "write_pfllib",
]  # fmt: skip
