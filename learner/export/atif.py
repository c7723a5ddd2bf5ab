"""ATIF, the Agent Trajectory Interchange Format of Harbor, version 1.8.

One step a message or reply. What tools answered is the observation of the step that called them.
Tokens and log-probabilities of each reply are those that were sampled, so that the line can be
trained on without tokenizing anything again.

Each call of an agent's part is a trajectory of its own: that of the part that begins is the line,
the others are embedded in it, and the result of the tool call that began one refers to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from learner.export.conversation import STOP, Message, read_messages
from learner.export.plain import Line, facts, floats_of, spans_of
from learner.export.replies import Reply, replies_of
from learner.export.source import Episode
from learner.export.tokenizer import Decoders
from understudy.chat import Call, parse_reply
from understudy.trajectory import IntArray, PartCall

SCHEMA = "ATIF-v1.8"
_THOUGHT_END = "</think>"


@dataclass
class _Conversation:
    """One call of a part: what it was told, and what it said."""

    replies: list[Reply] = field(default_factory=list)
    steps: list[Line] = field(default_factory=list)


def atif_line(episode: Episode, decoders: Decoders) -> Line:
    """An episode as one ATIF trajectory."""
    conversations: dict[PartCall | None, _Conversation] = {None: _Conversation()}
    said: list[Line] = []
    for reply in replies_of(episode.trajectory):
        decode = decoders.of(reply.part) or _no_text
        conversation = conversations.setdefault(reply.caller, _Conversation())
        steps = conversation.steps
        _add_messages(steps, read_messages(decode(reply.fresh)))
        steps.append(_agent_step(reply, len(steps), decode(reply.token_ids)))
        conversation.replies.append(reply)
        said.append(steps[-1])
    whole = conversations.pop(None)
    if not whole.steps:  # a trajectory has at least one
        whole.steps.append({"source": "system", "message": episode.trajectory.detail or "no turn"})
    name = f"{episode.run_id}-{episode.ordinal}-{episode.sample_index}"
    for caller in filter(None, conversations):
        _refer(said[caller.turn], caller.tool_call, f"{name}{_suffix(caller)}")
    line = _trajectory(name, None, whole, decoders)
    line["final_metrics"]["extra"] = {"reward": episode.trajectory.reward}
    if conversations:
        line["subagent_trajectories"] = [
            _trajectory(name, caller, conversation, decoders)
            for caller, conversation in conversations.items()
        ]
    return {**line, "extra": facts(episode)}


def _trajectory(
    name: str, caller: PartCall | None, conversation: _Conversation, decoders: Decoders
) -> Line:
    replies, steps = conversation.replies, conversation.steps
    part = replies[0].part if replies else ""
    agent: Line = {
        "name": part if caller else "understudy",
        "version": version("understudy"),
        "model_name": decoders.model_of(part),
        "extra": {"part": part, "frozen": replies[0].frozen} if part else None,
    }
    return {
        "schema_version": SCHEMA,
        "session_id": name,
        "trajectory_id": f"{name}{_suffix(caller)}",
        "agent": {key: value for key, value in agent.items() if value},
        "steps": [{"step_id": number, **step} for number, step in enumerate(steps, start=1)],
        "final_metrics": {
            "total_prompt_tokens": sum(len(reply.prompt) for reply in replies),
            "total_completion_tokens": sum(len(reply.token_ids) for reply in replies),
            "total_steps": len(steps),
        },
    }


def _suffix(caller: PartCall | None) -> str:
    return f"-turn{caller.turn}-call{caller.tool_call}" if caller else ""


def _refer(step: Line, tool_call: int, trajectory_id: str) -> None:
    """Have the result of a step's call refer to the trajectory that the call began."""
    results = step.setdefault("observation", {"results": []})["results"]
    ids = [call["tool_call_id"] for call in step.get("tool_calls", [])]
    source = {"source_call_id": ids[tool_call]} if tool_call < len(ids) else {}
    found = [result for result in results if source and source.items() <= result.items()]
    if not found:  # nothing came back, as where the conversation was handed over
        results.append(source)
        found = [source]
    found[0]["subagent_trajectory_ref"] = [{"trajectory_id": trajectory_id}]


def _no_text(token_ids: IntArray) -> str:
    return ""


def _add_messages(steps: list[Line], messages: Sequence[Message]) -> None:
    """Add what the policy was told: results to the step that they answer, all else as steps."""
    results = [message.content for message in messages if message.role == "tool"]
    answered = bool(results and steps and steps[-1]["source"] == "agent")
    if answered:
        steps[-1]["observation"] = {"results": _results(results, steps[-1].get("tool_calls", []))}
    for message in messages:
        if message.role != "tool" or not answered:
            source = "system" if message.role == "system" else "user"
            steps.append({"source": source, "message": message.content})


def _results(results: Sequence[str], calls: Sequence[Line]) -> list[Line]:
    """Results name their calls if there is one for each."""
    if len(results) != len(calls):
        return [{"content": content} for content in results]
    return [
        {"source_call_id": call["tool_call_id"], "content": content}
        for call, content in zip(calls, results, strict=True)
    ]


def _agent_step(reply: Reply, num_steps: int, text: str) -> Line:
    text = text.removesuffix(STOP)
    thoughts, ended, _ = text.rpartition(_THOUGHT_END)
    read = parse_reply(text)
    step: Line = {"source": "agent", "message": text if read.malformed else read.text}
    if ended:
        step["reasoning_content"] = thoughts.replace("<think>", "", 1).strip()
    if read.calls:
        step["tool_calls"] = [
            _call(call, f"call-{num_steps + 1}-{number}") for number, call in enumerate(read.calls)
        ]
    return {
        **step,
        "metrics": _metrics(reply),
        "llm_call_count": 1,
        "extra": _extra(reply, read.malformed),
    }


def _call(call: Call, call_id: str) -> Line:
    return {"tool_call_id": call_id, "function_name": call.name, "arguments": call.arguments}


def _metrics(reply: Reply) -> Line:
    return {
        "prompt_tokens": len(reply.prompt),
        "completion_tokens": len(reply.token_ids),
        "prompt_token_ids": reply.prompt.tolist(),
        "completion_token_ids": reply.token_ids.tolist(),
        "logprobs": floats_of(reply.logprobs),
        "extra": {"version_spans": spans_of(reply.version_spans)},
    }


def _extra(reply: Reply, malformed: str) -> dict[str, Any]:
    turn = reply.turn
    return {
        "reward": turn.reward,
        "generate_seconds": turn.generate_seconds,
        "step_seconds": turn.step_seconds,
        **({"part": reply.part} if reply.part else {}),
        **({"frozen": True} if reply.frozen else {}),
        **({"malformed_call": malformed} if malformed else {}),
    }
