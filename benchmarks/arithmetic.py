"""The floating point operations that a call executes, with loops counted as often as they run.

XLA's own count takes the body of a loop once. Here the program is rewritten so that it counts itself: each loop carries
a counter beside its state, each branch returns what it cost.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

ONE_EACH = frozenset({
    "add", "sub", "mul", "div", "max", "min", "neg", "abs", "sign", "exp", "exp2", "expm1", "log", "log1p", "tanh",
    "logistic", "sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "square", "erf", "erf_inv", "sin", "cos", "add_any",
})  # fmt: skip
"""Primitives counted as one operation for each number that comes out."""
REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumprod", "argmax", "argmin"}
)
"""Primitives counted as one operation for each number that goes in."""


def flops(function: Callable[..., Any], *args: Any) -> float:
    """Floating point operations of `function(*args)`: two for each product and sum of `dot` and `conv`, else one each.

    Comparisons, choices, sorting, copies and whatever is done with integers (random bits) are not counted. Lanes that
    are masked are: this is what is executed, on one device.
    """
    leaves, tree = jax.tree.flatten(args)
    traced = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*leaves)
    return float(jax.jit(lambda *leaves: _counted(traced.jaxpr, traced.consts, leaves)[1])(*leaves))


def _counted(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], Any]:
    """What a jaxpr returns, and the operations that it took."""
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    count: Any = jnp.float32(0)

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        results, cost = _one(equation, given)
        count += cost
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars], count


def _one(equation: Any, given: list[Any]) -> tuple[list[Any], Any]:
    """The results of an equation, and its operations."""
    name, params = equation.primitive.name, equation.params
    if name == "while":
        return _while(params, given)
    if name == "scan":
        return _scan(params, given)
    if name == "cond":
        branches = [lambda *args, b=branch: _counted(b.jaxpr, b.consts, args) for branch in params["branches"]]
        results, cost = lax.switch(given[0], branches, *given[1:])
        return results, cost
    inner = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if inner is not None:  # jit, remat, calls with rules for derivatives, which are of no use any more
        closed = inner if hasattr(inner, "consts") else core.ClosedJaxpr(inner, ())
        return _counted(closed.jaxpr, closed.consts, given)
    results = equation.primitive.bind(*given, **params)
    return (list(results) if equation.primitive.multiple_results else [results]), _static(equation)


def _while(params: dict[str, Any], given: list[Any]) -> tuple[list[Any], Any]:
    """Of a loop, the turns that it takes; its condition is evaluated once more than its body."""
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    for_test, for_body, start = given[:first], given[first:second], given[second:]

    def lanes(carry: Any) -> Any:  # of a loop under vmap, which of its lanes go on
        return _counted(test.jaxpr, test.consts, [*for_test, *carry[1]])[0][0]

    def turn(carry: Any) -> Any:
        state, cost = _counted(body.jaxpr, body.consts, [*for_body, *carry[1]])
        going = lanes(carry)
        if going.ndim:
            state = [
                jnp.where(going.reshape(going.shape + (1,) * (new.ndim - going.ndim)), new, old)
                for new, old in zip(state, carry[1], strict=True)
            ]
        return carry[0] + cost, state

    count, end = lax.while_loop(lambda carry: lanes(carry).any(), turn, (jnp.float32(0), list(start)))
    return end, count


def _scan(params: dict[str, Any], given: list[Any]) -> tuple[list[Any], Any]:
    body, consts, carried = params["jaxpr"], params["num_consts"], params["num_carry"]
    fixed, start, over = given[:consts], given[consts : consts + carried], given[consts + carried :]

    def turn(carry: Any, x: Any) -> Any:
        results, cost = _counted(body.jaxpr, body.consts, [*fixed, *carry[1], *x])
        return (carry[0] + cost, results[:carried]), results[carried:]

    (count, end), out = lax.scan(turn, (jnp.float32(0), list(start)), over, params["length"], params["reverse"])
    return [*end, *out], count


def _static(equation: Any) -> float:
    """Of an equation without loops, by its shapes."""
    name, out = equation.primitive.name, equation.outvars[0].aval
    if not jnp.issubdtype(getattr(equation.invars[0].aval, "dtype", np.int32) if equation.invars else int, np.floating):
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return 2.0 * out.size * float(np.prod([equation.invars[0].aval.shape[axis] for axis in contracted]))
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval
        return 2.0 * out.size * kernel.size / kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    if name in REDUCTIONS:
        return float(equation.invars[0].aval.size)
    return float(out.size) if name in ONE_EACH else 0.0
