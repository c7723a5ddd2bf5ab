"""Commands `understudy run`, `understudy demo` and `understudy track`."""

from collections.abc import Sequence
from pathlib import Path

from understudy.arguments import config_parser, load_from


def run_all(argv: Sequence[str]) -> int:
    """Start all roles of a run on this machine and train to the end."""
    arguments = config_parser("run", "Start all roles on this machine.").parse_args(argv)
    config = load_from(arguments)

    from launch.run import run_local
    from understudy.process import prepare_process

    prepare_process("run")
    return run_local(config)


def run_demo(argv: Sequence[str]) -> int:
    """Make a small model, warm it up, train it by practice, measure and report."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="understudy demo",
        description="Train a small agent from scratch on this machine and measure what it learned.",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of model, demonstrations and evaluation"
    )
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="time for everything after set-up"
    )
    parser.add_argument(
        "--control",
        action="store_true",
        help="shuffle rewards among episodes: nothing can be learned, and nothing should be",
    )
    parser.add_argument("--config", type=Path, default=None, help="default: configs/demo.toml")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value"
    )
    parser.add_argument("--name", help="run folder below runs/; default: demo, or demo-control")
    arguments = parser.parse_args(argv)

    from launch.demo import DemoPlan, run_demo_plan
    from understudy.process import prepare_process

    prepare_process("demo")
    plan = DemoPlan(
        seed=arguments.seed,
        minutes=arguments.minutes,
        control=arguments.control,
        name=arguments.name or ("demo-control" if arguments.control else "demo"),
        config_file=arguments.config or Path(__file__).parents[1] / "configs" / "demo.toml",
        overrides=tuple(arguments.set),
    )
    return run_demo_plan(plan)


def run_track(argv: Sequence[str]) -> int:
    """Copy a run's figures to TensorBoard or Weights & Biases."""
    import argparse

    from launch.track import DESTINATIONS, track
    from understudy.errors import ConfigError

    parser = argparse.ArgumentParser(
        prog="understudy track", description="Show a run's figures in another program."
    )
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/demo")
    parser.add_argument("--to", choices=sorted(DESTINATIONS), default="tensorboard")
    parser.add_argument("--follow", action="store_true", help="go on until Ctrl-C")
    arguments = parser.parse_args(argv)
    try:
        print(f"{track(arguments.run, arguments.to, arguments.follow)} lines")
    except ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        pass
    return 0
