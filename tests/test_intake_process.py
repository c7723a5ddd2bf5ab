"""The intake as a process, its epoch, and its credits."""

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from intake_rig import make_config, running
from learner.intake.credits import MAX_STREAM_BYTES, Grant, Window, grant
from learner.intake.refusals import RefusedError
from learner.intake.server import IntakeServer
from learner.log.reader import LogReader
from understudy.errors import ConfigError


async def test_the_epoch_rises_at_each_start(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for epoch in (1, 2, 3):
        async with running(config, version=False) as rig:
            assert rig.intake.state.epoch == epoch


async def test_a_second_intake_on_the_same_run_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config):
        with pytest.raises(ConfigError, match="another intake"):
            await IntakeServer.open(config)


async def test_a_port_in_use_and_a_missing_model_are_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    async with running(config, version=False) as rig:
        taken = {"listen": f"127.0.0.1:{rig.server._server.port}"}
        other = config.run.model_copy(update={"name": "other"})
        learner = config.learner.model_copy(update=taken)
        second = config.model_copy(update={"learner": learner, "run": other})
        server = await IntakeServer.open(second)
        with pytest.raises(ConfigError, match="learner.listen"):
            await server.start()
        await server.stop()
    (config.model.path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"model\.path"):
        await IntakeServer.open(config)


async def test_the_process_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(
        f"[model]\npath = '{config.model.path}'\n[run]\ndirectory = '{tmp_path / 'runs'}'\n"
    )
    command = [sys.executable, "-m", "learner.intake", "--config", str(path)]
    for listen in ("listen", "metrics_listen"):
        command += ["--set", f"learner.{listen}=127.0.0.1:0"]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    async with asyncio.timeout(30):
        while b"is serving" not in await process.stderr.readline():
            assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    events = [entry.WhichOneof("event") for entry, _ in LogReader(tmp_path / "runs/run/log")]
    assert events == ["segment_opened", "intake_started"]


def test_credits_share_the_room_of_the_store() -> None:
    assert grant(2**30, 2, 2**20).payload_bytes == MAX_STREAM_BYTES
    assert grant(2**25, 4, 2**20).payload_bytes == 2**23
    assert grant(1, 4, 2**20).payload_bytes == 2**20  # one record always fits
    assert grant(0, 4, 2**20) == Grant(records=0, payload_bytes=0)


def test_a_smaller_grant_does_not_take_back_what_is_under_way() -> None:
    window = Window()
    window.open(Grant(records=10, payload_bytes=100))
    window.take(60)
    window.open(Grant(records=0, payload_bytes=0))
    window.take(40)
    with pytest.raises(RefusedError, match="CREDITS_EXCEEDED"):
        window.take(1)
