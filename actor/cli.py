"""Commands `understudy actor` and `understudy eval`."""

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
    """Measure the policy that is served now."""
    parser = config_parser("eval", "Measure the served policy on tasks of a split.")
    parser.add_argument("--suite", help="default: the one that is trained on")
    parser.add_argument("--split", default="test")
    parser.add_argument("--num-tasks", type=int, default=600, help="tasks 0 .. N-1 of the split")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, help="default: the run's")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: standard output")
    arguments = parser.parse_args(argv)
    config = load_from(arguments)
    if arguments.num_tasks < 1:
        parser.error(f"--num-tasks {arguments.num_tasks}: at least 1")
    if arguments.out and not arguments.out.parent.is_dir():
        parser.error(f"--out {arguments.out}: the folder {arguments.out.parent} does not exist")

    import json

    from actor.evaluate import EvaluationPlan, evaluate, write_result
    from understudy.process import prepare_process, run

    plan = EvaluationPlan(
        suite=arguments.suite or config.learner.tasks.suite,
        split=arguments.split,
        num_tasks=arguments.num_tasks,
        temperature=arguments.temperature,
        seed=config.run.seed if arguments.seed is None else arguments.seed,
    )

    async def main() -> int:
        result = await evaluate(config, plan)
        if arguments.out:
            write_result(result, arguments.out)
        else:
            print(json.dumps(result, indent=2))
        return 0

    prepare_process("eval", config.actor.cpus)
    return run(main())
