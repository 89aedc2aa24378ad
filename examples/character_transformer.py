"""A character-level transformer in plain PyTorch, and the text that it learns, independent of the optimizer.

The text ships with Python itself: the topics of its help, which are the language reference (PSF licence), about 450,000
characters. The text and the losses differ a little between versions of Python.
"""

from __future__ import annotations

import pydoc_data.topics
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CharacterTransformer", "Text"]

_SEED = 7
_HELD_OUT = 0.1


class Text(NamedTuple):
    """Text as indices into its alphabet, `(n,) int64`: training text and held-out text."""

    alphabet: str
    training: Tensor
    held_out: Tensor

    @classmethod
    def of_python(cls) -> Text:
        """Return the topics of Python's help, in the order of their names."""
        topics = pydoc_data.topics.topics
        text = "\n".join(topics[name] for name in sorted(topics))
        alphabet = "".join(sorted(set(text)))
        index = {character: number for number, character in enumerate(alphabet)}
        encoded = torch.tensor([index[character] for character in text])
        cut = int(len(encoded) * (1 - _HELD_OUT))
        return cls(alphabet, encoded[:cut], encoded[cut:])

    def batch(self, step: int, *, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step: `(size, length)` characters, and the characters after each.

        The number of the step alone decides the batch, and no generator with a past. So a process that continues after
        a kill has nothing to restore.
        """
        generator = torch.Generator().manual_seed(_SEED * 1_000_000 + step)
        starts = torch.randint(len(self.training) - length, (size,), generator=generator)
        return _windows(self.training, starts, length)

    def test(self, *, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Return windows at even distances in the held-out text."""
        starts = torch.linspace(0, len(self.held_out) - length - 1, size).long()
        return _windows(self.held_out, starts, length)


def _windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(length + 1)]
    return windows[:, :-1], windows[:, 1:]


class Block(nn.Module):
    """Attention over earlier positions, then a layer for each position alone; both add to their input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.attended = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        projected = self.queries_keys_values(self.before_attention(x))
        q, k, v = projected.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attended(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class CharacterTransformer(nn.Module):
    """The next character's logits, at every position: `(batch, length) int64` → `(batch, length, alphabet)`."""

    def __init__(self, alphabet: int, *, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(alphabet, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.last, self.logits = nn.LayerNorm(width), nn.Linear(width, alphabet)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.characters(x) + self.positions(torch.arange(x.shape[1]))
        logits: Tensor = self.logits(self.last(self.blocks(embedded)))
        return logits

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean cross-entropy per character, in nats."""
        return functional.cross_entropy(self(x).float().flatten(0, 1), y.flatten())


def _initialise(module: nn.Module) -> None:
    """Draw small weights, as language models do."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
