"""Panels, rows and variables of a Grafana dashboard, as its JSON has them (schema 39, Grafana 10.4 and later)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.monitoring.series import Series

SCHEMA_VERSION = 39
WIDTH = 24
"""columns of Grafana's grid"""
FIRST_ID = 100
"""of the panels that ask for no id of their own"""

GREEN, AMBER, RED, BLUE = "green", "orange", "red", "blue"
Step = tuple[float | None, str]
"""a threshold: from which value on, and its colour; None is the lowest"""
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """An expression and the name of what it gives; `{{label}}` stands for a label's value."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A panel.

    Args:
        title: of it.
        description: what it says and when to worry.
        queries: that it shows.
        kind: of panel.
        unit: by Grafana's name for it.
        thresholds: the lowest first, with a meaning; none by default.
        width: of 24 columns.
        height: in rows of the grid.
        id: where Ray's dashboard asks for one.
        minimum: of the axis.
        maximum: of the axis.
        stacked: areas on top of each other.
        logarithmic: axis.
        mappings: texts for values.
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat", "gauge", "bargauge", "heatmap"] = "timeseries"
    unit: str = "short"
    thresholds: tuple[Step, ...] = ()
    width: int = 8
    height: int = 8
    id: int | None = None
    minimum: float | None = 0
    maximum: float | None = None
    stacked: bool = False
    logarithmic: bool = False
    mappings: tuple[tuple[str, str, str], ...] = ()


@dataclass(frozen=True)
class Row:
    """A heading and the panels under it."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label of a metric. All are chosen at first."""

    name: str
    label: str
    series: Series
    of: str
    """the label"""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard. Its uid, up to 40 letters, never changes: links and Ray's embedding name it."""

    uid: str
    title: str
    description: str
    variables: tuple[Variable, ...]
    rows: tuple[Row, ...]
    tags: tuple[str, ...] = field(default=("raysoner", "ray"))

    @property
    def panels(self) -> list[Panel]:
        """All panels, from above."""
        return [panel for row in self.rows for panel in row.panels]


def to_json(dashboard: Dashboard) -> dict[str, Any]:
    """What Grafana imports or provisions."""
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": list(dashboard.tags),
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "Raysoner",
                "tags": ["raysoner"],
                "asDropdown": True,
                "includeVars": False,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_datasource(), *(_variable(each) for each in dashboard.variables)]},
        "panels": _placed(dashboard.rows),
    }


def _placed(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Panels side by side until a line is full, under the heading of their row."""
    placed: list[dict[str, Any]] = []
    next_id, y = FIRST_ID, 0
    for row in rows:
        placed.append(
            {
                "id": next_id,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1},
                "panels": [],
            }
        )
        next_id, x, y, height = next_id + 1, 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > WIDTH:
                x, y, height = 0, y + height, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            placed.append({"id": panel.id or next_id, "gridPos": place, **_panel(panel)})
            next_id, x, height = next_id + 1, x + panel.width, max(height, panel.height)
        y += height
    return placed


def _panel(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {
            "mode": "absolute",
            "steps": [{"value": value, "color": colour} for value, colour in panel.thresholds or ((None, BLUE),)],
        },
        "mappings": [
            {"type": "value", "options": {value: {"text": text, "color": colour, "index": index}}}
            for index, (value, text, colour) in enumerate(panel.mappings)
        ],
    }
    if panel.minimum is not None:
        defaults["min"] = panel.minimum
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
    if panel.kind == "timeseries":
        defaults["custom"] = _drawing(panel)
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel),
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": query.expression,
                "legendFormat": query.legend,
                "format": "heatmap" if panel.kind == "heatmap" else "time_series",
                "instant": False,
                "range": True,
            }
            for index, query in enumerate(panel.queries)
        ],
    }


def _drawing(panel: Panel) -> dict[str, Any]:
    return {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 25 if panel.stacked else 5,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if panel.thresholds else "off"},
    }


def _options(panel: Panel) -> dict[str, Any]:
    last = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    if panel.kind == "timeseries":
        legend = {"displayMode": "table", "placement": "bottom", "showLegend": True, "calcs": ["lastNotNull", "max"]}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "heatmap":
        return {
            "calculate": False,
            "color": {"mode": "scheme", "scheme": "Spectral", "reverse": True, "scale": "exponential", "exponent": 0.5},
            "yAxis": {"axisPlacement": "left", "unit": panel.unit},
            "rowsFrame": {"layout": "auto"},
            "legend": {"show": True},
            "tooltip": {"mode": "single", "yHistogram": True},
        }
    if panel.kind == "stat":
        return {"reduceOptions": last, "colorMode": "background", "graphMode": "area", "textMode": "auto"}
    if panel.kind == "bargauge":
        return {"reduceOptions": last, "orientation": "horizontal", "displayMode": "basic", "showUnfilled": True}
    return {"reduceOptions": last, "showThresholdLabels": False, "showThresholdMarkers": True}


def _datasource() -> dict[str, Any]:
    """Its name is that which Ray's dashboard sets."""
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "current": {}}


def _variable(variable: Variable) -> dict[str, Any]:
    query = f"label_values({variable.series.gauge()}, {variable.of})"
    return {
        "name": variable.name,
        "label": variable.label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": variable.name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }
