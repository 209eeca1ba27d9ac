"""ONNX: the rewritten program as a file that ONNX Runtime runs, without torch."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, ClassVar

from recast.kernels.quantized_matmul.ops import largest_exact_code
from recast.lowering.base import Lowering, Runner
from recast.lowering.inline import inline_operators
from recast.lowering.onnx.embeddings import Table, pack_tables, read_form, round_tables, tables_of
from recast.lowering.onnx.export import check, export, input_names, output_kinds
from recast.lowering.onnx.fuse import fuse
from recast.lowering.onnx.genai import genai_config
from recast.lowering.onnx.grouped import group_attention
from recast.lowering.onnx.guards import drop_guards
from recast.lowering.onnx.kept import write_kept
from recast.lowering.onnx.kernels import kernels
from recast.lowering.onnx.last import keep_last
from recast.lowering.onnx.memory import without_memory
from recast.lowering.onnx.options import check_options
from recast.lowering.onnx.packed_cache import bytes_a_token, in_floats, pack_cache, round_cache
from recast.lowering.onnx.qdq import all_pairs_fit, check_static, share_roundings
from recast.lowering.onnx.session import load_session, needed, runner
from recast.lowering.onnx.spelled import gather_spelled
from recast.passes.module import OperatorModule
from recast.patterns.errors import ArtifactError, TargetError
from recast.patterns.program import Program

__all__ = ["OnnxRuntime"]

_MODEL, _WEIGHTS = "model.onnx", "model.onnx.data"
_LARGE = 1 << 30  # a protobuf message ends at 2 GiB
# Weights in a file of their own are mapped: a process that generates needs 1.1 times their bytes at its peak, else twice.
_MAPPED = 1 << 24


class OnnxRuntime(Lowering):
    """Exports to ONNX and runs with ONNX Runtime on the CPU.

    Parameters
    ----------
    opset
        Version of the standard operators, at least 21.
    accuracy_level
        0: 4-bit weights meet activations as they are; 4: activations are rounded to int8 inside the product, which is
        faster for single tokens and less exact.
    external_data
        Keep weights in a file of their own; by default above 1 GiB, and above 16 MiB for a decoder with its cache: ONNX Runtime
        then maps them instead of copying them.
    threads
        Of ONNX Runtime; by default as many as torch uses.
    attention
        Of a decoder with its cache: ``grouped`` for GroupQueryAttention, ``standard`` for standard operators, ``auto`` for the
        first where it computes the same.
    genai
        Write a decoder's ``genai_config.json`` too, for onnxruntime-genai.
    logits
        Of a decoder with its cache: ``last`` for (batch, 1, tokens), those after each text's last token, ``all`` for every token.
    embeddings
        Form of tables that inputs are looked up in, ``int4(group=32)``, say: `GatherBlockQuantized` unpacks the rows that are
        looked up. A head that is tied to a table and has the same bits and groups is held once with it.
    style
        ``qoperator`` for ONNX Runtime's own operators, ``qdq`` for QuantizeLinear and DequantizeLinear around standard ones,
        which OpenVINO, TensorRT, QNN and DirectML read. Inputs then need scales beforehand: ``int8(activations=true,
        static=true)``.
    cache
        Of a decoder with its cache: ``float`` as the model has it, ``int8`` for bytes with a scale for each head and token, in
        standard operators: a quarter of the memory, and not exact.
    """

    name: ClassVar[str] = "onnx"
    summary: ClassVar[str] = "an ONNX file, run with ONNX Runtime on the CPU"
    stores_program: ClassVar[bool] = False

    def __init__(
        self,
        opset: int = 21,
        accuracy_level: int = 0,
        external_data: bool | None = None,
        threads: int | None = None,
        attention: str = "auto",
        genai: bool = False,
        logits: str = "last",
        embeddings: str | None = None,
        style: str = "qoperator",
        cache: str = "float",
    ) -> None:
        check_options(opset, accuracy_level, attention, genai, logits, embeddings, style, cache)
        self.style, self.attention, self.genai = style, "standard" if style == "qdq" else attention, genai
        self.logits, self.embeddings, self.cache = logits, embeddings, cache
        self._form = None if embeddings is None else read_form(embeddings)
        self._tables: list[Table] = []
        self.opset, self.accuracy_level = opset, accuracy_level
        self.external_data, self.threads = external_data, threads
        self.inputs: list[str | None] = []
        self.outputs: list[list[Any]] = []
        self.decoder: dict[str, Any] | None = None  # of a decoder with its cache; see `Program`
        self.pairs: bool | None = None  # of style 'qdq', see `all_pairs_fit`
        self.session: Any = None  # onnxruntime.InferenceSession
        self._kernels: dict[str, str] = {}
        self._notes: list[str] = []
        self._model: Any = None  # onnx_ir.Model over the program's own tensors
        self._folder: Path | None = None  # where a loaded one came from

    @classmethod
    def installed(cls) -> None:
        """Raise TargetError if onnx, onnxscript or onnxruntime is missing."""
        for package in ("onnx", "onnxscript", "onnxruntime"):
            needed(package)

    def prepare(self, program: Program) -> Runner:
        """Export, and make a session."""
        self.installed()
        check(program)
        qdq = self.style == "qdq"
        if qdq:
            check_static(program)
            self.pairs = all_pairs_fit(program)
        self._tables, said = tables_of(program, self._form) if self._form is not None else ([], [])
        said += map(str, self._tables)
        if program.decoder is not None and self.logits == "last":
            program, count = keep_last(program)
            said += [f"logits: of the last token alone, for which {count} operations are computed"]
        inlined, self._kernels = inline_operators(program, kernels(self.accuracy_level, qdq))
        without_memory(inlined)
        write_kept(inlined, self.opset)
        drop_guards(inlined)
        said += self._pack_cache(inlined)
        pack_tables(inlined, self._tables, standard=qdq)
        self.decoder = self._group(inlined)
        inlined = gather_spelled(inlined, standard=qdq)
        self._notes += said
        share_roundings(inlined)
        fuse(inlined, standard=qdq)
        self.inputs, self.outputs = input_names(inlined), output_kinds(inlined)
        self._model = export(inlined, _sites(program), self.opset)
        if self.decoder is not None:
            self.decoder["in_place"] = self.decoder["grouped"] and _only_grouped(self._model)
        with tempfile.TemporaryDirectory(prefix="recast-onnx-") as folder:
            if self._external:
                self.write(Path(folder))
                self.session = self._load(Path(folder) / _MODEL)
            else:
                import onnx_ir

                self.session = self._load(onnx_ir.to_proto(self._model).SerializeToString())
        return self._runner()

    def _runner(self) -> Runner:
        run = runner(self.session, self.inputs, self.outputs)
        return in_floats(run, self.inputs, self.outputs) if self.cache == "int8" else run

    def computes(self, program: Program) -> Program:
        """The program with what was asked for beside it: rounded embeddings, logits of the last token alone."""
        if self._tables:
            program = round_tables(program, self._tables)
        program = program if program.decoder is None or self.logits == "all" else keep_last(program)[0]
        return round_cache(program) if self.cache == "int8" else program

    def _load(self, model: bytes | Path) -> Any:
        """Make a session; in style 'qdq' products of integers where this CPU multiplies them exactly."""
        exact = self.pairs is not None and (self.pairs or largest_exact_code() >= 127)
        return load_session(model, self.threads, integers=exact)

    def _pack_cache(self, program: Program) -> list[str]:
        """Pack a decoder's cache if that was asked for; gives what to say of it."""
        if self.cache == "float":
            return []
        if program.decoder is None:
            raise TargetError(
                f"target 'onnx': cache='int8' is for decoders with their cache, {program.label} was captured without; capture it "
                "with cache=True"
            )
        before, after = bytes_a_token(program)
        pack_cache(program)
        return [f"cache: int8 with a scale for each head and token, {after} bytes a token instead of {before}"]

    def _group(self, program: Program) -> dict[str, Any] | None:
        """Rewrite a decoder's attention, if it is one; gives what a generation loop has to know."""
        if program.decoder is None:
            if self.genai:
                raise TargetError(
                    f"target 'onnx': genai=True is for decoders with their cache, {program.label} was captured without; capture it "
                    "with cache=True"
                )
            return None
        standard = self.attention == "standard" or self.cache == "int8"
        asked = "attention='standard'" if self.attention == "standard" else "cache='int8'"
        reason = asked if standard else group_attention(program)
        if reason is not None and self.attention == "grouped":
            raise TargetError(
                f"target 'onnx': GroupQueryAttention does not compute what {program.label} does: {reason}"
            )
        self._notes = [
            "attention: GroupQueryAttention; prompts of different lengths are padded on the right"
            if reason is None
            else f"attention: standard operators ({reason})"
        ]
        found = {**program.decoder, "grouped": reason is None, "logits": self.logits, "held": self.cache}
        if self.genai:
            genai_config(found)  # what it has no words for is refused before the work
        return found

    def notes(self) -> list[str]:
        """What became of a decoder's attention, of its logits, and of embeddings."""
        return list(self._notes)

    @property
    def _external(self) -> bool:
        size = sum(value.const_value.nbytes for value in self._model.graph.initializers.values())
        least = _LARGE if self.decoder is None else _MAPPED
        return size > least if self.external_data is None else self.external_data

    def kernels(self, program: Program) -> dict[str, str]:
        """What `prepare` chose for each site."""
        return dict(self._kernels)

    def write(self, folder: Path) -> None:
        """Write ``model.onnx``, and ``model.onnx.data`` where weights are kept apart."""
        if self.genai and self.decoder is not None:
            (folder / "genai_config.json").write_text(
                json.dumps(genai_config(self.decoder), indent=1), encoding="utf-8"
            )
        if self._folder is not None:
            for name in (_MODEL, _WEIGHTS):
                if (self._folder / name).is_file():
                    shutil.copyfile(self._folder / name, folder / name)
            if not (folder / _MODEL).is_file():
                raise ArtifactError(f"artifact: '{self._folder / _MODEL}' it was loaded from is gone; load it again")
            return
        import onnx_ir

        if self._external:
            onnx_ir.save(self._model, folder / _MODEL, external_data=_WEIGHTS)
        else:
            onnx_ir.save(self._model, folder / _MODEL)

    @classmethod
    def read(cls, folder: Path, data: dict[str, Any]) -> tuple[Lowering, Runner]:
        """Restore from `write`'s files; neither torch's exporter nor onnx is needed."""
        described = dict(data["lowering"])
        inputs, outputs, kernels = described.pop("inputs"), described.pop("outputs"), described.pop("kernels")
        decoder, pairs = described.pop("decoder", None), described.pop("pairs", None)
        lowering = cls(**{"logits": "all", **described})  # as before there was a choice
        lowering.inputs, lowering.outputs, lowering._kernels = inputs, outputs, kernels
        lowering._folder, lowering.decoder, lowering.pairs = folder.absolute(), decoder, pairs
        lowering.session = lowering._load(lowering._folder / _MODEL)
        return lowering, lowering._runner()

    def extra(self) -> dict[str, Any]:
        """Options, as they were, and how flat inputs and results are called in the graph."""
        return {
            "opset": self.opset,
            "accuracy_level": self.accuracy_level,
            "external_data": self.external_data,
            "threads": self.threads,
            "attention": self.attention,
            "genai": self.genai,
            "logits": self.logits,
            "embeddings": self.embeddings,
            "style": self.style,
            "cache": self.cache,
            "pairs": self.pairs,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "kernels": self._kernels,
            "decoder": self.decoder,
        }


def _only_grouped(model: Any) -> bool:
    """Whether nothing but GroupQueryAttention looks at a decoder's cache, or at its length, which may then be more than is in it."""
    held = [value for value in model.graph.inputs if value.name.startswith("past_key_values.")]
    return all(_looks_away(user) for value in held for user, _ in value.uses())


def _looks_away(user: Any) -> bool:
    if user.op_type == "Shape":  # of the batch alone
        first, end = (user.attributes[name].as_int() if name in user.attributes else None for name in ("start", "end"))
        return first in (None, 0) and end is not None and 0 <= end <= 2
    return bool(user.op_type == "GroupQueryAttention")


def _sites(program: Program) -> dict[str, str]:
    nodes = [str(n.target) for n in program.graph.nodes if n.op == "call_module"]
    modules = {path: program.module.get_submodule(path) for path in nodes}
    return {path: module.site for path, module in modules.items() if isinstance(module, OperatorModule)}
