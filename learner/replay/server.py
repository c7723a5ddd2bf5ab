"""Entry point of the process that feeds a replay: `python -m learner.replay.server`."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from learner.intake.batch_servicer import BatchServicer
from learner.intake.journal import Journal
from learner.log.reader import LogReader
from learner.replay.recorded import RecordedBatches
from learner.weights.opening import MAX_MESSAGE_BYTES, open_weights, weight_service
from understudy import metrics
from understudy.arguments import config_parser, load_from
from understudy.config import Config
from understudy.errors import UnderstudyError
from understudy.process import prepare_process, run
from understudy.rpc import RoleControl, RoleServer, Service
from understudy.v1 import batch_pb2_grpc


async def serve_replay(config: Config, log_folder: Path) -> int:
    """Serve a log's batches on config.learner.listen until drained. Returns the exit code."""
    journal = Journal(config.run.path)
    batches = RecordedBatches(config, LogReader(log_folder), journal)
    weights = (await open_weights(config)).servicer(batches.issue)
    control = RoleControl("learner", lambda: _figures(batches))
    server = RoleServer(
        "learner",
        config.learner.listen,
        config.network,
        [
            Service(
                name="understudy.v1.BatchService",
                add=batch_pb2_grpc.add_BatchServiceServicer_to_server,
                servicer=BatchServicer(batches, control.draining),
            ),
            weight_service(weights),
        ],
        control,
        MAX_MESSAGE_BYTES,
    )
    metrics.start_exporter(config.learner.metrics_listen, "learner")
    await server.bind()
    await server.set_serving()
    await control.draining.wait()
    await weights.store.close()
    await server.stop(1.0)
    journal.close()
    return 0


def _figures(batches: RecordedBatches) -> Mapping[str, float]:
    return {"batches": len(batches.state.batches)}


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
