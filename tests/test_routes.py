"""Routes on their way: from the engine into records that the intake takes, each with its token."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.scripted import ScriptedEngine, made_up_routes
from intake_rig import make_config, make_record, running, trajectory
from recording_helpers import call, client_of, recordings
from test_actor import engine, make_lease, play
from understudy.chat import ChatFormat
from understudy.client import BadReplyError, InferenceClient
from understudy.config import InferenceConfig, ScriptedConfig
from understudy.errors import ConfigError
from understudy.routes import Mixture, RouteArray, decode_routes, encode_routes, read_mixture
from understudy.rpc import error_reason
from understudy.trajectory import Segment
from understudy.v1 import common_pb2, task_pb2

MIXTURE = Mixture(num_layers=3, num_experts=7, top_k=2)
SAMPLING = common_pb2.SamplingParameters(temperature=1.0, max_new_tokens=20)
PROMPT = np.array([5, 6, 7, 8, 9], np.int32)


@pytest.fixture(scope="module")
def mixture(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as that of a mixture of experts."""
    folder = shutil.copytree(bundle, tmp_path_factory.mktemp("mixture") / "bundle")
    described = {"num_hidden_layers": 3, "num_experts": 7, "num_experts_per_tok": 2}
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | described))
    return folder


def assert_of_its_tokens(segment: Segment) -> None:
    """Each row is the token's own, and the last token has none."""
    assert segment.routes is not None
    np.testing.assert_array_equal(segment.routes, made_up_routes(segment.token_ids[:-1], MIXTURE))


# --- The codec ---


@given(
    rows=st.integers(0, 5),
    layers=st.integers(1, 4),
    top_k=st.integers(1, 3),
    num_experts=st.sampled_from([2, 256, 257, 65_536]),
)
def test_routes_come_back_as_they_were(
    rows: int, layers: int, top_k: int, num_experts: int
) -> None:
    mixture = Mixture(num_layers=layers, num_experts=num_experts, top_k=top_k)
    ids = np.random.default_rng(rows).integers(0, 60_000, rows, np.int32)
    routes = made_up_routes(ids, mixture)
    found = decode_routes(encode_routes(routes), rows)
    np.testing.assert_array_equal(found, routes)
    assert found.dtype == routes.dtype
    assert found.shape == (rows, layers, top_k)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"expert_bytes": 0}, "expert_bytes 0; known are"),
        ({"expert_bytes": 4}, "expert_bytes 4; known are"),
        ({"num_layers": 0}, "num_layers 0 and top_k 2; each is 1 to 1024"),
        ({"top_k": 2**32 - 1}, "each is 1 to 1024"),
        ({"experts": b"x" * 23}, "23 bytes of experts; 4 tokens take 24"),
        ({"experts": b""}, "0 bytes of experts; 4 tokens take 24"),
    ],
    ids=["no width", "wide", "no layer", "many a token", "short", "empty"],
)
def test_messages_of_other_tokens_are_refused(fields: dict[str, Any], says: str) -> None:
    sound = {"experts": b"x" * 24, "expert_bytes": 1, "num_layers": 3, "top_k": 2}
    with pytest.raises(ValueError, match=says):
        decode_routes(common_pb2.Routes(**(sound | fields)), 4)


# --- The engine ---


async def test_routes_are_of_the_tokens_from_the_asked_place_on(mixture: Path) -> None:
    async with engine(mixture, ["ab"], router_replay=True) as address:
        async with InferenceClient.connect(address) as client:
            for first in (0, 3, 5):
                reply = await client.generate(PROMPT, SAMPLING, routes_from=first)
                computed = np.concatenate((PROMPT, reply.token_ids))[first:-1]
                np.testing.assert_array_equal(reply.routes, made_up_routes(computed, MIXTURE))
            assert (await client.generate(PROMPT, SAMPLING)).routes is None


@pytest.mark.parametrize(
    ("router_replay", "routes_from", "says"),
    [(True, 6, "routes_from = 6; the prompt has 5 tokens"), (False, 0, "records no routes")],
    ids=["behind the prompt", "none are recorded"],
)
async def test_routes_that_there_are_not_are_refused(
    router_replay: bool, routes_from: int, says: str, mixture: Path
) -> None:
    async with engine(mixture, ["ab"], router_replay=router_replay) as address:
        async with InferenceClient.connect(address) as client:
            with pytest.raises(grpc.aio.AioRpcError, match=says) as caught:
                await client.generate(PROMPT, SAMPLING, routes_from=routes_from)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error_reason(caught.value) == "BAD_PROMPT"


async def test_a_replica_that_leaves_them_out_is_named(
    mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inference.scripted.made_up_routes", lambda *_: None)
    async with engine(mixture, ["ab"], router_replay=True) as address:
        async with InferenceClient.connect(address) as client:
            with pytest.raises(BadReplyError, match=f"{address}: routes: expert_bytes 0"):
                await client.generate(PROMPT, SAMPLING, routes_from=0)


async def test_a_model_without_experts_has_none(bundle: Path) -> None:
    config = InferenceConfig(scripted=ScriptedConfig(replies=("a",)))
    with pytest.raises(ConfigError, match="router_replay = true, but .* has no num_experts"):
        await ScriptedEngine(config, router_replay=True).start(bundle)


def test_experts_are_found_under_both_names(tmp_path: Path) -> None:
    for name in ("num_experts", "num_local_experts"):
        settings = {"num_hidden_layers": 3, name: 7, "num_experts_per_tok": 2}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert read_mixture(tmp_path) == MIXTURE


# --- The actor ---


async def test_every_token_of_an_episode_has_its_own(chat: ChatFormat, mixture: Path) -> None:
    replies = [call("echo", '{"text": "a"}'), call("echo", '{"text": "b"}'), "7"]
    played = await play(chat, mixture, replies, make_lease("echo", 7), router_replay=True)
    (segment,) = played.segments
    assert len(played.turns) == 3
    assert_of_its_tokens(segment)


async def test_harnesses_forks_and_additions_have_theirs(chat: ChatFormat, mixture: Path) -> None:
    user = {"role": "user", "content": "hi"}
    async with engine(mixture, ["one", "two", "three"], router_replay=True) as inference:
        async with recordings(chat, mixture, inference, router_replay=True) as served:
            with served.session(make_lease("echo", 7, max_turns=20)) as session:
                client: Any = client_of(session.url)

                async def ask(*messages: dict[str, str]) -> dict[str, str]:
                    completion = await client.chat.completions.create(
                        model="any", messages=list(messages)
                    )
                    return {"role": "assistant", "content": completion.choices[0].message.content}

                first = await ask(user)
                await ask(user, first, {"role": "user", "content": "go on"})
                await ask(user, first, {"role": "user", "content": "another way"})
                extended, forked = session.recorder.segments()
    assert extended.loss_mask.sum() > forked.loss_mask.sum()
    for segment in (extended, forked):
        assert_of_its_tokens(segment)


# --- The intake ---


def of_all_tokens(segment: Segment) -> RouteArray:
    return made_up_routes(segment.token_ids[:-1], MIXTURE)


@pytest.mark.parametrize(
    ("routes", "says"),
    [
        (of_all_tokens, ""),
        (lambda segment: None, "a segment has no routes; set model.router_replay = true"),
        (lambda s: of_all_tokens(s)[1:], "bytes of experts; 11 tokens take"),
        (lambda s: of_all_tokens(s)[:, 1:], "(2, 2) layers and experts a token; there are (3, 2)"),
        (lambda s: of_all_tokens(s) + 1, "expert 7; there are 7"),
    ],
    ids=["sound", "missing", "short", "of another model", "unknown expert"],
)
async def test_the_intake_takes_what_the_trainer_can(
    routes: Callable[[Segment], RouteArray | None], says: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    described = {"num_hidden_layers": 3, "num_experts": 7, "num_experts_per_tok": 2}
    (config.model.path / "config.json").write_text(json.dumps(described))
    config = replace_model(config)
    async with running(config) as rig:
        lease, *_ = await rig.lease(1)
        played = with_routes(lease, routes)
        nacks = await rig.push(make_record(lease, played))
    if says:
        (nack,) = nacks
        assert nack.reason == "BAD_PAYLOAD"
        assert says in nack.detail
    else:
        assert not nacks


def replace_model(config: Any) -> Any:
    """The same run with router replay."""
    return config.model_copy(
        update={"model": config.model.model_copy(update={"router_replay": True})}
    )


def with_routes(lease: task_pb2.Lease, routes: Callable[[Segment], RouteArray | None]) -> Any:
    """An episode whose one segment has these routes."""
    played = trajectory(lease)
    (segment,) = played.segments
    return replace(played, segments=(replace(segment, routes=routes(segment)),))
