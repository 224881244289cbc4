"""A headless Chromium for the tests, spoken to over its own protocol: no driver, no package beyond Ray's aiohttp."""

import asyncio
import base64
import contextlib
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Browser:
    """One page. `with Browser(folder) as browser:`; every wait has a limit.

    Args:
        folder: for the browser's profile.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.errors: list[str] = []  # what the page's script threw or logged as an error, and requests elsewhere
        self.requests: list[str] = []
        self._ids = itertools.count(1)

    def __enter__(self):
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--hide-scrollbars", "--remote-debugging-port=0"]
        self._process = subprocess.Popen(
            [CHROMIUM, *flags, f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._loop = asyncio.new_event_loop()
        self._run(self._connect())
        return self

    def __exit__(self, *exc):
        with contextlib.suppress(Exception):
            self._run(self._call("Browser.close"))
        self._run(self._session.close())
        self._loop.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Go to a page in a window of that size."""
        self.resize(width, height)
        self._run(self._call("Page.navigate", url=url))

    def resize(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._run(self._call("Emulation.setDeviceMetricsOverride", **size))

    def evaluate(self, script: str):
        """The value of a JavaScript expression."""
        answer = self._run(self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True))
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true; one that fails, say on a page that is not there yet, is not."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"(() => {{ try {{ return {condition} }} catch {{ return false }} }})()"):
            assert time.monotonic() < deadline, f"{condition} within {seconds} s; {self.errors}; the page says:\n{self.text()}"
            time.sleep(0.1)

    def text(self) -> str:
        """What a reader sees."""
        return self.evaluate("document.body ? document.body.innerText : ''")

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        height = self.evaluate("document.documentElement.scrollHeight")
        width = self.evaluate("window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self._run(self._call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip))
        path.write_bytes(base64.b64decode(answer["data"]))

    def _run(self, coroutine):
        return self._loop.run_until_complete(asyncio.wait_for(coroutine, 60))

    async def _connect(self):
        port_file = self.folder / "DevToolsActivePort"
        while not (port_file.exists() and port_file.read_text().count("\n") >= 1):
            assert self._process.poll() is None, f"{CHROMIUM} did not start"
            await asyncio.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        pages = []
        while not pages:
            async with self._session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
        self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **parameters):
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            self._event(message.get("method"), message.get("params", {}))

    def _event(self, method: str, parameters: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
