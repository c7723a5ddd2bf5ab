"""A suite whose task is to read a note with a tool and to count its words."""

from random import Random

from envserver.environment import (
    Action,
    Environment,
    Message,
    Reset,
    Step,
    Suite,
    SuiteDescription,
    ToolSpec,
    user_message,
)

WORDS = ("the", "quick", "brown", "fox", "jumps")
READ = ToolSpec(
    name="read", description="Read the note.", parameters={"type": "object", "properties": {}}
)


class WordCount(Suite):
    name = "word_count"

    def describe(self) -> SuiteDescription:
        return SuiteDescription(name=self.name, splits={"train": 9000}, levels=(1,), digest="1")

    def open(self, split: str, task_ordinal: int) -> Environment:
        if split != "train" or not 0 <= task_ordinal < 9000:
            raise KeyError(task_ordinal)
        return Note(task_ordinal)


class Note(Environment):
    def __init__(self, ordinal: int) -> None:
        random = Random(ordinal)
        self.id = f"word-count-{ordinal}"
        self.note = " ".join(random.choices(WORDS, k=random.randint(3, 30)))

    def reset(self) -> Reset:
        question = user_message("How many words has the note? Reply with the number.")
        return Reset(task_id=self.id, level=1, messages=[question], tools=[READ])

    def step(self, action: Action) -> Step:
        if action.tool_calls:
            return Step(messages=[Message(role="tool", content=self.note)] * len(action.tool_calls))
        right = action.text.strip() == str(len(self.note.split()))
        return Step(reward=float(right), terminated=True)
