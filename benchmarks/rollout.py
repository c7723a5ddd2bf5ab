"""Rollout: episodes a second against the ideal, and CPU a turn of every role.

Real actor, environment, inference and intake processes over loopback gRPC. The engine is scripted:
a reply takes 50 ms whatever the load. A task is 5 model calls and 4 tool calls of 50 ms each, so
one takes 0.45 s at best, and C of them side by side C / 0.45 s.

    {"bench": "rollout", "concurrency": 32, "tasks_per_s": ..., "share_of_ideal": ...,
     "speedup": ..., "cpu_ms_per_turn": {"actor": ..., ...}, "cpu_ms_per_turn_all": ...}

speedup is tasks_per_s x 0.45 s: how many times faster than one ideal sequential worker.
This process plays the trainer's part once: it publishes one tensor, so that the engine serves.
"""

import argparse
import asyncio
import json
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from benchmarks.suite import TOOL_SECONDS
from understudy.client import BatchClient, WeightClient
from understudy.config import Config, write_config
from understudy.process import prepare_process
from understudy.supervisor import Supervisor

ROOT = Path(__file__).parents[1]
NUM_CALLS = 4
IDEAL_SECONDS = (NUM_CALLS + 1) * TOOL_SECONDS + NUM_CALLS * TOOL_SECONDS
CALL = (
    '<tool_call>\n{"name": "lookup", "arguments": {"entity": "Acme", "field": "founder"}}\n'
    "</tool_call>"
)
REPLIES = (*[CALL] * NUM_CALLS, "41,250")
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<think>", "</think>"),
)
ROLES = ("actor", "envserver", "inference", "intake")


def main() -> None:
    """Run every case and print its line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time a case")
    arguments = parser.parse_args()
    prepare_process("benchmark")
    for concurrency in arguments.concurrency:
        print(json.dumps(measure(concurrency, arguments.seconds)), flush=True)


def measure(concurrency: int, seconds: float) -> dict[str, object]:
    """One case: start all roles, let them settle, measure for a while."""
    with tempfile.TemporaryDirectory(prefix="understudy-bench-") as folder:
        config = _config(Path(folder), concurrency)
        config_file = write_config(config, config.run.path)
        with Supervisor(config.run.path / "logs") as supervisor:
            _start(supervisor, config, config_file)
            _wait_for_tasks(config, concurrency)
            before, start = _sample(supervisor, config), time.monotonic()
            time.sleep(seconds)
            after, wall = _sample(supervisor, config), time.monotonic() - start
    return _line(concurrency, before, after, wall)


def _line(
    concurrency: int, before: dict[str, float], after: dict[str, float], wall: float
) -> dict[str, object]:
    used = {key: after[key] - before[key] for key in after}
    tasks_per_s = used["tasks"] / wall
    cpu = {role: round(1000 * used[role] / used["turns"], 3) for role in ROLES}
    return {
        "bench": "rollout",
        "concurrency": concurrency,
        "tasks_per_s": round(tasks_per_s, 2),
        "share_of_ideal": round(tasks_per_s * IDEAL_SECONDS / concurrency, 3),
        "speedup": round(tasks_per_s * IDEAL_SECONDS, 1),
        "cpu_ms_per_turn": cpu,
        "cpu_ms_per_turn_all": round(sum(cpu.values()), 3),
    }


def _config(folder: Path, concurrency: int) -> Config:
    _write_bundle(folder / "model")
    listen = {role: free_address() for role in ROLES}
    scrape = {role: free_address() for role in ROLES}
    return Config.model_validate(
        {
            "run": {"name": "bench", "directory": folder},
            "model": {"path": folder / "model", "dtype": "float32", "tools": "signatures"},
            "network": {
                "learner": listen["intake"],
                "inference": [listen["inference"]],
                "envservers": [listen["envserver"]],
            },
            "envserver": {
                "listen": listen["envserver"],
                "metrics_listen": scrape["envserver"],
                "suites": ["benchmarks.suite:SlowToolSuite"],
            },
            "inference": {
                "listen": listen["inference"],
                "metrics_listen": scrape["inference"],
                "engine": "scripted",
                "scripted": {"latency_seconds": TOOL_SECONDS, "replies": REPLIES},
            },
            "actor": {"metrics_listen": scrape["actor"], "concurrency": concurrency},
            "learner": {
                "listen": listen["intake"],
                "metrics_listen": scrape["intake"],
                # Nobody trains: one batch that never fills keeps leases coming.
                "tasks": {"suite": "slow-tool", "groups_per_batch": 1_000_000},
            },
        }
    )


def free_address() -> str:
    """An address of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def _start(supervisor: Supervisor, config: Config, config_file: Path) -> None:
    commands = {
        "envserver": ["envserver"],
        "intake": ["learner", "--part", "intake"],
        "inference": ["inference"],
        "actor": ["actor"],
    }
    for name, words in commands.items():
        if name == "actor":
            asyncio.run(publish(config))
            supervisor.wait_serving("inference", config.inference.listen, config.network, 60)
        arguments = ["-m", "understudy.cli", *words, "--config", str(config_file)]
        supervisor.start(name, [sys.executable, *arguments])
        if name == "intake":
            supervisor.wait_serving("intake", config.learner.listen, config.network, 60)


async def publish(config: Config) -> None:
    """Play the trainer: start, and publish a first version."""
    tensors = {"model.norm.weight": np.zeros(16, np.float32)}
    async with BatchClient(config.network.learner, config.network) as batches:
        epoch = await batches.start_training(config.run.name)
    async with WeightClient(config.network.learner, config.network) as learner:
        await learner.publish(tensors, step=0, epoch=epoch, run_id=config.run.name)


def _wait_for_tasks(config: Config, concurrency: int) -> None:
    """Until every slot of the actor has been through two tasks, so that starts have spread."""
    deadline = time.monotonic() + 60
    while _scrape(config, "actor", "understudy_trajectories") < 2 * concurrency:
        if time.monotonic() > deadline:
            raise RuntimeError("no episode ended within 60 s; see the logs of the roles")
        time.sleep(0.1)


def _sample(supervisor: Supervisor, config: Config) -> dict[str, float]:
    cpu = {role: _cpu_seconds(supervisor.pid(role)) for role in ROLES}
    return {
        **cpu,
        "tasks": _scrape(config, "intake", "understudy_trajectories_stored"),
        "turns": _scrape(config, "actor", "understudy_turns"),
    }


def _cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _scrape(config: Config, role: str, name: str) -> float:
    from urllib.error import URLError
    from urllib.request import urlopen

    section = config.learner if role == "intake" else getattr(config, role)
    try:
        with urlopen(f"http://{section.metrics_listen}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except URLError:  # not up yet
        return 0.0
    families = {family.name: family for family in text_string_to_metric_families(text)}
    samples = families[name].samples if name in families else []
    return sum(sample.value for sample in samples if sample.name == f"{name}_total")


def _write_bundle(folder: Path) -> None:
    """A tokenizer that knows the script's text, the house's chat template, and no weights."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [CALL, REPLIES[-1], "How many people live in the town where the founder was born?"] * 10,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=[AddedToken(text, normalized=False) for text in SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"model_type": "qwen3", "vocab_size": tokenizer.get_vocab_size()}
    (folder / "config.json").write_text(json.dumps(settings))
    stop = tokenizer.token_to_id("<|im_end|>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    shutil.copy(ROOT / "learner" / "trainer" / "chat_template.jinja", folder)


if __name__ == "__main__":
    main()
