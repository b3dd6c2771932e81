"""Ahead-of-time compilation of Triton kernels, on a machine without a GPU, and what the assembly text says of them.

`compile_kernel` reproduces the specialisation that the JIT launcher would choose, so what is inspected or executed by a
test is what a GPU would run. Every name of Triton that is not documented is imported here and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# Read from triton 3.7.1; 3.6 has the same names. ASTSource takes the specialisation as `attrs`, a dict from the path of
# an argument, (index,), to a list of [attribute, value].
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = {
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}

_CROSS_LANE = {
    "dpp": r"_dpp\b",
    "swizzle": r"^ds_swizzle",
    "permute": r"^ds_b?permute|^v_permlane",
    "readlane": r"^v_readlane|^v_readfirstlane",
    "lds_write": r"^ds_write|^ds_store|^st\.shared|^stmatrix",
    "lds_read": r"^ds_read|^ds_load|^ld\.shared|^ldmatrix",
    "shuffle": r"^shfl\.",
    "barrier": r"^s_barrier|^bar\.|^barrier\.",
}


@dataclass(frozen=True)
class Facts:
    """What the text of a kernel says. None: the text of this architecture does not say it."""

    vgpr: int | None
    agpr: int | None
    sgpr: int | None
    spills: int | None
    """Vector and scalar registers that were spilled."""
    scratch: int | None
    """Bytes of private memory per lane."""
    lds: int
    """Bytes of shared memory. From the metadata: the amdgcn directive always reads 0, Triton's shared memory is dynamic."""
    widest_load: int
    """Bytes that one lane reads from global memory with its widest instruction."""
    widest_store: int
    narrow_stores: int
    """Global stores of less than 4 bytes per lane, written in the text (not executed)."""
    short_stores: int
    """Those of exactly 2 bytes: on CDNA the sign of a layout that went through LDS."""
    valu: int | None
    """Vector ALU instructions in the text."""
    cross_lane: dict[str, int] = field(default_factory=dict)
    """How lanes exchange data: method -> number of instructions; methods that do not occur are absent."""


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: `text` is amdgcn assembly, or PTX on sm_90."""

    name: str
    arch: str
    text: str
    metadata: Any
    """Triton's own: num_warps, shared, name, ..."""
    signature: dict[str, str]
    """Run-time arguments in order, name to Triton type. Constants are not among them."""

    def opcodes(self) -> Counter[str]:
        """How often each opcode stands in the text."""
        if self.arch.startswith("sm_"):
            return Counter(re.findall(r"^\s+(?:@%?!?%?\w+\s+)?([a-z][\w.:]+)", self.text, re.M))
        return Counter(re.findall(r"^\s+([a-z]\w+)", self.text, re.M))

    def facts(self) -> Facts:
        """Registers, memory widths and cross-lane traffic, as the text states them."""
        ops = self.opcodes()
        amd = not self.arch.startswith("sm_")
        loads, stores = _widths(ops, "load" if amd else "ld", amd), _widths(ops, "store" if amd else "st", amd)
        spilled = [self._number("vgpr_spill_count"), self._number("sgpr_spill_count")]
        counts = {method: sum(n for op, n in ops.items() if re.search(p, op)) for method, p in _CROSS_LANE.items()}
        return Facts(
            vgpr=self._number("vgpr_count"),
            agpr=self._number("agpr_count"),
            sgpr=self._number("sgpr_count"),
            spills=sum(n or 0 for n in spilled) if amd else None,
            scratch=self._number("private_segment_fixed_size"),
            lds=int(self.metadata.shared),
            widest_load=max(loads, default=0),
            widest_store=max(stores, default=0),
            narrow_stores=sum(n for width, n in stores.items() if width < 4),
            short_stores=stores[2],
            valu=sum(n for op, n in ops.items() if op.startswith("v_") and op != "v_nop") if amd else None,
            cross_lane={method: n for method, n in counts.items() if n},
        )

    def _number(self, key: str) -> int | None:
        found = re.search(rf"^\s+(?:- )?\.{key}:\s+(\d+)", self.text, re.M)
        return int(found[1]) if found else None


def compile_kernel(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    *,
    warps: int = 4,
    small_pointers: bool = True,
    aligned: bool = True,
    divisible: Collection[str] = (),
    stages: int | None = None,
) -> Compiled:
    """Compiles a `triton.jit` function for one architecture; no GPU and no driver is needed.

    Fused multiply-add contraction is always off: the codes of a wire format are defined by separate roundings, and with
    contraction some of them differ by one.

    Args:
        signature: Argument name to Triton type ("*fp32", "*u8", "i32"), for every argument that `constants` lacks.
        constants: Values of the constexpr arguments (and of arguments that the JIT would specialise to 1 or None).
        arch: A key of `TARGETS`.
        warps: Waves (of 64 lanes on CDNA) per program.
        small_pointers: As the launcher does for tensors below 2 GB: AMD then addresses them with 32-bit offsets and
            buffer instructions. Without it the code is that of larger tensors.
        aligned: Pointers are multiples of 16 bytes, as the launcher finds for nearly all tensors.
        divisible: Integer arguments that are multiples of 16.
        stages: Software pipelining depth; None is Triton's default.

    Raises:
        ValueError: Unknown `arch`, or `signature` and `constants` do not name the arguments of `kernel`.
    """
    if arch not in TARGETS:
        raise ValueError(f"unknown arch {arch!r}, one of: {', '.join(TARGETS)}")
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"{kernel!r} is not a compiled triton.jit function (is TRITON_INTERPRET set?)")
    names = list(kernel.arg_names)
    run_time = {name: signature[name] for name in names if name in signature and name not in constants}
    wrong = [name for name in names if name not in run_time and name not in constants]
    wrong += [name for name in (*signature, *constants, *divisible) if name not in names]
    if wrong:
        raise ValueError(f"{kernel.__name__}({', '.join(names)}): missing or unknown arguments {wrong}")

    attrs: dict[tuple[int], list[list[Any]]] = {}
    for name, type_ in run_time.items():
        pointer = type_.startswith("*")
        marks = [["tt.divisibility", 16]] if (aligned if pointer else name in divisible) else []
        if pointer and small_pointers and arch.startswith("gfx"):
            marks.append(["tt.pointer_range", 32])
        if marks:
            attrs[(names.index(name),)] = marks
    source = ASTSource(
        fn=kernel,
        signature={name: run_time.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attrs,
    )
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if stages is not None:
        options["num_stages"] = stages
    made = triton_compile(source, target=TARGETS[arch], options=options)
    text = made.asm["amdgcn" if arch.startswith("gfx") else "ptx"]
    return Compiled(kernel.__name__, arch, text, made.metadata, run_time)


def _widths(ops: Counter[str], what: str, amd: bool) -> Counter[int]:
    """Bytes per lane -> number of global loads or stores of that width."""
    widths: Counter[int] = Counter()
    for op, n in ops.items():
        if amd:
            found = re.fullmatch(
                rf"(?:global|buffer|flat)_{what}_(?:lds_)?([us]?byte|[us]?short|dword)(?:x(\d))?\w*", op
            )
            if found:
                widths[{"e": 1, "t": 2, "d": 4}[found[1][-1]] * int(found[2] or 1)] += n
        else:
            found = re.fullmatch(rf"{what}\.(?:\w+\.)*?global(?:\.\w+|::\w+)*?(?:\.v(\d))?\.[a-z](\d+)", op)
            if found:
                widths[int(found[2]) // 8 * int(found[1] or 1)] += n
    return widths
