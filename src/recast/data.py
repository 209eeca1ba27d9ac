"""Batches from a file, for `--calibrate` and `--on`: text, JSON lines, or safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recast.models import Model, quiet_transformers, require
from recast.patterns.errors import CalibrationError, ModelError, nearest

__all__ = ["is_statistics", "read_batches", "tokenized"]

Batch = dict[str, Tensor]
_LONGEST = 128  # tokens a text is cut to; calibration sees more kinds of text that way than with a few long ones


def is_statistics(path: Path) -> bool:
    """Whether a file holds a saved `Calibration`, not data."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return str((file.metadata() or {}).get("format", "")).startswith("recast-calibration")
    except (OSError, SafetensorError):
        return False


def read_batches(
    path: str | Path,
    model: Model,
    *,
    batch_size: int = 8,
    limit: int | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Batch]:
    """Batches of named inputs for a model.

    Parameters
    ----------
    path
        ``.txt``: a text a line, tokenised with the tokenizer in the model's directory. ``.jsonl``: a line each
        ``{"text": ...}`` or the inputs by name as (nested) lists. ``.safetensors``: tensors named like the
        inputs, whose first dimension is the batch.
    model
        Whose inputs they are.
    batch_size
        Rows of a batch.
    limit
        Use the first so many rows at most.
    say
        Is told where there are more rows than that.

    Raises
    ------
    CalibrationError
        The file is missing, empty, of an unknown kind, or does not fit the model's inputs.
    ModelError
        Texts are given and the model has no tokenizer.
    """
    file = Path(path)
    if not file.is_file():
        raise CalibrationError(f"data: there is no file '{path}'; give a .txt, .jsonl or .safetensors file")
    readers = {".txt": _texts, ".jsonl": _lines, ".safetensors": _tensors}
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise CalibrationError(
            f"data: '{path}' ends in '{file.suffix}'; a .txt file (one text a line), .jsonl (one object a line) or "
            ".safetensors (tensors named like the inputs) is needed"
        )
    try:
        batches, rows = reader(file, model, max(1, batch_size), limit)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"data: '{path}' cannot be read: {error}") from error
    if say is not None and limit is not None and rows > limit:
        say(f"the first {limit} of {rows} rows of '{file}' are used; --limit {rows} would use all")
    return [_checked(batch, model, file) for batch in batches]


def _texts(file: Path, model: Model, size: int, limit: int | None) -> tuple[list[Batch], int]:
    texts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise CalibrationError(f"data: '{file}' holds no text; one text a line is needed, a few dozen would do")
    return tokenized(texts[:limit], model, size), len(texts)


def tokenized(
    texts: Sequence[str],
    model: Model,
    size: int,
    length: int = _LONGEST,
    *,
    pad: bool = False,
    inputs: Sequence[str] | None = None,
) -> list[Batch]:
    """Texts as batches of a model's inputs, or of those named `inputs`: then the model need not be captured to know them.

    They are padded to the longest of each batch, or to `length` if `pad`.
    """
    folder = model.directory
    if folder is None or not model.has_tokenizer:
        raise ModelError(
            f"data: texts need a tokenizer, and '{model.label}' has none beside it (tokenizer.json); give the inputs "
            f"themselves, as a .safetensors file with {', '.join(model.inputs)}"
        )
    transformers = require("transformers", "tokenising texts")
    with quiet_transformers():
        try:
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(os.fspath(folder), local_files_only=True)
        except Exception as error:  # as for models: all mean that the files are no tokenizer
            raise ModelError(f"data: the tokenizer in '{folder}' cannot be loaded: {error}") from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if inputs is None and model.decoder is not None:
            tokenizer.padding_side = "right"  # where GroupQueryAttention takes it
        batches = []
        for start in range(0, len(texts), size):
            rows = list(texts[start : start + size])
            found = tokenizer(
                rows, padding="max_length" if pad else True, truncation=True, max_length=length, return_tensors="pt"
            )
            batches.append({name: value for name, value in found.items() if isinstance(value, Tensor)})
    wanted = model.inputs if inputs is None else inputs
    return [{name: value for name, value in batch.items() if name in wanted} for batch in batches]


def _lines(file: Path, model: Model, size: int, limit: int | None) -> tuple[list[Batch], int]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"data: line {number} of '{file}' is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise CalibrationError(f'data: line {number} of \'{file}\' is not an object; {{"text": "..."}} would work')
        rows.append(row)
    found, rows = len(rows), rows[:limit]
    if not rows:
        raise CalibrationError(f"data: '{file}' holds no line; one JSON object a line is needed, a few dozen would do")
    if "text" in rows[0] and "text" not in model.inputs:
        if strange := [i for i, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)]:
            raise CalibrationError(f"data: line {strange[0]} of '{file}' has no \"text\", unlike the first")
        return tokenized([row["text"] for row in rows], model, size), found
    known = [*model.inputs, *(["text"] if model.has_tokenizer else [])]
    if strange_names := [name for name in rows[0] if name not in known]:
        raise CalibrationError(
            f"data: '{file}' has \"{strange_names[0]}\", which is no input of the model; {nearest(strange_names[0], known)}"
        )
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batches.append({name: _stacked(name, part, start, model, file) for name in part[0]})
    return batches, found


def _stacked(name: str, rows: Sequence[Mapping[str, Any]], start: int, model: Model, file: Path) -> Tensor:
    try:
        tensor = torch.tensor([row[name] for row in rows])
    except KeyError as error:
        raise CalibrationError(f"data: not every line of '{file}' has \"{name}\", which the first has") from error
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"data: '{name}' in lines {start + 1} to {start + len(rows)} of '{file}' is no tensor: {error}; "
            "make the lists equally long, or set --batch-size 1"
        ) from error
    return tensor


def _tensors(file: Path, model: Model, size: int, limit: int | None) -> tuple[list[Batch], int]:
    try:
        with safe_open(os.fspath(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CalibrationError(f"data: '{file}' is not a readable safetensors file: {error}") from error
    if not tensors:
        raise CalibrationError(f"data: '{file}' holds no tensor; {', '.join(model.inputs)} are needed")
    lengths = {name: (t.shape[0] if t.ndim else 0) for name, t in tensors.items()}
    if len(set(lengths.values())) != 1:
        raise CalibrationError(f"data: the tensors in '{file}' have unequal first dimensions (the batch): {lengths}")
    found = next(iter(lengths.values()))
    rows = min(found, limit or found)
    if not rows:
        raise CalibrationError(f"data: the tensors in '{file}' are empty; at least one row is needed")
    cuts = [{n: t[start : min(start + size, rows)] for n, t in tensors.items()} for start in range(0, rows, size)]
    return cuts, found


def _checked(batch: Batch, model: Model, file: Path) -> Batch:
    """The batch with the inputs of the model, in its dtypes, or an error that names what is wrong."""
    wanted = model.inputs
    if missing := [name for name in wanted if name not in batch]:
        raise CalibrationError(
            f"data: '{file}' has {', '.join(batch) or 'nothing'}; {', '.join(missing)} of the model's inputs "
            f"({', '.join(wanted)}) is missing"
        )
    if extra := [name for name in batch if name not in wanted]:
        raise CalibrationError(
            f"data: '{file}' has '{extra[0]}', which is no input of the model; {nearest(extra[0], wanted)}"
        )
    examples = model.examples()
    found: Batch = {}
    for name in wanted:
        value, example = batch[name], examples.get(name)
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CalibrationError(
                f"data: '{name}' in '{file}' holds NaN or infinity; repair it, or leave those rows out"
            )
        if example is not None:
            if value.ndim != example.ndim:
                raise CalibrationError(
                    f"data: '{name}' in '{file}' has shape {tuple(value.shape)} a batch, the model takes "
                    f"{example.ndim} dimensions such as {tuple(example.shape)}"
                )
            if example.is_floating_point() != value.is_floating_point() and not example.is_floating_point():
                raise CalibrationError(f"data: '{name}' in '{file}' is {value.dtype}, the model takes {example.dtype}")
            value = value.to(example.dtype)
        found[name] = value.contiguous()
    return found
