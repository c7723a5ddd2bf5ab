"""Entry point of the process that feeds a replay: `python -m learner.replay.server`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from learner.intake.batch_servicer import BatchServicer
from learner.intake.bundle import Bundle
from learner.intake.journal import Journal
from learner.intake.publication import Version
from learner.intake.weight_servicer import WeightServicer
from learner.intake.weight_store import WeightStore
from learner.log.reader import LogReader
from learner.replay.recorded import RecordedBatches
from understudy import metrics
from understudy.arguments import config_parser, load_from
from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.process import prepare_process, run
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import batch_pb2_grpc, weight_pb2_grpc


async def serve_replay(config: Config, log_folder: Path) -> int:
    """Serve a log's batches on config.learner.listen until drained. Returns the exit code."""
    journal = Journal(config.run.path)
    batches = RecordedBatches(config, LogReader(log_folder), journal)
    weights = WeightStore(lambda: batches.epoch, batches.issue, _forget)
    servicer = WeightServicer(weights, Bundle.read(config.model.path), journal, config.run.name)
    control = RoleControl("learner", lambda: _figures(batches))
    server = RoleServer(
        "learner",
        config.learner.listen,
        config.network,
        [
            Service(
                name="understudy.v1.BatchService",
                add=batch_pb2_grpc.add_BatchServiceServicer_to_server,
                servicer=BatchServicer(batches),
            ),
            Service(
                name="understudy.v1.WeightService",
                add=weight_pb2_grpc.add_WeightServiceServicer_to_server,
                servicer=servicer,
            ),
        ],
        control,
    )
    metrics.start_exporter(config.learner.metrics_listen, "learner")
    await server.bind()
    await server.set_serving()
    await control.draining.wait()
    await weights.close()
    await server.stop(1.0)
    journal.close()
    return 0


def _figures(batches: RecordedBatches) -> Mapping[str, float]:
    return {"batches": len(batches.state.batches)}


def _forget(version: Version, seconds: float) -> None:
    """Nobody plays with what a replay publishes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve a replay and return the exit code."""
    parser = config_parser("learner", "Serve the batches of a run's log.")
    parser.add_argument("--log", type=Path, required=True, help="the log's folder")
    parsed = parser.parse_args(arguments)
    try:
        config = load_from(parsed)
        prepare_process("intake", config.learner.cpus)
        return run(serve_replay(config, parsed.log))
    except UnderstudyError as error:
        print(f"learner.replay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
