"""Losses against those that other people's code computed; loss_vectors/ has how."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.trainer.losses import table
from learner.trainer.losses.tokens import Totals
from losses_helpers import config, float64, tokens

VECTORS = Path(__file__).with_name("loss_vectors")


def read(name: str) -> dict[str, Any]:
    return json.loads((VECTORS / name).read_text(encoding="utf-8"))


TRL, RLAX = read("trl.json"), read("rlax.json")


@pytest.mark.parametrize("name", TRL["cases"])
def test_loss_and_gradient_equal_trls(name: str) -> None:
    """Rows of the config's table, observations between turns left out, against _compute_loss."""
    sequence = "sequence_" if name == "gspo" else ""
    using = config(
        name=name,
        clip_low=0.999 if name == "cispo" else TRL[f"{sequence}clip_low"],
        clip_high=TRL[f"{sequence}clip_high"],
        importance_cap=TRL["importance_cap"],
        constant_length=TRL["constant_length"],
    )
    made = tokens(TRL["turn_lengths"], behaviour=float64(TRL["behaviour_logprobs"]))
    logprobs = float64(TRL["logprobs"]).requires_grad_()
    old = float64(TRL["old_logprobs"])
    weights = table.CORRECTIONS[using.correction](
        log_ratios_N=old - made.behaviour_logprobs_N, tokens=made, config=using
    )
    found = table.OBJECTIVES[using.objective](
        logprobs_N=logprobs,
        proximal_logprobs_N=old,
        advantages_N=float64(TRL["advantages"])[made.episode_N],
        weights_N=weights,
        tokens=made,
        config=using,
    )
    loss = table.AGGREGATIONS[using.aggregation](
        losses_N=found.losses_N,
        tokens=made,
        totals=Totals(
            num_tokens=made.num_tokens, num_steps=made.num_steps, num_episodes=made.num_episodes
        ),
        config=using,
    )
    loss.backward()
    expected = TRL["cases"][name]
    torch.testing.assert_close(loss.item(), expected["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(logprobs.grad, float64(expected["gradient"]), rtol=1e-11, atol=1e-15)
    assert 0 < found.clipped_N.sum() < made.num_tokens
    assert 0 < (weights == using.importance_cap).sum() < made.num_tokens


@pytest.mark.parametrize("case", RLAX["cases"])
def test_vtrace_equals_rlaxs(case: dict[str, Any]) -> None:
    using = config(
        name="vtrace",
        step="token",
        **{field: case[field] for field in ("gamma", "trace_decay", "importance_cap")},
    )
    made = tokens(
        [[n] for n in RLAX["lengths"]],
        step="token",
        rewards=RLAX["rewards"],
        truncated=RLAX["truncated"],
    )
    log_ratios = float64(RLAX["log_ratios"])
    found = table.CRITICS["vtrace"](
        log_ratios_K=log_ratios,
        values_K=float64(RLAX["values"]),
        end_values_E=float64(RLAX["end_values"]),
        steps=made.steps,
        config=using,
    )
    torch.testing.assert_close(found.values_K, float64(case["targets"]), rtol=1e-12, atol=1e-12)
    if case["trace_decay"] == 1:  # below, rlax bootstraps from a mean of v and V, unlike the paper
        rhos = table.CORRECTIONS["step"](log_ratios_N=log_ratios, tokens=made, config=using)
        expected = float64(case["policy_gradient_advantages"])
        torch.testing.assert_close(rhos * found.advantages_K, expected, rtol=1e-12, atol=1e-12)
