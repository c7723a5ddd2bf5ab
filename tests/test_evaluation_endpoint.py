"""OpenAI-compatible endpoints: what is sent, what is refused, what is tried again."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from actor.evaluation.endpoint import Endpoint as Address
from actor.evaluation.endpoint import EndpointPolicy, EndpointSpeaker, check_url, read_key
from actor.policy import CutShortError, InferenceFailedError
from endpoint_server import Answer, Endpoint, Request, endpoint, refuses, says
from test_actor import make_lease
from understudy.chat import Call
from understudy.client import Opening
from understudy.config import NetworkConfig
from understudy.errors import ConfigError, PeerUnreachableError

TOOL = {"name": "echo", "description": "Says it back.", "parameters": {"type": "object"}}
QUESTION = [{"role": "user", "content": "Say 7."}]
OPENING = Opening(task_id="t", level=1, messages=QUESTION, tools=[TOOL])


def policy_of(server: Endpoint, key: str | None = None, timeout: float = 20.0) -> EndpointPolicy:
    return EndpointPolicy(Address(url=server.url, model="m", key=key), timeout)


def speaker_of(policy: EndpointPolicy, **lease: Any) -> EndpointSpeaker:
    return policy.begin(make_lease("echo", 7, **lease), OPENING)


def in_turn(*answers: Answer) -> Any:
    """A model that gives one answer after another."""
    left = list(answers)
    return lambda request: left.pop(0)


async def test_calls_and_their_answers_are_messages_as_the_interface_has_them() -> None:
    calls = (("echo", '{"text": "a"}'), ("echo", '{"text": "b"}'))
    with endpoint(in_turn(says(None, *calls), says("<think>well</think> 7"))) as server:
        speaker = speaker_of(policy_of(server))
        said = await speaker.reply(QUESTION)
        assert said.reply.calls == (
            Call(name="echo", arguments={"text": "a"}),
            Call(name="echo", arguments={"text": "b"}),
        )
        observations = [{"role": "tool", "content": text} for text in ("a", "b")]
        answer = await speaker.reply(observations)
    assert (answer.reply.text, answer.reply.calls) == ("7", ())
    first, second = server.requests
    assert first["tools"] == [{"type": "function", "function": TOOL}]
    assert (first["temperature"], first["max_tokens"], first["model"]) == (1.0, 100, "m")
    roles = [(m["role"], m.get("tool_call_id"), m["content"]) for m in second["messages"]]
    assert roles == [
        ("user", None, "Say 7."),
        ("assistant", None, ""),
        ("tool", "call-0", "a"),
        ("tool", "call-1", "b"),
    ]
    assert (answer.start, answer.end, speaker.num_tokens) == (5, 10, 55)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [("{oops", "the arguments are not valid JSON"), ("[1]", "the arguments are no object")],
)
async def test_a_malformed_call_is_told_and_every_call_is_answered(
    arguments: str, said: str
) -> None:
    replies = in_turn(says(None, ("echo", arguments), ("echo", "{}")), says("7"))
    with endpoint(replies) as server:
        speaker = speaker_of(policy_of(server))
        first = await speaker.reply(QUESTION)
        assert (first.reply.malformed, first.reply.calls) == (said, ())
        await speaker.reply([{"role": "tool", "content": f"Malformed call: {said}."}])
    _, assistant, *answers = server.requests[1]["messages"]
    assert [json.loads(c["function"]["arguments"]) for c in assistant["tool_calls"]] == [{}, {}]
    assert [a["content"] for a in answers] == [f"Malformed call: {said}.", "Not executed."]


async def test_what_says_later_is_asked_again_after_the_time_it_names() -> None:
    busy = refuses(429, "slow down", Retry_After="0.01")
    broken = refuses(503, "down", Retry_After="0.01")
    with endpoint(in_turn(busy, broken, says("7"))) as server:
        said = await speaker_of(policy_of(server)).reply(QUESTION)
    assert said.reply.text == "7"
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "error", "said"),
    [
        (refuses(401, "bad key s3cret"), InferenceFailedError, "HTTP 401: .*bad key \\*\\*\\*"),
        (refuses(400, "nonsense"), InferenceFailedError, "HTTP 400"),
        (refuses(400, "maximum context length is 9"), CutShortError, "maximum context length"),
        (Answer("not json"), InferenceFailedError, "is no JSON"),
        (Answer({"choices": []}), InferenceFailedError, "no chat completion"),
    ],
)
async def test_what_no_retry_mends_ends_the_turn(
    answer: Answer, error: type[Exception], said: str
) -> None:
    with endpoint(lambda request: answer) as server:
        with pytest.raises(error, match=said):
            await speaker_of(policy_of(server, key="s3cret")).reply(QUESTION)
    assert len(server.requests) == 1


async def test_a_reply_that_takes_too_long_is_given_up() -> None:
    busy = refuses(503, "down", Retry_After="30")
    with endpoint(lambda request: busy) as server:
        with pytest.raises(InferenceFailedError, match="no reply within 0.3 s"):
            await speaker_of(policy_of(server, timeout=0.3)).reply(QUESTION)


async def test_limits_are_those_of_the_lease() -> None:
    with endpoint(in_turn(says("long", finish_reason="length", tokens=(150, 49)))) as server:
        speaker = speaker_of(policy_of(server), max_tokens=199)
        assert (await speaker.reply(QUESTION)).cut_off
        with pytest.raises(CutShortError, match="max_tokens = 199"):
            await speaker.reply([{"role": "user", "content": "Go on."}])


async def test_an_endpoint_that_knows_the_limit_by_its_newer_name_gets_that() -> None:
    def strict(request: Request) -> Answer:
        if "max_tokens" in request:
            return refuses(400, "'max_tokens' is not supported, use 'max_completion_tokens'.")
        return says("7")

    with endpoint(strict) as server:
        policy = policy_of(server)
        await policy.wait_ready(64, 10)
        await speaker_of(policy).reply(QUESTION)
    assert [request.get("max_completion_tokens") for request in server.requests] == [None, 64, 100]


@pytest.mark.parametrize(
    ("status", "said"), [(401, "HTTP 401: .*no entry"), (404, "HTTP 404"), (400, "HTTP 400")]
)
async def test_an_endpoint_that_refuses_is_named_before_anything_is_played(
    status: int, said: str
) -> None:
    with endpoint(lambda request: refuses(status, "no entry")) as server:
        with pytest.raises(ConfigError, match=f"--endpoint {server.url} --model m: {said}"):
            await policy_of(server).wait_ready(64, 10)


async def test_an_absent_endpoint_is_named() -> None:
    policy = EndpointPolicy(Address(url="http://127.0.0.1:9/v1", model="m"), 5.0)
    with pytest.raises(PeerUnreachableError, match="did not answer within 0.5 s"):
        await policy.wait_ready(64, 0.5)


async def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    file.chmod(0o600)
    key = read_key("NO_SUCH_VARIABLE", file)
    with endpoint(lambda request: says("7")) as server:
        await policy_of(server, key=key).wait_ready(64, 10)
        await policy_of(server).wait_ready(64, 10)
    assert server.keys == ["Bearer s3cret", "Bearer none"]
    assert "s3cret" not in repr(Address(url=server.url, model="m", key=key))


def test_the_key_comes_from_a_file_of_one_s_own_or_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "from the environment")
    assert read_key("SOME_KEY", None) == "from the environment"
    assert read_key("NO_SUCH_VARIABLE", None) is None
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match="No such file"):
        read_key("SOME_KEY", file)
    file.write_text("from the file\n")
    os.chmod(file, 0o640)
    with pytest.raises(ConfigError, match="mode 0640: others may read it; chmod 600"):
        read_key("SOME_KEY", file)
    os.chmod(file, 0o600)
    assert read_key("SOME_KEY", file) == "from the file"


@pytest.mark.parametrize(
    ("url", "has_key", "insecure", "said"),
    [
        ("https://api.example.com/v1", True, False, ""),
        ("http://127.0.0.1:8000/v1", True, False, ""),
        ("http://[::1]:8000/v1", True, False, ""),
        ("http://api.example.com/v1", False, False, ""),
        ("http://api.example.com/v1", True, True, ""),
        ("http://api.example.com/v1", True, False, "would get the key in plaintext; take https"),
        ("api.example.com/v1", False, False, "give a URL such as"),
        ("ftp://api.example.com", False, False, "give a URL such as"),
    ],
)
def test_a_key_goes_in_plaintext_only_where_it_was_asked_for(
    url: str, has_key: bool, insecure: bool, said: str
) -> None:
    network = NetworkConfig(insecure=insecure)
    if not said:
        check_url(url, has_key, network)
        return
    with pytest.raises(ConfigError, match=said):
        check_url(url, has_key, network)
