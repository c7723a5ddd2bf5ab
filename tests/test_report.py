"""The run report: whole runs, interrupted ones, and text that nobody should trust."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from launch.report import format_table, write_report
from launch.report.chats import chats_of
from launch.report.files import read_run
from launch.report.plots import charts_of
from understudy.report.charts import Series, line_chart, moving_mean, nice_ticks, number
from understudy.report.chats import Bubble, bubbles_of

ATTACK = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(2)>"
CHAT = (
    "<|im_start|>system\nUse tools.<|im_end|>\n"
    "<|im_start|>user\nWho founded Orbix?<|im_end|>\n"
    "<|im_start|>assistant\n<think>Look it up.</think>\n"
    '<tool_call>\n{"name": "lookup", "arguments": {"entity": "Orbix", "n": 1}}\n</tool_call>'
    "<|im_end|>\n"
    f"<|im_start|>user\n<tool_response>\nHana {ATTACK}\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\nHana<|im_end|>\n"
)


def _score(accuracy: float) -> dict[str, Any]:
    return {"accuracy": accuracy, "ci95": [accuracy - 0.04, accuracy + 0.04], "n": 200}


def _scores(accuracy: float) -> dict[str, Any]:
    return {level: _score(accuracy) for level in ("all", "level1", "level2", "level3")}


RESULT = {
    "seed": 7,
    "control": False,
    "interrupted": False,
    "base": _scores(0.31),
    "trained": _scores(0.84),
    "base_greedy": _scores(0.42),
    "trained_greedy": _scores(0.87),
    "episodes": 5120,
    "wall_seconds": {"warmup": 200.5, "reinforce": 301.0, "total_after_setup": 501.5},
    "versions_published": 21,
    "staleness": {"mean": 0.7, "max": 1},
    "logprob_mismatch": None,
    "token_budget": {
        "base": {"tokens_mean": 211.0, "sampled_tokens_mean": 40.0, "turns_mean": 3.0}
    },
    "machine": {"cpu": f"cpu {ATTACK}"},
}


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """The folder of a small run that went to its end."""
    steps = [
        {
            **{"kind": "step", "time": 1e9 + 4 * step, "step": step, "version": step},
            **{"reward_mean": step / 20, "reward_level1": 0.9, "reward_level2": 0.5},
            **{"episodes": 256, "trajectories": 200, "tokens_mean": 200.0, "loss": None},
            **{"trained_tokens": 6000, "seconds_wait": 0.5},
        }
        for step in range(20)
    ]
    replicas = [
        {"kind": "replica", "replica": "a", "version": version, "mismatch_mean": 1e-7}
        for version in range(20)
    ]
    samples = [
        {
            "step": step,
            "version": step,
            "task_id": ATTACK,
            "level": 1,
            "reward": right,
            "text": CHAT,
        }
        for step in (0, 10, 19)
        for right in (0.0, 1.0)
    ]
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    _write_lines(tmp_path / "metrics.jsonl", steps + replicas)
    _write_lines(tmp_path / "samples.jsonl", samples)
    _write_lines(tmp_path / "warmup.jsonl", [{"stage": "supervised", "step": 0, "loss": 2.0}])
    return tmp_path


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


class _Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: dict[str, set[str]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, set()).add(value or "")


def test_report_of_a_whole_run_has_every_part(run_path: Path):
    path = write_report(run_path)
    page = path.read_text()
    assert path == run_path / "report.html"
    for part in ("31.0", "84.0", "+53.0", "Reward by level", "Trajectories a second"):
        assert part in page
    for part in ("Engine against learner", "Supervised loss", "Wall time", "Early in", "Late in"):
        assert part in page
    assert "Missing" not in page
    assert "interrupted" not in page


def test_page_refers_to_nothing_outside_and_runs_nothing(run_path: Path):
    page = write_report(run_path).read_text()
    elements = _Elements(page)
    assert not elements.tags & {"script", "link", "img", "iframe", "object", "a", "base", "form"}
    assert not set(elements.attributes) & {"src", "href", "srcset", "action", "data"}
    assert not [name for name in elements.attributes if name.startswith("on")]
    assert "url(" not in page
    assert "@import" not in page
    assert any("default-src 'none'" in value for value in elements.attributes["content"])


def test_untrusted_text_is_shown_and_not_obeyed(run_path: Path):
    page = write_report(run_path).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2


def test_empty_run_has_a_report_that_says_so(tmp_path: Path):
    page = write_report(tmp_path / "never-started").read_text()
    for missing in ("no accuracy was measured", "no step was taken", "no trajectory was kept"):
        assert missing in page


def test_interrupted_run_shows_what_there_is(run_path: Path):
    result = {"control": True, "interrupted": True, "base": {"all": _score(0.3)}}
    (run_path / "result.json").write_text(json.dumps(result))
    lines = (run_path / "metrics.jsonl").read_text().splitlines()
    (run_path / "metrics.jsonl").write_text(lines[0] + '\nnot json\n{"kind": "st')
    (run_path / "samples.jsonl").unlink()
    page = write_report(run_path).read_text()
    for part in ("was interrupted", "accuracy of trained", "Control experiment", "not measured"):
        assert part in page
    assert "30.0" in page


def test_a_repeated_step_counts_once(tmp_path: Path):
    lines = [
        {"kind": "step", "step": step, "loss": loss} for step, loss in ((0, 1), (1, 2), (1, 3))
    ]
    _write_lines(tmp_path / "metrics.jsonl", lines)
    assert [step["loss"] for step in read_run(tmp_path).steps] == [1, 3]


@pytest.mark.parametrize("folder", ["model", "base", "elsewhere"])
def test_token_ids_are_decoded_with_the_run_s_tokenizer(tmp_path: Path, folder: str):
    (tmp_path / folder).mkdir()
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / folder / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model": {"path": str(tmp_path / folder)}}))
    segments = [{"token_ids": [0]}, {"token_ids": [0, 1]}]
    lines = [{"step": 0, "token_ids": [1, 0]}, {"step": 0, "segments": segments}]
    _write_lines(tmp_path / "samples.jsonl", lines)
    texts = [sample["text"] for sample in read_run(tmp_path).samples]
    assert texts == ["world hello", "hello world"]


def test_without_a_tokenizer_the_report_says_what_is_missing(tmp_path: Path):
    _write_lines(tmp_path / "samples.jsonl", [{"step": 0, "token_ids": [0, 1]}])
    assert "tokenizer.json" in write_report(tmp_path).read_text()


def test_chat_is_taken_apart_into_what_was_said():
    bubbles = bubbles_of(CHAT)
    assert [bubble.kind for bubble in bubbles] == [
        *("system", "user", "thought", "call", "response", "answer"),
    ]
    assert bubbles[3].text == 'lookup(entity="Orbix", n=1)'


@pytest.mark.parametrize(
    ("text", "bubbles"),
    [
        ("", ()),
        ("no turns", (Bubble(kind="assistant", text="no turns"),)),
        ("<|im_start|>assistant\ncut", (Bubble(kind="answer", text="cut"),)),
        ("<|im_start|>assistant\n<tool_call>{1", (Bubble(kind="call", text="{1"),)),
        ("<|im_start|>user\n<tool_call>{}", (Bubble(kind="user", text="<tool_call>{}"),)),
        ("<|im_start|>assistant\n<tool_call>[]", (Bubble(kind="call", text="[]"),)),
    ],
)
def test_broken_chats_are_shown_as_they_are(text: str, bubbles: tuple[Bubble, ...]):
    assert bubbles_of(text) == bubbles


def test_trajectories_come_from_the_whole_run_right_and_wrong():
    samples = [
        {"step": step, "level": level, "reward": reward, "text": CHAT}
        for step in range(30)
        for level in (1, 2, 3)
        for reward in (0.0, 1.0)
    ]
    chats = chats_of(samples)
    assert list(chats) == ["early", "middle", "late"]
    for some in chats.values():
        assert [chat.is_right for chat in some] == [True, True, False, False]
        assert len({chat.title for chat in some[:2]}) == 2


def test_rates_come_from_the_time_between_steps(run_path: Path):
    charts = {chart.title: chart for chart in charts_of(read_run(run_path))["Speed"]}
    assert charts["Trajectories a second"].legend == (("trajectories/s", "64"),)
    assert charts["Tokens a second"].legend == (
        ("all tokens/s", "12.8k"),
        ("trained tokens/s", "1.5k"),
    )


def test_the_worst_replica_speaks_for_a_version(tmp_path: Path):
    lines = [
        {"kind": "replica", "replica_id": name, "version": version, "mismatch_max": mismatch}
        for version, name, mismatch in ((1, "a", 0.5), (0, "a", 0.1), (0, "b", 0.3), (1, "b", 0.2))
    ]
    _write_lines(tmp_path / "metrics.jsonl", lines)
    (chart,) = charts_of(read_run(tmp_path))["Health"]
    assert chart.legend == (("max", "0.5"),)
    assert chart.svg.count("<polyline") == 2


def test_held_out_accuracy_is_drawn_over_steps(tmp_path: Path):
    lines = [
        {
            **{"kind": "evaluation", "step": step, "heldout_accuracy": accuracy},
            **{"heldout_ci95": [accuracy - 0.1, accuracy + 0.1], "heldout_level2": accuracy},
        }
        for step, accuracy in ((0, 0.25), (10, 0.5), (20, 0.1), (20, 0.75))
    ]
    lines.append({"kind": "evaluation", "step": 30, "heldout_accuracy": None})
    _write_lines(tmp_path / "metrics.jsonl", lines)
    charts = {chart.title: chart for chart in charts_of(read_run(tmp_path))["Learning"]}
    accuracy = charts["Held-out accuracy"]
    assert accuracy.legend[0] == ("accuracy", "0.75")  # of a repeated evaluation, the last
    assert [label for label, _ in accuracy.legend] == ["accuracy", "95 % interval, low", "high"]
    assert 'class="raw' not in accuracy.svg  # points as they are
    assert charts["Held-out accuracy by level"].legend == (("level 2", "0.75"),)


def test_values_that_cannot_be_drawn_are_left_out():
    nothing = [(0.0, float("nan")), (1.0, float("inf"))]
    assert line_chart("t", "h", [Series(label="a", points=nothing)]) is None
    chart = line_chart("t", "h", [Series(label="a", points=[*nothing, (2.0, 3.0)])])
    assert chart is not None
    assert "nan" not in chart.svg


def test_long_runs_make_small_charts():
    points = [(float(x), float(x % 7)) for x in range(50_000)]
    chart = line_chart("t", "h", [Series(label="a", points=points)])
    assert chart is not None
    assert len(chart.svg) < 20_000


def test_moving_mean_keeps_constants_and_length():
    points = [(float(x), 2.5) for x in range(40)]
    assert moving_mean(points) == points


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (-3, 8), (0, 1e-7), (5, 5), (0, 123456)])
def test_ticks_are_few_and_cover_the_values(low: float, high: float):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert 2 <= len(ticks) <= 7


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0314, "0.0314"), (1.2e-6, "1.2e-06"), (256, "256"), (14_200, "14.2k")],
)
def test_numbers_are_short(value: float, text: str):
    assert number(value) == text


def test_table_for_the_terminal():
    table = format_table(RESULT)
    assert "31.0 [27.0, 35.0]" in table
    assert "+53.0" in table
    assert "base: 211 tokens an episode, of which 40 sampled, in 3.0 turns" in table
    assert all(len(line) <= 80 for line in table.splitlines())


def test_table_of_an_interrupted_run_says_what_is_missing():
    assert format_table({}) == "no accuracy was measured"
    table = format_table({"base": {"all": _score(0.3)}, "interrupted": True, "control": True})
    assert "interrupted" in table
    assert "control" in table
