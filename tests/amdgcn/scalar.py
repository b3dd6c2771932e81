"""Scalar ALU: what each opcode computes in one wave.

`@scalar("uc<uu", "s_add_u32")`: result types, then source types. u, i: 32 bits, U, I: 64 bits, c: the condition code
scc, which the text does not name, k: a 16-bit constant, sign-extended, K: the same, zero-extended.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from amdgcn.errors import Unsupported
from amdgcn.program import EXEC, Instruction, Operand
from amdgcn.registry import opcode
from amdgcn.state import State

U32, I32, U64, I64 = np.uint32, np.int32, np.uint64, np.int64
_VIEWS = {"u": U32, "i": I32, "U": U64, "I": I64}
Function = Callable[..., object]


def scalar(types: str, *names: str, old: bool = False) -> Callable[[Function], Function]:
    """Registers a function of arrays [waves] as the meaning of scalar opcodes.

    Args:
        old: The former value of the destination is passed as well, first.
    """
    results, sources = types.split("<")
    named = len(results.replace("c", "")) + len(sources.replace("c", ""))

    def register(function: Function) -> Function:
        @opcode(*names, operands=named)
        def execute(state: State, instruction: Instruction) -> None:
            operands = iter(instruction.operands)
            targets = [None if letter == "c" else next(operands) for letter in results]
            values = [_read(state, instruction, targets[0], results[0])] if old else []
            for letter in sources:
                values.append(state.scc if letter == "c" else _read(state, instruction, next(operands), letter))
            made = function(*values)
            for letter, target, value in zip(
                results, targets, made if isinstance(made, tuple) else (made,), strict=True
            ):
                if letter == "c":
                    state.scc = np.broadcast_to(value, (state.waves,))
                elif letter in "UI":
                    state.write_scalar_pair(target, value)
                else:
                    state.write_scalar(target, value)

        return function

    return register


def _read(state: State, instruction: Instruction, operand: Operand, letter: str) -> np.ndarray:
    if operand.negate or operand.absolute or operand.sign_extend:
        raise Unsupported(f"{instruction}: modifier of {operand.text}")
    if letter in "kK":
        if operand.kind != "integer":
            raise Unsupported(f"{instruction}: {operand.text} is no constant")
        value = operand.value & 0xFFFF
        value = value - 0x10000 if letter == "k" and value & 0x8000 else value
        return np.broadcast_to(I32(value) if letter == "k" else U32(value), (state.waves,))
    values = state.scalar_pair(operand, letter) if letter in "UI" else state.scalar(operand)
    return values.view(_VIEWS[letter])


def _nonzero(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Most operations on bits set scc to "the result is not 0"."""
    return value, value != 0


# Moves and selects

scalar("u<u", "s_mov_b32")(lambda a: a)
scalar("U<U", "s_mov_b64")(lambda a: a)
scalar("i<k", "s_movk_i32")(lambda a: a)
scalar("u<uuc", "s_cselect_b32")(lambda a, b, c: np.where(c, a, b))
scalar("U<UUc", "s_cselect_b64")(lambda a, b, c: np.where(c, a, b))
scalar("u<uc", "s_cmov_b32", old=True)(lambda d, a, c: np.where(c, a, d))
scalar("U<Uc", "s_cmov_b64", old=True)(lambda d, a, c: np.where(c, a, d))

# Arithmetic. scc is the carry or borrow of _u32, and signed overflow of _i32; multiplications leave it alone.


@scalar("uc<uu", "s_add_u32")
def add(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a + b, a + b < a


@scalar("uc<uuc", "s_addc_u32")
def add_with_carry(a: np.ndarray, b: np.ndarray, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a.astype(U64) + b.astype(U64) + carry
    return total.astype(U32), total > 0xFFFFFFFF


@scalar("uc<uu", "s_sub_u32")
def subtract(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a - b, b > a


@scalar("uc<uuc", "s_subb_u32")
def subtract_with_borrow(a: np.ndarray, b: np.ndarray, borrow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return a - b - borrow.astype(U32), b.astype(U64) + borrow > a


@scalar("ic<ii", "s_add_i32")
@scalar("ic<k", "s_addk_i32", old=True)
def add_signed(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    return total, ((a < 0) == (b < 0)) & ((total < 0) != (a < 0))


@scalar("ic<ii", "s_sub_i32")
def subtract_signed(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a - b
    return total, ((a < 0) != (b < 0)) & ((total < 0) != (a < 0))


scalar("u<uu", "s_mul_i32")(lambda a, b: a * b)
scalar("i<k", "s_mulk_i32", old=True)(lambda d, a: d * a)
scalar("u<uu", "s_mul_hi_u32")(lambda a, b: ((a.astype(U64) * b.astype(U64)) >> U64(32)).astype(U32))
scalar("i<ii", "s_mul_hi_i32")(lambda a, b: ((a.astype(I64) * b.astype(I64)) >> I64(32)).astype(I32))
scalar("ic<i", "s_abs_i32")(lambda a: _nonzero(np.abs(a)))
scalar("ic<ii", "s_min_i32")(lambda a, b: (np.minimum(a, b), a < b))
scalar("ic<ii", "s_max_i32")(lambda a, b: (np.maximum(a, b), a > b))
scalar("uc<uu", "s_min_u32")(lambda a, b: (np.minimum(a, b), a < b))
scalar("uc<uu", "s_max_u32")(lambda a, b: (np.maximum(a, b), a > b))


def _shift_and_add(shift: int) -> None:
    @scalar("uc<uu", f"s_lshl{shift}_add_u32")
    def execute(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = (a.astype(U64) << U64(shift)) + b.astype(U64)
        return total.astype(U32), total > 0xFFFFFFFF


for _each in (1, 2, 3, 4):
    _shift_and_add(_each)

# Bits

for _suffix, _letter in {"b32": "u", "b64": "U"}.items():
    _binary, _unary = f"{_letter}c<{_letter * 2}", f"{_letter}c<{_letter}"
    scalar(_binary, f"s_and_{_suffix}")(lambda a, b: _nonzero(a & b))
    scalar(_binary, f"s_or_{_suffix}")(lambda a, b: _nonzero(a | b))
    scalar(_binary, f"s_xor_{_suffix}")(lambda a, b: _nonzero(a ^ b))
    scalar(_binary, f"s_andn2_{_suffix}")(lambda a, b: _nonzero(a & ~b))
    scalar(_binary, f"s_orn2_{_suffix}")(lambda a, b: _nonzero(a | ~b))
    scalar(_binary, f"s_nand_{_suffix}")(lambda a, b: _nonzero(~(a & b)))
    scalar(_binary, f"s_nor_{_suffix}")(lambda a, b: _nonzero(~(a | b)))
    scalar(_binary, f"s_xnor_{_suffix}")(lambda a, b: _nonzero(~(a ^ b)))
    scalar(_unary, f"s_not_{_suffix}")(lambda a: _nonzero(~a))
    scalar(f"uc<{_letter}", f"s_bcnt1_i32_{_suffix}")(lambda a: _nonzero(np.bitwise_count(a).astype(U32)))

scalar("uc<uu", "s_lshl_b32")(lambda a, b: _nonzero(a << (b & U32(31))))
scalar("uc<uu", "s_lshr_b32")(lambda a, b: _nonzero(a >> (b & U32(31))))
scalar("ic<iu", "s_ashr_i32")(lambda a, b: _nonzero(a >> (b & U32(31)).astype(I32)))
scalar("Uc<Uu", "s_lshl_b64")(lambda a, b: _nonzero(a << (b & U32(63)).astype(U64)))
scalar("Uc<Uu", "s_lshr_b64")(lambda a, b: _nonzero(a >> (b & U32(63)).astype(U64)))
scalar("Ic<Iu", "s_ashr_i64")(lambda a, b: _nonzero(a >> (b & U32(63)).astype(I64)))
scalar("u<uu", "s_bfm_b32")(lambda a, b: ((U32(1) << (a & U32(31))) - U32(1)) << (b & U32(31)))
scalar("i<u", "s_sext_i32_i8")(lambda a: a.astype(np.int8).astype(I32))
scalar("i<u", "s_sext_i32_i16")(lambda a: a.astype(np.int16).astype(I32))
scalar("u<uu", "s_pack_ll_b32_b16")(lambda a, b: (a & U32(0xFFFF)) | (b << U32(16)))
scalar("u<uu", "s_pack_lh_b32_b16")(lambda a, b: (a & U32(0xFFFF)) | (b & U32(0xFFFF0000)))
scalar("u<uu", "s_pack_hh_b32_b16")(lambda a, b: (a >> U32(16)) | (b & U32(0xFFFF0000)))
scalar("u<u", "s_bitset0_b32", old=True)(lambda d, a: d & ~(U32(1) << (a & U32(31))))
scalar("u<u", "s_bitset1_b32", old=True)(lambda d, a: d | (U32(1) << (a & U32(31))))


@scalar("u<u", "s_brev_b32")
def reverse_bits(a: np.ndarray) -> np.ndarray:
    swapped = np.unpackbits(np.ascontiguousarray(a)[:, None].view(np.uint8), axis=1)  # most significant bit first
    return np.packbits(swapped.reshape(-1, 4, 8)[:, ::-1].reshape(-1, 32), axis=1, bitorder="little").view(U32)[:, 0]


def _first_one(a: np.ndarray) -> np.ndarray:
    """The number of the lowest set bit; -1 for 0."""
    return np.where(a == 0, -1, np.bitwise_count((a & -a) - a.dtype.type(1)).astype(I32)).astype(I32)


scalar("i<u", "s_ff1_i32_b32")(_first_one)
scalar("i<U", "s_ff1_i32_b64")(_first_one)
scalar("i<u", "s_flbit_i32_b32")(lambda a: np.where(a == 0, -1, 32 - np.frexp(a.astype(np.float64))[1]).astype(I32))


def _extract(a: np.ndarray, field: np.ndarray, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The second source packs offset (low 5 bits; 6 for 64 bits) and width (bits 16-22). The sign is that of the last bit taken.

    A width of all bits or more takes all bits.
    """
    kind = a.dtype.type
    size = 8 * a.itemsize
    width = np.minimum((field >> U32(16)) & U32(0x7F), U32(size)).astype(kind)
    bits = a >> (field & U32(size - 1)).astype(kind)
    unused = kind(size) - width  # a shift by `size` would not be one
    kept = np.where(width == 0, kind(0), bits << np.minimum(unused, kind(size - 1)))
    if signed:
        signed_kind = {32: I32, 64: I64}[size]
        kept = (kept.view(signed_kind) >> np.minimum(unused, kind(size - 1)).astype(signed_kind)).view(kind)
    else:
        kept = kept >> np.minimum(unused, kind(size - 1))
    return _nonzero(kept)


scalar("uc<uu", "s_bfe_u32")(lambda a, field: _extract(a, field, signed=False))
scalar("uc<uu", "s_bfe_i32")(lambda a, field: _extract(a, field, signed=True))
scalar("Uc<Uu", "s_bfe_u64")(lambda a, field: _extract(a, field, signed=False))
scalar("Uc<Uu", "s_bfe_i64")(lambda a, field: _extract(a, field, signed=True))

# Comparisons

_COMPARE = {
    "eq": np.equal,
    "lg": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
}
for _name, _function in _COMPARE.items():
    scalar("c<ii", f"s_cmp_{_name}_i32")(_function)
    scalar("c<uu", f"s_cmp_{_name}_u32")(_function)
    scalar("c<ik", f"s_cmpk_{_name}_i32")(_function)
    scalar("c<uK", f"s_cmpk_{_name}_u32")(_function)
scalar("c<UU", "s_cmp_eq_u64")(np.equal)
scalar("c<UU", "s_cmp_lg_u64")(np.not_equal)
scalar("c<uu", "s_bitcmp0_b32")(lambda a, b: (a >> (b & U32(31))) & U32(1) == 0)
scalar("c<uu", "s_bitcmp1_b32")(lambda a, b: (a >> (b & U32(31))) & U32(1) == 1)

# Exec


def _saveexec(name: str, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    @opcode(f"s_{name}_saveexec_b64", operands=2)
    def execute(state: State, instruction: Instruction) -> None:
        """The old exec goes to the destination, a function of the source and the old exec to exec; scc: any lane left.

        The source is read before the destination is written: they may be the same pair.
        """
        target, source = instruction.operands
        exec_pair = Operand("exec", "s", EXEC, 2)
        before, chosen = state.scalar_pair(exec_pair), state.scalar_pair(source)
        state.write_scalar_pair(target, before)
        state.write_scalar_pair(exec_pair, function(chosen, before))
        state.scc = state.scalar_pair(exec_pair) != 0


_saveexec("and", lambda s, e: s & e)
_saveexec("or", lambda s, e: s | e)
_saveexec("xor", lambda s, e: s ^ e)
_saveexec("andn2", lambda s, e: s & ~e)
_saveexec("andn1", lambda s, e: ~s & e)
_saveexec("orn2", lambda s, e: s | ~e)

# Mode


@opcode("s_setreg_imm32_b32", operands=2)
def set_mode(state: State, instruction: Instruction) -> None:
    """Only FP16_OVFL of MODE may be written: rounding and denormal modes are taken from the descriptor."""
    register, value = instruction.operands
    if not re.fullmatch(r"hwreg\(HW_REG_MODE,\s*23,\s*1\)", register.text) or value.value not in (0, 1):
        raise Unsupported(f"{instruction}: register {register.text}")
    bit = U32(1 << 23)
    state.mode = (state.mode & ~bit) | (bit if value.value else U32(0))
