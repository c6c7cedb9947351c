"""Measure a running server: requests at a rate, and how long their answers take.

The load is open: send times are drawn beforehand and hold however slow the answers are, unless
--max-concurrency limits how many are under way. Times count from the sending of a request. Several
rates or concurrencies make one run each. Flags and figures have the names of `vllm bench serve`.
"""

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from jaxserve.commands.load.arguments import SAMPLING, Plan, add_load_arguments
from jaxserve.commands.load.figures import METRICS
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from jaxserve.commands.load.requests import Dataset, LoadRequest
    from jaxserve.commands.load.run import Record
    from jaxserve.commands.remote.api import Api
    from jaxserve.frontend.tokenizer import Tokenizer

USAGE = "[--base-url URL] [flags]"
_SALTS_A_RUN = 3  # of the requests themselves, the test before and the warm-up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    plan = Plan.of(args)

    import asyncio

    from jaxserve.commands.load.requests import Dataset
    from jaxserve.commands.remote.opening import open_api

    base = args.base_url or f"http://{_bracketed(args.host)}:{args.port}"
    api = open_api(base, headers=plan.headers)
    dataset = Dataset(args, _tokenizer(args.tokenizer))
    _allow_many_sockets()

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_bench(args, plan, api, dataset))


async def _bench(args: argparse.Namespace, plan: Plan, api: "Api", dataset: "Dataset") -> int:
    from jaxserve.commands.load import figures, saving

    try:
        await _wait_until_ready(api, args.ready_check_timeout_sec)
        model = args.model or await api.first_model()
        results = []
        records: list[Record] = []
        for i, (rate, limit) in enumerate(plan.loads):
            load = Load(args, plan, api, dataset, args.served_model_name or model, i)
            if i == 0:
                await load.test()
            await load.warm_up(limit)
            records, duration_s = await load.measure(rate, limit)
            result = figures.figures(
                records,
                duration_s,
                metrics=plan.metrics,
                percentiles=plan.percentiles,
                goodput=plan.goodput,
            )
            print(
                figures.block(
                    result, rate=rate, max_concurrency=limit, percentiles=plan.percentiles
                ),
                flush=True,
            )
            _tell_troubles(records, limit)
            head = saving.head(args, plan, model, rate, limit)
            results.append(head | result)
            if args.save_result:
                path = saving.save(args, plan, head | result, rate, limit)
                _say(f"saved: {path}")
    finally:
        api.close()
    if len(results) > 1:
        saving.print_sweep(results)
    if args.plot:
        from jaxserve.commands.load.plot import plot

        plot(args.plot, results, {name: figures.samples_ms(name, records) for name in METRICS})
        _say(f"drawn: {args.plot}")
    return 0 if any(result["completed"] for result in results) else 1


class Load:
    """Makes the requests of one run and sends them."""

    def __init__(
        self,
        args: argparse.Namespace,
        plan: Plan,
        api: "Api",
        dataset: "Dataset",
        model: str,
        index: int,
    ) -> None:
        self._args = args
        self._path = plan.path
        self._api = api
        self._dataset = dataset
        self._model = model
        self._index = index

    async def test(self) -> None:
        """Sends one request, so that a mistake shows at once.

        Raises:
            JaxserveError: It is not answered well.
        """
        (record,), _ = await self._send(self._dataset.make(1, self._salt(1)), [0.0], None)
        if record.error:
            raise JaxserveError(f"the first request failed: {record.error}")

    async def warm_up(self, limit: int | None) -> None:
        num = self._args.num_warmups
        if num > 0:
            requests = self._dataset.make(num, self._salt(2))
            await self._send(requests, [0.0] * num, limit)

    async def measure(self, rate: float, limit: int | None) -> "tuple[list[Record], float]":
        from tqdm import tqdm

        from jaxserve.commands.load.run import arrivals

        args = self._args
        requests = self._dataset.make(args.num_prompts, self._salt(0))
        times = arrivals(len(requests), rate, args.burstiness, args.seed)
        shown = sys.stderr.isatty() and not args.disable_tqdm
        with tqdm(total=len(requests), disable=not shown) as bar:
            records, duration_s = await self._send(requests, times, limit, bar)
        for record, request in zip(records, requests, strict=True):
            if record.num_input is None:
                record.num_input = request.num_prompt_tokens
            if record.num_output is None:
                count = self._dataset.count(record.text)
                record.num_output = len(record.chunks_s) if count is None else count
        return records, duration_s

    def _salt(self, use: int) -> int:
        return self._index * _SALTS_A_RUN + use

    async def _send(
        self, requests: "list[LoadRequest]", times: list[float], limit: int | None, bar: Any = None
    ) -> "tuple[list[Record], float]":
        from jaxserve.commands.load.run import run_load

        prefix = f"{self._args.request_id_prefix}{time.time_ns():x}-"
        return await run_load(
            self._api,
            self._path,
            [self._body(request) for request in requests],
            times,
            max_concurrency=limit,
            request_ids=[f"{prefix}{i}" for i in range(len(requests))],
            on_done=(lambda: None) if bar is None else bar.update,
        )

    def _body(self, request: "LoadRequest") -> bytes:
        args = self._args
        body: dict[str, Any] = {"model": self._model}
        if args.backend == "openai":
            body |= {"prompt": request.prompt, "max_tokens": request.output_len}
        else:
            body["messages"] = [{"role": "user", "content": request.prompt}]
            body["max_completion_tokens"] = request.output_len
        body |= {"temperature": 0.0, "stream": True, "stream_options": {"include_usage": True}}
        body |= {n: value for n in SAMPLING if (value := getattr(args, n)) is not None}
        if args.ignore_eos or args.dataset_name == "random":
            body["ignore_eos"] = True
        return json.dumps(body | (args.extra_body or {})).encode()


async def _wait_until_ready(api: "Api", timeout_s: float) -> None:
    import asyncio

    end = time.monotonic() + timeout_s
    while True:
        try:
            await api.first_model()
            return
        except JaxserveError as error:
            if getattr(error, "status", 0):  # it answers; whether well, the first request shows
                return
            if time.monotonic() >= end:
                raise JaxserveError(
                    f"{error}; start one with `jaxserve serve`, or pass --base-url or --port"
                ) from None
        await asyncio.sleep(1)


def _tokenizer(model: str | None) -> "Tokenizer | None":
    if model is None:
        return None
    from jaxserve.checkpoint import open_checkpoint
    from jaxserve.frontend.tokenizer_files import load_tokenizer

    return load_tokenizer(open_checkpoint(model, load_format="dummy"))


def _tell_troubles(records: "list[Record]", limit: int | None) -> None:
    """Errors, each once; and when the load was not what was asked for."""
    errors = [record.error for record in records if record.error]
    for error in list(dict.fromkeys(errors))[:5]:
        _say(f"{errors.count(error)} failed: {error}")
    late_s = max(record.delay_s for record in records)
    if limit is None and late_s > 0.1:
        _say(
            f"warning: a request was sent {1e3 * late_s:.0f} ms late; this machine is too slow for "
            "this load"
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _allow_many_sockets() -> None:
    """A request has a connection of its own while it runs; the usual limit is 1,024 files."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _say(text: str) -> None:
    print(f"jaxserve: {text}", file=sys.stderr, flush=True)
