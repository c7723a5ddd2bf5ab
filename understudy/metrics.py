"""Every Prometheus metric of every role, declared once.

Names start with `understudy_`, units are base units, counters end in `_total`, labels have fixed
small sets and never ids. vLLM's own `vllm:*` metrics are exposed beside these. Children with labels
are looked up once by their users: an uncached `labels()` costs a microsecond a call.
"""

import contextlib
import logging
import time
from collections.abc import Iterator

from prometheus_client import Counter, Gauge, Histogram, Info, start_http_server

from understudy.errors import ConfigError

_log = logging.getLogger(__name__)

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
VERSIONS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)

# Every role.
BUILD = Info("understudy_build", "Version of the package and role of the process")
POLICY_VERSION = Gauge("understudy_policy_version", "Newest policy version this process holds")
WIRE_BYTES = Counter(
    "understudy_wire_bytes_total",
    "Payload bytes of trajectories, before (raw) and after compression (compressed)",
    ["direction", "stage"],
)

# gRPC, under the family's usual names.
GRPC_SERVER_STARTED = Counter(
    "grpc_server_started_total",
    "RPCs started on the server",
    ["grpc_type", "grpc_service", "grpc_method"],
)
GRPC_SERVER_HANDLED = Counter(
    "grpc_server_handled_total",
    "RPCs completed on the server",
    ["grpc_type", "grpc_service", "grpc_method", "grpc_code"],
)
GRPC_SERVER_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "Time of unary RPCs on the server",
    ["grpc_type", "grpc_service", "grpc_method"],
    buckets=SECONDS,
)

# Environment servers.
SESSIONS = Gauge("understudy_environment_sessions", "Episodes that live on this server")
ENVIRONMENT_STEP_SECONDS = Histogram(
    "understudy_environment_step_seconds", "Time of resets and steps", ["suite"], buckets=SECONDS
)
TOOL_CALLS = Counter(
    "understudy_tool_calls_total", "Tool calls by outcome", ["suite", "tool", "outcome"]
)
ENVIRONMENT_FAILURES = Counter(
    "understudy_environment_failures_total", "Episodes that the environment failed", ["reason"]
)
SANDBOX_FREE_BOXES = Gauge("understudy_sandbox_free_boxes", "Boxes of the sandbox that stand ready")

# Inference servers.
REQUESTS_RUNNING = Gauge("understudy_inference_requests", "Generate calls in the engine")
QUEUED_TOKENS = Gauge("understudy_inference_queued_tokens", "Tokens admitted and not yet done")
REQUESTS_REFUSED = Counter(
    "understudy_inference_refused_total", "Generate calls that were refused", ["reason"]
)
GENERATED_TOKENS = Counter("understudy_generated_tokens_total", "Tokens sampled")
PROMPT_TOKENS = Counter("understudy_prompt_tokens_total", "Prompt tokens received")
GENERATE_SECONDS = Histogram(
    "understudy_generate_seconds", "Time of one reply in the engine", buckets=SECONDS
)
WEIGHT_APPLY_SECONDS = Histogram(
    "understudy_weight_apply_seconds",
    "Time from a version's announcement until it serves",
    buckets=SECONDS,
)
GENERATION_PAUSE_SECONDS = Histogram(
    "understudy_generation_pause_seconds",
    "Time that generation stood still for an update",
    buckets=SECONDS,
)
WEIGHTS_REFUSED = Counter(
    "understudy_weights_refused_total", "Versions that were refused", ["reason"]
)
LOGPROB_MISMATCH = Gauge(
    "understudy_logprob_mismatch",
    "|engine's - learner's| log-probability over the probe of the newest version",
    ["statistic"],
)

# Actors.
EPISODES = Gauge("understudy_episodes", "Episodes that this actor plays now")
TRAJECTORIES = Counter(
    "understudy_trajectories_total", "Episodes that ended, by outcome", ["suite", "outcome"]
)
EPISODE_SECONDS = Histogram(
    "understudy_episode_duration_seconds", "Wall time of episodes", ["suite"], buckets=SECONDS
)
TURNS = Counter("understudy_turns_total", "Turns that were played")
MALFORMED_CALLS = Counter("understudy_malformed_calls_total", "Replies with an unreadable call")
GENERATE_RETRIES = Counter(
    "understudy_generate_retries_total", "Generate calls that were tried again", ["reason"]
)
RECORDING_REQUESTS = Counter(
    "understudy_recording_requests_total",
    "Requests to the recording endpoint: how a reply's tokens were placed, or why there was none",
    ["outcome"],
)
UNACKED_BYTES = Gauge("understudy_unacked_bytes", "Trajectory bytes sent or waiting, not acked")

# Intake.
TASK_KEYS = Gauge(
    "understudy_task_keys",
    "Balance over task keys: issued equals the sum of the other states",
    ["state"],
)
TRAJECTORIES_STORED = Counter("understudy_trajectories_stored_total", "Trajectories stored")
TRAJECTORIES_DUPLICATE = Counter(
    "understudy_trajectories_duplicate_total", "Records that were stored before"
)
TRAJECTORIES_DROPPED = Counter(
    "understudy_trajectories_dropped_total", "Samples that were dropped", ["reason"]
)
STORED_TRAJECTORIES = Gauge(
    "understudy_intake_stored_trajectories", "Trajectories that wait for a batch"
)
LEASES_EXPIRED = Counter("understudy_leases_expired_total", "Leases that nobody renewed")
LOG_BYTES = Gauge("understudy_log_bytes", "Size of the run's log on disk")
LOG_UNSYNCED_BYTES = Gauge("understudy_log_unsynced_bytes", "Log entries that are not durable yet")
LOG_THROTTLED = Gauge(
    "understudy_log_throttled", "1 while the disk is full or the log at its quota: no credits"
)
LOG_QUARANTINED = Gauge(
    "understudy_log_quarantined_ranges", "Damaged ranges that the last start found in the log"
)
TRAINER_RANKS = Gauge("understudy_trainer_ranks", "Processes of the trainer that answer")
CHECKPOINT_STEP = Gauge("understudy_checkpoint_step", "Steps behind the newest durable checkpoint")
POLICY_STALENESS = Histogram(
    "understudy_policy_staleness_versions",
    "Versions, counted in steps, that the oldest token of a trained trajectory was behind",
    buckets=VERSIONS,
)
HELDOUT_ACCURACY = Gauge(
    "understudy_heldout_accuracy",
    "Mean reward of the newest evaluation that has ended; 0 before the first",
)
BATCH_WAIT_SECONDS = Histogram(
    "understudy_batch_wait_seconds", "Time that a rank waited for its batch", buckets=SECONDS
)
WEIGHT_PUBLISH_SECONDS = Histogram(
    "understudy_weight_publish_seconds",
    "Time from a version's first part until its commit",
    buckets=SECONDS,
)
WEIGHT_BYTES = Counter("understudy_weight_bytes_total", "Weight bytes served", ["kind"])

# Trainer.
TRAIN_STEP_SECONDS = Histogram(
    "understudy_train_step_seconds", "Time of a step's phases", ["phase"], buckets=SECONDS
)
TRAINED_TOKENS = Counter("understudy_trained_tokens_total", "Sampled tokens that were trained on")
TOKENS_BY_STALENESS = Counter(
    "understudy_trained_tokens_by_staleness_total",
    "Sampled tokens that were trained on, by steps behind (at most; `more` is above them all)",
    ["versions"],
)
SKIPPED_UPDATES = Counter(
    "understudy_skipped_updates_total",
    "Updates that were left out: loss or gradient not finite, or too small an effective sample",
)
LAST_STEP = Gauge("understudy_last_step_timestamp_seconds", "When the last step ended, Unix time")
LOSS = Gauge("understudy_loss", "Loss of the last step")
REWARD = Gauge(
    "understudy_reward",
    "Mean reward of the last batch, as it is learned from: with penalties of length",
)
GRAD_NORM = Gauge("understudy_grad_norm", "Gradient norm of the last step, before clipping")
ENTROPY = Gauge("understudy_entropy", "Mean negative log-probability of sampled tokens, in nats")
EFFECTIVE_SAMPLE_SIZE = Gauge(
    "understudy_effective_sample_size_ratio", "Effective over actual number of trained tokens"
)


@contextlib.contextmanager
def timed(histogram: Histogram) -> Iterator[None]:
    """Observe the seconds that the body takes, also when it raises."""
    start = time.perf_counter()
    try:
        yield
    finally:
        histogram.observe(time.perf_counter() - start)


def start_exporter(listen: str, role: str, field: str = "metrics_listen") -> int:
    """Serve /metrics on host:port and return the port.

    Args:
        field: key in the config that `listen` comes from, for the error.

    Raises:
        ConfigError: when the port is in use or the address is no host:port.
    """
    from understudy import __version__

    host, _, port = listen.rpartition(":")
    BUILD.info({"version": __version__, "role": role})
    try:
        server, _ = start_http_server(int(port), addr=host.strip("[]"))
    except OSError as error:
        raise ConfigError(
            f"{role}: {field} = {listen!r}: {error.strerror}; choose a free port"
        ) from None
    _log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    return int(server.server_port)
