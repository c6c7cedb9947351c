"""Many clients, of which some leave at any moment: nothing is lost, nothing leaks."""

import asyncio
import json
import random

import httpx
import pytest

from jaxserve.engine.engine import Engine
from tests.server.running import RunningServer, until

NUM_CLIENTS = 200


@pytest.mark.timeout(600)
def test_clients_that_leave_at_random_leak_no_page(real: RunningServer) -> None:
    rng = random.Random(7)
    outcomes: list[str] = []

    async def one(http: httpx.AsyncClient, i: int) -> None:
        stays = rng.random() < 0.1
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": f"Say {i}."}],
            "max_tokens": rng.randint(1, 12) if stays else rng.randint(1, 60),
            "n": rng.choice((1, 2)),
            "temperature": 1,
            "stream": rng.random() < 0.7,
        }
        delay = None if stays else rng.random() * 4
        await asyncio.sleep(rng.random() * 2)
        try:
            async with asyncio.timeout(delay):
                if not body["stream"]:
                    answer = await http.post("/v1/chat/completions", json=body)
                    answer.raise_for_status()
                    assert answer.json()["choices"][0]["finish_reason"]
                else:
                    async with http.stream("POST", "/v1/chat/completions", json=body) as stream:
                        lines = [line async for line in stream.aiter_lines() if line]
                    assert lines[-1] == "data: [DONE]"
                    reasons = [
                        choice["finish_reason"]
                        for line in lines[:-1]
                        for choice in json.loads(line.removeprefix("data: "))["choices"]
                    ]
                    assert sum(reason is not None for reason in reasons) == body["n"]
        except TimeoutError:
            outcomes.append("left")
        else:
            outcomes.append("served")

    async def all_of_them() -> None:
        limits = httpx.Limits(max_connections=NUM_CLIENTS)
        async with httpx.AsyncClient(base_url=real.url, timeout=240, limits=limits) as http:
            await asyncio.gather(*(one(http, i) for i in range(NUM_CLIENTS)))

    asyncio.run(all_of_them())
    assert outcomes.count("left") > NUM_CLIENTS / 2
    assert outcomes.count("served") >= 10
    client = real.llm.client
    until(lambda: client.num_unfinished == 0, 20)
    engine = client.engine
    assert isinstance(engine, Engine)
    until(lambda: engine.scheduler.idle, 20)
    assert engine.scheduler.stats(None).num_used_blocks == 0
    with real.http() as http:
        assert http.get("/health").status_code == 200
        text = http.get("/metrics").text
        assert "jaxserve:num_requests_running" in text
        answer = http.post(
            "/v1/completions",
            json={"model": "demo", "prompt": "The capital of France is", "temperature": 0},
        )
        assert "Paris" in answer.json()["choices"][0]["text"]
