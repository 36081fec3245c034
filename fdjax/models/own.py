"""A user's own nets: a class or function in a file, or a value from Python, in the place of a name of the zoo.

A net is a linen module or its class, an nnx module's class, a function of the number of classes that returns either, or
a `Model`. A class or function is given `num_classes`, `input_shape`, `tokens`, `categories` and (nnx) `rngs`, as far as
it takes them.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from fdjax import models, own
from fdjax.errors import InputError, a_kind, unknown
from fdjax.models import MODELS, NUMBERS, Features, ModelEntry
from fdjax.types import Model

_OWN = own.Registry("model")
_ZOO = dict(MODELS)  # as it is here: what is put into MODELS later is somebody's own


def resolve(given: Any) -> str:
    """The name by which settings hold a net.

    Args:
      given: a name of the zoo, path/to/net.py:Net, a net as a value, or what this function returned.

    Raises:
      InputError: a name that nothing has, a file that does not import or has no such net, a value that is no net.
    """
    if not isinstance(given, str):
        return _OWN.add_value(_called(given), _checked(given, "--model"))
    if given in MODELS:
        entry = MODELS[given]
        return given if _ZOO.get(given) is entry else _OWN.add_value(given, entry)
    if own.is_file(given):
        return _of_file(given)
    if own.is_own(given):
        return _OWN[given] and given
    path = Path(f"{given.partition(':')[0]}.py").expanduser()
    if path.is_file():
        raise InputError(f"unknown model {given!r}; did you mean the file, --model={path}:{given.partition(':')[2]}?")
    raise unknown("model", given, MODELS)


def resolve_list(given: Any) -> str:
    """The same of the nets of cohorts: "name:clients,path/to/net.py:Net:clients", or pairs of a net and clients."""
    if isinstance(given, str):
        parts = [part.strip().rpartition(":") for part in given.split(",")]
        if not all(name and size.isdecimal() for name, _, size in parts):
            return given  # whoever takes it apart says what is wrong with it
        pairs: Sequence[Any] = [(name.strip(), size) for name, _, size in parts]
    else:
        pairs = given
        good = isinstance(given, Sequence) and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in given)
        if not good or not given:
            raise InputError(f"--models={given!r}: expected pairs of a net and clients, e.g. [(net, 3), ('2nn', 7)]")
    return ",".join(f"{resolve(net)}:{size}" for net, size in pairs)


def title(name: str) -> str:
    """How tables and errors call a net: by its own name, and the file it is from."""
    return _OWN[name].titled(name) if own.is_own(name) else name


def file_of(name: str) -> str:
    """The file that a net is from; empty for those of the zoo."""
    return _OWN[name].file if own.is_own(name) else ""


def build(
    name: str, input_shape: Sequence[int], num_classes: int, features: Features = NUMBERS, **options: Any
) -> Model:
    """As `models.build`, of a net by the name that settings hold."""
    if not own.is_own(name):
        return models.build(name, input_shape, num_classes, features, **options)
    return wrap(_OWN[name].value, input_shape, num_classes, _label(name), features, **options)


def _label(name: str) -> str:
    """A title that no other net of this process has."""
    alike = [other for other in _OWN if title(other) == title(name)]
    return title(name) if len(alike) == 1 else name


def wrap(
    thing: Any, input_shape: Sequence[int], num_classes: int, name: str, features: Features = NUMBERS, **options: Any
) -> Model:
    """A net as a `Model`. Raises InputError if it cannot take such inputs or give logits of so many classes."""
    shape = tuple(input_shape)
    try:
        model = _model(thing, shape, num_classes, name, features, options)
        x = model.example(shape, 2)
        out = jax.eval_shape(lambda key, x: model.apply(model.init(key), x), jax.random.key(0), x)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model {name!r} on inputs {shape}: {own.told(error)}") from error
    if getattr(out, "shape", None) != (2, num_classes):
        raise InputError(
            f"model {name!r} returned {out} for x {x.shape}, expected logits [B, {num_classes}]: the data have "
            f"{num_classes} classes, which a net is told as num_classes if it takes that"
        )
    return model


def _model(
    thing: Any, shape: tuple[int, ...], classes: int, name: str, features: Features, options: dict[str, Any]
) -> Model:
    if isinstance(thing, Model):
        return thing._replace(name=name, tokens=features.tokens)
    if isinstance(thing, nn.Module):
        return models.from_linen(thing, shape, name, features.tokens)
    if isinstance(thing, ModelEntry):
        return models.of_entry(thing, shape, classes, name, features, options)
    given = _arguments(thing, shape, classes, name, features)
    if "rngs" in _signature(thing).parameters or (isinstance(thing, type) and issubclass(thing, nnx.Module)):
        make: Callable[..., Any] = functools.partial(thing, *given.args, **given.kwargs)
        return models.from_nnx(lambda rngs: make(rngs=rngs), shape, name, features.tokens)
    made = thing(*given.args, **given.kwargs)
    if isinstance(made, nnx.Module):
        raise InputError(f"model {name!r} made an nnx module without being given rngs; let it take rngs")
    if not isinstance(made, nn.Module | Model):
        raise InputError(f"model {name!r} made {a_kind(made)}, expected a linen module or a Model")
    return _model(made, shape, classes, name, features, {})


def _signature(make: Any) -> inspect.Signature:
    """What a class or function takes; a class of nnx is made by its metaclass, which takes anything."""
    if not isinstance(make, type):
        return inspect.signature(make)
    taken = inspect.signature(make.__init__)
    return taken.replace(parameters=list(taken.parameters.values())[1:])


def _arguments(
    make: Any, shape: tuple[int, ...], classes: int, name: str, features: Features
) -> inspect.BoundArguments:
    """What a class or function is called with. Raises InputError for one that wants more than is known."""
    signature = _signature(make)
    known = {"num_classes": classes, "input_shape": shape, **features._asdict()}
    accepted = {n: v for n, v in known.items() if n in signature.parameters}
    wanted = [
        n
        for n, p in signature.parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n not in {*known, "rngs"}
    ]
    if len(wanted) == 1 and not accepted and not isinstance(make, type):  # lambda k: Net(k)
        return signature.bind_partial(classes)
    if wanted:
        raise InputError(
            f"model {name!r} wants {', '.join(wanted)}, of which nobody knows the value: give defaults, or a function "
            "of num_classes that returns the net"
        )
    return signature.bind_partial(**accepted)


def _of_file(given: str) -> str:
    """The name of a net in a file."""
    path, _, wanted = given.partition(":")
    file = own.load(path, "model")
    thing = vars(file.module).get(wanted)
    if wanted not in vars(file.module):
        nets = [f"{path}:{name}" for name in file.names() if _is_net(vars(file.module)[name])]
        has = f"give {' or '.join(nets)}" if nets else f"it has {', '.join(file.names()) or 'nothing'}, and no net"
        raise InputError(f"--model={given} {f'has no {wanted}' if wanted else 'names no net of the file'}; {has}")
    _checked(thing, f"--model={given}")
    return _OWN.add(wanted, file.content_of(wanted), file.thing(thing))


def _is_net(thing: Any) -> bool:
    if isinstance(thing, type):
        return issubclass(thing, nn.Module | nnx.Module)
    return isinstance(thing, nn.Module | Model)


def _checked(thing: Any, where: str) -> Any:
    """The thing. Raises InputError for what cannot be a net."""
    if isinstance(thing, nnx.Module):
        raise InputError(
            f"{where} is an nnx module with weights; give its class, or a function of rngs that returns it"
        )
    if _is_net(thing) or isinstance(thing, ModelEntry) or (callable(thing) and not isinstance(thing, type)):
        return thing
    what = f"the class {thing.__name__}" if isinstance(thing, type) else a_kind(thing)
    raise InputError(
        f"{where} is {what}, expected a linen module or its class, an nnx module's class, a function of num_classes "
        "that returns one, or a Model"
    )


def _called(thing: Any) -> str:
    """What a net that was given as a value calls itself."""
    if isinstance(thing, Model):
        return thing.name
    return getattr(thing, "__name__", type(thing).__name__)
