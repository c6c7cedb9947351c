"""The runner: owns the device's state, launches steps and reads their results."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxserve.checkpoint import Checkpoint
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.layers.kernels import Chip, Kernels, choose_backend, kv_pages_shape, verify
from jaxserve.models import registry
from jaxserve.request import Request
from jaxserve.runner import compile_cache, device, kv_cache
from jaxserve.runner.batch import (
    Layout,
    PageUpdate,
    RowParameters,
    pack,
    pack_masks,
    token_buckets,
)
from jaxserve.runner.executables import CompileCounter, Job, compile_all
from jaxserve.runner.model import split_model
from jaxserve.runner.progress import loading_bar
from jaxserve.runner.results import Launched, PromptScores, read
from jaxserve.runner.row_state import (
    UPLOADED,
    RowShapes,
    flags_of,
    load_sampling,
    load_tokens,
    pack_sampling,
    pack_tokens,
)
from jaxserve.runner.settings import resolve
from jaxserve.runner.step import DeviceState, make_prompt_logprobs, make_step
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, StepPlan, StepResult
from jaxserve.weights.loader import load_weights

INT32 = jnp.dtype(jnp.int32)
_NO_REQUEST = Request(
    request_id="", prompt_token_ids=(), sampling=SamplingParams(), max_tokens=1, eos_token_id=None
)


class Runner:
    """Loads a model onto the device and runs steps there.

    Raises:
        ConfigError: An argument cannot work with this model or device.
        CheckpointError: The weights are not what the config promises.
    """

    def __init__(self, config: EngineConfig, checkpoint: Checkpoint) -> None:
        device.prepare_backend(config.gpu_memory_utilization)
        self._cache_folder = compile_cache.enable(config.compilation_cache_dir)
        self._show_progress = config.show_progress
        self.device = device.detect()
        spec = registry.spec_from_config(checkpoint.config)
        self.settings = resolve(
            config, spec, self.device, model_dtype=_dtype_name(checkpoint.config)
        )
        s = self.settings
        self.spec = spec = spec.for_context(s.max_model_len)
        kinds = spec.attentions(page_size=s.page_size, dtype=s.kv_dtype)
        try:
            self.attention_backend, self.attention_reasons = choose_backend(
                config.attention_backend, *kinds, chip=Chip.of(self.device.device)
            )
            if self.attention_backend.is_kernel:
                for kind in kinds:
                    verify(kind, self.attention_backend, dtype=s.dtype)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._model = split_model(
            self.spec,
            page_size=s.page_size,
            kernels=Kernels(self.attention_backend),
            dtype=s.dtype,
            kv_dtype=s.kv_dtype,
            scan_layers=s.scan_layers,
        )
        names = registry.weight_names(checkpoint.config, spec)
        start = time.perf_counter()
        with loading_bar(show=config.show_progress) as progress:
            loaded = load_weights(
                checkpoint,
                self._model.sources(names, checkpoint.tensors),
                dtype=s.dtype,
                load_format=config.load_format,
                seed=config.seed,
                ignored=names.ignored,
                progress=progress,
            )
        self._weights: list[Array] = [loaded.pop(name) for name in self._model.names]
        jax.block_until_ready(self._weights)
        self.load_s = time.perf_counter() - start
        self.weight_bytes = sum(w.nbytes for w in self._weights)
        self.num_parameters = self._model.num_parameters
        self._kv_specs = tuple(
            group.attention.attention(page_size=s.page_size, dtype=s.kv_dtype).kv
            for group in spec.kv_groups
        )
        self.group_pages = tuple(
            kv_cache.GroupPages.of(
                group.window,
                bytes_a_page=kv_cache.page_bytes(
                    kv, group.num_layers, backend=self.attention_backend
                ),
                page_size=s.page_size,
                max_model_len=s.max_model_len,
                max_num_seqs=s.max_num_seqs,
                max_num_batched_tokens=s.max_num_batched_tokens,
            )
            for kv, group in zip(self._kv_specs, spec.kv_groups, strict=True)
        )
        self._shapes = RowShapes(
            max_num_seqs=s.max_num_seqs,
            max_model_len=s.max_model_len,
            page_size=s.page_size,
            vocab_size=spec.vocab_size,
            num_groups=len(spec.kv_groups),
        )
        buckets = token_buckets(s.max_num_batched_tokens, config.cudagraph_capture_sizes)
        self._layouts = {t: Layout(t, self._shapes) for t in buckets}
        self.kv_groups = kv_cache.size_groups(
            config,
            self.device,
            self.group_pages,
            max_model_len=s.max_model_len,
            weight_bytes=self.weight_bytes,
            step_bytes=self._estimated_step_bytes(),
        )
        self.kv_bytes = kv_cache.kv_bytes(self.group_pages, self.kv_groups)
        self._none: tuple[tuple[int, ...], ...] = ((),) * self._shapes.num_groups
        self.compiles = CompileCounter()
        self.compile_s = 0.0
        self._executables: dict[str, Any] = {}
        self._parameters = RowParameters(self._shapes)
        self._held: dict[int, list[list[int]]] = {}  # row -> per group, the pages it holds
        self._requests: dict[int, Request] = {}  # row -> request
        self._last_finished_s = 0.0
        self._state = self._allocate()
        # What steps without a grammar are given, made once: by number of rows.
        self._no_masks = {
            rows: jnp.zeros((rows, self._shapes.mask_words), jnp.uint32, device=self.device.device)
            for rows in {layout.num_rows for layout in self._layouts.values()}
        }
        self._compile(config)

    # Start-up

    def _estimated_step_bytes(self) -> int:
        """Temporaries of the largest step: activations, and float32 logits in a few copies."""
        s, m = self.settings, self.spec
        width = 4 * m.hidden_size + max(
            2 * layer.attention.activation_size + layer.ffn.activation_size for layer in m.layers
        )
        rows = min(s.max_num_batched_tokens, s.max_num_seqs)
        return s.max_num_batched_tokens * width * 4 + 5 * rows * m.vocab_size * 4 + (256 << 20)

    def _abstract_state(self) -> DeviceState:
        caches = tuple(
            kv_pages_shape(kv, group.num_layers, sizes.num_blocks, backend=self.attention_backend)
            for kv, group, sizes in zip(
                self._kv_specs, self.spec.kv_groups, self.kv_groups, strict=True
            )
        )
        return DeviceState(caches, self._shapes.abstract())  # pyright: ignore[reportArgumentType]

    def _allocate(self) -> DeviceState:
        shapes = self._abstract_state()
        with jax.default_device(self.device.device):
            return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))()

    def _compile(self, config: EngineConfig) -> None:
        s, state = self.settings, self._abstract_state()
        weights = list(self._model.shapes)

        def ints(size: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((size,), INT32)

        def loader(name: str, function: Callable, size: int) -> Job:
            def load(state: DeviceState, blob: Array) -> DeviceState:
                return state._replace(rows=function(self._shapes, state.rows, blob))

            return Job(name, load, (state, ints(size)), donate=(0,))

        jobs = [
            loader("load_tokens", load_tokens, pack_tokens(self._shapes, 0, self._none, ()).size),
            loader(
                "load_sampling", load_sampling, pack_sampling(self._shapes, 0, _NO_REQUEST).size
            ),
        ]
        for t, layout in sorted(self._layouts.items(), reverse=True):
            step = make_step(
                layout,
                self._model,
                num_pages=tuple(group.num_blocks for group in self.kv_groups),
                max_logprobs=s.max_logprobs,
            )
            masks = jax.ShapeDtypeStruct((layout.num_rows, self._shapes.mask_words), jnp.uint32)
            arguments = (weights, state, ints(layout.size), masks)
            jobs.append(Job(f"step_{t}", step, arguments, donate=(1,)))
            hidden = jax.ShapeDtypeStruct((t, self.spec.hidden_size), s.dtype)
            score = make_prompt_logprobs(t, self._model, max_logprobs=s.max_logprobs)
            jobs.append(Job(f"prompt_logprobs_{t}", score, (weights, hidden, ints(t))))
        float32 = s.dtype == jnp.float32
        self._executables, self.compile_s = compile_all(
            jobs,
            platform=self.device.platform,
            precision="highest" if float32 else None,
            show_progress=self._show_progress,
        )
        compile_cache.seal(self._cache_folder)
        self._check_memory(config)

    def _check_memory(self, config: EngineConfig) -> None:
        """Refuses to start with a step that the device's memory cannot hold."""
        limit = self.device.memory_limit_bytes(config.gpu_memory_utilization)
        if limit is None:
            return
        step_bytes = max(m.temp_size_in_bytes for m in self.memory_analysis().values())
        budget = limit - self.weight_bytes - step_bytes
        if self.kv_bytes > budget:
            fitting = kv_cache.fitting_override(self.group_pages, budget)
            raise ConfigError(
                f"the largest step needs {step_bytes / device.GIB:.2f} GiB beside "
                f"{self.weight_bytes / device.GIB:.2f} GiB of weights and "
                f"{self.kv_bytes / device.GIB:.2f} GiB of KV cache: more than the "
                f"{limit / device.GIB:.2f} GiB that may be used. Lower max_num_batched_tokens"
                + (f", or pass num_gpu_blocks_override={fitting}" if fitting > 1 else "")
            )

    def warm_up(self) -> None:
        """Runs every executable once, on the idle row and the null page.

        XLA:CPU's first run of each costs a quarter of a second more than the next.
        """
        idle, there = self.settings.max_num_seqs, self.device.device
        self._load("load_tokens", pack_tokens(self._shapes, idle, self._none, ()))
        self._load("load_sampling", pack_sampling(self._shapes, idle, _NO_REQUEST))
        no_pages: tuple[list[PageUpdate], ...] = ([],) * self._shapes.num_groups
        empty = StepPlan(rows=(), new_rows=(), num_tokens=0)
        for t, layout in self._layouts.items():
            blob = jax.device_put(pack(layout, empty, self._parameters, no_pages), there)
            self._state, _, hidden = self._executables[f"step_{t}"](
                self._weights, self._state, blob, self._no_masks[layout.num_rows]
            )
            targets = jax.device_put(np.zeros(t, np.int32), there)
            score = self._executables[f"prompt_logprobs_{t}"]
            jax.block_until_ready(score(self._weights, hidden, targets))

    def memory_analysis(self) -> dict[int, Any]:
        """XLA's memory figures for each token bucket's step."""
        return {t: self._executables[f"step_{t}"].memory_analysis() for t in self._layouts}

    # Steps

    def launch(self, plan: StepPlan) -> Launched:
        """Sends a step to the device and returns at once."""
        bucket = next(t for t in self._layouts if t >= plan.num_tokens)
        layout, there = self._layouts[bucket], self.device.device
        launched_s = time.monotonic()
        updates = self._take_pages(plan)
        blob = pack(layout, plan, self._parameters, updates)
        masks = self._no_masks[layout.num_rows]
        if plan.token_masks:
            masks = jax.device_put(pack_masks(layout, plan), there)
        self._state, sampled, hidden = self._executables[f"step_{bucket}"](
            self._weights, self._state, jax.device_put(blob, there), masks
        )
        sampled.token_ids.copy_to_host_async()
        scores = None
        if any(row.wants_prompt_logprobs for row in plan.rows):
            targets, spans = self._prompt_targets(plan, bucket)
            score = self._executables[f"prompt_logprobs_{bucket}"]
            ids, values, ranks = score(self._weights, hidden, jax.device_put(targets, there))
            scores = PromptScores(ids, values, ranks, spans)
        num_logprobs = layout.views(blob)["num_logprobs"]
        pools = any(row.pools for row in plan.rows)
        return Launched(plan, sampled, num_logprobs, scores, hidden if pools else None, launched_s)

    def wait(self, launched: Launched) -> StepResult:
        """Blocks until a step is done and returns what it produced."""
        rows = read(launched)
        finished_s = time.monotonic()
        device_s = finished_s - max(launched.launched_s, self._last_finished_s)
        self._last_finished_s = finished_s
        return StepResult(rows=rows, finished_s=finished_s, device_s=device_s)

    def close(self) -> None:
        """Waits for the last step, then frees the device's memory."""
        # An array that XLA's threads still write must not go, least of all at interpreter exit.
        jax.block_until_ready([x for x in jax.tree.leaves(self._state) if not x.is_deleted()])
        self.compiles.close()
        for array in jax.tree.leaves((self._weights, self._state, self._no_masks)):
            if not array.is_deleted():
                array.delete()
        self._executables = {}

    # Rows

    def _take_pages(self, plan: StepPlan) -> tuple[list[PageUpdate], ...]:
        """Brings the rows' state up to date; returns the new pages that the step itself enters."""
        for new in plan.new_rows:
            self._enter(new)
        whole = {new.row: new for new in plan.new_rows if any(new.block_ids)}
        updates: tuple[list[PageUpdate], ...] = tuple([] for _ in range(self._shapes.num_groups))
        for row in plan.rows:
            held = self._held[row.row]
            for group, pages in enumerate(row.new_block_ids):
                if pages:
                    if row.row not in whole:
                        first = len(held[group])
                        updates[group].extend(
                            PageUpdate(row.row, first + i, page) for i, page in enumerate(pages)
                        )
                    held[group].extend(pages)
        for new in whole.values():
            blocks = tuple(self._held[new.row])
            self._load("load_tokens", pack_tokens(self._shapes, new.row, blocks, new.token_ids))
        return updates

    def _enter(self, new: NewRow) -> None:
        """Takes a row over for a sequence."""
        request, p = new.request, new.request.sampling
        self._held[new.row] = [list(ids) for ids in new.block_ids]
        self._requests[new.row] = request
        flags = flags_of(request)
        seed = (request.seed + new.choice) & (2**64 - 1)
        low, high = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint32).view(np.int32)
        prompt_len = len(request.prompt_token_ids)
        num_logprobs = -1 if p.logprobs is None else p.logprobs
        if p.logprobs == -1:
            num_logprobs = self.settings.max_logprobs  # the whole vocabulary
        self._parameters.set(
            new.row,
            prompt_lens=prompt_len,
            min_lens=prompt_len + p.min_tokens,
            flags=flags,
            top_k=max(p.top_k, 0),
            seed_low=low,
            seed_high=high,
            num_logprobs=num_logprobs,
            temperature=0.0 if p.greedy else p.temperature,
            top_p=p.top_p,
            min_p=p.min_p,
            presence=p.presence_penalty,
            frequency=p.frequency_penalty,
            repetition=p.repetition_penalty,
        )
        if flags & UPLOADED:
            self._load("load_sampling", pack_sampling(self._shapes, new.row, request))

    def _load(self, name: str, blob: np.ndarray) -> None:
        blob_there = jax.device_put(blob, self.device.device)
        self._state = self._executables[name](self._state, blob_there)

    def _prompt_targets(
        self, plan: StepPlan, bucket: int
    ) -> tuple[np.ndarray, dict[int, tuple[int, int, int]]]:
        """The prompt token after each token of the step, where one follows; and whose is where."""
        targets = np.zeros(bucket, np.int32)
        spans, at = {}, 0
        for row in plan.rows:
            if row.wants_prompt_logprobs:
                request = self._requests[row.row]
                first = row.num_computed_tokens + 1
                following = request.prompt_token_ids[first : first + row.num_tokens]
                targets[at : at + len(following)] = following
                wanted = request.sampling.prompt_logprobs or 0
                count = self.settings.max_logprobs if wanted == -1 else wanted
                spans[row.seq_id] = (at, at + len(following), count)
            at += row.num_tokens
        return targets, spans


def _dtype_name(config: Mapping[str, Any]) -> str | None:
    return config.get("dtype") or config.get("torch_dtype")
