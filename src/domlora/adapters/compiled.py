"""The loops behind :mod:`domlora.adapters.cpu`, compiled when they are first called.

The products of a correction are so thin (a rank of 16, or four rows of a domain) that a library spends more time on its
calls than on their numbers. Here one loop runs over the domains of a batch and keeps sums in registers. What a row gets does
not depend on the rows beside it.

All arrays are flat. Indices that a plain loop adds up are unsigned: numba would look at each whether it is below zero.
Everything that is compiled lies in this file, so that what numba keeps on disk for the next process is never older than a
part of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["backward", "forward"]

_BLOCK = 32  # rows whose numbers stay in the nearest cache from one product to the next
_TALL = 8 if binding.get_host_cpu_features().get("avx512f") else 4  # rows whose sums fill the registers


def _compiled(function: Any) -> Any:
    """Compiled at the first call with numbers of a type, and kept on disk for the next process where there is a place."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither this folder nor the user's own can be written
        return njit(nogil=True)(function)


def _tile(width: int) -> Any:
    """A product of a few rows and ``width`` columns whose sums stay in registers.

    For each row ``i`` from ``first`` to before ``last``, at the most ``_TALL``: ``out[out_at[i] + column : + width]``
    becomes, or with ``add`` grows by, the sum over ``k`` below ``count`` of
    ``scale * left[left_at[i] + k * left_step] * right[right_at + column + k * right_step : + width]``.
    """

    @intrinsic
    def tile(  # type: ignore[no-untyped-def]
        typing_context,  # noqa: ARG001 - numba asks for it
        first,
        last,
        column,
        out,
        out_at,
        add,
        scale,
        left,
        left_at,
        left_step,
        right,
        right_at,
        right_step,
        count,
    ):
        del first, last, column, add, left_step, right_at, right_step, count
        at = types.intp
        kinds = (at, at, at, out, out_at, types.boolean, scale, left, left_at, at, right, at, at, at)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            builder.function.attributes.add("noinline")  # the function around: once compiled is enough
            low = builder.icmp_signed("<=", builder.sub(values[1], values[0]), ir.Constant(values[0].type, _TALL // 2))
            with builder.if_else(low) as (few, many):
                with few:
                    _emit(context, builder, signature.args, values, _TALL // 2, width)
                with many:
                    _emit(context, builder, signature.args, values, _TALL, width)
            return context.get_dummy_value()

        return types.void(*kinds), emit

    return tile


def _emit(context: Any, builder: Any, kinds: Any, values: Any, height: int, width: int) -> None:
    """The instructions of a :func:`_tile`; where there are fewer rows than ``height`` the last is computed several times."""
    first, last, column, _, _, add, scale, _, _, left_step, _, right_at, right_step, count = values
    out, out_at, left, left_at, right = (
        context.make_array(kinds[place])(context, builder, values[place]).data for place in (3, 4, 7, 8, 10)
    )
    vector, size = ir.VectorType(scale.type, width), context.get_abi_sizeof(scale.type)
    final = builder.sub(last, ir.Constant(last.type, 1))
    rows = [builder.add(first, ir.Constant(first.type, row)) for row in range(height)]
    rows = [builder.select(builder.icmp_signed("<", row, final), row, final) for row in rows]

    def spread(number: Any) -> Any:
        nothing, lanes = ir.Constant(vector, ir.Undefined), ir.VectorType(ir.IntType(32), width)
        lone = builder.insert_element(nothing, number, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(lone, nothing, ir.Constant(lanes, [0] * width))

    def several(array: Any, place: Any) -> Any:
        return builder.bitcast(builder.gep(array, [builder.add(place, column)]), vector.as_pointer())

    def load(pointer: Any) -> Any:
        loaded = builder.load(pointer)
        loaded.align = size
        return loaded

    def store_all(numbers: list[Any]) -> None:
        for number, target in zip(numbers, targets, strict=True):
            builder.store(number, target).align = size

    starts = [builder.load(builder.gep(left_at, [row])) for row in rows]
    targets = [several(out, builder.load(builder.gep(out_at, [row]))) for row in rows]
    sums = [cgutils.alloca_once(builder, vector) for _ in rows]
    for total in sums:
        builder.store(ir.Constant(vector, [0.0] * width), total)
    with cgutils.for_range(builder, count) as loop:
        numbers = load(several(right, builder.add(right_at, builder.mul(loop.index, right_step))))
        step = builder.mul(loop.index, left_step)
        for start, total in zip(starts, sums, strict=True):
            factor = spread(builder.load(builder.gep(left, [builder.add(start, step)])))
            product = builder.fmul(factor, numbers, flags=("contract",))
            builder.store(builder.fadd(product, builder.load(total), flags=("contract",)), total)
    changes = [builder.fmul(builder.load(total), spread(scale)) for total in sums]
    with builder.if_else(add) as (grows, becomes):
        with grows:  # all are read before one is written: a repeated row must not grow twice
            store_all([builder.fadd(old, change) for old, change in zip(map(load, targets), changes, strict=True)])
        with becomes:
            store_all(changes)


_tile_16, _tile_8, _tile_4, _tile_1 = _tile(16), _tile(8), _tile(4), _tile(1)


@_compiled
def _product(  # type: ignore[no-untyped-def]
    out, out_at, add, scale, left, left_at, left_step, right, right_at, right_step, count, height, width
):
    """As :func:`_tile`, of any height and width."""
    for first in range(0, height, _TALL):
        last, at = min(first + _TALL, height), 0
        while at + 16 <= width:
            _tile_16(
                first, last, at, out, out_at, add, scale, left, left_at, left_step, right, right_at, right_step, count
            )
            at += 16
        if at + 8 <= width:
            _tile_8(
                first, last, at, out, out_at, add, scale, left, left_at, left_step, right, right_at, right_step, count
            )
            at += 8
        if at + 4 <= width:
            _tile_4(
                first, last, at, out, out_at, add, scale, left, left_at, left_step, right, right_at, right_step, count
            )
            at += 4
        while at < width:
            _tile_1(
                first, last, at, out, out_at, add, scale, left, left_at, left_step, right, right_at, right_step, count
            )
            at += 1


@_compiled
def forward(out, hidden, x, a, b, bias, scale, rows, bounds, names, sizes):  # type: ignore[no-untyped-def]
    """``out[row] += scale * (x[row] A_d) B_d + c_d`` unless ``out`` is empty, and ``hidden`` becomes ``x[row] A_d``.

    **Shape**: flat ``out (N, O)``, ``hidden (N, R)`` in the order of ``rows``, ``x (N, I)``, ``a (D, I, R)``,
    ``b (D, R, O)``, ``bias (D, O)`` or empty; ``rows (N,)`` numbers the rows, those of domain ``names[p]`` from
    ``bounds[p]`` to ``bounds[p + 1]``; ``sizes = (I, R, O)``.
    """
    width_in, rank, width_out = sizes
    ones, nowhere = np.ones(1, x.dtype), np.zeros(_BLOCK, np.intp)
    one = ones[0]
    hidden_at = np.arange(len(rows)) * rank
    x_at, out_at = rows * width_in, rows * width_out
    for place in range(len(names)):
        domain = names[place]
        a_at, b_at, bias_at = domain * width_in * rank, domain * rank * width_out, domain * width_out
        for start in range(bounds[place], bounds[place + 1], _BLOCK):
            stop = min(start + _BLOCK, bounds[place + 1])
            inner, to, height = hidden_at[start:stop], out_at[start:stop], stop - start
            _product(hidden, inner, False, one, x, x_at[start:stop], 1, a, a_at, rank, width_in, height, rank)
            if len(out):
                _product(out, to, True, scale, hidden, inner, 1, b, b_at, width_out, rank, height, width_out)
            if len(out) and len(bias):
                _product(out, to, True, one, ones, nowhere, 0, bias, bias_at, 0, 1, height, width_out)


@_compiled
def _turn(turned, matrix, start, height, width):  # type: ignore[no-untyped-def]
    """``turned (width, height)`` becomes the transpose of ``matrix (height, width)`` from ``start``."""
    high, wide, at = np.uintp(height), np.uintp(width), np.uintp(start)
    for column in range(wide):
        for row in range(high):
            turned[column * high + row] = matrix[at + row * wide + column]


@_compiled
def _take(taken, matrix, rows, width):  # type: ignore[no-untyped-def]
    """``taken`` becomes ``rows`` of ``matrix (N, width)``."""
    wide = np.uintp(width)
    for place in range(len(rows)):
        start, to = np.uintp(rows[place]) * wide, np.uintp(place) * wide
        for column in range(wide):
            taken[to + column] = matrix[start + column]


@_compiled
def backward(  # type: ignore[no-untyped-def]
    grad_x, grad_a, grad_b, grad_bias, grad, hidden, x, a, b, scale, rows, bounds, names, places, sizes
):
    """Add to the gradients what :func:`forward` owes them; one that is empty is not wanted.

    **Shape**: flat, as there; ``grad (N, O)``; ``grad_a (P, I, R)``, ``grad_b (P, R, O)`` and ``grad_bias (P, O)`` hold
    domain ``names[p]`` at ``places[p]``.
    """
    width_in, rank, width_out = sizes
    ones, nowhere = np.ones(1, x.dtype), np.zeros(1, np.intp)
    one = ones[0]
    block = np.arange(_BLOCK)
    grad_at, inner_at, x_at = block * width_out, block * rank, rows * width_in
    a_at, b_at = np.arange(width_in), np.arange(rank)
    turned_a, turned_b = np.empty(rank * width_in, x.dtype), np.empty(rank * width_out, x.dtype)
    own_x, own_grad = np.empty(_BLOCK * width_in, x.dtype), np.empty(_BLOCK * width_out, x.dtype)
    inner = np.empty(_BLOCK * rank, x.dtype)
    wants_inner = len(grad_a) > 0 or len(grad_x) > 0
    for place in range(len(names)):
        domain, to = names[place], places[place]
        if wants_inner:
            _turn(turned_b, b, domain * rank * width_out, rank, width_out)
        if len(grad_x):
            _turn(turned_a, a, domain * width_in * rank, width_in, rank)
        to_a, to_b = a_at * rank + to * width_in * rank, b_at * width_out + to * rank * width_out
        to_bias = np.full(1, to * width_out)
        for start in range(bounds[place], bounds[place + 1], _BLOCK):
            stop = min(start + _BLOCK, bounds[place + 1])
            height, own = stop - start, rows[start:stop]
            _take(own_grad, grad, own, width_out)
            if len(grad_bias):
                _product(grad_bias, to_bias, True, one, ones, nowhere, 0, own_grad, 0, width_out, height, 1, width_out)
            if len(grad_b):
                of = b_at + start * rank
                _product(grad_b, to_b, True, scale, hidden, of, rank, own_grad, 0, width_out, height, rank, width_out)
            if wants_inner:
                _product(
                    inner, inner_at, False, scale, own_grad, grad_at, 1, turned_b, 0, rank, width_out, height, rank
                )
            if len(grad_a):
                _take(own_x, x, own, width_in)
                _product(grad_a, to_a, True, one, own_x, a_at, width_in, inner, 0, rank, height, width_in, rank)
            if len(grad_x):
                of = x_at[start:stop]
                _product(grad_x, of, True, one, inner, inner_at, 1, turned_a, 0, width_in, rank, height, width_in)
