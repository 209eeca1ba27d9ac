"""The models of `benchmarks.fidelity`: captured, calibrated on training text, judged on text that was held out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import recast
from benchmarks import language_model
from benchmarks.corpus import perplexity, windows
from benchmarks.encoder_inputs import _spread, cosines, directory, encoder, passages, sentences
from benchmarks.fidelity_budget import HALF, Shapes
from recast.passes.cache import Fitted, OperatorCache
from recast.passes.calibration import Calibration
from recast.passes.errors_of import measured_errors
from recast.passes.forms.form import Form
from recast.passes.forms.shared import divided
from recast.passes.forms.stats import Stats
from recast.patterns.constants import Constants
from recast.patterns.linear.find import Matrix, find_linear, matrix_of
from recast.patterns.program import Program

MODELS = ("llama", "minilm", "mixtral")
SMALLEST = 32  # a matrix with a side below this (a router) stays as it is
SAMPLE = 1024  # held-out inputs of each matrix on which its error is measured
SCOPES = {
    "all": r"",
    "attention": r"attn|attention",
    "mlp": r"^(?!.*(attn|attention|experts))",
    "values": r"v_proj|o_proj|value|attention\.output",
    "experts": r"experts",
}


@dataclass
class Subject:
    """A model ready for rows: fits see `calibration`, figures come from `judge` and `held_out`."""

    name: str
    program: Program
    calibration: Calibration
    held_out: Calibration
    matrices: dict[str, Matrix]
    judge: Callable[[Program], dict[str, float]]
    facts: dict[str, Any]
    batches: list[tuple[Tensor, ...]]  # what calibration has seen

    def shapes(self, scope: str) -> Shapes:
        """Shapes of the matrices that a scope rewrites."""
        return {name: matrix.shape for name, matrix in self.matrices.items() if re.search(SCOPES[scope], name)}


class HalfCache(OperatorCache):
    """Fits every matrix as it is held at 16 bits, counts what the fit holds, and computes with it in float32."""

    def __init__(self) -> None:
        super().__init__(None)
        self.done: dict[tuple[str, ...], list[Fitted]] = {}
        self.bytes: dict[str, int] = {}
        self.seconds = 0.0

    def fit_together(
        self,
        matrices: Sequence[Matrix],
        form: Form,
        stats: Sequence[Stats | None],
        *,
        where: Sequence[str] | None = None,
    ) -> list[Fitted]:
        """Fit a group once; the same group again is answered from memory."""
        assert where is not None
        key = (str(form), *where)
        if key not in self.done:
            weights = [matrix.read().to(HALF) for matrix in matrices]
            start = time.perf_counter()
            operators = form.fit_together(weights, [s.regular if s is not None else None for s in stats], where=where)
            self.seconds += time.perf_counter() - start
            self.bytes.update(zip(where, divided(operators), strict=True))
            wide = [operator.to(torch.float32) for operator in operators]
            self.done[key] = [Fitted.of(w.float(), o, s) for w, o, s in zip(weights, wide, stats, strict=True)]
        return self.done[key]

    def layer_errors(self, held_out: Mapping[str, Stats], weights: Mapping[str, Matrix]) -> dict[str, float]:
        """Relative error of each layer's output on held-out inputs, the layer run as it will run."""
        found = {}
        for (_, *names), fits in self.done.items():
            for name, fitted in zip(names, fits, strict=True):
                error = measured_errors(weights[name].read(), fitted.operator, held_out.get(name))
                if error is not None:
                    found[name] = error
        return found


def prepare(name: str, *, quick: bool, log: Callable[[str], None]) -> Subject:
    """Load, capture and calibrate one of `MODELS`; with `quick` on an eighth of the text."""
    return _encoder(quick, log) if name == "minilm" else _language_model(name, quick, log)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Any:
        return self.model(input_ids=ids).logits


def _next_token(output: Any, batch: Any) -> Tensor:
    (logits,) = output if isinstance(output, tuple | list) else (output,)
    ids = batch[0] if isinstance(batch, tuple) else batch
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _language_model(name: str, quick: bool, log: Callable[[str], None]) -> Subject:
    log(f"{name}: loading and capturing")
    model, tokens = language_model.load(name)
    count, context = language_model.JUDGED // (8 if quick else 1), language_model.CONTEXT
    judged = windows(tokens.held_out, context + 1, count)
    shown = windows(tokens.training, context, count)
    program = recast.capture(_Logits(model).eval(), (shown[:8],))
    log(f"{name}: calibrating")
    batches: list[tuple[Tensor, ...]] = [(rows,) for rows in torch.split(shown, 8)]
    calibration = recast.calibrate(program, batches, loss=_next_token, progress=False)
    seen = windows(tokens.held_out, context, max(4, count // 4))
    held_out = recast.calibrate(program, [(rows,) for rows in torch.split(seen, 8)], sample=SAMPLE, progress=False)

    def judge(changed: Program) -> dict[str, float]:
        return {"perplexity": perplexity(lambda ids: _only(changed(ids)), judged)}

    facts = {"judged_tokens": judged[:, 1:].numel(), "calibration_tokens": shown.numel()}
    return _subject(name, program, calibration, held_out, judge, facts, batches)


def _only(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple | list) else output
    return found


def _alike(output: Any, batch: Any) -> Tensor:
    """Each sentence should be told from the others of its batch: a loss that needs no labels."""
    found = _only(output)
    return -(found @ found.T / 0.05).log_softmax(-1).diagonal().mean()


def _encoder(quick: bool, log: Callable[[str], None]) -> Subject:
    log("minilm: loading and capturing")
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory())
    names = sorted(topics)

    def encode(rows: list[str], length: int) -> tuple[Tensor, Tensor]:
        found = tokenizer(rows, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"], found["attention_mask"]

    share = 8 if quick else 1
    shown = [w for name in names[1::2] for w in passages(sentences(topics[name]))][: 96 // share + 4]
    held = [s for name in names[0::2] for s in sentences(topics[name]) if len(s.split()) >= 6]
    judged = encode(_spread(held, 192 // share), 64)
    model = encoder()
    program = recast.capture(model, judged)
    log("minilm: calibrating")
    batches: list[tuple[Tensor, ...]] = [encode(shown[i : i + 16], 128) for i in range(0, len(shown), 16)]
    calibration = recast.calibrate(program, batches, loss=_alike, progress=False)
    # Sentences end in padding, half of their tokens, which calibration does not see: layers are measured on full passages.
    full = encode(_spread([w for name in names[0::2] for w in passages(sentences(topics[name]))], 32 // share), 128)
    held_out = recast.calibrate(program, [full], sample=SAMPLE, progress=False)
    with torch.no_grad():
        reference = model(*judged)
    nearest = _nearest(reference)

    def judge(changed: Program) -> dict[str, float]:
        with torch.no_grad():
            rows = [_only(changed(*part)) for part in zip(*(torch.split(part, 32) for part in judged), strict=True)]
        found = torch.cat(rows)
        alike = cosines(reference, found)
        same = (_nearest(found) == nearest).double().mean()
        return {"cosine": float(alike.mean()), "worst_cosine": float(alike.min()), "same_neighbour": float(same)}

    facts = {"judged_sentences": len(reference), "calibration_tokens": len(shown) * 128}
    return _subject("minilm", program, calibration, held_out, judge, facts, batches)


def _nearest(embeddings: Tensor) -> Tensor:
    scores = embeddings @ embeddings.T
    return scores.fill_diagonal_(-2).argmax(1)


def _subject(
    name: str,
    program: Program,
    calibration: Calibration,
    held_out: Calibration,
    judge: Callable[[Program], dict[str, float]],
    facts: dict[str, Any],
    batches: list[tuple[Tensor, ...]],
) -> Subject:
    sites = [s for s in find_linear(program)[0] if not s.tied and min(s.out_features, s.in_features) >= SMALLEST]
    constants = Constants(program)
    matrices = {site.name: matrix_of(site.uses[0], constants) for site in sites}
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values())
    facts |= {"matrices": len(matrices), "weights": weights, "bytes": weights * HALF.itemsize}
    return Subject(name, program, calibration, held_out, matrices, judge, facts, batches)
