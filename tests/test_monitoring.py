"""The dashboard and Prometheus's configuration against the metrics that the code declares."""

import itertools
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram, Info
from prometheus_client.metrics import MetricWrapperBase

from monitoring.dashboards import OVERVIEW, dump, overview
from monitoring.queries import exposed_name
from understudy import metrics
from understudy.config import ActorConfig, EnvserverConfig, InferenceConfig, LearnerConfig

MONITORING = OVERVIEW.parents[1]
REPOSITORY = MONITORING.parent
METRICS = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
TARGET_LABELS = {"job", "instance"}
ROLE_OF_JOB = {"intake": "learner"}
"""Where a job's name is not its processes' role."""
DEADLINE_SECONDS = 25.0


def _labels_by_sample() -> dict[str, set[str]]:
    """Labels by the name of each sample that Prometheus stores."""
    samples = {exposed_name(metrics.BUILD): {"version", "role"} | TARGET_LABELS}
    for metric in METRICS:
        labels = set(metric._labelnames) | TARGET_LABELS
        name = exposed_name(metric)
        if isinstance(metric, Histogram):
            samples |= {f"{name}_bucket": labels | {"le"}}
            samples |= {f"{name}_sum": labels, f"{name}_count": labels}
        elif not isinstance(metric, Info):
            samples[name] = labels
    return samples


def _expressions() -> list[tuple[str, str]]:
    """Panel title and PromQL of every target, Grafana's variables filled in."""
    return [
        (panel["title"], _fill_in(target["expr"]))
        for panel in json.loads(OVERVIEW.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


def _fill_in(expression: str) -> str:
    for variable, value in {"$__rate_interval": "3s", "$job": ".*", "$instance": ".*"}.items():
        expression = expression.replace(variable, value)
    return expression


def _selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        elif isinstance(node, promql_parser.MatrixSelector):
            found.append(node.vector_selector)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


def test_committed_dashboard_is_what_the_generator_writes():
    assert OVERVIEW.read_text(encoding="utf-8") == dump(overview()), "run `make dashboards`"


def test_every_metric_and_label_that_a_panel_queries_is_declared():
    declared = _labels_by_sample()
    for title, expression in _expressions():
        selectors = _selectors(expression)
        assert selectors, f"{title}: no metric in {expression}"
        for selector in selectors:
            assert selector.name in declared, f"{title}: {selector.name}"
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= declared[selector.name], f"{title}: {expression}"


def test_labels_that_a_panel_groups_by_or_shows_are_declared():
    declared = _labels_by_sample()
    for panel in json.loads(OVERVIEW.read_text())["panels"]:
        for target in panel.get("targets", ()):
            known = set[str]().union(
                *(declared[s.name] for s in _selectors(_fill_in(target["expr"])))
            )
            grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
            used = {label.strip() for labels in grouped for label in labels.split(",")}
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used | shown <= known, panel["title"]
            assert shown <= used, panel["title"]


def test_every_declared_metric_has_a_panel():
    names = {
        re.sub(r"_(bucket|sum|count)$", "", selector.name)
        for _, expression in _expressions()
        for selector in _selectors(expression)
    }
    assert {exposed_name(metric) for metric in METRICS} <= names


def test_roles_that_panels_select_are_those_of_the_code():
    roots = ("actor", "envserver", "inference", "learner")
    sources = [path.read_text() for root in roots for path in (REPOSITORY / root).rglob("*.py")]
    exporters = re.findall(r'start_exporter\([^)"]*"(\w+)"', "\n".join(sources))
    selected = re.findall(r'role="(\w+)"', " ".join(expression for _, expression in _expressions()))
    assert set(selected) <= set(exporters)


def test_panels_say_what_they_show_and_name_their_metrics():
    for panel in json.loads(OVERVIEW.read_text())["panels"]:
        if panel["type"] != "row":
            help, _, names = panel["description"].partition("\n\nMetric: ")
            assert help.endswith(".")
            assert re.fullmatch(r"`\w+`(, `\w+`)*", names)


def test_panels_do_not_overlap():
    cells: set[tuple[int, int]] = set()
    for panel in json.loads(OVERVIEW.read_text())["panels"]:
        p = panel["gridPos"]
        mine = set(
            itertools.product(range(p["x"], p["x"] + p["w"]), range(p["y"], p["y"] + p["h"]))
        )
        assert not mine & cells
        cells |= mine


def test_prometheus_scrapes_the_default_addresses():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]
    }
    learner = LearnerConfig()
    assert targets == {
        "intake": [learner.metrics_listen],
        "trainer": [learner.trainer_metrics_listen],
        "inference": [InferenceConfig().metrics_listen],
        "envserver": [EnvserverConfig().metrics_listen],
        "actor": [ActorConfig().metrics_listen],
    }


def test_grafana_provisioning_is_readable():
    folder = MONITORING / "grafana" / "provisioning"
    sources = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())
    providers = yaml.safe_load((folder / "dashboards" / "understudy.yml").read_text())
    prometheus = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert providers["providers"][0]["type"] == "file"


@pytest.fixture(scope="module")
def prometheus() -> None:
    """Skip, and say so among the warnings, where Prometheus is not installed."""
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        reason = "Prometheus is not installed, so no query was tried: apt-get install prometheus"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def exporters() -> Iterator[dict[str, int]]:
    """A process of each role that uses every metric all the time; ports by job."""
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    names = [job["job_name"] for job in jobs]
    commands = [[sys.executable, __file__, ROLE_OF_JOB.get(name, name)] for name in names]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        ports = [int(process.stdout.readline()) for process in processes if process.stdout]
        yield dict(zip(names, ports, strict=True))
    finally:
        _end(processes)


def test_promtool_finds_no_fault(prometheus: None, exporters: dict[str, int]):
    url = f"http://127.0.0.1:{exporters['actor']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as reply:
        exposition = reply.read()
    for command in (["metrics"], ["config", str(MONITORING / "prometheus.yml")]):
        done = subprocess.run(
            ["promtool", "check", *command], input=exposition, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_prometheus_answers_every_panel(
    prometheus: None, exporters: dict[str, int], tmp_path: Path
):
    server, url = _start_prometheus(exporters, tmp_path)
    try:
        unanswered = dict.fromkeys(_expressions(), "not asked")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while unanswered and time.monotonic() < deadline:
            time.sleep(0.5)
            answers = {key: _ask(url, key[1]) for key in unanswered}
            unanswered = {key: fault for key, fault in answers.items() if fault}
        log = (tmp_path / "prometheus.log").read_text()
        assert not unanswered, f"{json.dumps(list(unanswered.items()), indent=1)}\n{log}"
    finally:
        _end([server])


def _start_prometheus(ports: dict[str, int], folder: Path) -> tuple[subprocess.Popen[str], str]:
    """Start Prometheus with the shipped configuration on other ports, and hurry it."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *("prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address={address}", "--log.level=warn"),
    ]
    with (folder / "prometheus.log").open("w") as log:
        return subprocess.Popen(command, stderr=log, stdout=log, text=True), f"http://{address}"


def _ask(url: str, expression: str) -> str:
    """Put a query to Prometheus; what is wrong with the answer, or nothing."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=10) as reply:
            answer: dict[str, Any] = json.load(reply)
    except urllib.error.HTTPError as error:
        return error.read().decode()
    except OSError as error:
        return str(error)
    values = [float(series["value"][1]) for series in answer["data"]["result"]]
    return "" if values and all(map(math.isfinite, values)) else f"no data: {answer}"


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=10)
        if process.stdout:
            process.stdout.close()


def _use_every_metric() -> None:
    for metric in METRICS:
        child = metric.labels(*metric._labelnames) if metric._labelnames else metric
        if isinstance(child, Counter):
            child.inc()
        elif isinstance(child, Histogram):
            child.observe(0.2)
        elif isinstance(child, Gauge):
            child.set(time.time())


def _export(role: str) -> None:
    print(metrics.start_exporter("127.0.0.1:0", role), flush=True)
    while True:
        _use_every_metric()
        time.sleep(0.1)


if __name__ == "__main__":
    _export(sys.argv[1])
