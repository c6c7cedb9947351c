"""How many pages the KV cache gets, and where its memory comes from."""

from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.layers.kernels import Backend, KVSpec, kv_pages_shape
from jaxserve.runner.device import GIB, DeviceInfo, cpu_kv_bytes


def page_bytes(spec: KVSpec, num_layers: int, *, backend: Backend) -> int:
    """Bytes of one page in all layers."""
    shape = kv_pages_shape(spec, num_layers, 1, backend=backend)
    return shape.size * shape.dtype.itemsize


def num_pages(
    config: EngineConfig,
    device: DeviceInfo,
    *,
    bytes_a_page: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    weight_bytes: int,
    step_bytes: int,
) -> int:
    """Pages to allocate, the null page included.

    In this order: `num_gpu_blocks_override`, `kv_cache_memory_bytes`, what a device has left of
    its share after weights and a step's temporaries; on the CPU a share of the free memory. Never
    more than all rows can fill at full length, but for the override.

    Raises:
        ConfigError: Not even one sequence of `max_model_len` tokens fits.
    """
    longest = -(-max_model_len // page_size)
    if config.num_gpu_blocks_override is not None:
        if config.num_gpu_blocks_override < 2:
            raise ConfigError(
                f"num_gpu_blocks_override={config.num_gpu_blocks_override} leaves no page to use "
                "beside the null page; use at least 2"
            )
        return config.num_gpu_blocks_override
    budget = config.kv_cache_memory_bytes
    if budget is None:
        limit = device.memory_limit_bytes(config.gpu_memory_utilization)
        budget = cpu_kv_bytes() if limit is None else limit - weight_bytes - step_bytes
    pages = min(budget // bytes_a_page, max_num_seqs * longest + 1)
    if pages < longest + 1:
        needed = (longest + 1) * bytes_a_page
        raise ConfigError(
            f"the KV cache gets {max(budget, 0) / GIB:.2f} GiB, but one sequence of "
            f"max_model_len={max_model_len} tokens needs {needed / GIB:.2f} GiB. "
            "Lower max_model_len, or raise gpu_memory_utilization or kv_cache_memory_bytes"
        )
    return pages
