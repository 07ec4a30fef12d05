"""A headless Chromium, driven by the DevTools protocol over its websocket.

Knows pages, keys and pictures; knows nothing of what they show. It resolves no name: a page that
asks for anything beyond this machine gets an error, and the request is noted.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

BINARIES = ("chromium", "chromium-browser", "google-chrome")
START_S = 60.0
WAIT_S = 60.0
OPTIONS = (
    "--headless=new", "--remote-debugging-port=0", "--no-first-run", "--no-default-browser-check",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-extensions", "--disable-gpu", "--hide-scrollbars", "--mute-audio", "--no-sandbox",
    "--disable-dev-shm-usage", "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


class BrowserFailed(Exception):
    """The browser does not start, or a page does not do what it was asked."""


def binary() -> str | None:
    """The browser of this machine, None where there is none."""
    return next((found for name in BINARIES if (found := shutil.which(name))), None)


@dataclass
class Page:
    """One tab, and what happened in it: messages of its console, requests, uncaught errors."""

    call: Callable[..., Any]
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def heard(self, method: str, told: dict[str, Any]) -> None:
        """An event of the protocol."""
        if method == "Runtime.consoleAPICalled":
            texts = (str(one.get("value", one.get("description"))) for one in told["args"])
            self.messages.append(f"{told['type']}: {' '.join(texts)}")
        elif method == "Runtime.exceptionThrown":
            found = told["exceptionDetails"]
            text = found.get("exception", {}).get("description", found["text"])
            self.messages.append(f"uncaught: {text}")
        elif method == "Log.entryAdded":
            entry = told["entry"]
            self.messages.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])

    async def size(
        self, width: int, height: int, *, dark: bool = False, still: bool = True
    ) -> None:
        """The window, and what the system is said to prefer."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def open(self, url: str) -> None:
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def value(self, script: str) -> Any:
        """What an expression comes to, as JSON; of a promise, what it is fulfilled with."""
        told = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in told:
            raise BrowserFailed(f"{script}: {told['exceptionDetails']}")
        return told["result"].get("value")

    async def until(self, script: str, limit_s: float = WAIT_S) -> None:
        """Asks until the expression is true. Raises BrowserFailed."""
        try:
            async with asyncio.timeout(limit_s):
                while not await self.value(f"Boolean({script})"):  # noqa: ASYNC110  # no event
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.value("document.body.innerText.slice(0, 1500)")
            raise BrowserFailed(f"never true: {script}\n{text}\n{self.messages[-5:]}") from None

    async def press(self, key: str, code: int = 0) -> None:
        """One key of the keyboard: `Tab`, `Enter`, `Escape`."""
        text = "\r" if key == "Enter" else ""
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code or KEYS[key]}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **shared)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def picture(self, file: Path) -> None:
        """All of the page, not only what is in sight, as a PNG as wide as the window."""
        # No bar is drawn here, and so no place is to be kept for one.
        await self.value("document.documentElement.style.scrollbarGutter = 'auto'")
        told = await self.call("Page.getLayoutMetrics")
        area = told["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": area["width"], "height": area["height"], "scale": 1}
        shot = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        file.write_bytes(base64.b64decode(shot["data"]))  # noqa: ASYNC240  # one small file


KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "Space": 32}


@dataclass
class Browser:
    """One running browser."""

    socket: aiohttp.ClientWebSocketResponse
    pages: dict[str, Page] = field(default_factory=dict)
    waiting: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Raises BrowserFailed."""
        number = next(self.numbers)
        future = self.waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self.socket.send_json(message | ({"sessionId": session} if session else {}))
        told = await asyncio.wait_for(future, WAIT_S)
        if "error" in told:
            raise BrowserFailed(f"{method}: {told['error']['message']}")
        return told["result"]

    async def listen(self) -> None:
        """Until the browser ends."""
        async for message in self.socket:
            told = message.json()
            if (number := told.get("id")) is not None:
                self.waiting.pop(number).set_result(told)
            elif (page := self.pages.get(told.get("sessionId", ""))) is not None:
                page.heard(told["method"], told["params"])

    async def page(self) -> Page:
        """A new tab, empty."""
        made = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=made["targetId"], flatten=True)
        session = attached["sessionId"]

        async def call(method: str, **parameters: Any) -> Any:
            return await self.call(method, session, **parameters)

        page = self.pages[session] = Page(call)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await call(f"{domain}.enable")
        return page


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Starts one, and ends it. Raises BrowserFailed where there is none."""
    program = binary()
    if program is None:
        raise BrowserFailed(f"none of {', '.join(BINARIES)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            program, *OPTIONS, f"--user-data-dir={folder}", "about:blank",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = await _address(Path(folder), process)
            async with (
                aiohttp.ClientSession() as session,
                session.ws_connect(address, max_msg_size=0) as socket,
            ):
                found = Browser(socket)
                listening = asyncio.create_task(found.listen())
                try:
                    yield found
                    await found.call("Browser.close")
                finally:
                    listening.cancel()
                    await asyncio.gather(listening, return_exceptions=True)
        finally:
            if process.returncode is None:
                try:
                    await asyncio.wait_for(process.wait(), 5)
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _address(folder: Path, process: asyncio.subprocess.Process) -> str:
    """Where it listens: it writes that into its folder once it does."""
    file = folder / "DevToolsActivePort"
    try:
        async with asyncio.timeout(START_S):
            while not file.exists() or file.read_text().count("\n") < 1:
                if process.returncode is not None:
                    raise BrowserFailed(f"the browser ended with {process.returncode}")
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise BrowserFailed(f"the browser did not listen within {START_S:.0f} s") from None
    port, path = file.read_text().split("\n")[:2]
    return f"ws://127.0.0.1:{port}{path}"
