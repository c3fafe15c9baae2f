"""The model that `end_to_end.py` trains: a Llama in plain torch, with random weights.

`loss(model, ids)` is the mean cross-entropy of the next token. Nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """A Llama: grouped key/value heads, gated feed-forward, head untied."""

    dim: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int


SIZES = {
    # 13,408 parameters: does it run?
    "llama_tiny": Sizes(32, 64, 1, 2, 1, 64),
    # 11,210,112 parameters, for a CPU.
    "llama_11m": Sizes(384, 1024, 4, 6, 2, 6400),
    # TinyLlama's, 1,100,048,384.
    "llama_1b": Sizes(2048, 5632, 22, 32, 4, 32000),
}


class RMSNorm(nn.Module):
    """x / rms(x) * weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-5)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [batch, heads, length, head_dim]."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    positions = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    angles = positions[:, None] * 10000.0**-exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """Attention and gated feed-forward, each behind a norm and beside a residual."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        head = sizes.dim // sizes.heads
        self.head = head
        self.input_norm, self.middle_norm = RMSNorm(sizes.dim), RMSNorm(sizes.dim)
        self.q = nn.Linear(sizes.dim, sizes.heads * head, bias=False)
        self.k = nn.Linear(sizes.dim, sizes.key_value_heads * head, bias=False)
        self.v = nn.Linear(sizes.dim, sizes.key_value_heads * head, bias=False)
        self.o = nn.Linear(sizes.heads * head, sizes.dim, bias=False)
        self.gate = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.up = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.input_norm(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, self.head)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.middle_norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Decoder(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.dim)
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = RMSNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.embedding(ids))))
        return logits


def build(sizes: Sizes, device: torch.device) -> Decoder:
    """A bf16 model on `device`, the same each time."""
    torch.manual_seed(0)
    with device:
        return Decoder(sizes).to(torch.bfloat16)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each next token, in fp32."""
    logits = model(ids)[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def adopt(model: nn.Module, params: list[Tensor]) -> None:
    """Make these the model's parameters, in the order of `model.parameters()`."""
    names = [name for name, _ in model.named_parameters()]
    for name, param in zip(names, params, strict=True):
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, param)
