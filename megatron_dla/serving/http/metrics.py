"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_dla.serving.engine import Engine, Event, Stats

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_GAUGES = {
    "running": "requests that have a slot",
    "waiting": "requests without a slot, those put aside among them",
    "saved": "requests put aside in host memory",
    "slots": "slots of the pool",
    "slots_used": "slots that hold a sequence",
    "pages": "pages of keys and values",
    "pages_used": "pages in use",
    "pool_bytes": "bytes of the pool of states and of the pages",
    "reserved_bytes": "bytes that sequences hold",
    "used_bytes": "bytes of them that hold something",
    "waste": "share of the reserved bytes that hold nothing",
    "generated_per_s": "tokens generated a second, over the last ten",
    "read_per_s": "prompt tokens read a second, over the last ten",
}
_COUNTERS = {
    "generated": "tokens generated",
    "read": "prompt tokens read",
    "prefix_tokens": "prompt tokens that kept prefixes saved",
    "saves": "times that a sequence was put aside",
}


class _EngineCollector(Collector):
    """The engine's own numbers, taken when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"dla_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"dla_{name}", text, value=getattr(stats, name))


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        options: dict[str, Any] = {"registry": self._registry}
        self._ended = Counter("dla_requests", "requests that have ended, by reason", ["reason"], **options)
        self._errors = Counter("dla_answers", "answers of the server, by status", ["status"], **options)
        self._first = Histogram(
            "dla_first_token_seconds", "from the request to its first token", buckets=SECONDS, **options
        )
        self._whole = Histogram("dla_request_seconds", "from the request to its end", buckets=SECONDS, **options)

    def count(self, begin: float, event: Event) -> None:
        """An event of a request that began at `begin` of `time.perf_counter()`."""
        if event.tokens == 1 and event.token is not None:
            self._first.observe(time.perf_counter() - begin)
        if event.finish_reason is not None:
            self._ended.labels(event.finish_reason).inc()
            self._whole.observe(time.perf_counter() - begin)

    def answered(self, status: int) -> None:
        self._errors.labels(str(status)).inc()

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def stats(self) -> Stats:
        return self._engine.stats()
