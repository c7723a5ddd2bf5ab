"""Routes: which experts of a mixture each token was sent to, in every layer.

R tokens, L layers of the model, K experts a token. Engine and trainer compute a router's scores a
little differently; near a tie they choose other experts, and the probability of a token is another
one altogether. Recorded routes let the trainer send each token where it went when it was sampled.
Source: arXiv 2510.11370.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from understudy.errors import ConfigError
from understudy.v1 import common_pb2

RouteArray = npt.NDArray[np.uint8 | np.uint16]
"""[R, L, K] experts' indices."""

_MOST = 1024
"""Layers, and experts a token, that a message may claim."""
_WIDTHS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """What routes have to be like for one model."""

    num_layers: int
    num_experts: int
    top_k: int

    def check(self, routes: RouteArray) -> None:
        """Check that the model could have been sent along these routes.

        Raises:
            ValueError: of another model's shape, or to an expert that there is not.
        """
        expected = self.num_layers, self.top_k
        if routes.shape[1:] != expected:
            raise ValueError(f"{routes.shape[1:]} layers and experts a token; there are {expected}")
        highest = routes.max(initial=0)
        if highest >= self.num_experts:
            raise ValueError(f"expert {highest}; there are {self.num_experts}")


def read_mixture(model: Path) -> Mixture:
    """The mixture that a model folder's config.json describes.

    Raises:
        ConfigError: it describes none.
    """
    settings = json.loads((model / "config.json").read_bytes())
    # As published, and as transformers saves it.
    num_experts = settings.get("num_experts") or settings.get("num_local_experts")
    top_k = settings.get("num_experts_per_tok")
    if not num_experts or not top_k:
        raise ConfigError(
            f"model.router_replay = true, but {model / 'config.json'} has no num_experts and "
            "num_experts_per_tok; leave it out for a model that is no mixture of experts"
        )
    return Mixture(num_layers=settings["num_hidden_layers"], num_experts=num_experts, top_k=top_k)


def encode_routes(routes: RouteArray) -> common_pb2.Routes:
    """Encode [R, L, K] routes."""
    width = routes.dtype.itemsize
    return common_pb2.Routes(
        experts=routes.astype(f"<u{width}", copy=False).tobytes(),
        expert_bytes=width,
        num_layers=routes.shape[1],
        top_k=routes.shape[2],
    )


def decode_routes(message: common_pb2.Routes, num_tokens: int) -> RouteArray:
    """Decode the routes of R = num_tokens tokens.

    Raises:
        ValueError: the message is not of that many.
    """
    width, num_layers, top_k = message.expert_bytes, message.num_layers, message.top_k
    if width not in _WIDTHS:
        raise ValueError(f"expert_bytes {width}; known are {_WIDTHS}")
    if not (1 <= num_layers <= _MOST and 1 <= top_k <= _MOST):
        raise ValueError(f"num_layers {num_layers} and top_k {top_k}; each is 1 to {_MOST}")
    data, size = message.experts, num_tokens * num_layers * top_k * width
    if len(data) != size:
        raise ValueError(f"{len(data)} bytes of experts; {num_tokens} tokens take {size}")
    return np.frombuffer(data, f"<u{width}").reshape(num_tokens, num_layers, top_k)
