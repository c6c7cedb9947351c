"""The dashboard asks for metrics that exist, in queries that Prometheus can parse."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families as parse
from starlette.applications import Starlette

from jaxserve.server.http_metrics import HTTPMetrics
from jaxserve.server.metrics import Metrics
from tests.server.observed import promtool

DASHBOARD = json.loads((files("jaxserve.server") / "dashboard.json").read_text())
METRIC = re.compile(r"\b(?:jaxserve:|http_|process_|python_)[a-zA-Z0-9_:]+")
GRAFANA = {"$__rate_interval": "1m", "$model_name": ".*"}
HTTP = "http_request_duration_highr_seconds", "http_request_duration_seconds", "http_requests"


def queries() -> Iterator[tuple[str, str]]:
    """Every panel's title and expression."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def plain(expression: str) -> str:
    """As Grafana sends it."""
    for variable, text in GRAFANA.items():
        expression = expression.replace(variable, text)
    return expression


def exposed() -> dict[str, set[str]]:
    """Names of samples, each with its labels."""
    metrics = Metrics(model_name="m", max_model_len=64)
    HTTPMetrics(Starlette(), metrics.registry)
    found: dict[str, set[str]] = {}
    for family in parse(metrics.render()[0].decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # What has labels of requests has no samples before the first.
    for name in HTTP:
        suffixes = ("_total",) if name == "http_requests" else ("_bucket", "_sum", "_count")
        for suffix in suffixes:
            found.setdefault(name + suffix, set()).update({"method", "handler", "status", "le"})
    return found


def test_every_metric_in_a_query_exists_with_its_labels() -> None:
    found = exposed()
    used = set()
    for title, expression in queries():
        names = METRIC.findall(expression)
        assert names, title
        assert set(names) <= found.keys(), title
        used.update(names)
        for group in re.findall(r"by \(([^)]*)\)", expression):
            labels = set(group.replace(" ", "").split(","))
            assert all(labels <= found[name] for name in names), title
        legends = re.findall(r"{{(\w+)}}", json.dumps(DASHBOARD))
        assert set(legends) <= {label for name in found for label in found[name]}
    models = DASHBOARD["templating"]["list"][1]["query"]["query"]
    assert METRIC.findall(models)[0] in found
    # The dashboard shows most of what there is: all but what other panels say already.
    engine = {n for n in found if n.startswith("jaxserve:") and not n.endswith("_sum")}
    assert len({n for n in used if n.startswith("jaxserve:")}) > len(engine) / 2


def test_promtool_parses_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{i}", "expr": plain(expression)}
        for i, (_, expression) in enumerate(queries())
    ]
    assert not any("$" in rule["expr"] for rule in rules)
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # also YAML
    done = promtool("check", "rules", str(path))
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout
    rules[3]["expr"] += ")"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert promtool("check", "rules", str(path)).returncode != 0


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    taken: dict[tuple[int, int], str] = {}
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, (panel["title"], taken[x, y])
                taken[x, y] = panel["title"]
        assert panel["type"] == "row" or panel["fieldConfig"]["defaults"]["unit"]
