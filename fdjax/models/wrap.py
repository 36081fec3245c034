"""Modules of flax, linen and nnx, as a `Model`: their parts, their training mode and their running statistics."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from fdjax import keys
from fdjax.errors import InputError
from fdjax.models.notice import notice_plain_conv
from fdjax.types import STATISTICS, Model, PyTree

MODES = {"train": True, "training": True, "deterministic": False, "use_running_average": False}  # values for training

Part = Callable[[Any, Any, bool], Any]  # (module, x, train) -> y: a module's call, or one of its blocks
Call = Callable[[Part, PyTree, Any, jax.Array | None], Any]  # (part, params, x, key) -> y


def from_linen(module: nn.Module, input_shape: Sequence[int], name: str | None = None, tokens: int = 0) -> Model:
    """Wrap a linen module as a `Model`; a line is logged if its convolutions will be slow on this device.

    Args:
      module: called as module(x) on x `[B, *input_shape]`. Where its call, or a method below, has an argument `train`,
        `training`, `deterministic` or `use_running_average`, that says whether it trains; a module without one is the
        same in both modes. A method `blocks`, which returns functions of h, or methods `features(x)` and `head(h)`
        give it parts; one after another they must be the call.
      input_shape: one example's shape.
      name: how tables call it; the module's class if absent.
      tokens: inputs are int32 tokens below this number; 0: they are float32.

    Returns:
      A `Model`; its parameters are the module's collection "params", with BatchNorm's "batch_stats" beside them.

    Raises:
      InputError: the module cannot take such inputs, keeps other state, draws random numbers or changes statistics
        when tested, or does not return logits `[B, K]`.
    """
    shape = tuple(input_shape)

    def init(key: jax.Array) -> PyTree:
        mode: dict[str, Any] = _mode(module.__call__, train=False)
        variables = dict(module.init(key, jnp.zeros((1, *shape), jnp.int32 if tokens else jnp.float32), **mode))
        params = variables.pop("params", {})
        if extra := sorted(set(variables) - {STATISTICS}):
            raise InputError(f"it keeps {', '.join(extra)} besides parameters and {STATISTICS}; use a module without")
        return {**params, **variables} if variables else params

    def call(part: Part, params: PyTree, x: Any, key: jax.Array | None) -> Any:
        train, statistics = key is not None, params.get(STATISTICS)
        variables = {"params": {name: value for name, value in params.items() if name != STATISTICS}}
        if statistics is not None:
            variables[STATISTICS] = jax.lax.stop_gradient(statistics)
        # linen falls back to the stream "params" for every random number that a module asks for, whatever its stream.
        more: dict[str, Any] = {"rngs": {"params": key}, "mutable": [STATISTICS]} if train else {}
        out = module.apply(variables, x, method=lambda module, x: part(module, x, train), **more)
        if not train:
            return out
        return out[0] if statistics is None else _reporting(out[0], statistics, out[1][STATISTICS])

    return _model(name or type(module).__name__, shape, type(module), init, call, tokens)


def from_nnx(
    make: Callable[[nnx.Rngs], nnx.Module], input_shape: Sequence[int], name: str | None = None, tokens: int = 0
) -> Model:
    """Wrap an nnx module as a `Model`, as `from_linen` does a linen one.

    Args:
      make: makes the module from `nnx.Rngs`: once to look at it, and at every init.
      input_shape: one example's shape.
      name: how tables call it; the module's class if absent.
      tokens: as of `from_linen`.

    Returns:
      A `Model`; its parameters are the module's `nnx.Param`, with its `nnx.BatchStat` below "batch_stats". In training
      mode the module's `train()` was called, else its `eval()`; its random keys come from the model's key.

    Raises:
      InputError: as of `from_linen`.
    """
    try:
        module = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"from_nnx needs a function of nnx.Rngs that makes a module: {_first_line(error)}") from error
    label = name or type(module).__name__
    kinds = nnx.Param, nnx.BatchStat, nnx.RngState
    graph, *states, rest = nnx.split(module, *kinds, ...)
    if found := sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)}):
        raise InputError(f"model {label!r} keeps {', '.join(found)} besides Param and BatchStat; use a module without")

    def init(key: jax.Array) -> PyTree:
        _, *drawn = nnx.split(make(nnx.Rngs(key)), *kinds)
        params, statistics = map(nnx.to_pure_dict, drawn[:2])
        return {**params, STATISTICS: statistics} if statistics else params

    def call(part: Part, params: PyTree, x: Any, key: jax.Array | None) -> Any:
        train, statistics = key is not None, params.get(STATISTICS, {})
        held = {name: value for name, value in params.items() if name != STATISTICS}
        drawn = _streams(states[2], jax.random.key(0) if key is None else key)
        given = held, jax.lax.stop_gradient(statistics), drawn
        filled = (_filled(state, values) for state, values in zip(states, given, strict=True))
        module = nnx.merge(graph, *filled, copy=True)
        (module.train if train else module.eval)()
        y = part(module, x, train)
        if not train or not statistics:
            return y
        return _reporting(y, statistics, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))

    return _model(label, tuple(input_shape), type(module), init, call, tokens)


def _filled(state: nnx.State, values: PyTree) -> nnx.State:
    """The state with other values."""
    state = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(state, values)
    return state


def _streams(state: nnx.State, key: jax.Array) -> PyTree:
    """The values of a module's random streams: a key each, drawn from `key`, and a count of 0."""
    leaves, structure = jax.tree.flatten(nnx.to_pure_dict(state))
    return jax.tree.unflatten(
        structure,
        [
            keys.stream(key, "stream", i) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros_like(leaf)
            for i, leaf in enumerate(leaves)
        ],
    )


@jax.custom_vjp
def _reporting(y: Any, old: PyTree, new: PyTree) -> Any:
    """y; the gradient of the statistics `old` is old - new, whatever is made of y."""
    return y


_reporting.defvjp(
    lambda y, old, new: (y, jax.tree.map(jnp.subtract, old, new)),
    lambda change, g: (g, change, jax.tree.map(jnp.zeros_like, change)),
)


def _mode(function: Callable[..., Any], train: bool) -> dict[str, bool]:
    """The arguments by which a function is told the mode."""
    return {name: value is train for name, value in MODES.items() if name in inspect.signature(function).parameters}


def _whole(module: Any, x: Any, train: bool) -> Any:
    return module(x, **_mode(module.__call__, train))


def _method(name: str) -> Part:
    def part(module: Any, x: Any, train: bool) -> Any:
        method = getattr(module, name)
        return method(x, **_mode(method, train))

    return part


def _blocks(module: Any, train: bool) -> Sequence[Callable[[Any], Any]]:
    return module.blocks(**_mode(module.blocks, train))


def _block(index: int) -> Part:
    return lambda module, x, train: _blocks(module, train)[index](x)


def _model(
    label: str, shape: tuple[int, ...], kind: type, init: Callable[[jax.Array], PyTree], call: Call, tokens: int
) -> Model:
    """The checked model of a module of class `kind`."""
    if not shape or min(shape) < 1:
        raise InputError(f"model {label!r}: input_shape must have at least one axis, none of them empty; got {shape}")

    def bound(part: Part) -> Callable[..., Any]:
        return lambda params, x, key=None: call(part, params, x, key)

    def apply(params: PyTree, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if x.shape[1:] != shape or not jnp.issubdtype(x.dtype, jnp.integer if tokens else jnp.floating):
            kind = "tokens, int32" if tokens else "floats"
            raise InputError(f"model {label!r} takes {kind} [B, {', '.join(map(str, shape))}]; got {x.dtype} {x.shape}")
        return call(_whole, params, x, key)

    def parts() -> list[Part]:
        if callable(getattr(kind, "blocks", None)):
            found: list[int] = []
            look: Part = lambda module, x, train: found.append(len(_blocks(module, train))) or x  # noqa: E731
            jax.eval_shape(bound(look), params, x)
            return [_block(index) for index in range(found[0])]
        both = all(callable(getattr(kind, name, None)) for name in ("features", "head"))
        return [_method("features"), _method("head")] if both else []

    x = Model(label, init, apply, tokens=tokens).example(shape, 2)
    try:
        params = jax.eval_shape(init, jax.random.key(0))
        logits = [jax.eval_shape(apply, params, x), jax.eval_shape(apply, params, x, jax.random.key(0))]
        model = Model(label, init, apply, tuple(bound(part) for part in parts()), tokens)
        for block in model.blocks:
            x = jax.eval_shape(block, params, x)
        logits += [x] if model.blocks else []
    except InputError as error:
        raise InputError(f"model {label!r} on inputs {shape}: {error}") from None
    except (flax.errors.FlaxError, TypeError, ValueError, AttributeError) as error:
        hint = "; its call must be told the mode, e.g. by an argument train" if isinstance(error, _UNTOLD) else ""
        raise InputError(f"model {label!r} cannot take inputs {shape}: {_first_line(error)}{hint}") from error
    for out, what in zip(logits, ("", " in training mode", " by its blocks one after another")):
        if getattr(out, "ndim", None) != 2 or out.shape[0] != 2 or out.shape != logits[0].shape:
            raise InputError(f"model {label!r} must return logits [B, K]{what}; for x {(2, *shape)} it returned {out}")
    notice_plain_conv(model, shape)
    return model


_UNTOLD = (flax.errors.InvalidRngError, flax.errors.ModifyScopeVariableError)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
