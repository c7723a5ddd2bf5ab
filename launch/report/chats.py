"""Trajectories of a run to read: a few right and wrong ones."""

from collections.abc import Sequence

from launch.report.files import Line
from understudy.report.chats import Chat, bubbles_of, bubbles_of_pieces

_EACH = 2
"""Trajectories shown of each stretch of the run, right and wrong ones each."""


def chats_of(samples: Sequence[Line]) -> dict[str, list[Chat]]:
    """A few right and wrong trajectories from the beginning, the middle and the end of the run."""
    steps = sorted({_step(sample) for sample in samples})
    if not steps:
        return {}
    span = (steps[-1] - steps[0] + 1) / 3
    chosen: dict[str, list[Chat]] = {}
    for index, stretch in enumerate(("early", "middle", "late")):
        here = [s for s in samples if min(int((_step(s) - steps[0]) // span), 2) == index]
        picked = [s for is_right in (True, False) for s in _pick(here, is_right)]
        if picked:
            chosen[stretch] = [_chat(sample) for sample in picked]
    return chosen


def _pick(samples: Sequence[Line], is_right: bool) -> list[Line]:
    """The longest first, of different levels if there are."""
    matching = [sample for sample in samples if _is_right(sample) == is_right]
    matching.sort(key=lambda sample: len(str(sample["text"])), reverse=True)
    by_level = {str(sample.get("level")): sample for sample in reversed(matching)}
    first = sorted(by_level.values(), key=lambda s: str(s.get("level")), reverse=True)
    rest = [sample for sample in matching if all(sample is not other for other in first)]
    return (first + rest)[:_EACH]


def _chat(sample: Line) -> Chat:
    names = {"step": "step", "version": "version", "num_turns": "turns"}
    facts = [f"{name} {sample[key]}" for key, name in names.items() if key in sample]
    reward = sample.get("reward")
    if isinstance(reward, int | float):
        facts.append(f"reward {reward:g}")
    level = f"level {sample['level']}" if "level" in sample else ""
    pieces = sample.get("pieces")
    title = " - ".join(str(word) for word in (sample.get("task_id"), level) if word)
    return Chat(
        title=title or "trajectory",
        is_right=_is_right(sample),
        verdict="right" if _is_right(sample) else "wrong",
        facts=", ".join(facts),
        bubbles=bubbles_of_pieces(pieces) if pieces else bubbles_of(str(sample["text"])),
    )


def _step(sample: Line) -> float:
    step = sample.get("step")
    return step if isinstance(step, int | float) else 0


def _is_right(sample: Line) -> bool:
    reward = sample.get("reward")
    return isinstance(reward, int | float) and reward > 0.5
