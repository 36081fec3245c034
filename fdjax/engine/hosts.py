"""Several hosts as one simulation: the same program, started once on each, with jax.distributed."""

import contextlib
import json
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fdjax.errors import InputError

_SECONDS = 60  # to wait for the other hosts
_ROOM = 1 << 15  # bytes that a host's settings may take


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the cluster at `coordinator` (host:port); without it, nothing; "auto" asks the cluster's own environment.

    Call it before the first use of a device. Raises InputError for flags that do not fit together and for a cluster
    that cannot be joined.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise InputError("--num_processes and --process_id need --coordinator=host:port, the same on every host")
        return
    if coordinator == "auto":
        given: dict[str, Any] = {}
    else:
        if num_processes is None or process_id is None:
            raise InputError(f"--coordinator={coordinator} needs --num_processes and --process_id, or be auto")
        if num_processes < 1:
            raise InputError(f"--num_processes={num_processes}: expected at least 1")
        if not 0 <= process_id < num_processes:
            raise InputError(
                f"--process_id={process_id}: expected 0 to {num_processes - 1} for {num_processes} processes"
            )
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise InputError(f"--coordinator={coordinator}: expected host:port, e.g. 10.0.0.1:9876, or auto")
        if process_id:
            _reach(host.strip("[]"), int(port))
        sys.stderr.write(f"process {process_id} of {num_processes} waits {_SECONDS} s for all to join {coordinator}\n")
        given = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
    try:
        jax.distributed.initialize(**given, initialization_timeout=_SECONDS)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--coordinator={coordinator}: cannot join the other hosts: {reason}") from None


def _reach(host: str, port: int) -> None:
    """Until process 0 listens there, because JAX, when it does not, aborts the process with a dump of its stack."""
    end = time.monotonic() + _SECONDS
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() > end:
                raise InputError(
                    f"--coordinator={host}:{port}: no process 0 answers there ({error.strerror or error}); start one, "
                    "and give the same --coordinator to all"
                ) from None
            time.sleep(0.2)


def is_first() -> bool:
    """Whether this process speaks and writes files for all."""
    return jax.process_index() == 0


def wait() -> None:
    """Until every host is here. Raises InputError if one does not come."""
    if jax.process_count() > 1:
        with _others():
            multihost_utils.sync_global_devices("fdjax")


@contextlib.contextmanager
def _others():
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"another host stopped or does not answer; its own message says why ({reason})") from None


def any_of(here: bool) -> bool:
    """Whether it is so on any host, known to all of them, so that they save and stop together."""
    if jax.process_count() == 1:
        return here
    with _others():
        return bool(np.any(multihost_utils.process_allgather(np.array([here]))))


def first_says(number: int) -> int:
    """The first host's number, on all of them."""
    if jax.process_count() == 1:
        return number
    with _others():
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@contextlib.contextmanager
def all_or_none():
    """A block without exchange between hosts that ends in InputError on all of them if it does on one."""
    failed = None
    try:
        yield
    except InputError as error:
        failed = error
    if any_of(failed is not None):
        raise failed or InputError("another host cannot go on; its own message says why")


def check_agreement(settings: dict[str, Any], free: tuple[str, ...]) -> None:
    """Raises InputError on every host if `settings` differ between hosts, `free` names aside."""
    if jax.process_count() == 1:
        return
    encoded = json.dumps({k: v for k, v in settings.items() if k not in free}, sort_keys=True).encode()
    if len(encoded) > _ROOM:
        raise InputError(f"settings of {len(encoded)} bytes cannot be compared between hosts; shorten them")
    padded = np.frombuffer(encoded.ljust(_ROOM), np.uint8)
    with _others():
        gathered = np.asarray(multihost_utils.process_allgather(padded))
    everyone = [json.loads(bytes(row)) for row in gathered]
    for host, theirs in enumerate(everyone):
        other = sorted(name for name in theirs if theirs[name] != everyone[0].get(name))
        if other:
            first, here = everyone[0].get(other[0]), theirs[other[0]]
            raise InputError(
                f"hosts disagree: --{other[0]} is {first} on process 0 and {here} on process {host}; "
                "start the same command on every host"
            )
