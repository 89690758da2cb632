"""The tensors that step_speed takes steps on: those of well-known models, in other layouts, after many steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shapes = list[tuple[int, ...]]


def encoder(hidden: int, inner: int) -> Shapes:
    """The tensors of a transformer's twelve layers: attention, the two parts of the MLP, two norms."""
    attention, norms = [(hidden, hidden), (hidden,)] * 4, [(hidden,)] * 4
    return [*attention, (inner, hidden), (inner,), (hidden, inner), (hidden,), *norms] * 12


def resnet() -> Shapes:
    """The tensors of ResNet-50: a norm behind each convolution, four stages of bottlenecks."""
    convolutions, width = [(64, 3, 7, 7)], 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner, outer = 64 << stage, 256 << stage
        for block in range(blocks):
            convolutions += [(inner, width, 1, 1), (inner, inner, 3, 3), (outer, inner, 1, 1)]
            convolutions += [] if block else [(outer, width, 1, 1)]
            width = outer
    return [shape for c in convolutions for shape in (c, c[:1], c[:1])] + [(1000, 2048), (1000,)]


EMBEDDINGS: Shapes = [(30522, 768), (512, 768), (2, 768)]
BERT: Shapes = [*EMBEDDINGS, (768,), (768,), *encoder(768, 3072), (768, 768), (768,)]
VIT: Shapes = [
    *((1, 1, 384), (1, 197, 384), (384, 3, 16, 16), (384,)),
    *encoder(384, 1536),
    *((384,), (384,), (1000, 384), (1000,)),
]

SEED = 0
BATCH = 16 * 128
"""Tokens in a step of the embeddings."""

STUCK = 4 * 2.0**-149
"""Times 0.9, this rounds to itself in float32: where a first moment ends to which nothing is added any more."""


@dataclass(frozen=True)
class Workload:
    """Parameters with gradients.

    Attributes:
        label: What it is called.
        shapes: Of the parameters.
        channels_last: Whether convolutions, their gradients and their state lie in memory channels last.
        steps: How many steps are behind it in which each row of the first parameter is an embedding, of tokens that
            are drawn by Zipf's law.
    """

    label: str
    shapes: Shapes
    channels_last: bool = False
    steps: int = 0

    def cut(self) -> Workload:
        """The same in small, to see that it works."""
        shapes = [tuple(min(n, 32) for n in shape) for shape in self.shapes[:20]]
        return Workload(f"{self.label}, cut", shapes, self.channels_last, min(self.steps, 20))

    def tensors(self, device: str) -> list[Tensor]:
        """The parameters; their gradients are also kept as ``gradient``, as some optimizers drop them."""
        torch.manual_seed(SEED)
        params = [torch.randn(shape, device=device).mul_(0.02) for shape in self.shapes]
        if self.channels_last:
            params = [p.to(memory_format=torch.channels_last) if p.dim() == 4 else p for p in params]
        for p in params:
            p.grad = p.gradient = torch.randn_like(p).mul_(1e-3)  # type: ignore[attr-defined]
            p.requires_grad_()
        if self.steps:
            params[0].gradient[(self._ages() > 0).to(device)] = 0  # type: ignore[attr-defined]
        return params

    @torch.no_grad()
    def age(self, optimizer: Any, params: Sequence[Tensor]) -> None:
        """Gives the state of an optimizer that took one step the moments of its tokens' last steps.

        It is exact but for what came before the last of a token's steps, which is a part of the sum alone. Moments that
        are kept under no known name, or packed, are left as they are.
        """
        if not self.steps:
            return
        embedding, ages = params[0], self._ages().to(params[0].device)[:, None]
        generator = torch.Generator(embedding.device).manual_seed(SEED)
        last = torch.randn(embedding.shape, generator=generator, device=embedding.device) * 1e-3
        first = (0.1 * last.double() * 0.9 ** ages.double()).abs().clamp(min=STUCK).float().copysign(last)
        second = (0.001 * last.square() * 0.999**ages).float()
        for names, moment in ((("exp_avg", "state1"), first), (("exp_avg_sq", "state2"), second)):
            for name in names:
                kept = optimizer.state[embedding].get(name)
                if isinstance(kept, Tensor) and kept.shape == moment.shape and kept.dtype == moment.dtype:
                    kept.copy_(moment.where(ages < self.steps, 0.0))

    def _ages(self) -> Tensor:
        """For each row, the steps since its token came last; ``steps`` if it never came."""
        rows, steps = self.shapes[0][0], torch.arange(self.steps).repeat_interleave(BATCH)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.multinomial(1 / torch.arange(1.0, rows + 1), len(steps), True, generator=generator)
        last = torch.full((rows,), -1).scatter_reduce_(0, tokens, steps, "amax")
        return self.steps - 1 - last


WORKLOADS = {
    "bert": Workload("BERT-base", BERT),
    "vit": Workload("ViT-S/16", VIT),
    "resnet": Workload("ResNet-50, channels last", resnet(), channels_last=True),
    "tiny": Workload("2,000 x 1,000", [(1000,)] * 2000),
    "embeddings": Workload("BERT's embeddings at step 2,000", EMBEDDINGS, steps=2000),
}
