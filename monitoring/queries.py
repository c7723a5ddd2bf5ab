"""PromQL over the metric objects of understudy.metrics.

A panel names the object, never the string, so that a renamed or removed metric breaks the generator
and not a dashboard. Every process exposes every unlabelled metric, at 0 where it is not its own:
sums and rates do not mind, gauges are limited to the `role` that sets them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase

from understudy import metrics

_SELECTED = 'job=~"$job",instance=~"$instance"'
_WINDOW = "[$__rate_interval]"
_SUFFIXES = {"counter": "_total", "info": "_info"}


@dataclass(frozen=True, kw_only=True)
class Query:
    """One expression of a panel."""

    metric: str
    """The metric's name as Prometheus knows it; a histogram's without suffix."""
    expression: str
    """PromQL with the dashboard's variables in it."""
    legend: str
    """Grafana's legend format: `{{label}}` stands for a label's value."""


def exposed_name(metric: MetricWrapperBase) -> str:
    """Name of a metric's samples; a histogram's without `_bucket`, `_sum` or `_count`."""
    family = next(iter(metric.describe()))
    return f"{family.name}{_SUFFIXES.get(family.type, '')}"


def latest(
    gauge: Gauge | Info, *, role: str = "", by: str = "", legend: str = "", aggregate: str = "max"
) -> Query:
    """The gauge's value, of the processes of one role or of all.

    Args:
        role: as the process names itself to `start_exporter`.
    """
    name = exposed_name(gauge)
    value = f"{name}{{{_SELECTED}}}"
    if role:
        value += f' and on (job, instance) {exposed_name(metrics.BUILD)}{{role="{role}"}}'
    return _query(name, f"{aggregate}{_grouped(by)}({value})", by, legend)


def age(gauge: Gauge, *, legend: str) -> Query:
    """Seconds since the newest time that the gauge holds; nothing before it is first set."""
    name = exposed_name(gauge)
    return _query(name, f"time() - (max({name}{{{_SELECTED}}}) > 0)", "", legend)


def rate(counter: Counter, *, by: str = "", legend: str = "", where: str = "") -> Query:
    """Increase a second, summed over what `by` does not name.

    Args:
        where: further label matchers, as in `grpc_code!="OK"`.
    """
    name = exposed_name(counter)
    selected = f"{_SELECTED},{where}" if where else _SELECTED
    return _query(name, f"sum{_grouped(by)}(rate({name}{{{selected}}}{_WINDOW}))", by, legend)


def mean(histogram: Histogram, *, by: str = "", legend: str = "") -> Query:
    """Mean of the window's observations; nothing where there were none."""
    name = exposed_name(histogram)
    sums, counts = (
        f"sum{_grouped(by)}(rate({name}{suffix}{{{_SELECTED}}}{_WINDOW}))"
        for suffix in ("_sum", "_count")
    )
    return _query(name, f"{sums} / ({counts} > 0)", by, legend)


def quantiles(
    histogram: Histogram, *, by: str = "", shares: Sequence[float] = (0.5, 0.95)
) -> list[Query]:
    """Quantiles of the window's observations, one query each."""
    name = exposed_name(histogram)
    labels = f"le, {by}" if by else "le"
    buckets = f"sum by ({labels}) (rate({name}_bucket{{{_SELECTED}}}{_WINDOW}))"
    prefix = f"{_braces(by)} " if by else ""
    return [
        Query(
            metric=name,
            expression=f"histogram_quantile({share}, {buckets})",
            legend=f"{prefix}p{share * 100:g}",
        )
        for share in shares
    ]


def _query(name: str, expression: str, by: str, legend: str) -> Query:
    return Query(metric=name, expression=expression, legend=legend or _braces(by) or name)


def _grouped(by: str) -> str:
    return f" by ({by}) " if by else ""


def _braces(by: str) -> str:
    return " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(",")) if by else ""
