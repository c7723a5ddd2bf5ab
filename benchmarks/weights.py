"""Weights: bytes and speed of deltas, and what an update costs those who generate.

Three parts, a JSON line a case:

    codec     one core, real Adam steps; `encode` is diff + encode + digest, `decode` is copy +
              apply + verification; `zstd` and `xor` (with split bytes, zstd) are for comparison
    transfer  FetchWeights between two processes over loopback, bytes a second of CPU time
    live      a trainer's Publisher, a store's process and a replica with vLLM

    {"bench": "weights", "part": "codec", "bf16_mb": 34, "learning_rate": 1e-06,
     "changed_share": ..., "wire_ratio": ..., "encode_mb_per_s": ..., "decode_mb_per_s": ...,
     "diff_mb_per_s": ..., "apply_mb_per_s": ..., "xor_ratio": ..., ...}
    {"bench": "weights", "part": "live", "model": "demo", "link_mb_per_s": null, "weights_mb": ...,
     "pause_ms": ..., "fresh_after_ms": ..., "throughput_lost": ..., ...}

pause_ms is how long generation stood still; fresh_after_ms counts from the end of the step to the
first token of the new version, through Generate; throughput_lost is the share of generated tokens
that one update every 5 s costs. With link_mb_per_s the replica's fetches go no faster. --kv is
inference.kv_on_update: `refresh` reads running requests again under the new weights, which on a CPU
takes long for a large model.
"""

import argparse
import json

from benchmarks import weight_transfer
from benchmarks.adam_steps import SIZES, AdamSteps
from benchmarks.weight_codec import Codec
from understudy.process import prepare_process

LEARNING_RATES = (1e-6, 3e-6, 1e-5)
ROUNDS = {34: 7, 1000: 3}
PARTS = ("codec", "transfer", "live")


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--mb", type=int, choices=ROUNDS, nargs="+", default=list(ROUNDS))
    parser.add_argument("--kv", choices=("refresh", "keep"), default="refresh")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    if "codec" in arguments.parts:
        for megabytes in arguments.mb:
            codec(megabytes)
    if "transfer" in arguments.parts:
        report("transfer", weight_transfer.measure())
    if "live" in arguments.parts:
        from benchmarks import weight_live

        for model in weight_live.MODELS:
            report("live", weight_live.measure(model, arguments.kv))
        slowly = weight_live.measure("demo", arguments.kv, weight_live.SLOW_LINK_MB_PER_S)
        report("live", slowly)


def codec(megabytes: int) -> None:
    """All learning rates of one model."""
    steps = AdamSteps(SIZES[megabytes])
    old = steps.before()
    size = sum(map(len, old.values())) / 1e6
    for rate in LEARNING_RATES:
        figures = Codec(old, steps.after(rate)).measure(ROUNDS[megabytes])
        report("codec", {"bf16_mb": round(size, 1), "learning_rate": rate, **figures})


def report(part: str, figures: dict[str, object]) -> None:
    """Print one case."""
    print(json.dumps({"bench": "weights", "part": part, **figures}), flush=True)


if __name__ == "__main__":
    main()
