"""What real optimizer steps do to a model's served bfloat16 copy.

A Qwen3 learns made-up sequences with Adam, from float32 master weights, for 20 steps of warm-up:
the first steps of Adam change far more than later ones. Then one more step's gradients and Adam
states say what that step is at any learning rate.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from understudy.weights.layout import ByteArray

WARMUP_STEPS = 20
WARMUP_LEARNING_RATE = 3e-6
NUM_SUCCESSORS = 8
"""Tokens that may follow each token, with falling probability."""
BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A Qwen3 with tied embeddings, and the batch that it learns from."""

    hidden: int
    layers: int
    vocab: int
    rows: int
    tokens: int

    def config(self) -> Qwen3Config:
        """The model's configuration: three times as wide between its layers' matrices."""
        heads = self.hidden // 64
        return Qwen3Config(
            vocab_size=self.vocab, hidden_size=self.hidden, intermediate_size=3 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=heads,
            num_key_value_heads=heads // 2, head_dim=64, tie_word_embeddings=True,
            architectures=["Qwen3ForCausalLM"],
        )  # fmt: skip


SIZES = {
    34: ModelSize(hidden=384, layers=8, vocab=7_680, rows=8, tokens=64),
    135: ModelSize(hidden=768, layers=8, vocab=15_360, rows=8, tokens=64),
    1000: ModelSize(hidden=1536, layers=16, vocab=31_000, rows=2, tokens=64),
}
"""By megabytes of bfloat16."""


class AdamSteps:
    """A model after warm-up, and its next step at any learning rate."""

    def __init__(self, size: ModelSize, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self._size = size
        self._rng = np.random.default_rng(seed)
        self._successors = self._rng.integers(size.vocab, size=(size.vocab, NUM_SUCCESSORS))
        self._model = Qwen3ForCausalLM(size.config()).float().train()
        self._adam = torch.optim.Adam(
            self._model.parameters(), WARMUP_LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True
        )
        self.losses = [self._step() for _ in range(WARMUP_STEPS)]
        """Loss of each step of the warm-up."""
        # A rate of zero takes in the next gradients and leaves the weights where they are.
        self._adam.param_groups[0]["lr"] = 0.0
        self._step()

    def _sequences(self) -> Tensor:
        """[rows, tokens] random walks over the tokens."""
        size = self._size
        shape = (size.tokens, size.rows)
        choices = np.minimum(self._rng.geometric(0.5, shape) - 1, NUM_SUCCESSORS - 1)
        walk = [self._rng.integers(size.vocab, size=size.rows)]
        for choice in choices[1:]:
            walk.append(self._successors[walk[-1], choice])
        return torch.from_numpy(np.stack(walk, axis=1))

    def _step(self) -> float:
        tokens = self._sequences()
        loss = self._model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return float(loss.detach())

    @torch.no_grad()
    def before(self) -> dict[str, ByteArray]:
        """Bytes of the served copy by tensor."""
        return {name: _served(value) for name, value in self._parameters()}

    @torch.no_grad()
    def after(self, learning_rate: float) -> dict[str, ByteArray]:
        """The same, one step of Adam later."""
        return {
            name: _served(value - learning_rate * self._direction(value))
            for name, value in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._model.named_parameters()

    def _direction(self, parameter: Tensor) -> Tensor:
        """What Adam moves a parameter by at a learning rate of 1 (Kingma and Ba, algorithm 1)."""
        state = self._adam.state[parameter]
        steps = float(state["step"])
        mean = state["exp_avg"] / (1 - BETAS[0] ** steps)
        spread = (state["exp_avg_sq"] / (1 - BETAS[1] ** steps)).sqrt_()
        direction: Tensor = mean / spread.add_(EPSILON)
        return direction


def _served(values: Tensor) -> ByteArray:
    raw: ByteArray = values.detach().to(torch.bfloat16).reshape(-1).view(torch.uint8).numpy()
    return raw
