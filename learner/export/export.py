"""The export itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from learner.export.atif import atif_line
from learner.export.lines import write_lines
from learner.export.plain import Line, plain_line
from learner.export.source import Episode, Source, Split
from learner.export.tokenizer import find_decoder, model_of
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
    decode = find_decoder(run)
    if form == "atif" and decode is None:
        raise ConfigError(
            f"--format = atif: no tokenizer.json in {run / 'model'} or at model.path of "
            f"{run / 'config.json'}; put the model's there, or export as jsonl"
        )
    source = Source(run, split)
    model_name = model_of(run)

    def line(episode: Episode) -> Line:
        if form == "atif" and decode:
            return atif_line(episode, decode, model_name)
        return plain_line(episode, decode)

    number = write_lines(out, map(line, source))
    return Summary(num_written=number, remarks=tuple(_remarks(source, decode is None)))


def _remarks(source: Source, no_text: bool) -> list[str]:
    remarks = list(source.damaged)
    if source.num_trimmed:
        remarks.append(
            f"{source.num_trimmed} trajectories left out: retention trimmed their payloads"
        )
    if no_text:
        remarks.append("no tokenizer found: tokens only, no text")
    if not source.report.passed:
        remarks.append(f"the log breaks {source.report.num_violations} rules; audit the run")
    return remarks
