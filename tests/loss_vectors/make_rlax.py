"""V-trace by rlax, for tests/test_losses_peers.py.

    pip install rlax==0.1.9 jax==0.10.2 jaxlib==0.10.2 numpy==2.3.5

which with scipy and the rest is too large to be installed for one test. Run it there to write
rlax.json. rlax has c-bar at 1, and one sequence a call: here each is an episode.
"""

import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import rlax

LENGTHS, TRUNCATED = [12, 1, 7, 5, 1], [True, False, False, True, True]
CASES = [
    {"gamma": gamma, "trace_decay": trace_decay, "importance_cap": rho_bar}
    for gamma, trace_decay, rho_bar in [(1.0, 1.0, 1.0), (0.95, 1.0, 2.5), (0.9, 0.8, 1.0)]
]


def episode(
    ratios: np.ndarray,
    values: np.ndarray,
    rewards: np.ndarray,
    end: float,
    is_truncated: bool,
    case: dict[str, float],
) -> tuple[list[float], list[float]]:
    """Targets of values, and policy-gradient advantages, which are multiplied by rho."""
    discounts = np.full(len(values), case["gamma"])
    if not is_truncated:
        discounts[-1] = 0.0
    found = rlax.vtrace_td_error_and_advantage(
        values,
        np.append(values[1:], end),
        rewards,
        discounts,
        ratios,
        lambda_=case["trace_decay"],
        clip_rho_threshold=case["importance_cap"],
        clip_pg_rho_threshold=case["importance_cap"],
    )
    return (found.errors + values).tolist(), found.pg_advantage.tolist()


def main() -> None:
    """Write rlax.json."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(2)
    num = sum(LENGTHS)
    log_ratios, values, rewards = (
        rng.normal(0, 0.7, num),
        rng.normal(size=num),
        rng.normal(size=num),
    )
    ends = rng.normal(size=len(LENGTHS))
    bounds = np.cumsum(LENGTHS)[:-1]
    columns = [np.split(column, bounds) for column in (np.exp(log_ratios), values, rewards)]
    cases = []
    for case in CASES:
        found = [episode(*row, case) for row in zip(*columns, ends, TRUNCATED, strict=True)]
        targets = [target for column, _ in found for target in column]
        advantages = [advantage for _, column in found for advantage in column]
        cases.append(case | {"targets": targets, "policy_gradient_advantages": advantages})
    written = {
        "versions": {name: version(name) for name in ("rlax", "jax", "jaxlib", "numpy")},
        "lengths": LENGTHS,
        "truncated": TRUNCATED,
        "log_ratios": log_ratios.tolist(),
        "values": values.tolist(),
        "rewards": rewards.tolist(),
        "end_values": ends.tolist(),
        "cases": cases,
    }
    path = Path(__file__).with_name("rlax.json")
    path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
