"""The export itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from learner.export.atif import atif_line
from learner.export.lines import write_lines
from learner.export.plain import Line, plain_line
from learner.export.source import Episode, Source, Split
from learner.export.tokenizer import Decoders
from understudy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What an export did."""

    num_written: int
    remarks: tuple[str, ...]
    """What was left out and why, each in one line for people."""


def export_run(run: Path, out: Path, form: Literal["jsonl", "atif"], split: Split) -> Summary:
    """Write the trajectories of a run's log.

    Raises:
        ConfigError: the run has no log, ATIF finds no tokenizer, or the file cannot be written.
    """
    decoders = Decoders(run)
    if form == "atif" and decoders.own is None:
        raise ConfigError(
            f"--format = atif: no tokenizer.json in {run / 'model'} or at model.path of "
            f"{run / 'config.json'}; put the model's there, or export as jsonl"
        )
    source = Source(run, split)

    def line(episode: Episode) -> Line:
        return (atif_line if form == "atif" else plain_line)(episode, decoders)

    number = write_lines(out, map(line, source))
    return Summary(num_written=number, remarks=tuple(_remarks(source, decoders)))


def _remarks(source: Source, decoders: Decoders) -> list[str]:
    remarks = list(source.damaged)
    if source.num_trimmed:
        remarks.append(
            f"{source.num_trimmed} trajectories left out: retention trimmed their payloads"
        )
    if decoders.own is None:
        remarks.append("no tokenizer found: tokens only, no text")
    remarks += [
        f"part {part}: no tokenizer.json in {decoders.model_of(part)}: tokens only, no text"
        for part in decoders.missing
    ]
    if not source.report.passed:
        remarks.append(f"the log breaks {source.report.num_violations} rules; audit the run")
    return remarks
