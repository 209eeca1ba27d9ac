"""Tiny models of numbered layers, with a head or without."""

from typing import Any

import torch
from torch import Tensor, nn

WIDTH, CLASSES = 16, 23


class Layer(nn.Module):
    """Reads the tokens before, and ends in an operation after its last product."""

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix, self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)
        self.alone = alone

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device).unsqueeze(-1)
        y = y + self.mix(y).cumsum(1) / steps
        if bias is not None:
            y = y + bias
        y = self.down(torch.relu(self.up(y)))
        return y if self.alone else torch.nn.functional.softplus(x + y)


class Model(nn.Module):
    def __init__(self, kind: str = "plain", count: int = 4) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Layer(alone=kind == "additions outside") for _ in range(count))
        self.bias = nn.Linear(1, WIDTH)
        self.encoder = nn.ModuleList(Layer() for _ in range(5 if kind == "encoder" else 0))
        self.norm = nn.LayerNorm(WIDTH)
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=kind == "plain")

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """What each layer leaves behind."""
        found = [self.embed(ids)]
        bias = self.bias(torch.ones(1, 1, 1, dtype=found[0].dtype)) if self.kind == "bias of all" else None
        if self.kind == "encoder":
            bias = found[0].flip(1)
            for layer in self.encoder:
                bias = layer(bias)
        for layer in self.layers:
            if self.kind == "weights alone":
                found.append(found[-1] + nn.functional.linear(found[-1], layer.mix.weight, layer.mix.bias))
                continue
            y = layer(found[-1], bias)
            found.append(found[-1] + y if self.kind == "additions outside" else y)
        return found[1:]

    def forward(self, ids: Tensor) -> Any:
        hidden = self.hidden(ids)
        x = self.norm(hidden[-1])
        if self.kind == "last token":
            x = x[:, -1:]
        if self.kind == "transform":
            x = torch.nn.functional.gelu(self.dense(x))
        if self.kind == "pooled":
            seen = (ids != 0).to(torch.int64).unsqueeze(-1)
            x = (x * seen).sum(1) / seen.sum(1).clamp(min=1)
        logits = self.head(x)
        if self.kind == "soft cap":
            logits = torch.tanh(logits / 0.5) * 0.5
        if self.kind == "some tokens":
            logits = logits[:, 1:]
        if self.kind == "last that counts":
            logits = logits[torch.arange(ids.shape[0]), (ids != 0).sum(1) - 1]
        return (logits, *hidden) if self.kind == "hidden states" else logits


def made(kind: str = "plain", **options: Any) -> Model:
    torch.manual_seed(3)
    model = Model(kind, **options)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            layer.down.weight.mul_(1 + i)  # type: ignore[union-attr, operator]
    return model.double().eval()


def batches_of(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 50, shape, generator=generator) for shape in shapes]


class Encoder(nn.Module):
    """Ends in hidden values, as an encoder of sentences does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.body = kind, Model()
        self.mixed = nn.Linear(4 * WIDTH, 3)
        self.narrow = nn.ModuleList([nn.Linear(WIDTH, 12), nn.Linear(12, 8)])

    def forward(self, ids: Tensor) -> Any:
        x = self.body.hidden(ids)[-1]
        if self.kind == "hidden":
            return self.body.norm(x)
        if self.kind == "pooler":
            return self.body.norm(x), torch.tanh(self.body.dense(x[:, 0]))
        if self.kind == "layers alone":
            return x
        if self.kind == "no layers":
            return self.body.head(self.body.embed(ids))
        if self.kind == "of other sizes":
            first, second = self.narrow
            return self.body.dense(nn.functional.pad(second(first(self.body.embed(ids))), (4, 4)))
        return self.mixed(torch.cat(self.body.hidden(ids), -1))  # every layer's output goes on beside the others
