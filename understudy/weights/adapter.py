"""How adapters are told from the model that they belong to, and described, as peft has it.

A version's tensors are those of the model, under their names in its checkpoint, and those of the
adapters, under the names that peft gives them in a file. What is not a tensor, rank, alpha and
targets, is a file of the model bundle, as peft writes it beside an adapter.
"""

import json
from pathlib import Path

from pydantic import ValidationError

from understudy.config import LoraConfig
from understudy.config.base import explain
from understudy.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
"""Name of the description, in a bundle and beside an adapter."""
PREFIX = "base_model.model."
"""What the names of all adapter tensors begin with, e.g.
`base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`."""


def is_adapter(name: str) -> bool:
    """Whether a tensor is an adapter's."""
    return name.startswith(PREFIX)


def describe_adapter(lora: LoraConfig, base: str | None = None) -> bytes:
    """adapter_config.json; the same bytes for the same adapter.

    Args:
        lora: rank above 0.
        base: where the model is that the adapter belongs to, for those who load the adapter alone.
    """
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(lora.target_modules),
    }
    return (json.dumps(settings, indent=2) + "\n").encode()


def read_adapter(bundle: Path) -> LoraConfig | None:
    """The description in a bundle's folder; None if the bundle has no adapter.

    Raises:
        ConfigError: it is not what describe_adapter writes.
    """
    path = bundle / CONFIG_FILE
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
        lora = LoraConfig(
            rank=settings["r"],
            alpha=settings["lora_alpha"],
            target_modules=settings["target_modules"],
        )
    except ValidationError as error:
        raise explain(error, LoraConfig, f"{CONFIG_FILE} of the bundle") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{CONFIG_FILE} of the bundle cannot be read: {error!r}") from None
    if not lora.rank:
        raise ConfigError(f"{CONFIG_FILE} of the bundle: r = 0 is no adapter's rank")
    return lora
