"""The interpreter of amdgcn text (tests/amdgcn) on hand-written programs; test_amdgcn_triton.py has compiled ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from amdgcn.assemble import assemble, bits, copy, scalar, spread, vector
from amdgcn.errors import Endless, Fault, Unsupported
from amdgcn.launch import launch
from amdgcn.registry import known

U32, F32 = np.uint32, np.float32
LANE = np.arange(64, dtype=U32)
NAN, SIGNALLING, INFINITY, ZERO, MINUS_ZERO = 0x7FC00000, 0x7F800001, 0x7F800000, 0, 0x80000000


# Vector arithmetic


@pytest.mark.parametrize(
    ("a", "b", "largest", "smallest"),
    [
        (NAN, bits(2), bits(2), bits(2)),
        (bits(2), NAN, bits(2), bits(2)),
        (SIGNALLING, bits(2), SIGNALLING | 0x400000, SIGNALLING | 0x400000),
        (MINUS_ZERO, ZERO, ZERO, MINUS_ZERO),
        (ZERO, MINUS_ZERO, ZERO, MINUS_ZERO),
        (bits(-3), bits(2), bits(2), bits(-3)),
        (0xFF800000, bits(-2), bits(-2), 0xFF800000),
    ],
)
def test_maximum_and_minimum(a: int, b: int, largest: int, smallest: int) -> None:
    upper, lower = vector("v_max_f32_e32 v10, v1, v2\nv_min_f32_e32 v11, v1, v2", a, b)
    assert (upper[0], lower[0]) == (largest, smallest)


def test_median_of_nan_is_the_smallest_number() -> None:
    result, other = vector(
        "v_med3_f32 v10, v1, -1.0, 1.0\nv_med3_f32 v11, v1, 1.0, -1.0", np.where(LANE < 32, NAN, bits(9))
    )
    assert result.tolist() == [bits(-1)] * 32 + [bits(1)] * 32 == other.tolist()


def test_nan_of_an_operation() -> None:
    """Not the 0xffc00000 of x86; a NaN source keeps its payload."""
    result, payload = vector("v_sub_f32_e32 v10, v1, v1\nv_add_f32_e32 v11, v1, v2", INFINITY, 0x7FC12345)
    assert result[0] == NAN and payload[0] == 0x7FC12345


def test_fma_rounds_once() -> None:
    """The square of 1 + 2^-12 is halfway between two fp32, and 2^-60 decides. fp64 cannot hold both: rounding twice fails."""
    a, tiny = F32(1 + 2**-12), F32(2.0**-60)
    body = "v_fma_f32 v10, v1, v1, v2\nv_mul_f32_e32 v11, v1, v1\nv_add_f32_e32 v11, v11, v2"
    fused, separate = vector(body, a, tiny)
    assert fused[0] == bits(1 + 2**-11 + 2**-23) and separate[0] == bits(1 + 2**-11)
    below, _ = vector("v_mov_b32_e32 v10, v2\nv_fmac_f32_e32 v10, v1, v1", a, -tiny)
    assert below[0] == bits(1 + 2**-11)


@pytest.mark.parametrize(
    ("value", "signed", "unsigned"),
    [
        (np.nan, 0, 0),
        (np.inf, 2**31 - 1, 2**32 - 1),
        (-np.inf, 2**31, 0),
        (-1.9, 2**32 - 1, 0),
        (3e9, 2**31 - 1, 3_000_000_000),
    ],
)
def test_conversion_to_integers_saturates(value: float, signed: int, unsigned: int) -> None:
    a, b = vector("v_cvt_i32_f32_e32 v10, v1\nv_cvt_u32_f32_e32 v11, v1", F32(value))
    assert (a[0], b[0]) == (signed, unsigned)


def test_class() -> None:
    values = np.array([SIGNALLING, NAN, 0xFF800000, bits(-1), 0x80000001, MINUS_ZERO, ZERO, 1, bits(1), INFINITY], U32)
    body = "v_cmp_class_f32_e64 s[10:11], v1, v2\nv_cndmask_b32_e64 v10, 0, 1, s[10:11]"
    sources = np.resize(values, 64)
    result, _ = vector(body, sources, U32(1) << (LANE % 10))
    assert result.all()
    assert not vector(body, sources, ~(U32(1) << (LANE % 10)))[0].any()


def test_comparison_with_nan() -> None:
    body = "v_cmp_nlt_f32_e32 vcc, v1, v2\nv_cndmask_b32_e64 v10, 0, 1, vcc\nv_cmp_lg_f32_e32 vcc, v1, v2\nv_cndmask_b32_e64 v11, 0, 1, vcc"
    assert [int(each[0]) for each in vector(body, U32(NAN), F32(1))] == [1, 0]
    assert [int(each[0]) for each in vector(body, F32(0), F32(1))] == [0, 1]


def test_integer_products_and_carries() -> None:
    a, b = np.random.default_rng(1).integers(0, 2**32, (2, 64), U32)
    wide = a.astype(np.uint64) * b
    low, high = vector("v_mul_lo_u32 v10, v1, v2\nv_mul_hi_u32 v11, v1, v2", a, b)
    assert (low == wide.astype(U32)).all() and (high == (wide >> np.uint64(32)).astype(U32)).all()
    low, high = vector(
        "v_mov_b32_e32 v3, v2\nv_mov_b32_e32 v2, v1\nv_mad_u64_u32 v[10:11], s[8:9], v1, v3, v[2:3]", a, b
    )
    total = wide + (a | b.astype(np.uint64) << np.uint64(32))
    assert (low == total.astype(U32)).all() and (high == (total >> np.uint64(32)).astype(U32)).all()
    body = "v_add_co_u32_e32 v10, vcc, v1, v2\nv_addc_co_u32_e32 v11, vcc, 0, v1, vcc"
    assert (vector(body, a, b)[1] == a + (a + b < a)).all()
    body = "v_sub_co_u32_e32 v10, vcc, v1, v2\nv_subbrev_co_u32_e64 v11, s[8:9], 0, v1, vcc"
    assert (vector(body, a, b)[1] == a - (b > a)).all()


def test_bit_fields() -> None:
    body = "v_bfe_u32 v10, v1, v2, v3\nv_bfe_i32 v11, v1, v2, v3"
    assert [int(each[0]) for each in vector(body, 0x12345F78, 8, 4)] == [0xF, 0xFFFFFFFF]
    assert [int(each[0]) for each in vector(body, 0x12345F78, 0, 32)] == [0, 0]  # 5 bits of width
    assert [int(each[0]) for each in vector(body, 0x12345F78, 40, 8)] == [0x5F, 0x5F]  # 5 bits of offset
    assert vector("v_bfrev_b32_e32 v10, v1", 0x12345678)[0][0] == int(f"{0x12345678:032b}"[::-1], 2)
    shifts = vector("v_lshlrev_b32_e32 v10, v2, v1\nv_ashrrev_i32_e32 v11, v2, v1", 0x80000001, 33)
    assert [int(each[0]) for each in shifts] == [2, 0xC0000000]


def test_byte_permutation() -> None:
    a, b = 0x8899AABB, 0x7FEE80CC
    result, signs = vector("v_perm_b32 v10, v1, v2, v3\nv_perm_b32 v11, v1, v2, v4", a, b, 0x0D0C0703, 0x0B0A0908)
    assert result[0] == 0xFF00887F  # 0-3 are bytes of the second source
    assert signs[0] == 0xFFFF00FF  # the signs of a.3, a.1, b.3, b.1
    assert vector("v_alignbit_b32 v10, v1, v2, 8\nv_alignbyte_b32 v11, v1, v2, 3", a, b)[0][0] == 0xBB7FEE80


def test_packed_operand_selection() -> None:
    a, b, c, d = F32(2), F32(3), F32(5), F32(7)
    results = vector("v_pk_mul_f32 v[10:11], v[1:2], v[3:4] op_sel:[1,0] op_sel_hi:[0,1] neg_lo:[0,1]", a, b, c, d)
    assert [each[0] for each in results] == [bits(-15), bits(14)]
    results = vector("v_pk_mov_b32 v[10:11], v[1:2], v[3:4] op_sel:[1,0]", a, b, c, d)
    assert [each[0] for each in results] == [bits(3), bits(5)]
    results = vector(
        "v_mov_b32_e32 v10, v1\nv_mov_b32_e32 v11, v2\nv_pk_add_f32 v[10:11], v[10:11], v[10:11] op_sel:[1,1] op_sel_hi:[0,0]",
        a,
        b,
    )
    assert [each[0] for each in results] == [bits(6), bits(4)]
    with pytest.raises(Unsupported, match="upper half of the constant"):
        vector("v_pk_mul_f32 v[10:11], v[1:2], 2.0", a, b)


def test_sub_dword_addressing() -> None:
    value, old = 0x80F1A2B3, 0x11223344
    add = "v_mov_b32_e32 v10, v2\nv_add_u32_sdwa v10, {a}, v3 dst_sel:{to} dst_unused:{unused} src0_sel:{part} src1_sel:DWORD"

    def run(a: str, part: str, to: str, unused: str) -> int:
        return int(vector(add.format(a=a, part=part, to=to, unused=unused), value, old, 1)[0][0])

    assert run("v1", "BYTE_1", "DWORD", "UNUSED_PAD") == 0xA3
    assert run("sext(v1)", "WORD_1", "DWORD", "UNUSED_PAD") == 0xFFFF80F2
    assert run("v1", "BYTE_0", "BYTE_2", "UNUSED_PAD") == 0x00B40000
    assert run("v1", "BYTE_0", "WORD_1", "UNUSED_PRESERVE") == 0x00B43344
    assert run("v1", "BYTE_0", "BYTE_1", "UNUSED_SEXT") == 0xFFFFB400


def test_truth_table() -> None:
    a, b, c = np.random.default_rng(2).integers(0, 2**32, (3, 64), U32)
    result, other = vector(
        "v_bitop3_b32 v10, v1, v2, v3 bitop3:0xec\nv_bitop3_b32 v11, v1, v2, v3 bitop3:0x96", a, b, c, arch="gfx950"
    )
    assert (result == (a & c | b)).all() and (other == a ^ b ^ c).all()


@pytest.mark.parametrize(("arch", "dtype"), [("gfx942", torch.float8_e4m3fnuz), ("gfx950", torch.float8_e4m3fn)])
def test_fp8(arch: str, dtype: torch.dtype) -> None:
    """Against torch: all codes, and all kinds of numbers below the overflow, with ties."""
    largest = torch.finfo(dtype).max
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float().numpy()
    middle = (codes[:120] + codes[1:121]) / 2
    values = np.concatenate(
        [middle, -middle, np.nextafter(middle, F32(0)), np.nan_to_num(spread(2000)) * F32(2.0**-100)]
    )
    values = np.concatenate([values, np.random.default_rng(3).uniform(-largest, largest, 500)]).astype(F32)
    values = np.resize(np.where(np.abs(values) <= largest, values, F32(1)), (-(-len(values) // 64), 64))
    for row in values:
        wanted = torch.from_numpy(row.copy()).to(dtype).view(torch.uint8).numpy()
        got, _ = vector("v_cvt_pk_fp8_f32 v10, v1, v1 op_sel:[0,0,1]", row, arch=arch)
        assert (got == wanted.astype(U32) * 0x01010000).all()
    for start in range(0, 256, 64):
        low, high = vector("v_cvt_pk_f32_fp8_sdwa v[10:11], v1 src0_sel:WORD_1", (LANE + start) << U32(16), arch=arch)
        wanted_bits = codes[start : start + 64].view(U32)
        assert ((low == wanted_bits) | (np.isnan(low.view(F32)) & np.isnan(codes[start : start + 64]))).all()
        assert (high == 0).all()
    mode = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {}\nv_cvt_pk_fp8_f32 v10, v1, v1"
    assert (
        torch.tensor(int(vector(mode.format(1), F32(1e9), arch=arch)[0][0]) & 255, dtype=torch.uint8).view(dtype)
        == largest
    )
    assert (
        torch.tensor(int(vector(mode.format(0), F32(1e9), arch=arch)[0][0]) & 255, dtype=torch.uint8)
        .view(dtype)
        .isnan()
    )


# Lanes


def shuffled(modifiers: str, *, before: str = "") -> np.ndarray:
    """v_mov_b32_dpp of 100 + lane into a register of 0s."""
    return vector(f"{before}\nv_mov_b32_dpp v10, v1 {modifiers}", LANE + 100)[0]


def test_dpp_keeps_or_clears_lanes_without_source() -> None:
    kept = shuffled("row_shr:4 row_mask:0xf bank_mask:0xf", before="v_mov_b32_e32 v10, 7")
    cleared = shuffled("row_shr:4 row_mask:0xf bank_mask:0xf bound_ctrl:1", before="v_mov_b32_e32 v10, 7")
    outside = LANE % 16 < 4
    assert (kept == np.where(outside, 7, LANE + 96)).all() and (cleared == np.where(outside, 0, LANE + 96)).all()


def test_dpp_masks_select_what_is_written_not_what_is_read() -> None:
    result = shuffled("row_bcast:15 row_mask:0xa bank_mask:0xf bound_ctrl:1", before="v_mov_b32_e32 v10, 7")
    assert (result == np.repeat([7, 115, 7, 147], 16)).all()
    result = shuffled("row_bcast:31 row_mask:0xf bank_mask:0x5", before="v_mov_b32_e32 v10, 7")
    assert (result == np.where((LANE >= 32) & (LANE // 4 % 2 == 0), 131, 7)).all()


def test_dpp_reads_all_lanes_before_it_writes() -> None:
    result, _ = vector("v_mov_b32_e32 v10, v1\nv_mov_b32_dpp v10, v10 row_ror:1 row_mask:0xf bank_mask:0xf", LANE)
    assert (result == LANE // 16 * 16 + (LANE - 1) % 16).all()
    result, _ = vector("v_max_i32_dpp v10, v1, v1 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", LANE)
    assert (result == LANE | 1).all()


def test_dpp_does_not_read_inactive_lanes() -> None:
    before = "v_mov_b32_e32 v10, 7\ns_mov_b64 exec, 0xffff"
    for control, inactive in (("", 7), ("bound_ctrl:1", 0)):
        result = shuffled(f"row_mirror row_mask:0xf bank_mask:0xf {control}", before=before.replace("0xffff", "0xfff"))
        wanted = np.where(LANE < 12, np.where(LANE < 4, inactive, 115 - LANE), 7)
        assert (result == wanted).all()


def test_swizzle_permute_and_scalar_lanes() -> None:
    result, other = vector(
        "ds_swizzle_b32 v10, v1 offset:swizzle(SWAP,16)\nds_bpermute_b32 v11, v2, v1", LANE, (LANE * 5 % 64) * 4
    )
    assert (result == LANE ^ 16).all() and (other == LANE * 5 % 64).all()
    body = (
        "v_readlane_b32 s10, v1, 63\nv_writelane_b32 v10, s10, 3\ns_mov_b64 exec, 0xf0\nv_readfirstlane_b32 s11, v1\n"
    )
    result, other = vector(body + "s_mov_b64 exec, -1\nv_mov_b32_e32 v11, s11", LANE)
    assert (result == np.where(LANE == 3, 63, 0)).all() and (other == 4).all()


# Scalar arithmetic


@pytest.mark.parametrize(
    ("body", "sources", "wanted"),
    [
        ("s_add_u32 s20, s10, s11", (0xFFFFFFFF, 2), (1, 1)),
        ("s_add_i32 s20, s10, s11", (0xFFFFFFFF, 2), (1, 0)),  # _i32: signed overflow, not carry
        ("s_add_i32 s20, s10, s11", (0x7FFFFFFF, 1), (0x80000000, 1)),
        ("s_sub_u32 s20, s10, s11", (1, 2), (0xFFFFFFFF, 1)),
        ("s_cmp_eq_u32 s20, s20\ns_mul_i32 s20, s10, s11", (3, 0), (0, 1)),  # a product leaves scc alone
        ("s_and_b32 s20, s10, s11", (12, 3), (0, 0)),
        ("s_ashr_i32 s20, s10, 33", (0x80000000,), (0xC0000000, 1)),
        ("s_bfe_u32 s20, s10, 0x80004", (0xABCD,), (0xBC, 1)),
        ("s_bfe_i32 s20, s10, 0x80004", (0xABCD,), (0xFFFFFFBC, 1)),
        ("s_bfe_u32 s20, s10, 0x200000", (0xDEADBEEF,), (0xDEADBEEF, 1)),
        ("s_movk_i32 s20, 0x8000", (), (0xFFFF8000, 0)),
        ("s_mov_b32 s20, s10\ns_addk_i32 s20, 0xffff", (0x80000000,), (0x7FFFFFFF, 1)),
        ("s_min_i32 s20, s10, s11", (0xFFFFFFFF, 3), (0xFFFFFFFF, 1)),
        ("s_lshl2_add_u32 s20, s10, s11", (0x40000000, 5), (5, 1)),
        ("s_abs_i32 s20, s10", (0xFFFFFFFE,), (2, 1)),
        ("s_ff1_i32_b32 s20, s10", (0x50,), (4, 0)),
        ("s_cmpk_lt_i32 s10, 0xffff", (0xFFFFFFFE,), (0, 1)),
        ("s_brev_b32 s20, s10", (0x80000803,), (0xC0100001, 0)),
        ("s_bitcmp0_b32 s10, 7", (0x80,), (0, 0)),
        ("s_not_b64 s[20:21], s[10:11]", (0xFFFFFFFF, 0xFFFFFFFF), (0, 0)),
    ],
)
def test_scalar(body: str, sources: tuple[int, ...], wanted: tuple[int, int]) -> None:
    result, _, scc = scalar(body, *sources)
    assert (result, scc) == wanted


def test_scalar_pairs() -> None:
    assert scalar("s_add_u32 s20, s10, s12\ns_addc_u32 s21, s11, s13", 0xFFFFFFFF, 1, 1, 2)[:2] == [0, 4]
    assert scalar("s_sub_u32 s20, s10, s12\ns_subb_u32 s21, s11, s13", 0, 5, 1, 2)[:2] == [0xFFFFFFFF, 2]
    assert scalar("s_lshl_b64 s[20:21], s[10:11], 33", 3, 9)[:2] == [0, 6]
    assert scalar("s_ashr_i64 s[20:21], s[10:11], 4", 0x10, 0x80000000)[:2] == [1, 0xF8000000]
    assert scalar("s_bfe_i64 s[20:21], s[10:11], 0x200000", 0x80000005, 7) == [0x80000005, 0xFFFFFFFF, 1]
    assert scalar("s_bfe_u64 s[20:21], s[10:11], 0x80020", 5, 0xABCD) == [0xCD, 0, 1]
    assert scalar("s_bfe_u64 s[20:21], s[10:11], 0x400000", 5, 7) == [5, 7, 1]
    assert scalar("s_bfe_i64 s[20:21], s[10:11], 0x0", 5, 7) == [0, 0, 0]
    assert scalar("s_and_b64 s[20:21], s[10:11], -1", 7, 9)[:2] == [7, 9]
    assert scalar("s_and_b64 s[20:21], s[10:11], 0xffffffff", 7, 9)[:2] == [7, 0]


# Control flow


def test_exec_mask() -> None:
    body = """
        v_cmp_gt_u32_e32 vcc, 10, v1
        s_and_saveexec_b64 s[10:11], vcc
        v_mov_b32_e32 v10, 1
        s_xor_b64 s[10:11], exec, s[10:11]
        s_or_saveexec_b64 s[12:13], s[10:11]
        v_add_u32_e32 v11, 5, v11
        s_xor_b64 exec, exec, s[12:13]
        v_mov_b32_e32 v10, 2
    """
    result, other = vector(body, LANE)
    assert (result == np.where(LANE < 10, 1, 2)).all() and (other == 5).all()


LOOP = """
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    v_lshrrev_b32_e32 v1, 6, v0
    v_readfirstlane_b32 s6, v1
    s_add_i32 s6, s6, s2
    v_mov_b32_e32 v2, 0
    s_cmp_eq_u32 s6, 0
    s_cbranch_scc1 .LBB0_2
.LBB0_1:
    v_add_u32_e32 v2, s6, v2
    s_add_i32 s6, s6, -1
    s_cmp_lg_u32 s6, 0
    s_cbranch_scc1 .LBB0_1
.LBB0_2:
    s_lshl_b32 s7, s2, 8
    v_or_b32_e32 v0, s7, v0
    v_lshlrev_b32_e32 v0, 2, v0
    global_store_dword v0, v2, s[4:5]
"""


def test_loop_of_a_different_length_in_every_wave() -> None:
    out = np.full(8 * 256, 99, U32)
    launch(assemble(LOOP, {"out": "*i32"}, warps=4), (8,), [out], seed=5)
    turns = np.arange(8)[:, None] + np.arange(4)
    assert (out.reshape(8, 4, 64) == (turns * (turns + 1) // 2)[:, :, None]).all()


def test_endless_loop_is_given_up() -> None:
    with pytest.raises(Endless, match=r"line \d+"):
        launch(assemble(".LBB0_0:\n\ts_nop 0\n\ts_branch .LBB0_0", {}), (1,), [], limit=1000)


EXCHANGE = """
    s_load_dwordx2 s[4:5], s[0:1], 0x0
    v_lshlrev_b32_e32 v1, 2, v0
    ds_write_b32 v1, v0
    s_waitcnt lgkmcnt(0)
    s_barrier
    v_xor_b32_e32 v2, 0x40, v0
    v_lshlrev_b32_e32 v2, 2, v2
    ds_read_b32 v3, v2
    s_waitcnt lgkmcnt(0)
    s_lshl_b32 s6, s2, 9
    v_add_u32_e32 v1, s6, v1
    global_store_dword v1, v3, s[4:5]
"""


def test_missing_barrier_is_seen() -> None:
    right = assemble(EXCHANGE, {"out": "*i32"}, warps=2, shared=512)
    wrong = assemble(EXCHANGE.replace("s_barrier", "s_nop 0"), {"out": "*i32"}, warps=2, shared=512)
    wanted = np.tile(np.arange(128, dtype=U32) ^ U32(64), 3)
    for seed in range(4):
        out = np.zeros(3 * 128, U32)
        launch(right, (3,), [out], seed=seed)
        assert (out == wanted).all()
        launch(wrong, (3,), [out], seed=seed)
        assert not (out == wanted).all()  # one of the two waves reads what is not there yet, in every order


# Memory


@pytest.mark.parametrize("line", ["global_load_dword v10, v1, s[4:5]", "global_load_dword v10, v[3:4], off"])
def test_bounds_and_alignment(line: str) -> None:
    assert (copy(line)() == LANE + 1).all()
    with pytest.raises(
        Fault, match=r"line 10: global_load_dword .*workgroup 0, wave 0, lane 60.*no buffer.*source, 240 bytes"
    ):
        copy(line)(60)
    with pytest.raises(Fault, match=r"lane 0: .*multiple of 4"):
        copy(line, offset=2)()
    with pytest.raises(Fault, match="no buffer"):
        copy(line + " offset:-4")()
    with pytest.raises(Fault, match="no buffer"):  # the last bytes of a wide access count
        copy(line.replace("dword v10", "dwordx2 v[10:11]"))()


def test_buffers_anywhere() -> None:
    line = "global_load_dword v10, v[3:4], off"
    for address in (2**32 - 128, 2**33 + 16, 2**47 - 256, 16):
        assert (copy(line)(addresses={"source": address}) == LANE + 1).all()
    # The same program without its carry.
    body_without_carry = "s_nop 0\nv_mov_b32_e32 v4, v2\n" + line
    with pytest.raises(Fault):
        copy(body_without_carry)(addresses={"source": 2**32 - 128})
    with pytest.raises(ValueError, match="overlap"):
        copy(line)(addresses={"source": 4096, "out": 4096 + 128})


def test_stores_are_checked() -> None:
    store = "s_load_dwordx2 s[4:5], s[0:1], 0x0\nv_lshlrev_b32_e32 v1, 2, v0\n"
    with pytest.raises(Fault, match="lane 32"):
        launch(assemble(store + "global_store_dword v1, v0, s[4:5]", {"out": "*i32"}), (1,), [np.zeros(32, U32)])
    with pytest.raises(Fault, match="read-only"):
        launch(assemble("v_mov_b32_e32 v1, 0\nglobal_store_dword v1, v0, s[0:1]", {}), (1,), [])


def test_inactive_lanes_access_nothing() -> None:
    body = "s_mov_b64 exec, 0xff\nglobal_load_dword v10, v1, s[4:5]\ns_mov_b64 exec, -1\nv_cndmask_b32_e64 v10, 0, v10, s[8:9]"
    assert (copy("s_mov_b64 s[8:9], 0xff\n" + body)(8) == np.where(LANE < 8, LANE + 1, 0)).all()


def test_narrow_loads_and_stores() -> None:
    data = np.array([0x80FF7F01], U32)
    text = "s_load_dwordx4 s[4:7], s[0:1], 0x0\nv_mov_b32_e32 v1, 0\nv_mov_b32_e32 v2, -1\n"
    loads = ["ubyte v2, v1, s[4:5] offset:3", "sbyte v2, v1, s[4:5] offset:3", "ushort v2, v1, s[4:5] offset:2"]
    loads += ["sshort v2, v1, s[4:5] offset:2", "short_d16 v2, v1, s[4:5]", "short_d16_hi v2, v1, s[4:5]"]
    for i, each in enumerate(loads):
        text += f"v_mov_b32_e32 v2, -1\nglobal_load_{each}\nglobal_store_dword v1, v2, s[6:7] offset:{4 * i}\n"
    text += "global_store_byte v1, v1, s[6:7] offset:1\nglobal_store_short_d16_hi v1, v2, s[6:7] offset:20\n"
    out = np.zeros(6, U32)
    launch(assemble(text, {"source": "*i32", "out": "*i32"}), (1,), [data, out])
    assert out.tolist() == [0x80, 0xFFFFFF80, 0x80FF, 0xFFFF80FF, 0xFFFF7F01, 0x7F017F01]


def test_buffer_range() -> None:
    """Beyond num_records loads give 0 and stores vanish; inside of it a missing buffer is an error."""
    setup = (
        "s_and_b32 s5, s5, 0xffff\ns_mov_b32 s20, s4\ns_mov_b32 s21, s5\ns_mov_b32 s22, {}\ns_mov_b32 s23, 0x27000\n"
    )
    load = "buffer_load_dword v10, v1, s[20:23], 0 offen"
    assert (copy(setup.format(128) + load)() == np.where(LANE < 32, LANE + 1, 0)).all()
    assert (copy(setup.format(128) + load + " offset:64")() == np.where(LANE < 16, LANE + 17, 0)).all()
    assert (copy(setup.format("0x7ffffffe") + "v_bfrev_b32_e32 v1, 1\n" + load)() == 0).all()
    with pytest.raises(Fault, match="lane 32"):
        copy(setup.format("0x7ffffffe") + load)(32)
    with pytest.raises(Fault, match="across num_records 130"):
        copy(setup.format(130) + load)()
    with pytest.raises(Unsupported, match="stride"):
        copy(setup.format(128) + "s_or_b32 s21, s21, 0x40000\n" + load)()
    store = "global_load_dword v10, v1, s[4:5]\nbuffer_store_dword v50, v1, s[20:23], 0 offen\nglobal_load_dword v10, v1, s[4:5]"
    assert (copy(setup.format(16) + store)() == np.where(LANE < 4, 4 * LANE, LANE + 1)).all()


def test_shared_memory() -> None:
    body = "v_mov_b32_e32 v9, v0\nds_write2st64_b32 v1, v1, v9 offset0:0 offset1:1\ns_barrier\n"
    body += "ds_read2_b32 v[10:11], v1 offset0:64 offset1:0"
    assert (copy(body, shared=512)() == LANE).all()
    body = "ds_write_b16 v1, v1\nds_write_b8 v1, v0 offset:2\nds_read_b32 v10, v1\nds_read_u16 v11, v1\nv_and_b32_e32 v10, 0xffffff, v10"
    assert (copy(body, shared=256)() == (LANE << U32(16)) + 4 * LANE).all()
    with pytest.raises(Fault, match=r"lane 32: 4 bytes at LDS address 128, of 128"):
        copy("ds_read_b32 v10, v1", shared=128)()
    with pytest.raises(Fault, match="LDS address 2,"):
        copy("ds_read_b32 v10, v1 offset:2", shared=512)()


def test_scalar_loads() -> None:
    assert scalar("s_mov_b32 s14, 4\ns_load_dword s20, s[4:5], s14\ns_load_dword s21, s[4:5], s14 offset:0x4", 5, 6, 7)[
        :2
    ] == [6, 7]
    with pytest.raises(Fault, match=r"s_load_dwordx4.*no buffer"):
        scalar("s_load_dwordx4 s[20:23], s[4:5], 0x10", 1, 2, 3)
    with pytest.raises(Fault, match="misaligned"):
        scalar("s_load_dword s20, s[4:5], 0x2", 1)


@pytest.mark.parametrize(
    "line",
    [
        "v_mystery_f32 v1, v2",
        "v_add_f32_e32 v1, v2, v3 mul:2",
        "v_add_f32_e32 v1, v2",
        "v_add_f32_e32 v1, v2, v64",
        "s_mov_b32 s110, 0",
        "global_load_dword v1, v2, s[4:5] lds",
        "v_lshl_add_u64 v[2:3], v[2:3], 0, v[2:3] clamped",
        "s_cbranch_scc0 .LBB9_9",
        "v_bitop3_b32 v1, v1, v1, v1 bitop3:0x1",
        "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 4), 1",
    ],
)
def test_nothing_is_guessed(line: str) -> None:
    """An unknown opcode, modifier, register or label is an error."""
    with pytest.raises(Unsupported):
        launch(assemble(line, {}), (1,), [])


def test_aliases_and_table_of_opcodes() -> None:
    body = "s_load_dwordx4 s[4:7], s[0:1], 0x0\nv_lshlrev_b32_e32 v1, 2, v0\nglobal_load_dword v2, v1, s[4:5]\n"
    body += "v_add_u32_e32 v2, 1, v2\nglobal_store_dword v1, v2, s[6:7]"
    data = np.arange(64, dtype=U32)
    launch(assemble(body, {"source": "*i32", "out": "*i32"}), (1,), [data, data])
    assert (data == LANE + 1).all()
    assert len(known()) > 350
