"""Deterministic runs: two of real parts give the same weights bit for bit, whatever the timing."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import ROOT
from intake_rig import make_config, running
from learner.intake.leases import lease_seed
from learner.intake.tasks import TaskKey
from learner.log.reader import LogReader
from understudy.config import Config, load_config
from understudy.errors import ConfigError
from understudy.trajectory import decode_payload

from trainer_helpers import tiny_bundle  # isort: skip

CONFIG = """
[run]
directory = "{folder}"
name = "{name}"
deterministic = true

[model]
path = "{folder}/bundle"
dtype = "float32"

[network]
learner = "127.0.0.1:{port}000"
inference = ["127.0.0.1:{port}100"]
envservers = ["127.0.0.1:{port}200"]
connect_timeout_seconds = 200

[envserver]
suites = ["suites:ChattySuite"]
listen = "127.0.0.1:{port}200"
metrics_listen = "127.0.0.1:0"

[inference]
listen = "127.0.0.1:{port}100"
metrics_listen = "127.0.0.1:0"
max_model_len = 256
max_running = 32
enforce_eager = true
cpu_kv_cache_gib = 0.25

[actor]
metrics_listen = "127.0.0.1:0"
concurrency = 24

[learner]
listen = "127.0.0.1:{port}000"
metrics_listen = "127.0.0.1:0"
trainer_metrics_listen = "127.0.0.1:0"

[learner.tasks]
suite = "chatty"
num_tasks = 100
group_size = 4
groups_per_batch = 4
max_new_tokens = 24
max_turns = 3
max_tokens = 250
max_attempts = 50

[learner.train]
steps = 4
learning_rate = 1e-3
"""
OTHER_TIMING = ("envserver.suites=['suites:MoodySuite']", "actor.concurrency=3")
"""A few episodes at a time, many of which fail and are played again."""
RUNS: Mapping[str, tuple[str, ...]] = {
    "fresh": ("learner.tasks.max_staleness=0", "learner.ranks=2"),
    "fresh-again": ("learner.tasks.max_staleness=0", "learner.ranks=2", *OTHER_TIMING),
    "ahead": ("learner.tasks.max_staleness=1",),
    "ahead-again": ("learner.tasks.max_staleness=1", *OTHER_TIMING),
    "other-seed": ("learner.tasks.max_staleness=2", "run.seed=1"),
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run came to."""

    weights: bytes
    batches: list[bytes]
    """As the log has them: what the ledger's digests are made of."""
    episodes: dict[tuple[int, int], list[Any]]
    """Tokens, log-probabilities and versions of each sample."""
    num_returned: int
    """Times that a sample was given back, to be played again."""


def make_model(bundle: Path) -> None:
    """An untrained model, but for that it ends its replies: one token in ten."""
    tiny_bundle(bundle)
    model = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
    stop = AutoTokenizer.from_pretrained(bundle).eos_token_id
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(20):
        tokens = torch.randint(model.config.vocab_size, (8, 64))
        probabilities = model(tokens).logits.softmax(-1)[..., stop]
        (probabilities - 0.1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(bundle)


def run(folder: Path, name: str, port: int) -> Outcome:
    config = folder / f"{name}.toml"
    config.write_text(CONFIG.format(folder=folder, name=name, port=port))
    settings = [f"--set={setting}" for setting in RUNS[name]]
    done = subprocess.run(
        [sys.executable, "-m", "understudy.cli", "run", "--config", str(config), *settings],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return outcome_of(folder / name)


def outcome_of(folder: Path) -> Outcome:
    batches, episodes, num_returned = [], {}, 0
    reader = LogReader(folder / "log")
    for entry, location in reader:
        num_returned += entry.HasField("sample_returned")
        if entry.HasField("batch_assigned"):
            batches.append(entry.batch_assigned.SerializeToString(deterministic=True))
        if entry.HasField("trajectory_stored"):
            stored = entry.trajectory_stored
            _, payload = reader.read(location)
            segments = decode_payload(payload, stored.encoding).segments
            episodes[stored.task_key.ordinal, stored.task_key.sample_index] = [
                (s.token_ids.tobytes(), s.logprobs.tobytes(), s.version_spans) for s in segments
            ]
    reader.close()
    weights = (folder / "model" / "model.safetensors").read_bytes()
    return Outcome(weights=weights, batches=batches, episodes=episodes, num_returned=num_returned)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deterministic")
    make_model(folder / "bundle")
    return folder


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """All runs, two at a time, which makes their timing unlike as well."""
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(run, folder, name, 21 + i) for i, name in enumerate(RUNS)]
        return {name: outcome.result() for name, outcome in zip(RUNS, outcomes, strict=True)}


@pytest.mark.timeout(500)
@pytest.mark.parametrize("name", ["fresh", "ahead"])
def test_two_runs_play_and_learn_the_same_bit_for_bit(
    folder: Path, outcomes: dict[str, Outcome], name: str
) -> None:
    one, other = outcomes[name], outcomes[f"{name}-again"]
    assert other.num_returned > one.num_returned
    assert one.episodes == other.episodes
    assert one.batches == other.batches
    assert one.weights == other.weights
    assert one.weights != (folder / "bundle" / "model.safetensors").read_bytes()


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("name", "staleness"), [("fresh", 0), ("ahead", 1), ("other-seed", 2)])
def test_a_batch_is_played_by_one_version(
    outcomes: dict[str, Outcome], name: str, staleness: int
) -> None:
    for (ordinal, _), segments in outcomes[name].episodes.items():
        played_by = {span.version for _, _, spans in segments for span in spans}
        assert played_by == {max(ordinal // 4 - staleness, 0) + 1}


@pytest.mark.timeout(500)
def test_another_seed_plays_and_learns_otherwise(outcomes: dict[str, Outcome]) -> None:
    one, other = outcomes["ahead"], outcomes["other-seed"]
    assert all(one.episodes[key] != other.episodes[key] for key in one.episodes)
    assert one.weights != other.weights


def test_a_lease_s_seed_goes_by_run_and_sample_alone() -> None:
    keys = [TaskKey(ordinal, index) for ordinal in range(100) for index in range(20)]
    seeds = [lease_seed(run_seed, key) for run_seed in (0, 1, -1) for key in keys]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert lease_seed(7, TaskKey(8, 2)) == lease_seed(7, TaskKey(8, 2))
    # Well mixed: each bit is set in about half of them.
    shares = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(63)]
    assert min(shares) > 0.45
    assert max(shares) < 0.55


async def test_a_lease_names_its_seed_and_its_one_version(tmp_path: Path) -> None:
    config = make_config(tmp_path, seed=5)
    run = config.run.model_copy(update={"deterministic": True})
    async with running(config.model_copy(update={"run": run})) as rig:
        leases = await rig.lease()
    for lease in leases:
        key = TaskKey(lease.task_key.ordinal, lease.task_key.sample_index)
        assert lease.sampling.seed == lease_seed(5, key)
        assert lease.min_version == lease.max_version == 1


DETERMINISTIC = """
[model]
path = "m"
dtype = "float32"
[run]
deterministic = true
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[inference]\nthreads = 2", "inference.threads = 2"),
        ("[inference]\nengine = 'scripted'", "inference.engine = 'scripted' knows no seeds"),
        ("[network]\ninference = ['a:1', 'b:1']", "network.inference lists 2 replicas"),
        ("[learner.train]\nmax_seconds = 9", "learner.train.max_seconds = 9 ends the run by the"),
        ("[learner.weights]\ntransport = 'nccl'", "learner.weights.transport = 'nccl'"),
    ],
)
def test_what_breaks_determinism_is_refused_by_name(
    write_toml: Callable[[str], Path], text: str, said: str
) -> None:
    path = write_toml(DETERMINISTIC + text)
    with pytest.raises(ConfigError, match="run.deterministic = true") as caught:
        load_config(path)
    assert said in str(caught.value)
    assert isinstance(load_config(path, ["run.deterministic=false"]), Config)


def test_bfloat16_is_refused(write_toml: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype = 'bfloat16' .* take 'float32'"):
        load_config(write_toml(DETERMINISTIC), ["model.dtype=bfloat16"])
