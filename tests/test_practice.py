"""The practice suite: its tasks, splits, episodes and demonstrations."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from envserver.environment import Action, ToolCall
from envserver.suites.practice import PracticeEnvironment, PracticeSuite, names
from envserver.suites.practice.demonstrate import ORDINALS, demonstrations
from envserver.suites.practice.suite import MAX_TOOL_TURNS
from envserver.suites.practice.tasks import (
    CALLS_BY_LEVEL,
    LEVELS,
    SPLITS,
    digest,
    level_of,
    make_task,
)
from envserver.suites.practice.world import parity_of

REPOSITORY = Path(__file__).parents[1]
PER_LEVEL = 300


def _calls(demonstration: dict) -> list[dict]:
    turns = (message.get("tool_calls", []) for message in demonstration["messages"])
    return [call for turn in turns for call in turn]


def _fingerprint(split: str, ordinal: int) -> str:
    task = make_task(split, ordinal)
    return hashlib.sha256(repr((task.question, task.world)).encode()).hexdigest()


def _search() -> Action:
    return Action(tool_calls=[ToolCall(name="search", arguments={"query": "chess"})])


def _open(split: str = "test", ordinal: int = 0) -> PracticeEnvironment:
    environment = PracticeSuite().open(split, ordinal)
    environment.reset()
    return environment


def test_an_ordinal_is_always_the_same_task():
    assert [make_task("test", n) for n in range(60)] == [make_task("test", n) for n in range(60)]


def test_another_process_makes_the_same_tasks():
    code = "from envserver.suites.practice.tasks import digest; print(digest())"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest()


def test_splits_share_no_question_in_the_same_world():
    train = {_fingerprint("train", ordinal) for ordinal in range(3_000)}
    test = {_fingerprint("test", ordinal) for ordinal in range(SPLITS["test"])}
    assert len(train) == len(test) == 3_000
    assert not train & test


@pytest.mark.parametrize(("split", "parity"), [("train", 0), ("test", 1)])
def test_splits_cannot_share_a_world(split, parity):
    assert {parity_of(make_task(split, ordinal).world) for ordinal in range(300)} == {parity}


def test_a_name_or_clue_belongs_to_one_pool_only():
    pools = (names.PEOPLE, names.COMPANIES, names.CITIES)
    pools += (names.HOBBIES, names.PRODUCTS, names.LANDMARKS, names.ITEMS)
    words = [word for pool in pools for word in pool]
    assert len(words) == len({word.lower() for word in words})


def test_what_an_entity_is_known_for_is_unique_in_its_world():
    for ordinal in range(100):
        known_for = make_task("train", ordinal).world.known_for
        assert len(set(known_for.values())) == len(known_for) == 24


@pytest.mark.parametrize("split", SPLITS)
def test_a_record_has_gaias_fields(split):
    for ordinal in range(90):
        record = make_task(split, ordinal).record()
        assert list(record) == ["task_id", "Question", "Level", "Final answer", "file_name"]
        assert record["task_id"] == f"practice-{split}-{record['Level']}-{ordinal}"
        assert record["file_name"] == "" or record["file_name"] in record["Question"]


def test_a_file_is_attached_exactly_when_the_question_names_one():
    tasks = [make_task("train", ordinal) for ordinal in range(300)]
    assert all((task.attachment is not None) == (".csv" in task.question) for task in tasks)
    assert 20 < sum(task.attachment is not None for task in tasks) < 150


def test_every_level_fills_its_range_of_calls():
    for level in LEVELS:
        tasks = [make_task("test", ordinal) for ordinal in range(level - 1, 900, 3)]
        assert {task.level for task in tasks} == {level}
        fewest, most = CALLS_BY_LEVEL[level]
        assert {task.num_calls() for task in tasks} == set(range(fewest, most + 1))


def test_every_level_3_task_ends_in_a_calculation():
    for ordinal in range(2, 900, 3):
        task = make_task("test", ordinal)
        assert task.operator in ("+", "-")
        assert " plus " in task.question or " minus " in task.question
        assert int(task.answer) >= 0


def test_the_description_states_the_splits():
    description = PracticeSuite().describe()
    assert description.splits == {"train": 1_000_000, "test": 3_000}
    assert tuple(description.levels) == (1, 2, 3)
    assert description.digest == digest()


@pytest.mark.parametrize(("split", "ordinal"), [("dev", 0), ("test", -1), ("test", 3_000)])
def test_a_task_that_does_not_exist_is_a_key_error(split, ordinal):
    with pytest.raises(KeyError):
        PracticeSuite().open(split, ordinal)


def test_reset_asks_the_question_and_offers_the_tools():
    environment = PracticeSuite().open("test", 2)
    reset = environment.reset()
    assert [message.role for message in reset.messages] == ["system", "user"]
    assert reset.messages[1].content == environment.task.question
    assert (reset.task_id, reset.level) == ("practice-test-3-2", 3)
    assert [tool.name for tool in reset.tools] == ["lookup", "search", "read_csv", "calculate"]


@pytest.mark.parametrize("wrapping", ["{}", " {}\n", "FINAL ANSWER: {}", "So:\nfinal answer: {}"])
def test_the_right_answer_is_rewarded(wrapping):
    environment = _open()
    step = environment.step(Action(text=wrapping.format(environment.task.answer)))
    assert (step.reward, step.terminated, step.truncated) == (1.0, True, False)
    assert list(step.messages) == []


@pytest.mark.parametrize("text", ["", " ", "FINAL ANSWER:", "wrong", "\0", "\ud800", None, 7])
def test_any_other_answer_is_not(text):
    step = _open().step(Action(text=text))
    assert (step.reward, step.terminated) == (0.0, True)


def test_every_call_of_a_turn_is_answered_in_order():
    world = make_task("test", 0).world
    arguments = [{"entity": name, "field": "mayor"} for name in world.entities["city"]]
    calls = [ToolCall(name="lookup", arguments=each) for each in arguments]
    step = _open().step(Action(tool_calls=calls))
    assert [message.content for message in step.messages] == [
        world.facts[name]["mayor"] for name in world.entities["city"]
    ]
    assert all(message.role == "tool" for message in step.messages)
    assert [(outcome.name, outcome.ok) for outcome in step.tool_outcomes] == [("lookup", True)] * 6


def test_a_tool_turn_past_the_limit_cuts_the_episode():
    environment = _open()
    for _ in range(MAX_TOOL_TURNS):
        assert not environment.step(_search()).truncated
    step = environment.step(_search())
    assert (step.truncated, step.terminated, step.reward) == (True, False, 0.0)
    assert list(step.messages) == []


def test_an_answer_after_the_last_tool_turn_counts():
    environment = _open()
    for _ in range(MAX_TOOL_TURNS):
        environment.step(_search())
    assert environment.step(Action(text=environment.task.answer)).reward == 1.0


def test_closing_is_possible_before_any_step():
    PracticeSuite().open("test", 0).close()


@pytest.mark.parametrize("level", LEVELS)
def test_the_expert_solves_every_task_within_its_calls(level):
    mix = [float(each == level) for each in LEVELS]
    fewest, most = CALLS_BY_LEVEL[level]
    for demonstration in demonstrations(PER_LEVEL, seed=level, mix=mix):
        assert demonstration["level"] == level
        assert demonstration["reward"] == 1.0
        assert fewest <= len(_calls(demonstration)) <= most


def test_level_3_demonstrations_use_every_tool_and_end_in_one_calculation():
    used = set()
    for demonstration in demonstrations(PER_LEVEL, seed=0, mix=(0, 0, 1)):
        tools = [call["name"] for call in _calls(demonstration)]
        assert tools[-1] == "calculate"
        assert tools.count("calculate") == 1
        used |= set(tools)
    assert used == {"lookup", "search", "read_csv", "calculate"}


def test_a_careless_expert_fails_more_often_at_higher_levels():
    rewards = {level: [] for level in LEVELS}
    for demonstration in demonstrations(900, seed=0, carelessness=0.3):
        rewards[demonstration["level"]].append(demonstration["reward"])
    rates = [sum(rewards[level]) / len(rewards[level]) for level in LEVELS]
    assert 0.05 < rates[2] < rates[1] < rates[0] < 0.8


def test_demonstrations_repeat_for_a_seed_and_stay_in_their_ordinals():
    first = list(demonstrations(50, seed=3, carelessness=0.3))
    assert first == list(demonstrations(50, seed=3, carelessness=0.3))
    assert first != list(demonstrations(50, seed=4, carelessness=0.3))
    assert {int(each["task_id"].split("-")[-1]) in ORDINALS for each in first} == {True}
    assert level_of(ORDINALS[0]) == LEVELS[0]


def test_the_command_writes_chat_json_lines(tmp_path):
    out = tmp_path / "demos.jsonl"
    command = [sys.executable, "-m", "envserver.suites.practice.demonstrate", "--out", out]
    subprocess.run([*command, "--num", "20", "--mix", "2:2:1"], cwd=REPOSITORY, check=True)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 20
    for line in lines:
        roles = [message["role"] for message in line["messages"]]
        assert roles[:2] == ["system", "user"]
        assert roles[2:] == ["assistant", "tool"] * len(_calls(line)) + ["assistant"]
        assert {tool["name"] for tool in line["tools"]} >= {call["name"] for call in _calls(line)}


def test_a_task_s_tags_are_the_tools_that_the_expert_calls():
    for demonstration in demonstrations(60, seed=3):
        split, level, ordinal = demonstration["task_id"].removeprefix("practice-").split("-")
        tags = PracticeSuite().open(split, int(ordinal)).reset().tags
        assert sorted({call["name"] for call in _calls(demonstration)}) == tags, level
