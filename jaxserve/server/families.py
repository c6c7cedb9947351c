"""Figures as prometheus-client's metric families."""

from collections.abc import Mapping

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from jaxserve.server.histogram import Histogram


class Families:
    """Makes families that share a prefix and labels.

    Args:
        prefix: Before the colon of every name.
        labels: Of every sample.
    """

    def __init__(self, prefix: str, labels: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._names = tuple(labels)
        self._values = tuple(labels.values())

    def gauge(
        self, name: str, help_text: str, value: float | Mapping[str, float], by: str | None = None
    ) -> Metric:
        """One value, or one for each value of the label `by`."""
        return self._fill(GaugeMetricFamily, name, help_text, value, by)

    def counter(
        self, name: str, help_text: str, value: float | Mapping[str, float], by: str | None = None
    ) -> Metric:
        """As `gauge`; its samples end in _total."""
        return self._fill(CounterMetricFamily, name, help_text, value, by)

    def histogram(self, name: str, help_text: str, values: Histogram) -> Metric:
        family = HistogramMetricFamily(f"{self._prefix}:{name}", help_text, labels=self._names)
        family.add_metric(self._values, [*values.buckets()], values.sum)
        return family

    def info(self, name: str, help_text: str, facts: Mapping[str, str]) -> Metric:
        """A gauge that is 1 and has facts as labels."""
        labels = {**facts, **dict(zip(self._names, self._values, strict=True))}
        family = GaugeMetricFamily(f"{self._prefix}:{name}", help_text, labels=[*labels])
        family.add_metric([*labels.values()], 1)
        return family

    def _fill(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        help_text: str,
        value: float | Mapping[str, float],
        by: str | None,
    ) -> Metric:
        labels = self._names if by is None else (*self._names, by)
        family = kind(f"{self._prefix}:{name}", help_text, labels=labels)
        if isinstance(value, Mapping):
            for label, number in value.items():
                family.add_metric((*self._values, label), number)
        else:
            family.add_metric(self._values, value)
        return family
