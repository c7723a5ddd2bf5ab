"""What the overview dashboard shows, row by row."""

from dataclasses import dataclass

from monitoring.queries import Query, age, latest, mean, quantiles, rate
from understudy import metrics

NUMBER, SHARE, SECONDS, BYTES, BYTES_RATE = "short", "percentunit", "s", "bytes", "Bps"
CALLS_RATE, EVENTS_RATE = "reqps", "cps"
EPISODES_RATE, TOKENS_RATE = "suffix: /s", "suffix: tok/s"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel: a chart over time, or one number in the first row."""

    title: str
    help: str
    """What it shows and what to make of it."""
    queries: tuple[Query, ...]
    unit: str
    """One of Grafana's unit ids."""
    stacked: bool = False
    warn_above: float | None = None
    """From here on a number turns red."""


def _panel(
    title: str,
    help: str,
    *queries: Query,
    unit: str = NUMBER,
    stacked: bool = False,
    warn_above: float | None = None,
) -> Panel:
    return Panel(
        title=title,
        help=help,
        queries=queries,
        unit=unit,
        stacked=stacked,
        warn_above=warn_above,
    )


NOW = [
    _panel(
        "Policy version",
        "Newest version that any process holds. It rises with every optimizer step.",
        latest(metrics.POLICY_VERSION, legend="version"),
    ),
    _panel(
        "Reward",
        "Mean reward of the last batch.",
        latest(metrics.REWARD, role="trainer", legend="reward"),
    ),
    _panel(
        "Trajectories",
        "Episodes that end a second, whatever their outcome.",
        rate(metrics.TRAJECTORIES, legend="trajectories"),
        unit=EPISODES_RATE,
    ),
    _panel(
        "Generated tokens",
        "Tokens that all inference replicas sample a second.",
        rate(metrics.GENERATED_TOKENS, legend="tokens"),
        unit=TOKENS_RATE,
    ),
    _panel(
        "Staleness",
        "Mean versions that trajectories were behind when they were trained on.",
        mean(metrics.POLICY_STALENESS, legend="versions"),
    ),
    _panel(
        "Since the last step",
        "Time since the trainer ended a step. Far above a step's usual time: it stalls.",
        age(metrics.LAST_STEP, legend="age"),
        unit=SECONDS,
        warn_above=300,
    ),
]
"""Stat panels at the top."""

ACTOR = [
    _panel(
        "Trajectories by outcome",
        "Episodes that end a second. An outcome names the boundary that ended the episode.",
        rate(metrics.TRAJECTORIES, by="suite, outcome"),
        unit=EPISODES_RATE,
        stacked=True,
    ),
    _panel(
        "Episodes in play",
        "By actor. Below its concurrency an actor lacks leases, credits or environments.",
        latest(metrics.EPISODES, role="actor", by="instance"),
    ),
    _panel(
        "Episode duration",
        "Wall time of episodes.",
        *quantiles(metrics.EPISODE_SECONDS, by="suite"),
        unit=SECONDS,
    ),
    _panel(
        "Turns",
        "Turns played a second, and replies whose tool call could not be read.",
        rate(metrics.TURNS, legend="turns"),
        rate(metrics.MALFORMED_CALLS, legend="malformed calls"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Retried generation",
        "Generate calls tried again, by reason. Steady: replicas are too few, or one is gone.",
        rate(metrics.GENERATE_RETRIES, by="reason"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Recording endpoint",
        "Requests of other people's agents: how a reply's tokens were placed (began, extended, "
        "forked, rewritten), or why there was none.",
        rate(metrics.RECORDING_REQUESTS, by="outcome"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Unacknowledged trajectories",
        "Bytes that an actor holds until the intake has stored them. Full: no new episode starts.",
        latest(metrics.UNACKED_BYTES, role="actor", by="instance"),
        unit=BYTES,
    ),
]

INFERENCE = [
    _panel(
        "Tokens",
        "Tokens sampled, and prompt tokens received (those in the prefix cache included).",
        rate(metrics.GENERATED_TOKENS, legend="generated"),
        rate(metrics.PROMPT_TOKENS, legend="prompt"),
        unit=TOKENS_RATE,
    ),
    _panel(
        "Calls in the engine",
        "Generate calls that a replica works on.",
        latest(metrics.REQUESTS_RUNNING, role="inference", by="instance"),
    ),
    _panel(
        "Queued tokens",
        "Tokens admitted and not yet done, by replica. At its limit a replica refuses calls.",
        latest(metrics.QUEUED_TOKENS, role="inference", by="instance"),
    ),
    _panel(
        "Time of a reply",
        "Time of one Generate call in the engine.",
        *quantiles(metrics.GENERATE_SECONDS),
        unit=SECONDS,
    ),
    _panel(
        "Refused calls",
        "Generate calls that were turned away, by reason.",
        rate(metrics.REQUESTS_REFUSED, by="reason"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Version served",
        "Policy version by replica. Where lines part, a replica does not follow.",
        latest(metrics.POLICY_VERSION, role="inference", by="instance"),
    ),
    _panel(
        "New weights",
        "Time from a version's announcement until it serves, and how long generation stood still.",
        mean(metrics.WEIGHT_APPLY_SECONDS, legend="announced to serving"),
        mean(metrics.GENERATION_PAUSE_SECONDS, legend="generation paused"),
        unit=SECONDS,
    ),
    _panel(
        "Refused weights",
        "Versions that a replica would not serve, by reason; the one before goes on serving.",
        rate(metrics.WEIGHTS_REFUSED, by="reason"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Engine against learner",
        "How far log-probabilities of the same tokens under the same weights are apart, in nats. "
        "A rise above rounding error means that the two compute different things.",
        latest(metrics.LOGPROB_MISMATCH, by="statistic"),
    ),
]

ENVIRONMENT = [
    _panel(
        "Sessions",
        "Episodes that live on each server.",
        latest(metrics.SESSIONS, role="envserver", by="instance"),
    ),
    _panel(
        "Time of a step",
        "Time of resets and steps inside the environment.",
        *quantiles(metrics.ENVIRONMENT_STEP_SECONDS, by="suite"),
        unit=SECONDS,
    ),
    _panel(
        "Tool calls",
        "Tool calls a second, by tool and outcome.",
        rate(metrics.TOOL_CALLS, by="tool, outcome"),
        unit=EVENTS_RATE,
        stacked=True,
    ),
    _panel(
        "Free boxes",
        "Boxes of the sandbox that stand ready; at 0, first calls wait for one to start.",
        latest(metrics.SANDBOX_FREE_BOXES, role="envserver", by="instance"),
    ),
    _panel(
        "Failures",
        "Episodes that ended because the environment failed, by reason.",
        rate(metrics.ENVIRONMENT_FAILURES, by="reason"),
        unit=EVENTS_RATE,
    ),
]

INTAKE = [
    _panel(
        "Task keys",
        "The ledger's balance: issued equals the sum of the other states, always.",
        latest(metrics.TASK_KEYS, by="state"),
    ),
    _panel(
        "Held-out accuracy",
        "Mean reward on held-out tasks of the newest evaluation, if the run has any.",
        latest(metrics.HELDOUT_ACCURACY, role="learner", legend="accuracy"),
    ),
    _panel(
        "Stored trajectories",
        "Trajectories stored a second, and records that came again.",
        rate(metrics.TRAJECTORIES_STORED, legend="stored"),
        rate(metrics.TRAJECTORIES_DUPLICATE, legend="duplicate"),
        unit=EPISODES_RATE,
    ),
    _panel(
        "Waiting for a batch",
        "Stored trajectories that are in no batch yet. Always near 0: the trainer waits for "
        "experience. Always high: experience waits for the trainer.",
        latest(metrics.STORED_TRAJECTORIES, role="learner", legend="trajectories"),
    ),
    _panel(
        "Dropped samples",
        "Samples that are not trained on, by reason.",
        rate(metrics.TRAJECTORIES_DROPPED, by="reason"),
        unit=EPISODES_RATE,
    ),
    _panel(
        "Log",
        "Size on disk, and what is not durable yet: acks wait for it.",
        latest(metrics.LOG_BYTES, role="learner", legend="on disk"),
        latest(metrics.LOG_UNSYNCED_BYTES, role="learner", legend="not durable"),
        unit="bytes",
    ),
    _panel(
        "Log trouble",
        "Throttled: the disk is full or the log at its quota, and actors get no credits. Damaged "
        "ranges: audit the run.",
        latest(metrics.LOG_THROTTLED, role="learner", legend="throttled"),
        latest(metrics.LOG_QUARANTINED, role="learner", legend="damaged ranges"),
    ),
    _panel(
        "Trainer",
        "Processes of the trainer that answer; the others have ended or stand still.",
        latest(metrics.TRAINER_RANKS, role="learner", legend="ranks"),
    ),
    _panel(
        "Checkpoint",
        "Steps behind the newest durable checkpoint; steps after it are taken again after a crash.",
        latest(metrics.CHECKPOINT_STEP, role="learner", legend="steps"),
    ),
    _panel(
        "Expired leases",
        "Leases that nobody renewed; their tasks are leased again. A burst: an actor died.",
        rate(metrics.LEASES_EXPIRED, legend="expired"),
        unit=EVENTS_RATE,
    ),
    _panel(
        "Staleness",
        "Versions that the oldest token of a trained trajectory was behind.",
        *quantiles(metrics.POLICY_STALENESS),
    ),
    _panel(
        "Wait for a batch",
        "Time that a trainer rank waited for its share of a batch.",
        *quantiles(metrics.BATCH_WAIT_SECONDS),
        unit=SECONDS,
    ),
    _panel(
        "Publishing weights",
        "Time from a version's first part until its commit.",
        *quantiles(metrics.WEIGHT_PUBLISH_SECONDS),
        unit=SECONDS,
    ),
    _panel(
        "Weights served",
        "Weight bytes sent to replicas a second, in full copies and in deltas.",
        rate(metrics.WEIGHT_BYTES, by="kind"),
        unit=BYTES_RATE,
        stacked=True,
    ),
]

TRAINER = [
    _panel(
        "Reward",
        "Mean reward of each batch.",
        latest(metrics.REWARD, role="trainer", legend="reward"),
    ),
    _panel(
        "Loss",
        "Policy loss of each step. It need not fall; it must stay finite.",
        latest(metrics.LOSS, role="trainer", legend="loss"),
    ),
    _panel(
        "Gradient norm",
        "Global norm before clipping.",
        latest(metrics.GRAD_NORM, role="trainer", legend="norm"),
    ),
    _panel(
        "Entropy",
        "Mean negative log-probability of sampled tokens, in nats. At 0 nothing is explored.",
        latest(metrics.ENTROPY, role="trainer", legend="nats"),
    ),
    _panel(
        "Effective sample size",
        "Share of trained tokens that count after off-policy weighting. Low: they are too stale.",
        latest(metrics.EFFECTIVE_SAMPLE_SIZE, role="trainer", legend="share"),
        unit=SHARE,
    ),
    _panel(
        "Trained tokens by age",
        "Sampled tokens a second by the versions that their policy was behind.",
        rate(metrics.TOKENS_BY_STALENESS, by="versions"),
    ),
    _panel(
        "Skipped updates",
        "Updates that were left out as their gradient was not finite, or their sample too small.",
        rate(metrics.SKIPPED_UPDATES, legend="updates"),
    ),
    _panel(
        "Time of a step by phase",
        "Mean time of each phase.",
        mean(metrics.TRAIN_STEP_SECONDS, by="phase"),
        unit=SECONDS,
        stacked=True,
    ),
    _panel(
        "Trained tokens",
        "Sampled tokens trained on a second.",
        rate(metrics.TRAINED_TOKENS, legend="tokens"),
        unit=TOKENS_RATE,
    ),
]

GRPC = [
    _panel(
        "Calls",
        "Calls that begin a second, by method.",
        rate(metrics.GRPC_SERVER_STARTED, by="grpc_service, grpc_method"),
        unit=CALLS_RATE,
    ),
    _panel(
        "Failed calls",
        "Calls that end with another code than OK, by method. RESOURCE_EXHAUSTED is admission "
        "control, CANCELLED a caller that left.",
        rate(metrics.GRPC_SERVER_HANDLED, by="grpc_method, grpc_code", where='grpc_code!="OK"'),
        unit=CALLS_RATE,
    ),
    _panel(
        "Time of unary calls",
        "95th percentile, by method.",
        *quantiles(metrics.GRPC_SERVER_SECONDS, by="grpc_method", shares=[0.95]),
        unit=SECONDS,
    ),
    _panel(
        "Payload",
        "Payload bytes a second by direction, before and after compression.",
        rate(metrics.WIRE_BYTES, by="direction, stage"),
        unit=BYTES_RATE,
    ),
    _panel(
        "Processes",
        "Processes that are scraped, by role and version of the package.",
        latest(metrics.BUILD, by="role, version", aggregate="count"),
    ),
]

ROWS = {
    "Actors": ACTOR,
    "Inference": INFERENCE,
    "Environments": ENVIRONMENT,
    "Intake": INTAKE,
    "Trainer": TRAINER,
    "gRPC": GRPC,
}
"""Charts below the stat panels, by heading."""
