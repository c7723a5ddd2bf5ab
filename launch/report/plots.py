"""Which charts a run has: each is drawn if the run wrote its figures."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TypeGuard

from launch.report.files import Line, RunFiles
from understudy.report.charts import Chart, Points, Series, line_chart


def charts_of(run: RunFiles) -> dict[str, list[Chart]]:
    """Charts by section, without those that have no data."""
    steps = [{"episodes": step.get("trajectories"), **step} for step in run.steps]
    replicas = _worst_by_version(run.replicas)
    sections = {
        "Learning": _held_out(run.evaluations) + _learning(steps),
        "Speed": _speed(steps, replicas),
        "Health": _health(steps, replicas),
        "Warm-up": [_lines("Supervised loss", "Of demonstrations.", run.warmup, {"loss": "loss"})],
    }
    drawn = {title: [chart for chart in charts if chart] for title, charts in sections.items()}
    return {title: charts for title, charts in drawn.items() if charts}


def _held_out(evaluations: list[Line]) -> list[Chart | None]:
    """Few points, each over many episodes: drawn as they are."""
    bounds = [
        {**line, "low": line["heldout_ci95"][0], "high": line["heldout_ci95"][1]}
        for line in evaluations
        if line.get("heldout_accuracy") is not None and line.get("heldout_ci95")
    ]
    labels = {"heldout_accuracy": "accuracy", "low": "95 % interval, low", "high": "high"}
    return [
        _lines(
            "Held-out accuracy",
            "Mean reward on tasks that are not trained on, of the version of each step.",
            bounds,
            labels,
            smooth=False,
        ),
        _lines(
            "Held-out accuracy by level",
            "Mean reward on tasks that are not trained on.",
            evaluations,
            _labels(evaluations, "heldout_level", lambda level: f"level {level}"),
            smooth=False,
        ),
    ]


def _learning(steps: list[Line]) -> list[Chart | None]:
    return [
        _lines("Reward", "Mean over each batch.", steps, {"reward_mean": "mean reward"}),
        _lines(
            "Reward by level",
            "Mean over each batch; the share of right answers where a reward is 0 or 1.",
            steps,
            _labels(steps, "reward_level", lambda level: f"level {level}"),
        ),
        _lines(
            "Accuracy by level",
            "Share of right answers in each batch.",
            steps,
            _labels(steps, "accuracy_level", lambda level: f"level {level}"),
        ),
        _lines("Turns", "Mean of an episode.", steps, {"turns_mean": "turns"}),
        _lines(
            "Tokens",
            "Mean of an episode.",
            steps,
            {"tokens_mean": "all tokens", "sampled_tokens_mean": "sampled"},
        ),
        _lines(
            "Uniform groups",
            "Groups of a batch, and those whose episodes all earned the same.",
            steps,
            {"uniform_groups": "uniform", "groups": "all"},
        ),
        _lines(
            "Truncated episodes",
            "Share that ran into a limit.",
            steps,
            {"truncated_share": "share"},
        ),
        _lines(
            "Overlong penalty",
            "Mean of what was taken off rewards for the length of episodes.",
            steps,
            {"overlong_penalty_mean": "penalty"},
        ),
    ]


def _speed(steps: list[Line], replicas: list[Line]) -> list[Chart | None]:
    return [
        line_chart(
            "Trajectories a second",
            "Of a batch, over the time since the step before.",
            [Series(label="trajectories/s", points=_rates(steps, "episodes"))],
        ),
        line_chart(
            "Tokens a second",
            "All tokens of the trajectories, and the sampled ones that were trained on.",
            [
                Series(label="all tokens/s", points=_rates(steps, "episodes", "tokens_mean")),
                Series(label="trained tokens/s", points=_rates(steps, "trained_tokens")),
            ],
        ),
        _lines(
            "Seconds of a step",
            "By phase; waiting is for experience.",
            steps,
            _labels(steps, "seconds_", lambda phase: phase.replace("_", " ")),
        ),
        _lines(
            "New weights",
            "Seconds until a version serves everywhere, and the longest pause of generation.",
            replicas,
            {"apply_seconds": "until served", "pause_seconds": "generation paused"},
            x="version",
        ),
    ]


def _health(steps: list[Line], replicas: list[Line]) -> list[Chart | None]:
    return [
        _lines(
            "Staleness",
            "Steps that the oldest token of an episode was behind.",
            steps,
            {"staleness_mean": "mean", "staleness_max": "max"},
        ),
        _lines(
            "Engine against learner",
            "Log-probabilities of the same tokens apart, in nats; the worst replica.",
            replicas,
            {"mismatch_mean": "mean", "mismatch_max": "max"},
            x="version",
        ),
        _lines(
            "KL divergence",
            "Learner's policy from the one that sampled, in nats a token.",
            steps,
            {"kl": "KL", "kl_behaviour": "KL"},
        ),
        _lines(
            "KL divergence from the base",
            "Learner's policy from the one that the run began with, in nats a token.",
            steps,
            {"kl_reference": "KL"},
        ),
        _lines("Entropy", "Of sampled tokens, in nats.", steps, {"entropy": "entropy"}),
        _lines("Gradient norm", "Before clipping.", steps, {"grad_norm": "norm"}),
        _lines("Loss", "It need not fall.", steps, {"loss": "loss"}),
        _lines(
            "Shares",
            "Tokens that were clipped, of capped weight, and of none.",
            steps,
            {"clip_share": "clipped", "cap_share": "capped", "mask_share": "masked"},
        ),
        _lines(
            "Effective sample size",
            "Share of tokens that count after off-policy weighting.",
            steps,
            {"effective_sample_size": "share"},
        ),
    ]


def _worst_by_version(replicas: list[Line]) -> list[Line]:
    """One line a version: the largest figure of any replica."""
    worst: dict[float, Line] = {}
    for line in replicas:
        if _is_number(version := line.get("version")):
            seen = worst.setdefault(version, {})
            for key, value in line.items():
                if _is_number(value):
                    seen[key] = max(value, seen.get(key, value))
    return [worst[version] for version in sorted(worst)]


def _lines(
    title: str,
    help: str,
    lines: list[Line],
    labels: dict[str, str],
    *,
    x: str = "step",
    smooth: bool = True,
) -> Chart | None:
    """A chart of those keys that occur."""
    series = [
        Series(label=label, points=_points(lines, x, key), smooth=smooth)
        for key, label in labels.items()
    ]
    return line_chart(title, help, [s for s in series if s.points], x)


def _labels(lines: list[Line], prefix: str, name: Callable[[str], str]) -> dict[str, str]:
    keys = dict.fromkeys(key for line in lines for key in line if key.startswith(prefix))
    return {key: name(key.removeprefix(prefix)) for key in keys}


def _points(lines: Iterable[Line], x: str, y: str) -> Points:
    points = [(line.get(x), line.get(y)) for line in lines]
    return [(float(a), float(b)) for a, b in points if _is_number(a) and _is_number(b)]


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rates(steps: list[Line], *factors: str) -> Points:
    """Product of `factors` over the seconds since the step before, by step."""
    points = []
    for before, step in pairwise(steps):
        values = [step.get(key) for key in ("time", *factors)]
        if not all(map(_is_number, [before.get("time"), *values])):
            continue
        seconds = step["time"] - before["time"]
        amount = 1.0
        for key in factors:
            amount *= step[key]
        if seconds > 0:
            points.append((float(step["step"]), amount / seconds))
    return points
