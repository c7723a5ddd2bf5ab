"""Write the expert's episodes as chat JSON lines, one episode a line.

    python -m envserver.suites.practice.demonstrate --out demos.jsonl --num 10000 --seed 1 \\
        --carelessness 0.3 --mix 2:2:1

Each line: `task_id`, `level`, `reward`, `messages` (chat messages; an assistant's turn has either
one of `tool_calls` or its answer as `content`) and `tools` (name, description, parameters).
Demonstrations come from the top of the train split, so that practice can use the rest.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from envserver.environment import Action, Step
from envserver.suites.practice.expert import Expert
from envserver.suites.practice.suite import PracticeEnvironment, PracticeSuite
from envserver.suites.practice.tasks import LEVELS, SPLITS

SPLIT = "train"
ORDINALS = range(SPLITS[SPLIT] - 100_000, SPLITS[SPLIT])
"""Train ordinals that demonstrations are drawn from; the first is of the first level."""


def demonstrations(
    num: int, seed: int, carelessness: float = 0.0, mix: Sequence[float] = (1, 1, 1)
) -> Iterator[dict[str, Any]]:
    """Play `num` train tasks, levels in proportion to `mix`, and yield each as chat messages."""
    suite, rng = PracticeSuite(), Random(f"demonstrations/{seed}")
    for level in rng.choices(LEVELS, mix, k=num):
        ordinal = rng.choice(ORDINALS[level - 1 :: len(LEVELS)])
        environment = suite.open(SPLIT, ordinal)
        yield demonstrate(environment, Expert(environment.task, rng, carelessness))
        environment.close()


def demonstrate(environment: PracticeEnvironment, expert: Expert) -> dict[str, Any]:
    """Play one episode to its end."""
    reset = environment.reset()
    messages = [asdict(message) for message in reset.messages]
    actions = expert.actions()
    action, step = next(actions), Step()
    while not step.terminated:
        step = environment.step(action)
        messages.append(_assistant_message(action))
        messages.extend(asdict(message) for message in step.messages)
        if not step.terminated:
            action = actions.send(step)
    return {
        "task_id": reset.task_id,
        "level": reset.level,
        "reward": step.reward,
        "messages": messages,
        "tools": [asdict(tool) for tool in reset.tools],
    }


def main() -> None:
    """Write demonstrations to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--num", type=int, default=10_000, help="episodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--carelessness", type=float, default=0.0, help="error rate per call")
    parser.add_argument("--mix", type=_mix, default=(1, 1, 1), help="weights of levels 1:2:3")
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as out:
        for demonstration in demonstrations(args.num, args.seed, args.carelessness, args.mix):
            out.write(json.dumps(demonstration) + "\n")


def _assistant_message(action: Action) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": action.text}
    if action.tool_calls:
        message["tool_calls"] = [asdict(call) for call in action.tool_calls]
    return message


def _mix(text: str) -> tuple[float, ...]:
    weights = tuple(float(weight) for weight in text.split(":"))
    if len(weights) != len(LEVELS) or min(weights) < 0 or sum(weights) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: give three weights, such as 2:2:1")
    return weights


if __name__ == "__main__":
    main()
