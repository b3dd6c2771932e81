"""What the text of every Triton kernel must say on every architecture: nothing spilled, wide accesses, no contraction."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
import torch
from support.kernel_runs import AMD, cells, text_of

from zcompile.kernels import blocks
from zcompile.kernels.aot import Facts
from zcompile.kernels.catalogue import ARCHS, Variant, catalogue, flat, whole
from zcompile.kernels.code import BLOCKS, SCALES, Code
from zcompile.kernels.geometry import Geometry, Piece
from zcompile.kernels.triton_nibbles import requantize_words_kernel

LDS = 16384
"""Bytes that a kernel may use: four workgroups of eight waves then fill a compute unit of CDNA2."""
DIVISION = 2
"""Divisions in a quantisation, for each row of blocks that a lane works on: amax / top and 1 / scale."""
every = pytest.mark.parametrize(("variant", "arch"), cells(ARCHS))


@cache
def opcodes(variant: Variant, arch: str, small: bool = True) -> Counter[str]:
    return text_of(variant, arch, small)[0].opcodes()


@cache
def facts_of(variant: Variant, arch: str, small: bool = True) -> Facts:
    return text_of(variant, arch, small)[0].facts()


@every
def test_nothing_spilled_and_wide_accesses(variant: Variant, arch: str) -> None:
    facts, constants = facts_of(variant, arch), text_of(variant, arch)[1].constants
    assert facts.lds <= LDS
    assert facts.widest_load >= 8 and facts.widest_store >= 8
    # The scales of a tile, one per lane of a few, are bf16; nothing else is stored in less than 4 bytes but the ragged ends of
    # parameters that begin or end anywhere.
    writes_scales = "quantize" in variant.name and "dequantize" not in variant.name
    ragged = constants.get("ODD", False) and not writes_scales
    scale = constants.get("OUT_SCALE", constants["SCALE"])
    if not ragged:
        allowed = 1 if writes_scales and scale == "bf16" else 0
        assert facts.narrow_stores == facts.short_stores == allowed
    if arch in AMD:
        assert (facts.spills, facts.scratch, facts.agpr) == (0, 0, 0)
        assert facts.vgpr is not None and facts.vgpr <= 168, "three waves per SIMD"


@every
def test_narrow_loads_are_scales(variant: Variant, arch: str) -> None:
    """Codes and values come in pieces of 8 or 16 bytes per lane."""
    ops, constants = opcodes(variant, arch), text_of(variant, arch)[1].constants
    if constants.get("ODD"):
        pytest.skip("the ragged ends are read one by one")
    if arch in AMD:
        narrow = {
            op: n for op, n in ops.items() if re.match(r"(buffer|global|flat)_load_([us]?byte|[us]?short|dword$)", op)
        }
        scales = {
            "buffer_load_ushort",
            "buffer_load_dword",
            "global_load_ushort",
            "global_load_dword",
            "global_load_dwordx2",
        }
    else:
        narrow = {op: n for op, n in ops.items() if re.match(r"ld\.global(\.\w+)*\.[bus](8|16)$", op)}
        scales = {op for op in narrow if op.endswith("16")}
    assert set(narrow) <= scales
    parts = constants.get("PARTS")
    per_part = 3 if arch in AMD else 40
    assert sum(narrow.values()) <= per_part * max(parts if parts else 2, 1)


@pytest.mark.parametrize(("variant", "arch"), cells(AMD, all_of=""))
def test_both_ranges_of_pointers(variant: Variant, arch: str) -> None:
    """What tensors above 2 GB run is as wide as what the others run, and neither spills. (NVIDIA has one form.)"""
    small, large = facts_of(variant, arch), facts_of(variant, arch, False)
    assert (large.widest_load, large.widest_store) == (small.widest_load, small.widest_store)
    assert (large.narrow_stores, large.spills, large.scratch) == (small.narrow_stores, 0, 0)
    # Offsets inside of a tile are known to be small, so that buffer instructions serve both: the base is a 64-bit scalar.
    assert any(op.startswith("buffer_store") for op in opcodes(variant, arch, False))


def asked_for(variant: Variant, arch: str) -> int:
    """Fused multiply-adds that one lane is told to do: of products that are exact."""
    call = text_of(variant, arch)[1]
    if call.kernel is not requantize_words_kernel or call.constants["SCALE"] != "bf16":
        return 0
    lanes = (64 if arch in AMD else 32) * call.warps
    values: int = call.constants["ROWS"] * call.constants["BLOCK"] // lanes
    return ((call.constants["PARTS"] or 2) - 1) * values  # 0: a loop, whose body stands in the text once


@every
def test_no_contraction(variant: Variant, arch: str) -> None:
    """Fused multiply-adds stand inside of divisions, as many as those need, and where a kernel asks for them."""
    ops = opcodes(variant, arch)
    if arch in AMD:
        fused = sum(
            n * (1 + op.startswith("v_pk"))
            for op, n in ops.items()
            if re.match(r"v_(pk_)?(fma|fmac|mad|mac|fmaak|fmamk)\w*_f32", op)
        )
        divisions = ops["v_div_fixup_f32"] + ops["v_div_fixup_f32_e64"]
        inside = 5 * divisions  # v_div_scale, v_rcp, 5 v_fma, v_div_fmas, v_div_fixup
        assert fused == inside + asked_for(variant, arch)
        quantizes = "quantize" in variant.name and "dequantize" not in variant.name
        assert (divisions >= DIVISION) == quantizes
    else:
        assert sum(n for op, n in ops.items() if op.startswith("fma")) == asked_for(variant, arch)
        assert not any(".approx" in op or ".ftz" in op for op in ops)


@every
def test_no_atomics_and_no_calls(variant: Variant, arch: str) -> None:
    ops = opcodes(variant, arch)
    assert not any("atomic" in op or op.startswith(("s_swappc", "call", "red.")) for op in ops)


@pytest.mark.parametrize("arch", AMD)
def test_rounding_instructions(arch: str) -> None:
    """The conversions of fp8 and bf16 are the chip's where it has them, and only there."""
    for variant in catalogue():
        if arch not in variant.archs() or variant.name not in (
            "dequantize bf16 int8",
            "quantize bf16 e4m3fn",
            "quantize bf16 e4m3fnuz",
        ):
            continue
        ops = opcodes(variant, arch)
        if variant.code.integer:
            assert bool(ops["v_cvt_pk_bf16_f32"]) == (arch == "gfx950")
        else:
            assert any(re.match(r"v_cvt_(scalef32_)?pk_fp8_f32", op) for op in ops)


# The table of tiles


def _pieces(block: int) -> list[Geometry]:
    one_block = Geometry.of_rows(3, (block,))
    return [flat(block), flat(block, rows=5), whole(block, odd=True), whole(block, odd=False), one_block]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_tiles_cover_every_byte_once(block: int, kind: str, scale: str) -> None:
    """Codes, scales and padding of a message are written by one tile each, and values belong to the row that the geometry says."""
    code = Code(kind, block, scale)
    step, width = blocks.tile_blocks(code), SCALES[scale]
    for geometry in _pieces(block):
        written = torch.zeros(geometry.message_bytes(code), dtype=torch.int32)
        elements = [torch.zeros(piece.numel, dtype=torch.int32) for piece in geometry.pieces]
        for source, own, joint, valid, codes, scales, count, slots in blocks.tiles(geometry, code).tolist():
            assert 0 < count <= step and count <= slots <= step and 0 <= valid <= count * block
            assert codes % 16 == 0 and scales % width == 0
            written[codes : codes + code.code_bytes(count * block)] += 1
            written[scales : scales + slots * width] += 1
            elements[source][own : own + valid] += 1
            if not geometry.flat:
                assert joint == geometry.starts[source] + own
        assert (written == 1).all()
        assert all((each <= 1).all() for each in elements)
        for piece, each in zip(geometry.pieces, elements, strict=True):
            assert int(each.sum()) == sum(piece.span(row)[1] for row in range(geometry.rows))


def test_tiles_of_peers_count_from_the_beginning_of_each_message() -> None:
    code, geometry = Code("int4"), whole(256, odd=False)
    plain, peers = blocks.tiles(geometry, code), blocks.tiles(geometry, code, ranks=2)
    each = geometry.message_bytes(code) // 2
    assert torch.equal(peers[:, 0], plain[:, 4] // each)
    assert torch.equal(peers[:, 4:6] + peers[:, :1] * each, plain[:, 4:6])
    assert torch.equal(peers[:, 1:4], plain[:, 1:4])
    with pytest.raises(ValueError, match="3 equal messages"):
        blocks.tiles(geometry, code, ranks=3)


def test_odd_geometries() -> None:
    assert not blocks.odd(flat(32)) and not blocks.odd(whole(32, odd=False)) and blocks.odd(whole(32, odd=True))
    assert blocks.odd(Geometry(1, (Piece(32, 30, ((0, 30),)),), False))
