"""Losses and gradients by TRL's GRPOTrainer._compute_loss, for tests/test_losses_peers.py.

    pip install --no-deps trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 pandas==3.1.1 \
        pyarrow==26.0.1 multiprocess==0.70.19 python-dateutil six xxhash dill tzdata

beside torch 2.13.0, transformers 5.19.0 and numpy 2.3.5 (requirements/cpu.txt); together they are
too large to be installed for one test. Run it there to write trl.json. The method is called as it
is: the object stands in for the trainer's settings, and its log-probabilities are leaves.
"""

import json
import math
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from trl import GRPOTrainer

LOW, HIGH, CAP, LENGTH = 0.2, 0.28, 2.0, 16
SEQUENCE_LOW, SEQUENCE_HIGH = 0.05, 0.07
"""Clips of a geometric mean, wide enough for ratios as far apart as these."""
TURNS = [[[4, 2], [3, 0]], [[7, 3], [2, 0]], [[1, 0]], [[5, 1], [4, 2], [1, 0]], [[6, 0]]]
"""[sampled tokens, then observed ones] of each turn of each episode."""
CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},  # taken as the cap itself there
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon_low": SEQUENCE_LOW,
        "epsilon_high": SEQUENCE_HIGH,
    },
}


def trainer(logprobs: Tensor, **settings: object) -> SimpleNamespace:
    """What _compute_loss asks of the trainer."""
    defaults = {
        "importance_sampling_level": "token",
        "epsilon_low": LOW,
        "epsilon_high": HIGH,
        "beta": 0.0,
        "args": SimpleNamespace(delta=None, steps_per_generation=1),
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "max_completion_length": LENGTH,
        "current_gradient_accumulation_steps": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            num_processes=1, reduce=lambda values, reduction: values, gather=lambda values: values
        ),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
    }
    return SimpleNamespace(**defaults | settings)


def main() -> None:
    """Write trl.json."""
    flags = [[flag for n, m in turns for flag in [1] * n + [0] * m] for turns in TURNS]
    width = max(map(len, flags))
    completion = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in flags])
    sampled = torch.tensor([row + [0] * (width - len(row)) for row in flags])
    generator = torch.Generator().manual_seed(2)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(sampled.shape, dtype=torch.float64, generator=generator)

    logprobs = -draw(1.0).abs()
    old = logprobs - draw(0.3)
    sampling = old - draw(0.6)
    advantages = torch.tensor([1.2, -0.7, 0.4, -1.5, 0.6], dtype=torch.float64)
    counted = sampled.bool()

    # As _generate_and_score_completions has them in its modes token_truncate, sequence_truncate.
    differences = (old - sampling) * counted
    token_weights = torch.exp(differences).clamp(max=CAP)
    episode_weights = torch.exp(differences.sum(-1, keepdim=True)).clamp(max=CAP)

    cases = {}
    for name, settings in CASES.items():
        leaf = logprobs.clone().requires_grad_()
        stub = trainer(leaf, **settings)
        inputs = {
            "prompt_ids": torch.zeros(len(TURNS), 1, dtype=torch.int64),
            "prompt_mask": torch.ones(len(TURNS), 1, dtype=torch.int64),
            "completion_ids": torch.zeros_like(sampled),
            "completion_mask": completion,
            "tool_mask": sampled,
            "advantages": advantages,
            "old_per_token_logps": old,
            "importance_sampling_ratio": episode_weights if name == "gspo" else token_weights,
            "num_items_in_batch": sampled.sum(),
        }
        loss = GRPOTrainer._compute_loss(stub, stub.model, inputs)
        loss.backward()
        assert not leaf.grad[~counted].any()
        cases[name] = {"loss": loss.item(), "gradient": leaf.grad[counted].tolist()}
        assert math.isfinite(cases[name]["loss"])

    written = {
        "versions": {name: version(name) for name in ("trl", "torch", "transformers")},
        "clip_low": LOW,
        "clip_high": HIGH,
        "sequence_clip_low": SEQUENCE_LOW,
        "sequence_clip_high": SEQUENCE_HIGH,
        "importance_cap": CAP,
        "constant_length": LENGTH,
        "turn_lengths": [[n for n, _ in turns] for turns in TURNS],
        "logprobs": logprobs[counted].tolist(),
        "old_logprobs": old[counted].tolist(),
        "behaviour_logprobs": sampling[counted].tolist(),
        "advantages": advantages.tolist(),
        "cases": cases,
    }
    path = Path(__file__).with_name("trl.json")
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
