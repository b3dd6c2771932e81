"""The text of a kernel as a list of instructions, and what its descriptor says about registers and arguments."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from amdgcn.errors import Unsupported

SPECIAL = {"vcc": (106, 2), "vcc_lo": (106, 1), "vcc_hi": (107, 1), "m0": (124, 1)}
SPECIAL |= {"exec": (126, 2), "exec_lo": (126, 1), "exec_hi": (127, 1)}
VCC, EXEC = 106, 126

FLOATS = {"0.5": 0.5, "1.0": 1.0, "2.0": 2.0, "4.0": 4.0, "0.15915494": 0.15915494309189535}
FLOATS |= {"-" + text: -value for text, value in FLOATS.items()}

FLAGS = {"offen", "idxen", "glc", "slc", "dlc", "nt", "sc0", "sc1", "scc", "clamp", "lds", "gds", "tfe"}
FLAGS |= {"row_mirror", "row_half_mirror"}

NOT_EXECUTED = {"s_nop", "s_waitcnt", "s_setprio", "s_sleep", "s_inst_prefetch", "s_code_end"}
"""Timing and ordering of one wave's own accesses, which complete at once here."""
FLOW = {"s_endpgm", "s_barrier", "s_branch"}
FLOW |= {"s_cbranch_" + c for c in ("scc0", "scc1", "vccz", "vccnz", "execz", "execnz")}


@dataclass(frozen=True)
class Operand:
    """A register range, a constant, or a word such as `off`, with its source modifiers."""

    text: str
    kind: str
    """v, a, s (SGPRs, vcc, exec and m0), integer, float, scc, word."""
    index: int = 0
    count: int = 1
    value: Any = None
    negate: bool = False
    absolute: bool = False
    sign_extend: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line. `op` has no encoding suffix: v_add_f32_sdwa is op v_add_f32, encoding sdwa."""

    text: str
    line: int
    op: str
    encoding: str
    operands: tuple[Operand, ...]
    modifiers: dict[str, str]
    execute: Callable[[Any, Instruction], None] | None = None
    target: int = -1
    """Branches: where they go."""

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Argument:
    """Where one argument lies in the kernel's argument segment."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Program:
    """A parsed kernel."""

    name: str
    arch: str
    instructions: tuple[Instruction, ...]
    descriptor: dict[str, int]
    """The .amdhsa_ directives, without that prefix."""
    arguments: tuple[Argument, ...] = field(default_factory=tuple)

    def without(self, index: int) -> Program:
        """The same program with a no-op in place of one instruction."""
        gone = replace(self.instructions[index], op="s_nop", execute=None)
        return replace(self, instructions=(*self.instructions[:index], gone, *self.instructions[index + 1 :]))


def parse(text: str) -> Program:
    """Parses amdgcn assembly text of one kernel.

    Raises:
        Unsupported: An instruction, operand or modifier that is not modelled, even where it would never be reached.
    """
    from amdgcn.registry import lookup  # the opcode files import this one

    name = _one(r"^\s*\.amdhsa_kernel\s+(\S+)", text)
    arch = _one(r'\.amdgcn_target\s+"[\w-]+--(gfx\w+?)[:"]', text)
    descriptor = {
        key: int(value, 0)
        for key, value in re.findall(r"^\s*\.amdhsa_(\w+)\s+(\w+)\s*$", text, re.M)
        if value[0].isdigit()
    }
    instructions, labels, inside = [], {}, False
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(;|//).*", "", raw).strip()
        if line == f"{name}:":
            inside = True
        elif not inside or not line:
            continue
        elif line.startswith(".Lfunc_end") or line.startswith(".section"):
            break
        elif re.fullmatch(r"[.\w$]+:", line):
            labels[line[:-1]] = len(instructions)
        elif not line.startswith("."):
            instructions.append(_instruction(" ".join(line.split()), number))
    linked = []
    for each in instructions:
        if each.op.startswith(("s_branch", "s_cbranch")):
            if each.operands[0].text not in labels:
                raise Unsupported(f"{each}: no such label")
            linked.append(replace(each, target=labels[each.operands[0].text]))
        elif each.op in NOT_EXECUTED or each.op in FLOW:
            linked.append(each)
        else:
            _check_registers(each, descriptor)
            linked.append(replace(each, execute=lookup(each, arch)))
    return Program(name, arch, tuple(linked), descriptor, _arguments(text))


def _one(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.M)
    if len(found) != 1:
        raise Unsupported(f"expected one match of {pattern}, found {found}")
    return found[0]


def _arguments(text: str) -> tuple[Argument, ...]:
    """The `.args` list of the metadata at the end of the text."""
    block = re.search(r"^    \.args:\n((?:      .*\n)*)", text, re.M)
    entries = re.split(r"^      - ", block[1], flags=re.M)[1:] if block else []
    found = [dict(re.findall(r"\.(\w+):\s+(\S+)", entry)) for entry in entries]
    return tuple(Argument(int(e["offset"]), int(e["size"]), e["value_kind"]) for e in found)


def _instruction(text: str, line: int) -> Instruction:
    opcode, _, rest = text.partition(" ")
    op, encoding = opcode, ""
    for suffix in ("e32", "e64", "sdwa", "dpp"):
        if opcode.endswith("_" + suffix):
            op, encoding = opcode[: -len(suffix) - 1], suffix
    if op in NOT_EXECUTED:
        return Instruction(text, line, op, encoding, (), {})
    operands, modifiers = [], {}
    where = f"line {line}: {text}"
    for part in _split(rest, ","):
        first, *others = _split(part, " ")
        operands.append(_operand(first, where))
        for word in others:
            key, colon, value = word.partition(":")
            if not colon and word not in FLAGS:
                raise Unsupported(f"{where}: unknown modifier {word}")
            modifiers[key] = value
    return Instruction(text, line, op, encoding, tuple(operands), modifiers)


def _split(text: str, separator: str) -> list[str]:
    """Splits outside of brackets, and drops empty parts."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str, where: str) -> Operand:
    inner, negate, absolute, sign_extend = text, False, False, False
    if re.match(r"-[|vasm]", inner):
        inner, negate = inner[1:], True
    if inner[:1] == "|" == inner[-1:]:
        inner, absolute = inner[1:-1], True
    if inner.startswith("sext("):
        inner, sign_extend = inner[5:-1], True
    marks = {"negate": negate, "absolute": absolute, "sign_extend": sign_extend}
    if found := re.fullmatch(r"([vas])(?:(\d+)|\[(\d+):(\d+)\])", inner):
        first = int(found[2] or found[3])
        return Operand(text, found[1], first, int(found[4] or first) - first + 1, **marks)
    if inner in SPECIAL:
        return Operand(text, "s", *SPECIAL[inner], **marks)
    if inner in ("scc", "src_scc"):
        return Operand(text, "scc", **marks)
    if inner in FLOATS:
        return Operand(text, "float", value=FLOATS[inner], **marks)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", inner):
        return Operand(text, "integer", value=int(inner, 0), **marks)
    if re.fullmatch(r"off|\.?\w+|hwreg\(.*\)", inner) and not any(marks.values()):
        return Operand(text, "word")
    raise Unsupported(f"{where}: operand {text}")


def _check_registers(instruction: Instruction, descriptor: dict[str, int]) -> None:
    """A register beyond what the descriptor reserves belongs to another wave."""
    vector = descriptor.get("accum_offset", descriptor.get("next_free_vgpr", 256))
    limits = {"v": vector, "a": max(descriptor.get("next_free_vgpr", 512) - vector, 0), "s": 102}
    for operand in instruction.operands:
        limit = limits.get(operand.kind)
        named = operand.text in SPECIAL  # vcc, exec and m0 are always there
        if limit is not None and not named and operand.index + operand.count > limit:
            raise Unsupported(
                f"{instruction}: {operand.text} is beyond the {limit} registers that the descriptor reserves"
            )
