"""All that watches an engine while it serves: metrics, logs, traces, the watchdog."""

import logging

from jaxserve.async_llm import AsyncLLM
from jaxserve.server.metrics import Metrics
from jaxserve.server.request_log import RequestLog
from jaxserve.server.stats_log import StatsLog
from jaxserve.server.tracing import Tracing
from jaxserve.server.watchdog import Watchdog
from jaxserve.server_config import ServerConfig

logger = logging.getLogger(__name__)


class Telemetry:
    """Made before traffic; `close` sends and logs what is left.

    Args:
        llm: Whose requests are watched.
        model_name: Label of the metrics, attribute of the traces.

    Raises:
        ConfigError: Traces are asked for, and OpenTelemetry is not installed.
    """

    def __init__(self, llm: AsyncLLM, config: ServerConfig, model_name: str) -> None:
        client = llm.client
        summary = llm.summary()
        self.metrics = Metrics(
            model_name=model_name,
            max_model_len=llm.max_model_len,
            prefix=config.metrics_prefix,
            cache_config={
                "block_size": summary.get("page size", ""),
                "num_gpu_blocks": summary.get("KV pages", ""),
                "cache_dtype": llm.config.kv_cache_dtype,
                "gpu_memory_utilization": llm.config.gpu_memory_utilization,
                "enable_prefix_caching": llm.config.enable_prefix_caching,
            },
            late_compiles=lambda: client.engine.num_late_compiles,
        )
        self.watchdog = Watchdog(
            lambda: client.num_unfinished, timeout_s=config.engine_step_timeout_s
        )
        self.request_log = RequestLog(
            log_requests=config.enable_log_requests,
            log_outputs=config.enable_log_outputs,
            max_log_len=config.max_log_len,
        )
        endpoint = config.otlp_traces_endpoint
        self.tracing = None if endpoint is None else Tracing(endpoint, model_name=model_name)
        for part in (self.metrics, self.watchdog, self.request_log, self.tracing):
            if part is not None:
                part.watch(client.observers)
        self._stats_log = None
        if not llm.config.disable_log_stats:
            self._stats_log = StatsLog(self.metrics.totals)
            self._stats_log.start()

    def close(self) -> None:
        """May be called again."""
        if self._stats_log is not None:
            self._stats_log.stop()
        if self.tracing is not None:
            self.tracing.close()
