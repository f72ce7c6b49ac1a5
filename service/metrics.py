"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.admission import Admission
from service.errors import ServerError
from service.models import Models

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """All figures of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.audio = Counter(
            "voxgate_audio_seconds", "Audio recognised.", ["kind"], registry=self.registry
        )
        self.results = Counter("voxgate_results", "Results sent.", ["kind"], registry=self.registry)
        self.requests = Counter(
            "voxgate_requests", "Calls that ended.", ["method", "code"], registry=self.registry
        )
        self.stream_step = Histogram(
            "voxgate_stream_lag_seconds",
            "From the arrival of a piece of a stream to the end of its processing.",
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._queue_wait = Histogram(
            "voxgate_queue_wait_seconds",
            "Wait for a turn at the acoustic model.",
            ["kind"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._batch_size = Histogram(
            "voxgate_batch_size",
            "Windows or utterances run at once.",
            ["kind"],
            registry=self.registry,
            buckets=_SIZES,
        )

    def observe_batch(self, kind: str, size: int, waited_s: float) -> None:
        """Note a batch of the scheduler."""
        self._batch_size.labels(kind).observe(size)
        self._queue_wait.labels(kind).observe(waited_s)

    def watch(self, models: Models, admission: Admission, *, provider: str) -> None:
        """Show what these know whenever the figures are read."""
        self.registry.register(_State(models, admission, provider))

    def open_port(self, host: str, port: int) -> Callable[[], None]:
        """Serve the figures over HTTP at `/metrics`.

        Returns:
            What closes the port.

        Raises:
            ServerError: the port cannot be opened.
        """
        try:
            server, thread = start_http_server(port, addr=host, registry=self.registry)
        except OSError as error:
            raise ServerError(
                f"cannot serve metrics on {host}:{port} ({error}); choose another --metrics-port"
            ) from error

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return close


class _State(Collector):
    """Figures that somebody else keeps."""

    def __init__(self, models: Models, admission: Admission, provider: str) -> None:
        self._models = models
        self._admission = admission
        self._provider = provider

    def collect(self) -> Iterator[Metric]:
        """All of them, as they are now."""
        under_way = GaugeMetricFamily("voxgate_open_calls", "Calls under way.", labels=["kind"])
        under_way.add_metric(["stream"], self._admission.n_streams)
        under_way.add_metric(["recording"], self._admission.n_recordings)
        yield under_way
        yield GaugeMetricFamily(
            "voxgate_queued_audio_seconds",
            "Audio of recordings that wait or are being recognised.",
            value=self._admission.queued_audio_s,
        )
        loaded = GaugeMetricFamily(
            "voxgate_model_info",
            "Models that new requests can have, and where they run.",
            labels=["model", "language", "provider"],
        )
        stages = CounterMetricFamily(
            "voxgate_stage_seconds", "Work by stage.", labels=["model", "stage"]
        )
        for model in self._models.loaded:
            loaded.add_metric([model.name, model.language, self._provider], 1)
            for stage, seconds in vars(model.live.timings).items():
                stages.add_metric([model.name, stage.removesuffix("_s")], seconds)
        yield loaded
        yield stages
