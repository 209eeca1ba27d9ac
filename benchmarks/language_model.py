"""Train the two small language models of `benchmarks.fidelity`, on one core, and load them.

    python -m benchmarks.language_model llama      # about twelve minutes
    python -m benchmarks.language_model mixtral
    python -m benchmarks.language_model --check    # held-out perplexity of what is there

`llama`: six layers 256 wide, eight heads on four, rotary, gated MLP. `mixtral`: four layers 128 wide, six experts of which a
token visits two. Text and tokenizer: `corpus.py`. Checkpoints are in bfloat16, in `benchmarks/models/`, each a folder that
transformers loads. Interrupted training goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from benchmarks.corpus import Tokens, baselines, encode, perplexity, train_tokenizer, windows

HERE = Path(__file__).resolve().parent / "models"
CONTEXT = 256
JUDGED = 64  # held-out windows: 64 x 256 tokens are guessed
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"batch": 8, "steps": 400, "rate": 0.02, "rate_of_rest": 2e-3},
    "mixtral": {"batch": 8, "steps": 500, "rate": 0.02, "rate_of_rest": 2e-3},
}
WARM_UP, KEEP_EVERY = 20, 25


def configuration(name: str, vocabulary: int) -> Any:
    """The architecture of one of the two."""
    from transformers import LlamaConfig, MixtralConfig

    common = {
        "vocab_size": vocabulary,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "use_cache": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-5,
    }
    if name == "llama":
        return LlamaConfig(
            hidden_size=256,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            **common,
        )
    return MixtralConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        **common,
    )


def folder(name: str) -> Path:
    """Where a trained model is; SystemExit says how to make it if it is not."""
    if not (HERE / name / "model.safetensors").is_file():
        raise SystemExit(
            f"benchmarks/models/{name} holds no model; python -m benchmarks.language_model {name} trains one"
        )
    return HERE / name


def load(name: str) -> tuple[nn.Module, Tokens]:
    """Load a trained model in float32, in eval mode, and the corpus in its tokens."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    where = folder(name)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
    return model, encode(Tokenizer.from_file(str(where / "tokenizer.json")))


def judge(model: nn.Module, tokens: Tokens) -> float:
    """Held-out perplexity of a model of transformers."""
    return perplexity(lambda ids: model(input_ids=ids).logits, windows(tokens.held_out, CONTEXT + 1, JUDGED))


def train(name: str, steps: int) -> None:
    """Train, judge and save one model."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    settings = SETTINGS[name] | {"steps": steps}
    where, console = HERE / name, Console(stderr=True)
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "tokenizer.json").is_file():
        console.log("learning the tokenizer")
        train_tokenizer().save(str(where / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(where / "tokenizer.json"))
    tokens = encode(tokenizer)
    vocabulary = tokenizer.get_vocab_size()
    simple = baselines(tokens, windows(tokens.held_out, CONTEXT + 1, JUDGED), vocabulary)
    console.log(f"{len(tokens.training):,} tokens to train on, {len(tokens.held_out):,} held out; perplexity {simple}")
    torch.manual_seed(0)
    experts = (
        {"experts_implementation": "eager"} if name == "mixtral" else {}
    )  # no grouped products with gradients on a CPU
    model = AutoModelForCausalLM.from_config(configuration(name, vocabulary), **experts).train()
    seconds, losses = _fit(model, tokens.training, settings, where / "state.pt", console)
    model.to(torch.bfloat16).save_pretrained(where)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>").save_pretrained(where)
    found = judge(model.float().eval(), tokens)
    facts = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "settings": settings | {"context": CONTEXT, "threads": torch.get_num_threads()},
        "training_tokens": len(tokens.training),
        "tokens_seen": steps * settings["batch"] * CONTEXT,
        "seconds": round(seconds),
        "held_out_tokens": JUDGED * CONTEXT,
        "held_out_loss": round(math.log(found), 4),
        "held_out_perplexity": {"model": round(found, 3), **{k: round(v, 2) for k, v in simple.items()}},
        "losses": losses,
        "libraries": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    (where / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (where / "state.pt").unlink(missing_ok=True)
    console.log(f"{name}: held-out perplexity {found:.2f}; baselines {simple}")


def orthogonal(x: Tensor) -> Tensor:
    """Matrices of the singular vectors of some [..., m, n] with singular values near one: five steps of Newton and Schulz."""
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    wide = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = wide @ wide.mT
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    found: Tensor = wide.mT if x.shape[-2] > x.shape[-1] else wide
    return found


class Muon(torch.optim.Optimizer):
    """Steps in the direction of the orthogonalised momentum (Jordan et al., 2024): few tokens teach more than with Adam.

    `torch.optim.Muon` takes no stacks of matrices and computes in bfloat16, which a CPU may have to emulate.
    """

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                alike.setdefault(p.shape, []).append((p, p.grad.lerp(momentum, 0.95)))
            for shape, pairs in alike.items():
                scale = max(1.0, shape[-2] / shape[-1]) ** 0.5
                for (p, _), way in zip(pairs, orthogonal(torch.stack([d for _, d in pairs])), strict=True):
                    p.add_(way, alpha=-group["lr"] * scale)


def _fit(model: Any, training: Tensor, settings: dict[str, Any], state: Path, console: Console) -> Any:
    """Muon for matrices, Adam for the embedding and the norms; a warm-up, then down to zero in a line.

    Returns seconds, and the mean loss of every 25 steps.
    """
    steps, batch = settings["steps"], settings["batch"]
    matrices = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    rates = (settings["rate"], settings["rate_of_rest"])
    optimizers = (Muon(matrices, rates[0]), torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.95), weight_decay=0.0))
    count = (len(training) - 1) // CONTEXT
    order = torch.cat([torch.randperm(count, generator=torch.Generator().manual_seed(i)) for i in range(8)])
    if steps * batch > len(order):
        raise SystemExit(
            f"{steps} steps of {batch} windows are more than eight times the corpus; {len(order) // batch} do"
        )
    first, spent, losses, sums = 0, 0.0, list[float](), 0.0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, held in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        first, spent, losses = kept["step"], kept["seconds"], kept["losses"]
        console.log(f"going on at step {first}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    extra = {"output_router_logits": True} if hasattr(model.config, "num_local_experts") else {}
    start = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            for optimizer, rate in zip(optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))
            begins = order[step * batch : (step + 1) * batch] * CONTEXT
            ids = torch.stack([training[i : i + CONTEXT] for i in begins.tolist()])
            loss = model(input_ids=ids, labels=ids, **extra).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            sums += float(loss.detach())
            bar.update(task, completed=step + 1, description=f"loss {float(loss.detach()):.3f}")
            if (step + 1) % KEEP_EVERY == 0:
                losses.append(round(sums / KEEP_EVERY, 4))
                sums = 0.0
                passed = spent + time.perf_counter() - start
                if not console.is_terminal:
                    console.log(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}, {passed:.0f} s")
                _keep(state, model, optimizers, step + 1, passed, losses)
    return spent + time.perf_counter() - start, losses


def _keep(state: Path, model: Any, optimizers: Any, step: int, seconds: float, losses: list[float]) -> None:
    unfinished = state.with_name(state.name + ".new")
    held = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    torch.save(held | {"step": step, "seconds": seconds, "losses": losses}, unfinished)
    unfinished.replace(state)


def main(arguments: list[str] | None = None) -> int:
    """Train one model, or judge those that are there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_model", description=__doc__)
    parser.add_argument("model", nargs="?", choices=tuple(SETTINGS))
    parser.add_argument("--steps", type=int, metavar="N", help="instead of those that the kept models had")
    parser.add_argument("--check", action="store_true", help="train nothing: held-out perplexity of what is there")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.check:
        for name in SETTINGS:
            model, tokens = load(name)
            print(f"{name}: held-out perplexity {judge(model, tokens):.3f}")
    elif chosen.model:
        train(chosen.model, chosen.steps or SETTINGS[chosen.model]["steps"])
    else:
        parser.error("name a model to train, or --check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
