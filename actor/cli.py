"""Commands `understudy actor` and `understudy eval`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from understudy.arguments import config_parser, load_from, parse_config


def run_actor(argv: Sequence[str]) -> int:
    """Play episodes for a run."""
    config = parse_config("actor", argv)

    from actor.server import act
    from understudy.process import prepare_process, run

    prepare_process("actor", config.actor.cpus)
    return run(act(config))


def run_eval(argv: Sequence[str]) -> int:
    """Measure the policy that is served now, or a model behind an endpoint."""
    parser = _eval_parser()
    arguments = parser.parse_args(argv)
    config = load_from(arguments)
    _check(parser, arguments)

    from actor.evaluation.backends import EndpointPlan
    from actor.evaluation.evaluate import evaluate
    from actor.evaluation.plan import EvaluationPlan
    from understudy.process import prepare_process, run

    plan = EvaluationPlan(
        suite=arguments.suite or config.learner.tasks.suite,
        split=arguments.split,
        num_tasks=arguments.num_tasks,
        k=arguments.k,
        temperature=arguments.temperature,
        seed=config.run.seed if arguments.seed is None else arguments.seed,
        passing_reward=arguments.passing_reward,
        max_tries=arguments.max_tries,
    )
    endpoint = arguments.endpoint and EndpointPlan(
        url=arguments.endpoint,
        model=arguments.model,
        key_variable=arguments.key_variable,
        key_file=arguments.key_file,
    )

    async def main() -> int:
        import json

        result = await evaluate(config, plan, arguments.out, endpoint)
        if not arguments.out:
            print(json.dumps(result, indent=2))
        return 0

    prepare_process("eval", config.actor.cpus)
    return run(main())


def _eval_parser() -> argparse.ArgumentParser:
    parser = config_parser("eval", "Measure a policy on tasks of a split, k attempts at each.")
    parser.add_argument("--suite", help="default: the one that is trained on")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--num-tasks", type=int, help="tasks 0 .. N-1 of the split; default: 600, or all if fewer"
    )
    parser.add_argument("--k", type=int, default=1, help="attempts at each task")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument(
        "--passing-reward",
        type=float,
        help="from which reward an attempt has passed; default: the suite's highest",
    )
    parser.add_argument(
        "--max-tries",
        type=int,
        default=3,
        help="times an attempt is played at most while the infrastructure fails it",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file to write, with report and attempts beside it; the same again goes on with "
        "an evaluation that was stopped; default: standard output, and nothing is kept",
    )
    group = parser.add_argument_group(
        "OpenAI-compatible endpoint", "play a model behind one, in place of the run's own policy"
    )
    group.add_argument("--endpoint", metavar="URL", help="e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--model", help="its name there")
    group.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the key",
    )
    group.add_argument("--key-file", type=Path, help="file of mode 0600 that holds the key instead")
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name in ("num_tasks", "k", "max_tries"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} {value}: at least 1")
    if bool(arguments.endpoint) != bool(arguments.model):
        parser.error("--endpoint and --model belong together: give both or neither")
    out = arguments.out
    if out and not out.parent.is_dir():
        parser.error(f"--out {out}: the folder {out.parent} does not exist")
    if out and out.suffix != ".json":
        parser.error(f"--out {out}: give a name that ends in .json")
