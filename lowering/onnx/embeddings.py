"""Embedding tables of integers: rows are unpacked as they are looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from recast.lowering.onnx.fuse import splice
from recast.lowering.onnx.weights import contrib
from recast.passes.forms.form import Form
from recast.passes.forms.quantized import Quantized
from recast.passes.module import OperatorModule
from recast.patterns.errors import TargetError
from recast.patterns.program import Program, get_by_path, set_by_path

__all__ = ["Table", "pack_tables", "read_form", "round_tables", "tables_of"]

aten = torch.ops.aten
_BITS = (2, 4, 8)
_ANY = (4, 4096)  # a shape to outline forms for
_PACKED = "recast_embeddings"
_WORKS = "int4(group=32), int8(group=32) and int2(group=32) would work"


@dataclass(frozen=True)
class Table:
    """One table of a program, and what it becomes.

    Attributes
    ----------
    name
        Of the weight in the program.
    operator
        The codes, (rows, features).
    error
        Of the codes, relative to the table.
    shared
        Whether they are those of a head that is tied to the table.
    nbytes
        Of the table as it was.
    """

    name: str
    operator: Quantized
    error: float
    shared: bool
    nbytes: int

    def __str__(self) -> str:
        beside = ", the codes of the head" if self.shared else ""
        after = self.operator.nbytes
        return (
            f"embeddings: {self.name} in {self.operator.bits} bits, relative error {self.error:.3g}, {after} bytes instead of "
            f"{self.nbytes}{beside}"
        )


def read_form(text: str) -> Form:
    """Form of the option ``embeddings``.

    Raises
    ------
    TargetError
        GatherBlockQuantized has no such rows.
    """
    form = Form.parse(text)
    made = form.outline(_ANY)
    if not isinstance(made, Quantized) or made.bits not in _BITS or made.activations:
        raise TargetError(f"target 'onnx': embeddings={text!r} are no integers of 2, 4 or 8 bits; {_WORKS}")
    group = made.group
    if group is None or group < 16 or group & (group - 1):
        raise TargetError(
            f"target 'onnx': embeddings={text!r} has groups of {group or 'a whole row'}; GatherBlockQuantized takes powers of two "
            f"from 16 on: {_WORKS}"
        )
    return form


def tables_of(program: Program, form: Form) -> tuple[list[Table], list[str]]:
    """Tables that an input is looked up in, rounded; and why others stay as they are.

    A head that is tied to a table and is rewritten to the same bits and groups lends its codes: the file then holds them once.
    """
    heads = {f"{m.site}.weight": m.operator for m in program.module.modules() if isinstance(m, OperatorModule)}
    found: list[Table] = []
    notes: list[str] = []
    for name, reads in _reads(program).items():
        weight: Tensor = get_by_path(program.module, name).detach()
        asked = form.outline((weight.shape[0], weight.shape[1]))
        assert isinstance(asked, Quantized)
        others = [user for node in reads for user in node.users if user.target is not aten.embedding.default]
        if others:
            notes.append(f"embeddings: {name} stays dense, '{others[0].name}' needs it so; rewrite it too")
        elif weight.shape[1] % (asked.group or 1):
            notes.append(f"embeddings: {name} stays dense, {weight.shape[1]} features are no multiple of {asked.group}")
        else:
            head = heads.get(name)
            tied = isinstance(head, Quantized) and _alike(head, asked)
            made = head if tied else form.fit(weight, where=name)
            assert isinstance(made, Quantized)
            error = float((made.to_dense() - weight).norm() / weight.norm().clamp_min(1e-30))
            found.append(Table(name, made, error, tied, weight.nbytes))
    return found, notes or ([] if found else ["embeddings: no input is looked up in a table"])


def _alike(head: Quantized, asked: Quantized) -> bool:
    return (head.shape, head.bits, head.group) == (asked.shape, asked.bits, asked.group)


def _reads(program: Program) -> dict[str, list[fx.Node]]:
    """Nodes that read each table that an input of the program is looked up in."""
    names: dict[str, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.target is aten.embedding.default and node.args[0].op == "get_attr" and node.args[1].op == "placeholder":
            names.setdefault(str(node.args[0].target), [])
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in names:
            names[str(node.target)].append(node)
    return names


def round_tables(program: Program, tables: list[Table]) -> Program:
    """The program with its tables rounded, in floating point: what the packed ones compute."""
    result = program.copy()
    for place, table in enumerate(tables):
        path = f"{_PACKED}.dense_{place}"
        set_by_path(result.module, path, table.operator.to_dense().to(get_by_path(result.module, table.name).dtype))
        for node in result.graph.nodes:
            if node.op == "get_attr" and node.target == table.name:
                node.target = path
    result.module.recompile()
    return result


def pack_tables(program: Program, tables: list[Table], *, standard: bool = False) -> None:
    """Put GatherBlockQuantized in the place of each lookup, or standard operators, in a program without operator nodes."""
    reads = _reads(program)
    for place, table in enumerate(tables):
        held = {f"{_PACKED}.{name}_{place}": tensor for name, tensor in _laid_out(table.operator).items()}
        for path, tensor in held.items():
            set_by_path(program.module, path, tensor)
        for node in [user for read in reads[table.name] for user in read.users]:
            _replace(program, node, table.operator, held, standard)
    program.graph.eliminate_dead_code()
    program.module.recompile()


def _laid_out(operator: Quantized) -> dict[str, Tensor]:
    """Codes and scales as MatMulNBits has them, so that a tied head and its table are one; the zero points a byte each."""
    rows, features = operator.shape
    group = int(operator.group or features)
    groups = features // group
    codes = operator.values
    if operator.bits == 8:
        codes = codes.view(torch.uint8) + 128 if codes.dtype == torch.int8 else codes
    held = {"values": codes.reshape(rows, groups, -1), "scale": operator.scale.reshape(rows, groups)}
    if operator.zero is not None:
        zero = operator.zero
        zero = zero.view(torch.uint8) + 128 if zero.dtype == torch.int8 else zero
        held["zero"] = zero.reshape(rows, groups, 1).contiguous()
    return held


def _replace(program: Program, node: fx.Node, operator: Quantized, held: dict[str, Tensor], standard: bool) -> None:
    mode, ids = node.meta["val"], cast(fx.Node, node.args[1])
    rows, features = operator.shape
    group = int(operator.group or features)
    nodes = []
    for path, tensor in held.items():
        with program.graph.inserting_before(node):
            read = program.graph.create_node("get_attr", path)
        read.meta["val"] = mode.new_empty(tuple(tensor.shape), dtype=tensor.dtype)
        nodes.append(read)

    def run(ids: Tensor, values: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        wide = scale.to(torch.float32).reshape(rows, features // group, 1)
        y = contrib(
            "GatherBlockQuantized",
            [values, ids, wide, *zero],
            [*ids.shape, features // group, group],
            bits=operator.bits,
            block_size=group,
            gather_axis=0,
            quantize_axis=2,
        )
        return y.reshape(*ids.shape, features).to(mode.dtype)

    def looked_up(ids: Tensor, values: Tensor, scale: Tensor, *zero: Tensor) -> Tensor:
        """Rows of codes, and what becomes of those alone."""
        numbers, sizes = ids.reshape(-1), (*ids.shape, features // group)
        codes = torch.index_select(values, 0, numbers).reshape(*sizes, -1).to(torch.float32)
        parts = []
        for _ in range(8 // operator.bits):  # in floating point, which every provider has for all of this
            rest = torch.floor(codes / 2**operator.bits)
            parts.append(codes - rest * 2**operator.bits)
            codes = rest
        codes = torch.stack(parts, -1).reshape(*sizes, group)
        offset: Tensor | float = 2.0 ** (operator.bits - 1)
        if zero:
            offset = torch.index_select(zero[0], 0, numbers).reshape(*sizes, 1).to(torch.float32)
        steps = torch.index_select(scale, 0, numbers).to(torch.float32).reshape(*sizes, 1)
        y = (codes - offset) * steps
        return y.reshape(*ids.shape, features).to(mode.dtype)

    result = splice(program, node, looked_up if standard else run, [ids, *nodes])
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
