"""Export: what a line says, what is left out, and that Harbor takes the ATIF."""

import hashlib
import io
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from actor.conversation import Conversation
from audit_story import healthy, key, write
from learner.export.cli import run_export
from learner.export.conversation import Message, read_messages
from learner.export.replies import replies_of
from log_helpers import LIMITS, open_log
from understudy.chat import ChatFormat
from understudy.client import Generation
from understudy.errors import ConfigError
from understudy.trajectory import Trajectory, Turn, VersionSpan, encode_trajectory
from understudy.v1 import common_pb2, log_pb2, trajectory_pb2
from understudy.v1.log_pb2 import LogEntry

TOOLS = [
    {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {}, "b": {}}},
    }
]
OPENING = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 1+2 and 3+4? <|im_end|> is text."},
]
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'
)
PLAY = [
    (OPENING, f"<think>\nTwo sums.\n</think>\n\nI will add.\n{CALLS}"),
    ([{"role": "tool", "content": "3"}, {"role": "tool", "content": "7"}], "<tool_call>\n{"),
    ([{"role": "tool", "content": "Malformed call."}], "Done?"),
    ([{"role": "user", "content": "Say it."}], "3 and 7"),
]
Line = dict[str, Any]


def play(chat: ChatFormat, turns: Sequence[tuple[Any, str]] = PLAY) -> Trajectory:
    """An episode as an actor records it, of replies that are known beforehand."""
    conversation = Conversation(chat, TOOLS)
    played = []
    for number, (messages, reply) in enumerate(turns):
        conversation.observe(messages)
        ids = chat.encode(f"{reply}<|im_end|>")
        first, half = conversation.num_sampled, len(ids) // 2
        conversation.reply(
            Generation(
                token_ids=ids,
                logprobs=np.linspace(-0.1, -0.9, len(ids), dtype=np.float32),
                version_spans=(
                    VersionSpan(version=number + 1, start=0, end=half),
                    VersionSpan(version=number + 2, start=half, end=len(ids)),
                ),
                cut_off=False,
            )
        )
        played.append(
            Turn(
                segment=conversation.segment_index,
                start=first,
                end=conversation.num_sampled,
                reward=0.5,
                num_tool_calls=0,
                malformed_call=False,
                generate_seconds=0.25,
                step_seconds=0.125,
            )
        )
    return Trajectory(
        suite="practice",
        split="train",
        task_ordinal=7,
        task_id="sum-7",
        level=2,
        outcome=trajectory_pb2.OUTCOME_COMPLETED,
        detail="",
        segments=conversation.segments(),
        turns=tuple(played),
        reward=2.0,
        temperature=1.0,
        duration_seconds=1.5,
    )


async def write_run(
    run: Path, trajectory: Trajectory, bundle: Path | None, **story: LogEntry
) -> Path:
    """The audit's story, each of its stored samples with this trajectory."""
    data = encode_trajectory(trajectory)
    log = await open_log(run / "log", LIMITS)
    for entry in (healthy() | story).values():
        if entry.HasField("trajectory_stored"):
            stored = entry.trajectory_stored
            stored.payload_digest = hashlib.sha256(data).digest()
            stored.encoding = common_pb2.ENCODING_ZSTD
        log.append(entry, data if entry.HasField("trajectory_stored") else b"")
    await log.close()
    if bundle:
        shutil.copytree(bundle, run / "model")
    return run


def export(run: Path, *words: str) -> list[Line]:
    out = run / "out.jsonl.zst"
    assert run_export([str(run), "--out", str(out), *words]) == 0
    with out.open("rb") as file:
        text = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
        return [json.loads(line) for line in text]


def keys(lines: list[Line]) -> list[tuple[int, int]]:
    return [tuple(line["task_key"].values()) for line in lines]


# The plain format.


async def test_a_line_is_the_trajectory(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    trajectory = play(chat)
    (first, *_) = export(await write_run(tmp_path, trajectory, bundle))
    assert first["task_key"] == {"ordinal": 0, "sample_index": 0}
    task = {"suite": "practice", "split": "train", "ordinal": 7, "id": "sum-7", "level": 2}
    assert first["task"] == task
    assert (first["run"], first["outcome"], first["reward"]) == ("test", "completed", 2.0)
    assert (first["state"], first["reason"], first["step"]) == ("trained", "", 0)
    for line, segment in zip(first["segments"], trajectory.segments, strict=True):
        assert line["token_ids"] == segment.token_ids.tolist()
        assert line["loss_mask"] == segment.loss_mask.astype(int).tolist()
        assert np.array_equal(np.array(line["logprobs"], np.float32), segment.logprobs)
        spans = [VersionSpan(**span) for span in line["version_spans"]]
        assert tuple(spans) == segment.version_spans


async def test_turns_have_their_text(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    (first, *_) = export(await write_run(tmp_path, play(chat), bundle))
    turns = first["turns"]
    assert [turn["reply"] for turn in turns] == [f"{reply}<|im_end|>" for _, reply in PLAY]
    assert turns[0]["prompt"].startswith("<|im_start|>system\nBe brief.")
    assert turns[1]["prompt"].startswith("\n<|im_start|>user\n<tool_response>\n3\n")
    whole = "".join(turn["prompt"] + turn["reply"] for turn in turns)
    assert whole == chat.decode(np.array(first["segments"][0]["token_ids"]))


async def test_a_run_without_a_tokenizer_has_no_text(
    tmp_path: Path, chat: ChatFormat, capsys: pytest.CaptureFixture[str]
) -> None:
    run = await write_run(tmp_path, play(chat), None)
    (first, *_) = export(run)
    assert "reply" not in first["turns"][0]
    assert "no tokenizer found" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--format = atif: no tokenizer.json"):
        export(run, "--format", "atif")


async def test_the_configuration_says_where_the_tokenizer_is(
    tmp_path: Path, chat: ChatFormat, bundle: Path
) -> None:
    run = await write_run(tmp_path, play(chat), None)
    (run / "config.json").write_text(json.dumps({"model": {"path": str(bundle)}}))
    (first, *_) = export(run, "--format", "atif")
    assert first["agent"]["model_name"] == str(bundle)


async def test_the_split_chooses(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    run = await write_run(tmp_path, play(chat), bundle)
    trained = export(run)
    assert keys(trained) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert [line["step"] for line in trained] == [0, 0, 1, 1]
    everything = export(run, "--split", "all")
    assert keys(everything) == [(0, 0), (0, 1), (1, 0), (1, 1), (2**32, 0), (2, 0), (2, 1)]
    ends = {(line["state"], line["reason"]) for line in everything}
    assert ends == {("trained", ""), ("evaluated", ""), ("dropped", "uniform_group")}
    (heldout,) = export(run, "--split", "evaluated")
    assert heldout["evaluation"] == {"number": 1, "version": 2, "step": 1}
    assert heldout["step"] is None
    assert {line["evaluation"] for line in trained} == {None}


async def test_trimmed_payloads_are_counted(
    tmp_path: Path, chat: ChatFormat, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trimmed = healthy()["store00"]
    trimmed.trimmed_bytes = 100
    run = await write_run(tmp_path, play(chat), bundle, store00=trimmed)
    assert keys(export(run)) == [(0, 1), (2, 0), (2, 1)]
    assert "1 trajectories left out: retention trimmed" in capsys.readouterr().err


async def test_what_is_no_trajectory_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = await write(tmp_path, list(healthy().values()))
    assert export(run) == []
    assert "BAD_PAYLOAD" in capsys.readouterr().err


async def test_a_broken_log_is_said_to_be(
    tmp_path: Path, chat: ChatFormat, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = log_pb2.TrajectoryStored(
        task_key=key(0, 0), origin=log_pb2.RecordOrigin(actor_id="c", incarnation=9)
    )
    run = await write_run(tmp_path, play(chat), bundle, doubled=LogEntry(trajectory_stored=stored))
    assert keys(export(run)).count((0, 0)) == 1
    assert "audit the run" in capsys.readouterr().err


async def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = await write(tmp_path, list(healthy().values()))
    with pytest.raises(ConfigError, match="--out = .*No such file"):
        run_export([str(run), "--out", str(tmp_path / "none" / "x")])


# ATIF.


async def atif(tmp_path: Path, trajectory: Trajectory, bundle: Path) -> Line:
    return export(await write_run(tmp_path, trajectory, bundle), "--format", "atif")[0]


async def test_atif_steps_are_the_conversation(
    tmp_path: Path, chat: ChatFormat, bundle: Path
) -> None:
    steps = (await atif(tmp_path, play(chat), bundle))["steps"]
    assert [step["step_id"] for step in steps] == list(range(1, 8))
    assert [step["source"] for step in steps] == [
        *("system", "user", "agent", "agent", "agent", "user", "agent")
    ]
    system, user, calls, malformed, done, said, last = steps
    assert system["message"] == "Be brief.\n\nadd(a, b)"
    assert user["message"] == "What is 1+2 and 3+4? < |im_end|> is text."
    assert (calls["message"], calls["reasoning_content"]) == ("I will add.", "Two sums.")
    assert [call["arguments"] for call in calls["tool_calls"]] == [
        {"a": 1, "b": 2},
        {"a": 3, "b": 4},
    ]
    ids = [call["tool_call_id"] for call in calls["tool_calls"]]
    assert calls["observation"]["results"] == [
        {"source_call_id": ids[0], "content": "3"},
        {"source_call_id": ids[1], "content": "7"},
    ]
    assert malformed["message"] == "<tool_call>\n{"
    assert "without </tool_call>" in malformed["extra"]["malformed_call"]
    assert malformed["observation"]["results"] == [{"content": "Malformed call."}]
    assert (done["message"], said["message"], last["message"]) == ("Done?", "Say it.", "3 and 7")


async def test_atif_has_the_sampled_tokens(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    trajectory = play(chat)
    line = await atif(tmp_path, trajectory, bundle)
    (segment,) = trajectory.segments
    agents = [step for step in line["steps"] if step["source"] == "agent"]
    sampled = [token for step in agents for token in step["metrics"]["completion_token_ids"]]
    assert sampled == segment.token_ids[segment.loss_mask].tolist()
    for step in agents:
        metrics = step["metrics"]
        prompt, completion = metrics["prompt_token_ids"], metrics["completion_token_ids"]
        assert segment.token_ids[: len(prompt) + len(completion)].tolist() == prompt + completion
        assert len(metrics["logprobs"]) == len(completion) == metrics["completion_tokens"]
        spans = metrics["extra"]["version_spans"]
        assert (spans[0]["start"], spans[-1]["end"]) == (0, len(completion))
        assert spans[0]["end"] == spans[1]["start"]
    assert line["final_metrics"]["total_completion_tokens"] == len(sampled)
    assert line["extra"]["task"]["id"] == "sum-7"


def rewriting(bundle: Path, folder: Path) -> ChatFormat:
    """A chat format whose template strips thoughts from history, as Qwen3's own does."""
    shutil.copytree(bundle, folder)
    file = folder / "chat_template.jinja"
    text = file.read_text()
    kept, stripped = '(message.content or "")', "(message.content or \"\").split('</think>')[-1]"
    assert kept in text
    file.write_text(text.replace(kept, stripped))
    return ChatFormat.load(folder, "signatures")


async def test_rewritten_history_is_told_once(tmp_path: Path, bundle: Path) -> None:
    trajectory = play(rewriting(bundle, tmp_path / "rewriting"))
    assert len(trajectory.segments) == 2
    line = await atif(tmp_path / "run", trajectory, bundle)
    steps = line["steps"]
    assert [step["source"] for step in steps] == [
        *("system", "user", "agent", "agent", "agent", "user", "agent")
    ]
    assert [r["content"] for r in steps[2]["observation"]["results"]] == ["3", "7"]
    second = trajectory.segments[1]
    prompt = steps[3]["metrics"]["prompt_token_ids"]
    assert second.token_ids[: len(prompt)].tolist() == prompt
    assert len(second.token_ids) > len(prompt)


async def test_an_episode_without_a_turn_has_a_step(
    tmp_path: Path, chat: ChatFormat, bundle: Path
) -> None:
    (step,) = (await atif(tmp_path, play(chat, []), bundle))["steps"]
    assert step == {"step_id": 1, "source": "system", "message": "no turn"}


def test_replies_of_empty_turns_are_empty(chat: ChatFormat) -> None:
    trajectory = play(chat)
    empty = Turn(**{**vars(trajectory.turns[-1]), "start": trajectory.turns[-1].end})
    replies = list(replies_of(Trajectory(**{**vars(trajectory), "turns": (empty,)})))
    assert len(replies[0].token_ids) == len(replies[0].version_spans) == 0


def test_messages_of_another_template_are_one() -> None:
    assert read_messages("### Question: 1+2?\n") == [Message("user", "### Question: 1+2?")]
    assert read_messages("\n") == []


STEP_FIELDS = {
    *("step_id", "timestamp", "source", "model_name", "reasoning_effort", "message"),
    *("reasoning_content", "tool_calls", "observation", "metrics", "is_copied_context"),
    *("llm_call_count", "extra"),
}
METRICS_FIELDS = {
    *("prompt_tokens", "completion_tokens", "cached_tokens", "cost_usd", "prompt_token_ids"),
    *("completion_token_ids", "logprobs", "extra"),
}
AGENT_ONLY = {"model_name", "reasoning_effort", "reasoning_content", "tool_calls", "metrics"}


async def test_atif_has_the_fields_of_the_format(
    tmp_path: Path, chat: ChatFormat, bundle: Path
) -> None:
    """The rules of Harbor's models, which forbid all other fields, in short."""
    line = await atif(tmp_path, play(chat), bundle)
    assert line["schema_version"] == "ATIF-v1.8"
    assert set(line) == {
        *("schema_version", "session_id", "trajectory_id", "agent", "steps"),
        *("final_metrics", "extra"),
    }
    assert set(line["agent"]) <= {"name", "version", "model_name", "tool_definitions", "extra"}
    assert set(line["final_metrics"]) <= {
        *("total_prompt_tokens", "total_completion_tokens", "total_cached_tokens"),
        *("total_cost_usd", "total_steps", "extra"),
    }
    for number, step in enumerate(line["steps"], start=1):
        assert step["step_id"] == number
        assert set(step) <= STEP_FIELDS
        assert isinstance(step["message"], str)
        assert step["source"] in ("system", "user", "agent")
        if step["source"] != "agent":
            assert not set(step) & AGENT_ONLY
        assert set(step.get("metrics", {})) <= METRICS_FIELDS
        calls = {call["tool_call_id"] for call in step.get("tool_calls", [])}
        for result in step.get("observation", {"results": []})["results"]:
            assert set(result) <= {"source_call_id", "content"}
            assert result.get("source_call_id") in {*calls, None}


async def test_harbor_takes_it(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    """Harbor's own models, where they are installed; it needs Python 3.12."""
    try:
        from harbor.models.trajectories import Trajectory as HarborTrajectory
    except ImportError:
        warnings.warn("Harbor is not installed: its models did not check the ATIF", stacklevel=1)
        pytest.skip("pip install harbor")
    rewritten = play(rewriting(bundle, tmp_path / "rewriting"))
    for name, trajectory in {"a": play(chat), "b": rewritten, "c": play(chat, [])}.items():
        run = await write_run(tmp_path / name, trajectory, bundle)
        for line in export(run, "--format", "atif", "--split", "all"):
            assert HarborTrajectory.model_validate(line).to_json_dict() == line
