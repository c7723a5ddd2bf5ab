"""Which part said what: in exports, in a run's samples, in reports."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from actor.agents.part import GO_ON
from launch.report.chats import chats_of
from launch.report.files import read_run
from learner.intake.journal import Journal
from understudy.chat import ChatFormat
from understudy.report.chats import Bubble, bubbles_of_messages, bubbles_of_pieces
from understudy.trajectory import PartCall, Trajectory

from test_agents import ASK, ECHO, HELPER, call, play  # isort: skip
from test_agents_faults import LONG, short_lease  # isort: skip
from test_export import export, write_run  # isort: skip

AGENTS = {
    "planner": {"system": "You plan.", "sub_agents": ["helper"], "hand_off": ["closer"]},
    "helper": {**HELPER, "trainable": False, "policy": "other"},
    "closer": {"system": "You close.", "context": "summarise"},
}
HAND = call("hand_off_to_closer", request="Say it.")


async def episode(chat: ChatFormat, bundle: Path) -> Trajectory:
    """The planner calls its helper between two tools, and again, and hands over."""
    replies = [ECHO + ASK + call("nope") + ASK, HAND, LONG, "So many z.", "7"]
    trajectory = await play(
        chat, bundle, replies, AGENTS, short_lease(), others=[ECHO, "One.", "Two."]
    )
    assert trajectory.reward == 1.0
    return trajectory


async def test_a_segment_says_which_call_began_its_part(chat: ChatFormat, bundle: Path) -> None:
    trajectory = await episode(chat, bundle)
    callers = [(segment.part, segment.caller) for segment in trajectory.segments]
    assert callers == [
        ("planner", None),
        ("helper", PartCall(turn=0, tool_call=1)),
        ("helper", PartCall(turn=0, tool_call=3)),
        *(("closer", PartCall(turn=4, tool_call=0)),) * 2,  # before and after its summary
    ]


async def test_atif_has_a_trajectory_a_part(tmp_path: Path, chat: ChatFormat, bundle: Path) -> None:
    run = await write_run(tmp_path, await episode(chat, bundle), bundle)
    config = {
        "model": {"path": "base"},
        "agents": {"helper": {"policy": "other"}},
        "policies": {"other": {"model": str(bundle)}},
    }
    (run / "config.json").write_text(json.dumps(config))
    line = export(run, "--format", "atif")[0]
    planner = line["steps"]
    assert [step["source"] for step in planner] == ["system", "user", "agent", "agent"]
    name, children = line["trajectory_id"], line["subagent_trajectories"]
    results = planner[2]["observation"]["results"]
    assert [result["content"][:5] for result in results] == ["hi", "One.", "Error", "Two."]
    refs = [result.get("subagent_trajectory_ref") for result in results]
    assert refs[0::2] == [None, None]
    ids = [child["trajectory_id"] for child in children]
    assert [ref[0]["trajectory_id"] for ref in refs[1::2]] == ids[:2]
    assert ids == [f"{name}-turn0-call1", f"{name}-turn0-call3", f"{name}-turn4-call0"]
    (handed,) = planner[3]["observation"]["results"]
    assert handed["subagent_trajectory_ref"] == [{"trajectory_id": ids[2]}]
    assert line["agent"]["extra"] == {"part": "planner", "frozen": False}
    agents = [(child["agent"]["name"], child["agent"]["model_name"]) for child in children]
    assert agents == [("helper", str(bundle)), ("helper", str(bundle)), ("closer", "base")]
    first = children[0]["steps"]
    assert [step["message"] for step in first if step["source"] == "agent"] == ["", "One."]
    assert first[2]["observation"]["results"][0]["content"] == "hi"
    assert [step["step_id"] for step in first] == [1, 2, 3, 4]
    assert {child["session_id"] for child in children} == {line["session_id"]}
    closer = [step["message"] for step in children[2]["steps"] if step["source"] == "agent"]
    assert closer == ["", "So many z.", "7"]
    harbor(line)


def harbor(line: dict[str, Any]) -> None:
    """Harbor's own models, where they are installed; it needs Python 3.12."""
    try:
        from harbor.models.trajectories import Trajectory as HarborTrajectory
    except ImportError:
        warnings.warn("Harbor is not installed: its models did not check the ATIF", stacklevel=1)
        return
    assert HarborTrajectory.model_validate(line).to_json_dict() == line


async def test_parts_of_another_model_are_read_with_its_tokenizer_or_not_at_all(
    tmp_path: Path, chat: ChatFormat, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = await write_run(tmp_path, await episode(chat, bundle), bundle)
    config: dict[str, Any] = {
        "agents": {"helper": {"policy": "other"}},
        "policies": {"other": {"model": "elsewhere"}},
    }
    (run / "config.json").write_text(json.dumps(config))
    turns = export(run)[0]["turns"]
    assert "part helper: no tokenizer.json in elsewhere" in capsys.readouterr().err
    parts = ["planner", *["helper"] * 3, "planner", *["closer"] * 3]
    assert [turn["part"] for turn in turns] == parts
    assert ["reply" in turn for turn in turns] == [part != "helper" for part in parts]
    said = export(run, "--format", "atif")[0]["subagent_trajectories"][0]["steps"]
    assert [step["message"] for step in said] == ["", ""]


async def test_a_run_s_report_has_all_parts_in_order_of_time(
    tmp_path: Path, chat: ChatFormat, bundle: Path
) -> None:
    journal = Journal(tmp_path)
    journal.samples(0, 1, [await episode(chat, bundle)])
    journal.close()
    (tmp_path / "config.json").write_text(json.dumps({"model": {"path": str(bundle)}}))
    [[shown]] = chats_of(read_run(tmp_path).samples).values()
    assert shown.parts == ["planner", "helper", "closer"]
    said = [
        (bubble.part, bubble.text)
        for bubble in shown.bubbles
        if bubble.kind in ("assistant", "answer")
    ]
    assert said == [
        *(("helper", "One."), ("helper", "Two.")),
        *(("closer", "So many z."), ("closer", "7")),
    ]
    assert shown.bubbles[-1].kind == "answer"
    goes_on = [bubble for bubble in shown.bubbles if GO_ON.strip() in bubble.text]
    assert [bubble.part for bubble in goes_on] == ["closer"]
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model": {"path": str(bundle)},
                "agents": {"helper": {"policy": "other"}},
                "policies": {"other": {"model": "elsewhere"}},
            }
        )
    )
    [[shown]] = chats_of(read_run(tmp_path).samples).values()
    assert sum("tokens of another model" in bubble.text for bubble in shown.bubbles) == 3


def test_a_prompt_that_repeats_replies_is_shown_from_the_last_one_on() -> None:
    text = (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>"
    )
    assert bubbles_of_pieces([("one", text)]) == (
        Bubble(kind="user", text="More?", part="one"),
        Bubble(kind="answer", text="No", part="one"),
    )


def test_a_message_s_name_is_that_of_the_part() -> None:
    messages = [{"role": "user", "content": "Q", "name": "one"}, {"role": "tool", "content": "r"}]
    assert [bubble.part for bubble in bubbles_of_messages(messages)] == ["one", ""]
