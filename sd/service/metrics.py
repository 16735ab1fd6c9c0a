"""What the service counts, in the text that Prometheus reads."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, Summary, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]


class Metrics:
    """Of one app, in a registry of its own."""

    def __init__(self, waiting: Callable[[], int], drawing: Callable[[], bool], device: object = None):
        """waiting, drawing: the queue now. device: the GPU whose memory is told, a torch.device; None: none is."""
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("sd_requests", "Requests, by path and answer", ["path", "status"], **own)
        self.seconds = Summary("sd_request_seconds", "From a request's head to its answer's end", ["path"], **own)
        self.pictures = Counter("sd_pictures", "Pictures drawn", **own)
        self.stages = Counter("sd_stage_seconds", "Seconds of drawing, by stage", ["stage"], **own)
        Gauge("sd_queue_waiting", "Requests that wait", **own).set_function(waiting)
        Gauge("sd_drawing", "Whether a picture is drawn", **own).set_function(lambda: float(drawing()))
        ProcessCollector(registry=self.registry)
        if device is not None:
            memory = Gauge("sd_gpu_memory_bytes", "What tensors take on the GPU", **own)
            memory.set_function(lambda: _allocated(device))

    def answered(self, path: str, status: int, seconds: float) -> None:
        self.requests.labels(path, status).inc()
        self.seconds.labels(path).observe(seconds)

    def drawn(self, times: Mapping[str, float]) -> None:
        """A picture, with the seconds of its stages."""
        self.pictures.inc()
        for stage, seconds in times.items():
            self.stages.labels(stage).inc(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def _allocated(device: object) -> int:
    import torch

    return torch.cuda.memory_allocated(device)
