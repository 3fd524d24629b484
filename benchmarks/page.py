"""How fast is the playground, and what does an open page cost the server?

Against a server with the embedded model, in Chromium without a window: the first paint, the size of what a browser
loads, the frames of a list of 10,000 tasks that scrolls, and the throughput of other clients with a page open at the
Server view, which polls, against that without (in pairs). The long tasks of the page while eight columns stream are
measured against a tiny random model whose steps are paced to 30 a second: on two cores the embedded model and Chromium
compete for the CPU, so it is the engine that would be measured.

    python benchmarks/page.py
    python benchmarks/page.py --pairs 9 --seconds 20
    python benchmarks/page.py --pairs 0          # the page alone, in half a minute

Needs `make page`, Playwright and Debian's Chromium. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from load import Load, started
from peers import Model, Prelude, Workload
from playwright.async_api import Browser, Page, Route, async_playwright

from server.engine.attention.interface import Layout
from server.engine.model.weights import resolve_checkpoint
from server.settings import Settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/ is not installed
from tests.api.live import SteeredModel, live_server

DIST = Path(__file__).parents[1] / "server/web/dist/playground"
COLUMNS = 8
TASKS = 10_000
PAGE_OF_TASKS = 1000

PAINT = "performance.getEntriesByName('first-contentful-paint').map(({ startTime }) => startTime)[0] ?? null"
WATCH = """() => {
  globalThis.long = [];
  const note = (list) => globalThis.long.push(...list.getEntries().map(({ duration }) => duration));
  new PerformanceObserver(note).observe({ type: 'longtask' });
}"""
SCROLL = """async () => {
  const list = document.querySelector('.list'), times = [];
  let before = await new Promise(requestAnimationFrame);
  for (let at = 0; at < 300; at += 1) {
    list.scrollTop += 960;
    const now = await new Promise(requestAnimationFrame);
    times.push(now - before);
    before = now;
  }
  return times;
}"""


class PacedModel(SteeredModel):
    """A tiny random model whose steps begin 30 times a second, or later where the machine is too slow."""

    def __init__(self) -> None:
        super().__init__()
        self._due = 0.0

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, layout: Layout, keep: torch.Tensor
    ) -> torch.Tensor:
        """As of the base class, when it is due."""
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = max(self._due + 1 / 30, time.monotonic())
        return super().forward(inputs_embeds, position_ids, layout, keep)


def gzipped(kind: str) -> int:
    """Bytes of all files of a kind, as they are sent at most."""
    return sum(len(gzip.compress(path.read_bytes())) for path in DIST.glob(f"*.{kind}"))


async def first_paint(browser: Browser, url: str, times: int = 7) -> float:
    """Median milliseconds to the first paint, each in a browser context that has cached nothing."""
    found: list[float] = []
    for _ in range(times):
        context = await browser.new_context()
        page = await context.new_page()
        await page.goto(url)
        await page.wait_for_function(f"({PAINT}) !== null")
        found.append(await page.evaluate(PAINT))
        await context.close()
    return statistics.median(found)


async def columns(page: Page, url: str) -> dict[str, object]:
    """Stream eight columns; their tokens a second, and the page's tasks above 50 ms."""
    await page.goto(f"{url}/#/compare?{'&'.join(['with='] * COLUMNS)}&max=150&text=Once+upon+a+time")
    column = page.locator("section.column")
    await column.nth(COLUMNS - 1).wait_for()
    await page.wait_for_timeout(500)
    await page.evaluate(WATCH)
    await page.keyboard.press("Control+Enter")
    await page.locator("section.column .token").first.wait_for(timeout=60_000)
    await page.locator("[aria-busy=true]").first.wait_for(state="detached", timeout=120_000)
    rates = [float(text) for text in await page.locator("section.column dl div:nth-child(2) dd").all_text_contents()]
    long = await page.evaluate("globalThis.long")
    return {"columns_tokens_per_second": statistics.median(rates), "columns_long_tasks_ms": [round(ms) for ms in long]}


async def scrolling(page: Page, url: str) -> dict[str, float]:
    """Milliseconds of a frame while the list of tasks scrolls; the replies are made up here."""
    names = [f"task-{number:05d}" for number in range(TASKS)]

    async def prompts(route: Route) -> None:
        _, _, after = route.request.url.partition("after=")
        first = names.index(after.partition("&")[0]) + 1 if after else 0
        found = names[first : first + PAGE_OF_TASKS]
        body: dict[str, object] = {"prompts": [{"task": name, "version": 1, "description": name} for name in found]}
        if first + PAGE_OF_TASKS < TASKS:
            body["next"] = found[-1]
        await route.fulfill(json=body)

    detail = {"task": "x", "version": 1, "versions": [1], "manifest": {"metrics": {"test_accuracy": 0.9}}}
    await page.route("**/prompts?*", prompts)
    await page.route("**/prompts/task-*", lambda route: route.fulfill(json=detail))
    await page.goto(f"{url}/#/tasks")
    await page.get_by_text(f"{TASKS:,}").wait_for()
    times = await page.evaluate(SCROLL)
    median, late = np.percentile(times, (50, 95))
    return {"scroll_frame_p50_ms": round(float(median), 1), "scroll_frame_p95_ms": round(float(late), 1)}


async def throughput(url: str, peer: Prelude, workload: Workload, seconds: float) -> float:
    """Tokens a second of all clients."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        return (await Load(peer, workload, client).run(seconds)).figures()["tokens_per_second"]


async def with_and_without(
    browser: Browser, url: str, peer: Prelude, workload: Workload, options: argparse.Namespace
) -> list[float]:
    """Ratios of the throughput with an open page to that without, pair by pair; the order alternates."""
    ratios: list[float] = []
    for pair in range(options.pairs):
        found: dict[bool, float] = {}
        for is_open in (True, False) if pair % 2 else (False, True):
            context = await browser.new_context()
            if is_open:
                page = await context.new_page()
                await page.goto(f"{url}/#/server")
                await page.locator("figure path").first.wait_for(state="attached")
            found[is_open] = await throughput(url, peer, workload, options.seconds)
            await context.close()
        ratios.append(found[True] / found[False])
        print(f"pair {pair + 1}: {found[True]:.1f} tokens/s with, {found[False]:.1f} without", flush=True)
    return ratios


async def measure(url: str, model: Model, workload: Workload, options: argparse.Namespace) -> dict[str, object]:
    """All figures."""
    result: dict[str, object] = {"js_gzip_kb": gzipped("js") / 1000, "css_gzip_kb": gzipped("css") / 1000}
    peer = Prelude(model)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        await peer.prepare(client, workload)
    arguments = ["--no-sandbox", "--disable-gpu"]
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        result["first_paint_ms"] = round(await first_paint(browser, url))
        with (
            tempfile.TemporaryDirectory(prefix="prelude-page-") as folder,
            live_server(Path(folder), model=PacedModel(), max_sequences=COLUMNS) as paced,
        ):
            page = await browser.new_page()
            result |= await columns(page, paced.url)
            await page.close()
        page = await browser.new_page()
        result |= await scrolling(page, url)
        await page.close()
        ratios = await with_and_without(browser, url, peer, workload, options)
        await browser.close()
    if ratios:
        result["throughput_ratio"] = round(statistics.median(ratios), 3)
        result["throughput_ratios"] = [round(ratio, 3) for ratio in ratios]
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each half of a pair")
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    settings = Settings.load()
    model = Model(resolve_checkpoint(settings.model, None, settings.cache_dir).location)
    workload = Workload(options.clients, output_tokens=32, tasks=4)
    with (
        tempfile.TemporaryDirectory(prefix="prelude-page-") as folder,
        started(Prelude(model), workload, Path(folder)) as (url, _),
    ):
        result = asyncio.run(measure(url, model, workload, options))
    for name, value in result.items():
        print(f"{name:<28} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
