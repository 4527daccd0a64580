"""Sums of products of bf16 factors in fp32, A^T B over many tokens, by AVX512-BF16's own instruction.

Torch's products of bf16 matrices are rounded to bf16 on such processors, which is not for a Hessian that is factored.
This instruction multiplies two pairs of numbers and adds both products to an fp32 sum, 16 of them at once. Factors are
packed for it: panels of PANEL columns, in which a column's numbers of two tokens lie side by side, as an int32.

Legend: T tokens, A and B columns of two matrices.
"""

import ctypes
from math import prod

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from calibration.processor import has_amx, has_bf16_units, rounds
from calibration.threads import over_rows

PANEL, ROWS, LANES = 32, 8, 16  # of sums in registers at once: ROWS by PANEL, LANES in each
CHUNK = 128  # pairs of tokens: a panel of so many stays in a CPU's first cache
LEAST = 1 << 28  # products that are worth a thread: torch's own wait for more work on their processors for a while
NAN = 0x7FC0


def sums_in_bf16(x: torch.Tensor) -> bool:
    """Whether sums over x are to be formed here: in bf16, and not by a library with AMX."""
    return x.device.type == "cpu" and rounds() and has_bf16_units() and not has_amx()


class TokenSums:
    """Factors packed and products summed in memory that is used again for every batch of tokens.

    Made anew each time it would come to lie between what halted forwards keep, and leave holes behind.
    """

    def __init__(self):
        self._rooms: dict[str, torch.Tensor] = {}

    def packed(self, name: str, x: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
        """Panels (columns / PANEL, T / 2, PANEL) of bf16 pairs, filled up with zeros; until the next of this name.

        Args:
            name: Tells apart what is packed at the same time.
            x: (T, columns), fp32.
            counts: (T,) multiplies each token's numbers before they are rounded.
        """
        T, columns = x.shape
        panels = self._room(name, (-(-columns // PANEL), -(-T // 2), PANEL), torch.int32)
        counts = torch.ones(0) if counts is None else counts.float().contiguous()
        x = x.contiguous()
        given = _array(x), counts.numpy(), panels.numpy()
        over_rows(_pack, panels.shape[1], *given, least=LEAST // (64 * columns))
        return panels

    def add(self, total: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, upper: bool = False):
        """Adds A^T B to an fp64 sum.

        Args:
            total: (A, B) fp64; its sizes may end within the last panels.
            A: Packed.
            B: Packed, of the same tokens.
            upper: Leave out what lies left of the diagonal but for A's panels on it.
        """
        room = self._room("products", (len(A) * PANEL, len(B) * PANEL), torch.float32)
        given = A.numpy(), B.numpy(), room.numpy(), total.numpy(), upper
        over_rows(_add_products, len(A), *given, step=1, least=-(-LEAST // (A[0].numel() * room.shape[1])))

    def _room(self, name, shape, dtype):
        numbers = prod(shape)
        if name not in self._rooms or len(self._rooms[name]) < numbers:
            self._rooms[name] = torch.empty(numbers, dtype=dtype)
        return self._rooms[name][:numbers].view(shape)


def _array(x):
    """A tensor's fp32 numbers, by their address: a storage that numpy has been given cannot be parked any more."""
    return np.frombuffer((ctypes.c_char * x.nbytes).from_address(x.data_ptr()), np.float32).reshape(x.shape)


def in_panels(columns: slice) -> slice:
    """The panels of some columns, which begin with a panel."""
    return slice(columns.start // PANEL, -(-columns.stop // PANEL))


@intrinsic
def _bits(_, x):
    """A float's bits."""
    return types.uint32(types.float32), lambda _c, builder, _s, given: builder.bitcast(given[0], ir.IntType(32))


@njit(nogil=True, cache=True, inline="always")
def _rounded(x):
    """Bits of the bf16 nearest to a float, the even one of two."""
    bits = _bits(x)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return nearest if x == x else np.uint32(NAN)


@njit(nogil=True, cache=True)
def _pack(first, last, x, counts, panels):
    T, columns = x.shape
    nothing = np.zeros(columns, np.float32)
    for t in range(first, last):
        even, odd = x[2 * t], x[2 * t + 1] if 2 * t + 1 < T else nothing
        of_even, of_odd = np.float32(1), np.float32(1)
        if len(counts):
            of_even, of_odd = counts[2 * t], counts[min(2 * t + 1, T - 1)]
        for p in range(len(panels)):
            start, pairs = p * PANEL, panels[p, t]
            count = min(PANEL, columns - start)
            a, b = even[start : start + count], odd[start : start + count]
            for c in range(count):
                pairs[c] = np.int32(_rounded(a[c] * of_even) | (_rounded(b[c] * of_odd) << np.uint32(16)))
            pairs[count:] = 0


@intrinsic
def _multiply(_, a, b, c, pairs, stride):
    """Adds to ROWS rows of PANEL sums at address c, `stride` apart: so many columns at a times a panel's at b.

    One loop over pairs of tokens, with the sums in registers.
    """
    return types.void(*[types.int64] * 5), _generate_multiply


def _generate_multiply(context, builder, _, arguments):
    long, number = ir.IntType(64), ir.IntType(32)
    pair, sums = ir.VectorType(number, LANES), ir.VectorType(ir.FloatType(), LANES)
    name, kind = "llvm.x86.avx512bf16.dpbf16ps.512", ir.FunctionType(sums, [sums, pair, pair])
    dot = builder.module.declare_intrinsic(name, [], kind)
    a, b, c, pairs, stride = arguments
    a, b = (builder.inttoptr(address, number.as_pointer()) for address in (a, b))
    c = builder.inttoptr(c, ir.FloatType().as_pointer())
    lanes = range(0, PANEL, LANES)
    tile = [(row, lane) for row in range(ROWS) for lane in lanes]

    def element(start, index, offset):
        return builder.gep(start, [builder.add(index, long(offset))])

    def vector(start, index, offset, kind):
        return builder.bitcast(element(start, index, offset), kind.as_pointer())

    def repeated(one):
        first = builder.insert_element(ir.Constant(pair, ir.Undefined), one, number(0))
        return builder.shuffle_vector(first, first, ir.Constant(pair, [0] * LANES))

    places = [vector(c, builder.mul(stride, long(row)), lane, sums) for row, lane in tile]
    begun, before = [builder.load(place, align=4) for place in places], builder.block
    loop, done = (builder.append_basic_block(label) for label in ("pairs", "done"))
    builder.branch(loop)

    builder.position_at_end(loop)
    k, held = builder.phi(long), [builder.phi(sums) for _ in tile]
    at = builder.mul(k, long(PANEL))
    panel = {lane: builder.load(vector(b, at, lane, pair), align=4) for lane in lanes}
    columns = [repeated(builder.load(element(a, at, row))) for row in range(ROWS)]
    after = [
        builder.call(dot, [total, columns[row], panel[lane]]) for (row, lane), total in zip(tile, held, strict=True)
    ]
    following = builder.add(k, long(1))
    for phi, first, then in [(k, long(0), following), *zip(held, begun, after, strict=True)]:
        phi.add_incoming(first, before)
        phi.add_incoming(then, loop)
    builder.cbranch(builder.icmp_signed("<", following, pairs), loop, done)

    builder.position_at_end(done)
    for total, place in zip(after, places, strict=True):
        builder.store(total, place, align=4)
    return context.get_dummy_value()


@njit(nogil=True, cache=True)
def _add_products(first, last, A, B, room, total, upper):
    panels, pairs, width = len(A), A.shape[1], room.shape[1]
    mine = np.empty(last - first, np.int64)  # from both ends, so that threads have alike to do where some is left out
    for k in range(first, last):
        mine[k - first] = k // 2 if k % 2 == 0 else panels - 1 - k // 2
        room[mine[k - first] * PANEL : (mine[k - first] + 1) * PANEL] = 0
    for start in range(0, pairs, CHUNK):
        count = min(CHUNK, pairs - start)
        for q in range(len(B)):
            b = B.ctypes.data + 4 * (q * pairs + start) * PANEL
            for p in mine:
                if upper and q < p:
                    continue
                for row in range(0, PANEL, ROWS):
                    a = A.ctypes.data + 4 * ((p * pairs + start) * PANEL + row)
                    c = room.ctypes.data + 4 * ((p * PANEL + row) * width + q * PANEL)
                    _multiply(a, b, c, count, width)
    for p in mine:
        for i in range(p * PANEL, min((p + 1) * PANEL, len(total))):
            sums, products = total[i], room[i]
            for j in range(total.shape[1]):
                sums[j] += products[j]
