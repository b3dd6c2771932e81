"""Hand-written programs: the text around a few instructions, and launches that give each lane its sources."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from amdgcn.launch import launch

U32, F32 = np.uint32, np.float32


def assemble(body: str, signature: dict[str, str], *, warps: int = 1, shared: int = 0, arch: str = "gfx942") -> Any:
    """A hand-written program: arguments at s[0:1], workgroup id in s2, lane number in v0."""
    offset, arguments = 0, ""
    for kind in signature.values():
        size = 4 if kind in ("i32", "fp32") else 8
        offset = -(-offset // size) * size
        value = "global_buffer" if kind.startswith("*") else "by_value"
        arguments += (
            f"      - .offset:         {offset}\n        .size:           {size}\n        .value_kind:     {value}\n"
        )
        offset += size
    directives = {"user_sgpr_kernarg_segment_ptr": 1, "user_sgpr_count": 2, "system_sgpr_workgroup_id_x": 1}
    directives |= {"next_free_vgpr": 72, "accum_offset": 64}
    text = f'\t.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\nhand:\n{body}\n\ts_endpgm\n.Lfunc_end0:\n\t.amdhsa_kernel hand\n'
    text += "".join(f"\t\t.amdhsa_{key} {value}\n" for key, value in directives.items())
    text += f"\t.end_amdhsa_kernel\namdhsa.kernels:\n    .args:\n{arguments}    .name: hand\n"
    return SimpleNamespace(text=text, signature=signature, metadata=SimpleNamespace(num_warps=warps, shared=shared))


def vector(body: str, *sources: Any, arch: str = "gfx942", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Runs `body` on one wave with the sources (uint32 or fp32, [64] or one value) in v1, v2, ...; gives v10 and v11."""
    columns = [np.broadcast_to(np.asarray(each), (64,)) for each in sources]
    data = np.concatenate([c.view(U32) if c.dtype == F32 else c.astype(U32) for c in columns])
    loads = "".join(f"\tglobal_load_dword v{i + 1}, v50, s[4:5] offset:{256 * i}\n" for i in range(len(sources)))
    text = "\ts_load_dwordx4 s[4:7], s[0:1], 0x0\n\ts_waitcnt lgkmcnt(0)\n\tv_lshlrev_b32_e32 v50, 2, v0\n" + loads
    text += "\tv_mov_b32_e32 v10, 0\n\tv_mov_b32_e32 v11, 0\n" + body + "\n\ts_mov_b64 exec, -1\n"
    text += "\tglobal_store_dword v50, v10, s[6:7]\n\tglobal_store_dword v50, v11, s[6:7] offset:256"
    out = np.zeros(128, U32)
    launch(assemble(text, {"data": "*i32", "out": "*i32"}, arch=arch), (1,), [data, out], seed=seed)
    return out[:64], out[64:]


def scalar(body: str, *sources: int) -> list[int]:
    """Runs `body` with the sources in s10, s11, ...; gives s20, s21 and scc."""
    text = "\ts_load_dwordx2 s[4:5], s[0:1], 0x0\n"
    text += "".join(f"\ts_load_dword s{10 + i}, s[4:5], {hex(4 * i)}\n" for i in range(len(sources)))
    text += "\ts_mov_b32 s20, 0\n\ts_mov_b32 s21, 0\n\ts_cmp_eq_u32 s20, 1\n" + body + "\n"
    text += "\ts_cselect_b32 s22, 1, 0\n\tv_mov_b32_e32 v1, 0\n"
    text += "".join(
        f"\tv_mov_b32_e32 v2, s{20 + i}\n\tglobal_store_dword v1, v2, s[4:5] offset:{4 * i}\n" for i in range(3)
    )
    data = np.array([*sources, 0, 0, 0], U32)
    launch(assemble(text, {"data": "*i32"}), (1,), [data])
    return [int(each) for each in data[:3]]


def bits(value: float) -> int:
    return int(F32(value).view(U32))


def copy(line: str, offset: int = 0, **options: Any) -> Callable[..., np.ndarray]:
    """A program whose lanes read with `line`, from byte 4 * lane + offset, and write v10 to the second buffer."""
    body = f"""
        s_load_dwordx4 s[4:7], s[0:1], 0x0
        v_lshlrev_b32_e32 v50, 2, v0
        v_add_u32_e32 v1, {offset}, v50
        v_mov_b32_e32 v2, s5
        v_add_co_u32_e32 v3, vcc, s4, v1
        v_addc_co_u32_e32 v4, vcc, 0, v2, vcc
        {line}
        global_store_dword v50, v10, s[6:7]
    """
    compiled = assemble(body, {"source": "*i32", "out": "*i32"}, **options)

    def run(count: int = 64, **kwargs: Any) -> np.ndarray:
        source, out = np.arange(count, dtype=U32) + 1, np.zeros(64, U32)
        launch(compiled, (1,), [source, out], **kwargs)
        return out

    return run


def spread(count: int, seed: int = 0) -> np.ndarray:
    """fp32 of every size and kind: random bit patterns, denormals, powers of two, and all special values."""
    generator = np.random.default_rng(seed)
    patterns = generator.integers(0, 2**32, count, U32)
    patterns[::7] &= U32(0x807FFFFF)
    patterns[3::11] &= U32(0xFF800000)
    patterns[5::13] = generator.standard_normal(len(patterns[5::13])).astype(F32).view(U32)
    special = [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 1, 0x80000001, 0x7F7FFFFF, 0x00800000, 0x7F000000]
    patterns[: len(special)] = special
    return patterns.view(F32)
