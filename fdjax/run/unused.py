"""Settings that were given and that a run would not use: each is refused, because its user believes that it does."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from fdjax import models, own
from fdjax.data import own as data_own
from fdjax.data import sources
from fdjax.errors import InputError

_LEAVE_OUT = "leave it out"


def _no_files(settings: Any) -> str:
    """A source of the package itself, which no folder holds."""
    if any(_has_files(name) for name in (settings.dataset, None if settings.proxy_dir else settings.proxy)):
        return ""
    if data_own.is_known(settings.dataset):
        return f"{settings.dataset_title} is data of your own, which lie where they are; {_LEAVE_OUT}"
    real = ", ".join(name for name in ("mnist", "fashion_mnist", "cifar10", "idx") if name in sources.SOURCES)
    return f"--dataset={settings.dataset} reads no files; give a data set that does (such as {real}), or {_LEAVE_OUT}"


def _no_cache(settings: Any) -> str:
    if any(name not in sources.PLAIN_FILES for name in _read_from_files(settings)):
        return ""
    return f"only data sets that tfds prepared are decoded and kept, not --dataset={settings.dataset}; {_LEAVE_OUT}"


def _read_from_files(settings: Any) -> list[str]:
    """Those of the run's data sets that have files."""
    return [name for name in (settings.dataset, settings.proxy) if _has_files(name)]


def _has_files(name: str | None) -> bool:
    return name in sources.SOURCES and name not in sources.WITHOUT_FILES


def _no_proxy_files(settings: Any) -> str:
    if _has_files(settings.proxy):
        return ""
    return _no_proxy(settings) or f"--proxy={settings.proxy} reads no files; {_LEAVE_OUT}"


def _no_proxy(settings: Any) -> str:
    return f"there are no proxy data; give --proxy too, or {_LEAVE_OUT}" if settings.proxy is None else ""


def _no_use_of_proxy(settings: Any) -> str:
    if settings.method.proxy is None:
        return f"{settings.method.name} uses no proxy data; {_LEAVE_OUT}"
    return _no_proxy(settings)


def _no_training_on_proxy(settings: Any) -> str:
    if "distill" in settings.method.stages or settings.method.distill_batch_size:
        return _no_proxy(settings)
    return f"{settings.method.name} trains nothing on proxy data in batches of their own; {_LEAVE_OUT}"


def _nothing_lost_by_proxy(settings: Any) -> str:
    """Proxy data that are held out of training change what every method learns from; others mean nothing to most."""
    if settings.method.proxy or settings.proxy == "held_out":
        return ""
    return f"{settings.method.name} uses no proxy data, and only held_out takes examples from it; {_LEAVE_OUT}"


def _no_distillation(settings: Any) -> str:
    if settings.method.distils:
        return ""
    return f"a round of {settings.method.name} has no distillation of its own, before which it could test; {_LEAVE_OUT}"


def _no_padding(settings: Any) -> str:
    names = {settings.model, *(name for name, _ in settings.cohorts)}
    if any(not own.is_own(name) and "padding" in models.options_of(name) for name in names):
        return ""
    able = ", ".join(name for name in models.MODELS if "padding" in models.options_of(name))
    return f"model {settings.model_title!r} has no padding; {_LEAVE_OUT}, or choose of {able}"


def _no_stragglers(settings: Any) -> str:
    return "" if settings.stragglers else f"there are no stragglers; give --stragglers too, or {_LEAVE_OUT}"


def _no_new_clients(settings: Any) -> str:
    return "" if settings.new_clients else f"there are no new clients; give --new_clients too, or {_LEAVE_OUT}"


def _no_chunks(settings: Any) -> str:
    if settings.lifting not in ("vmap", "loop"):
        return ""
    return f"--lifting={settings.lifting} takes no chunks; {_LEAVE_OUT}, or give --lifting=chunk"


def _no_kept_optimizer(settings: Any) -> str:
    if settings.optimizer_state == "fresh" or settings.method.keeps_optimizer is not None:
        return ""
    return f"optimisers of {settings.method.name} start anew in every fit, as its nets do or are several; {_LEAVE_OUT}"


def _no_private_batches(settings: Any) -> str:
    return "" if settings.privacy == "example" else f"no batches are private; give --privacy=example, or {_LEAVE_OUT}"


def _no_private_counts(settings: Any) -> str:
    return "" if settings.privacy == "means" else f"no counts are private; give --privacy=means, or {_LEAVE_OUT}"


def _no_privacy(settings: Any) -> str:
    return f"nothing is private; give --privacy too, or {_LEAVE_OUT}" if settings.privacy == "none" else ""


def _no_patience(settings: Any) -> str:
    return "" if settings.patience else f"nothing waits for a better metric; give --patience too, or {_LEAVE_OUT}"


def _nothing_stops(settings: Any) -> str:
    if settings.patience or settings.stop_at_accuracy:
        return ""
    return f"nothing goes by a metric; give --patience or --stop_at_accuracy too, or {_LEAVE_OUT}"


def _no_option_of_data(name: str) -> Callable[[Any], str]:
    """Why an option that some files of a user's own have is not used."""

    def why_not(settings: Any) -> str:
        if name in data_own.options_of(settings.dataset):
            return ""
        having = " or ".join(
            reader.what for reader in data_own.READERS.values() if name in data_own.keywords(reader.read)
        )
        return f"--dataset={settings.dataset_title} has no such option, only {having} of your own; {_LEAVE_OUT}"

    return why_not


_WHY_NOT: Mapping[str, Callable[[Any], str]] = MappingProxyType(
    {
        "data_dir": _no_files,
        "cache_dir": _no_cache,
        "proxy": _nothing_lost_by_proxy,
        "proxy_dir": _no_proxy_files,
        "proxy_size": _no_proxy,
        "proxy_per_round": _no_use_of_proxy,
        "distill_batch_size": _no_training_on_proxy,
        "before_distillation": _no_distillation,
        "padding": _no_padding,
        "straggler_work": _no_stragglers,
        "fine_tune_epochs": _no_new_clients,
        "chunk": _no_chunks,
        "optimizer_state": _no_kept_optimizer,
        "batch_accounting": _no_private_batches,
        "count_noise_multiplier": _no_private_counts,
        "min_delta": _no_patience,
        "stop_metric": _nothing_stops,
        **{name: _no_option_of_data(name) for name in data_own.OPTIONS},
        **dict.fromkeys(("clip", "noise_multiplier", "delta", "target_epsilon", "accountant"), _no_privacy),
    }
)  # why settings like these do not use a setting; an empty text if they do


def check_unused(settings: Any, explicit: Collection[str] = ()) -> None:
    """Raises InputError for a setting, or a hyperparameter, that is not at its default and that the run does not use.

    `settings` are `Settings` whose fields have been checked one by one. Of those in `explicit`, a default is refused
    too, unless it says that there is to be nothing.
    """
    for name, why_not in _WHY_NOT.items():
        value = getattr(settings, name)
        if (value != getattr(type(settings), name) or (name in explicit and value)) and (reason := why_not(settings)):
            raise InputError(f"--{name}={value}: {reason}")
    method, options = settings.method, settings.method.choices(dict(settings.options))
    given = method.values(dict(settings.hparams))
    for name, record in method.hparams.items():
        option, *values = record.only or ("",)
        default = given[record.default] if isinstance(record.default, str) else record.default
        if option and given[name] != default and options[option] not in values:
            raise InputError(
                f"--{name}={given[name]:g}: {method.name} uses it with --{option}={' or '.join(values)} alone, not "
                f"{options[option]}; {_LEAVE_OUT}"
            )
    back = method.looks_back
    if back and options[back] != method.options[back][0] and int(options[back]) > settings.rounds:
        raise InputError(
            f"--{back}={options[back]}: more past rounds than the run has, with --rounds={settings.rounds}; give "
            "at most as many"
        )
    if given.get("local_steps") and given["local_epochs"] != method.hparams["local_epochs"].default:
        raise InputError(
            f"--local_steps={given['local_steps']:g} and --local_epochs={given['local_epochs']:g}: steps are in place "
            "of epochs; give one of them"
        )
