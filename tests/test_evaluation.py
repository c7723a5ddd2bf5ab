"""Evaluations over real servers: attempts, resumption, failures, files."""

import asyncio
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from actor.evaluation import play as play_module
from actor.evaluation.evaluate import evaluate
from actor.evaluation.plan import attempt_seed
from endpoint_server import Answer, ExpertModel, Request, endpoint, says
from envserver.environment import (
    Action,
    Environment,
    Step,
    SuiteDescription,
)
from envserver.suites.practice import PracticeSuite
from evaluation_helpers import (
    BrokenSuite,
    Tagged,
    TaggedSuite,
    config_of,
    endpoint_plan,
    lines_of,
    plan_of,
    says_the_number,
    serve_suites,
)
from learner.intake.server import IntakeServer
from test_actor import engine, make_config
from understudy.errors import ConfigError, PeerUnreachableError
from understudy.evaluation import episode_seed


async def test_the_run_s_own_policy_is_measured(tmp_path: Path, bundle: Path) -> None:
    out = tmp_path / "eval.json"
    async with serve_suites(TaggedSuite()) as environment, engine(bundle, ["1"], 7) as inference:
        server = await IntakeServer.open(make_config(tmp_path, bundle))
        learner = f"127.0.0.1:{await server.start()}"
        try:
            network = {"learner": learner, "inference": [inference], "envservers": [environment]}
            result = await evaluate(config_of(tmp_path, bundle, **network), plan_of(), out)
        finally:
            await server.stop(grace=0.2)
    assert result["policy"] == "version 7 of run run"
    assert result["versions"] == [7]
    assert result["accuracy"]["all"]["accuracy"] == pytest.approx(1 / 3)  # task 1 says 1
    assert result["accuracy"]["level2"]["accuracy"] == 1.0
    assert result["accuracy"]["tag:even"]["n"] == 4
    assert result["accuracy"]["tag:rare"]["pass_hat_k"][1]["value"] == 1.0
    assert result["sampled_tokens_mean"] == 2  # the digit, and the end of the turn
    assert json.loads(out.read_text()) == result
    settings, *attempts = lines_of(tmp_path / "eval.attempts.jsonl")
    assert settings["settings"]["policy"] == result["policy"]
    assert [message["role"] for message in attempts[0]["messages"]] == ["user", "assistant"]
    assert sorted((a["task"], a["attempt"]) for a in attempts) == [
        (task, index) for task in range(3) for index in range(2)
    ]


async def test_an_expert_behind_an_endpoint_solves_practice(tmp_path: Path, bundle: Path) -> None:
    plan = plan_of(suite="practice", split="test", num_tasks=9, k=2)
    with endpoint(ExpertModel(9)) as server:
        async with serve_suites(PracticeSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            out = tmp_path / "eval.json"
            result = await evaluate(config, plan, out, endpoint_plan(server.url))
    assert result["outcomes"] == {"completed": 18}
    assert result["accuracy"]["all"]["accuracy"] == 1.0
    assert set(result["accuracy"]) >= {"level1", "level2", "level3", "tag:lookup", "tag:calculate"}
    asked = server.requests[-1]
    assert asked["model"] == "scripted"
    assert {tool["function"]["name"] for tool in asked["tools"]} >= {"lookup", "search"}
    assert not (tmp_path / "eval.submission.jsonl").exists()


async def test_a_stopped_evaluation_goes_on_and_plays_nothing_twice(
    tmp_path: Path, bundle: Path
) -> None:
    out = tmp_path / "eval.json"
    with endpoint(says_the_number) as server:
        async with serve_suites(TaggedSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            plan = endpoint_plan(server.url)
            await evaluate(config, plan_of(k=1), out, plan)
            attempts = tmp_path / "eval.attempts.jsonl"
            with attempts.open("ab") as file:
                file.write(b'{"task": 0, "attempt": 1, "tor')  # of a crash
            asked = len(server.requests)
            result = await evaluate(config, plan_of(k=3), out, plan)
            assert len(server.requests) == asked + 1 + 6  # one to see whether it answers
            assert (result["num_resumed"], result["num_attempts"]) == (3, 9)
            assert len(lines_of(attempts)) == 1 + 9
            fewer = await evaluate(config, plan_of(k=2, num_tasks=2), out, plan)
            assert (fewer["num_attempts"], len(fewer["accuracy"]["all"]["pass_at_k"])) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": 0.5}, "was played with temperature = 1.0, not 0.5; give the same"),
        ({"seed": 6}, "seed = 5, not 6"),
        ({"split": "other"}, "split = 'train', not 'other'"),
    ],
)
async def test_attempts_under_other_settings_are_not_gone_on_with(
    tmp_path: Path, bundle: Path, fields: dict[str, Any], said: str
) -> None:
    class TwoSplits(TaggedSuite):
        def describe(self) -> SuiteDescription:
            splits = {"train": 100, "other": 100}
            return SuiteDescription(name="echo", splits=splits, levels=(1, 2), digest="1")

    out = tmp_path / "eval.json"
    with endpoint(says_the_number) as server:
        async with serve_suites(TwoSplits()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            await evaluate(config, plan_of(k=1), out, endpoint_plan(server.url))
            with pytest.raises(ConfigError, match=said):
                await evaluate(config, plan_of(**fields), out, endpoint_plan(server.url))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}\n", "no attempts of an evaluation; choose another --out"),
        ("nonsense\n", "no attempts of an evaluation"),
    ],
)
async def test_a_file_of_something_else_is_left_alone(
    tmp_path: Path, bundle: Path, content: str, said: str
) -> None:
    (tmp_path / "eval.attempts.jsonl").write_text(content)
    with endpoint(says_the_number) as server:
        async with serve_suites(TaggedSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            with pytest.raises(ConfigError, match=said):
                await evaluate(config, plan_of(), tmp_path / "eval.json", endpoint_plan(server.url))
    assert (tmp_path / "eval.attempts.jsonl").read_text() == content


async def test_failures_are_tried_again_then_told_apart_and_played_when_gone_on_with(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_module, "_PAUSE_SECONDS", 0.01)
    failures = {0: 1, 2: 6}  # task 0 fails once, task 2 in all three tries of both attempts
    out = tmp_path / "eval.json"
    with endpoint(says_the_number) as server:
        async with serve_suites(BrokenSuite(failures)) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            result = await evaluate(config, plan_of(), out, endpoint_plan(server.url))
            everything = result["accuracy"]["all"]
            assert result["outcomes"] == {"completed": 4, "environment_failed": 2}
            assert (result["num_failed"], result["num_retried"]) == (2, 3)
            assert "RuntimeError" in result["failures"][0]["what"]
            assert (everything["n"], everything["failed"], everything["tasks"]) == (4, 2, 2)
            assert everything["accuracy"] == 1.0
            assert everything["accuracy_if_failed"] == [pytest.approx(2 / 3), 1.0]
            assert "2 of 6 attempts were failed" in (tmp_path / "eval.html").read_text()
            answers = lines_of(tmp_path / "eval.submission.jsonl")
            assert [line["model_answer"] for line in answers] == ["0", "1", ""]
            again = await evaluate(config, plan_of(), out, endpoint_plan(server.url))
    assert again["outcomes"] == {"completed": 6}
    assert again["accuracy"]["all"]["n"] == 6
    answers = lines_of(tmp_path / "eval.submission.jsonl")
    assert [line["model_answer"] for line in answers] == ["0", "1", "2"]


async def test_when_everything_fails_the_evaluation_ends_and_keeps_what_it_has(
    tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(play_module, "FAILURES_IN_A_ROW", 5)
    with endpoint(says_the_number) as server:
        async with serve_suites(BrokenSuite(dict.fromkeys(range(10, 100), 100))) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            plan = plan_of(num_tasks=100, k=1, max_tries=1)
            with pytest.raises(PeerUnreachableError, match="5 attempts in a row failed"):
                await evaluate(config, plan, tmp_path / "eval.json", endpoint_plan(server.url))
    outcomes = {a["outcome"] for a in lines_of(tmp_path / "eval.attempts.jsonl")[1:]}
    assert outcomes >= {"environment_failed"}
    assert not (tmp_path / "eval.json").exists()


async def test_tasks_without_a_known_answer_are_submitted_and_not_scored(
    tmp_path: Path, bundle: Path
) -> None:
    with endpoint(says_the_number) as server:
        async with serve_suites(TaggedSuite(unscored=True)) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            out = tmp_path / "eval.json"
            result = await evaluate(config, plan_of(), out, endpoint_plan(server.url))
    assert (result["accuracy"], result["num_unscored"]) == ({}, 6)
    assert (
        "6 attempts are at tasks whose answer is not known" in (tmp_path / "eval.html").read_text()
    )
    first, *_ = lines_of(tmp_path / "eval.submission.jsonl")
    assert first == {
        "task_id": "00000000-0000-4000-8000-000000000000",
        "model_answer": "0",
        "reasoning_trace": "[user] Say 0.\n\n[assistant] 0",
    }


async def test_two_evaluations_do_not_write_one_file(tmp_path: Path, bundle: Path) -> None:
    out = tmp_path / "eval.json"
    with endpoint(says_the_number) as server:
        async with serve_suites(TaggedSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            plan = plan_of(num_tasks=30)
            results = await asyncio.gather(
                *(evaluate(config, plan, out, endpoint_plan(server.url)) for _ in range(2)),
                return_exceptions=True,
            )
    (error,) = [result for result in results if isinstance(result, BaseException)]
    assert "another evaluation writes it" in str(error)


async def test_the_report_has_the_curve_and_says_what_was_said(
    tmp_path: Path, bundle: Path
) -> None:
    attack = "<script>alert(1)</script>"
    out = tmp_path / "eval.json"

    def sometimes(request: Request) -> Answer:
        text = request["messages"][-1]["content"]
        return says(text[4:-1] if request.get("seed", 0) % 2 else attack)

    with endpoint(sometimes) as server:
        async with serve_suites(TaggedSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            plan = plan_of(num_tasks=6, k=4)
            await evaluate(config, plan, out, endpoint_plan(server.url))
    page = (tmp_path / "eval.html").read_text()
    for part in ("pass@4", "pass^4", "pass@k by level", "By tag", "Not passed", 'class="band c0"'):
        assert part in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    parser = HTMLParser()
    parser.feed(page)
    assert "http://" not in page.replace(server.url, "").replace("http://www.w3.org", "")


def test_the_first_attempt_has_the_seed_of_evaluations_within_a_run() -> None:
    assert attempt_seed(3, 17, 0) == episode_seed(3, 17)
    seeds = {attempt_seed(3, task, index) for task in range(100) for index in range(32)}
    assert len(seeds) == 3200


class EndlessSuite(TaggedSuite):
    """Rewards have no end; an answer earns its number."""

    def describe(self) -> SuiteDescription:
        rewards = (float("-inf"), float("inf"))
        splits = {"train": 100}
        return SuiteDescription(
            name="echo", splits=splits, levels=(1,), digest="1", reward_range=rewards
        )

    def open(self, split: str, task_ordinal: int) -> Environment:
        return Paid(task_ordinal, unscored=False)


class Paid(Tagged):
    """Pays what is said."""

    def step(self, action: Action) -> Step:
        return Step(reward=10 * float(action.text), terminated=True)


async def test_rewards_without_an_end_have_a_mean_and_pass_only_what_is_named(
    tmp_path: Path, bundle: Path
) -> None:
    out = tmp_path / "eval.json"
    with endpoint(says_the_number) as server:
        async with serve_suites(EndlessSuite()) as environment:
            config = config_of(tmp_path, bundle, envservers=[environment])
            result = await evaluate(config, plan_of(k=1), out, endpoint_plan(server.url))
            with pytest.raises(ConfigError, match="say with --passing-reward"):
                await evaluate(config, plan_of(k=2), out, endpoint_plan(server.url))
            passing = plan_of(k=2, passing_reward=10.0)
            named = await evaluate(config, passing, out, endpoint_plan(server.url))
    assert (result["reward_range"], result["accuracy"]["all"]["accuracy"]) == ([None, None], 10.0)
    assert result["accuracy"]["all"]["pass_at_k"] == []
    assert named["accuracy"]["all"]["pass_at_k"][0]["value"] == pytest.approx(2 / 3)
    assert "<b>10</b> mean reward" in (tmp_path / "eval.html").read_text()
