"""`mxfp4-rl report --watch`: a page on this machine of a running or finished run, which refreshes itself.

The page comes with the run's status, and with the report's table and plots as soon as they are drawn, which takes seconds;
until then a line says so. From then on it asks for the status every two seconds (`status.json`), and for table and plots
(`body.html`) when they have changed. Plots cost the machine that trains some CPU, so they are drawn only for a page that
asks, and no more often than every `refresh` seconds or than leaves nine tenths of the time to others. The server listens on
127.0.0.1 only, answers only to names of this machine (a page elsewhere could point a name of its own here), and writes nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from mxfp4_rl.launch import LaunchError
from mxfp4_rl.monitor import plots
from mxfp4_rl.monitor.live import LiveRun
from mxfp4_rl.monitor.report import SECTIONS, STYLE, png_of, section_html, table_html
from mxfp4_rl.monitor.run_log import METRICS_FILE, RunLog

DEFAULT_PORT = 8766
REFRESH_SECONDS = 10.0
NARROW = 640  # pixels; a window up to this gets plots drawn for it
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_PAGE_FILE = Path(__file__).with_name("watch.html")


class Watched:
    """A run as the server shows it; every method may be called from any thread.

    Args:
        run_dir: the run's directory.
        overlay: a second run, drawn dashed, as in the report.
        refresh: seconds between two versions of the plots, at least.
    """

    def __init__(self, run_dir: str | Path, overlay: str | Path | None = None, refresh: float = REFRESH_SECONDS):
        self._run = LiveRun(run_dir)
        self._other = None if overlay is None else RunLog.load(overlay)
        self._refresh = refresh
        self._lock = threading.Lock()
        self._version, self._shown_lines = 0, -1
        self._changed_at, self._drawing_took = -float("inf"), 0.0
        self._body: tuple[int, str] = (-1, "")
        self._plots: dict[tuple[str, bool], bytes] = {}

    def status(self) -> dict:
        """`LiveRun.status` with the version of the plots that a page may ask for now."""
        with self._lock:
            self._run.read()
            status = self._run.status()
            wait = max(self._refresh, 10 * self._drawing_took) if status["running"] else 0
            if self._run.lines != self._shown_lines and time.monotonic() - self._changed_at >= wait:
                self._version, self._shown_lines, self._changed_at = self._version + 1, self._run.lines, time.monotonic()
            return status | {"version": self._version, "has_metrics": self._run.run_log() is not None}

    def body(self) -> str:
        """The report's table and sections."""
        with self._lock:
            if self._body[0] != self._version:
                self._body = (self._version, self._draw())
            return self._body[1]

    def plot(self, file: str, narrow: bool) -> bytes | None:
        """A plot of the last body, for a wide or a narrow window; None if it has none of that name."""
        with self._lock:
            if (file, narrow) not in self._plots and (file, False) in self._plots:
                section = next(section for section in SECTIONS if section.file == file)
                self._plots[file, True] = self._png(section, narrow=True)[0]
            return self._plots.get((file, narrow))

    def _draw(self) -> str:
        run, began = self._run.run_log(), time.monotonic()
        self._plots = {}
        if run is None:
            return f'<p class="absent">The run has not logged anything yet ({escape(METRICS_FILE)}).</p>'
        parts = [table_html(run, self._other)]
        for section in SECTIONS:
            png, notes = self._png(section, narrow=False)
            image = None
            if png is None and section.optional:
                continue
            if png is not None:
                self._plots[section.file, False] = png
                source = f"plot/{section.file}?v={self._version}"
                image = (
                    f'<picture><source media="(max-width: {NARROW}px)" srcset="{source}&amp;narrow=1">'
                    f'<img alt="{escape(section.title)}" src="{source}"></picture>'
                )
            parts.append(section_html(section, image, notes, run, self._other))
        self._drawing_took = time.monotonic() - began
        return "\n".join(parts)

    def _png(self, section, narrow: bool) -> tuple[bytes | None, list[str]]:
        drawing = section.draw(self._run.run_log(), self._other)
        if drawing.figure is None:
            return None, drawing.notes
        if narrow:
            plots.make_narrow(drawing.figure)
        return png_of(drawing.figure), drawing.notes


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self):
        url = urlsplit(self.path)
        host = self.headers.get("Host", "")
        if host.rpartition(":")[0] not in _LOCAL and host not in _LOCAL:
            return self._answer(403, "text/plain", b"this page is for 127.0.0.1 and localhost only\n")
        try:
            if url.path == "/":
                self._send_page()
            elif url.path == "/status.json":
                self._answer(200, "application/json", json.dumps(self.server.watched.status(), allow_nan=False).encode())
            elif url.path == "/body.html":
                self._answer(200, "text/html", self.server.watched.body().encode())
            elif url.path.startswith("/plot/"):
                png = self.server.watched.plot(url.path.removeprefix("/plot/"), "narrow" in parse_qs(url.query))
                self._answer(*((200, "image/png", png) if png else (404, "text/plain", b"no such plot\n")))
            else:
                self._answer(404, "text/plain", b"not found\n")
        except (BrokenPipeError, ConnectionResetError):  # the page was closed meanwhile
            pass
        except Exception as error:  # shown on the page, which asks again
            self._answer(500, "text/plain", f"{type(error).__name__}: {error}\n".encode())

    def _send_page(self) -> None:
        """The page in pieces: a browser shows each as it comes, and counts the page as loaded after the last."""
        pieces = page_pieces(self.server.watched)
        head = next(pieces)  # may raise, which is answered otherwise
        self._begin(200, "text/html")
        self.wfile.write(head.encode())
        for piece in pieces:
            self.wfile.write(piece.encode())

    def _answer(self, code: int, kind: str, content: bytes) -> None:
        self._begin(code, kind, len(content))
        self.wfile.write(content)

    def _begin(self, code: int, kind: str, length: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind if kind.startswith("image") else f"{kind}; charset=utf-8")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; img-src 'self' data:")
        self.end_headers()

    def log_message(self, *args) -> None:
        """Say nothing: a line every two seconds helps nobody."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, watched: Watched):
        super().__init__(("127.0.0.1", port), _Handler)
        self.watched = watched

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


def page_pieces(watched: Watched) -> Iterator[str]:
    """The page: its head with the run's status, then table and plots, which take seconds to draw, then the rest."""
    status = watched.status()
    head, _, rest = _PAGE_FILE.read_text(encoding="utf-8").partition("{{BODY}}")
    facts = json.dumps(status, allow_nan=False).replace("<", "\\u003c")  # no name ends the script
    for mark, text in (("{{STYLE}}", STYLE), ("{{NAME}}", escape(status["name"])), ("{{STATUS}}", facts)):
        head = head.replace(mark, text)
    yield head
    try:
        body, shown = watched.body(), status["version"]
    except Exception:  # the page's script asks for it again, and says what is wrong
        body, shown = "", -1
    yield body
    yield rest.replace("{{SHOWN}}", str(shown))


def make_server(run_dir: str | Path, port: int, overlay: str | Path | None = None, refresh: float = REFRESH_SECONDS) -> _Server:
    """The server, listening but not serving yet.

    Raises:
        LaunchError: no such directory, an overlay that cannot be read, or a port that is taken.
    """
    if not Path(run_dir).is_dir():
        raise LaunchError(f"no run directory at {run_dir}: give the directory of a run, which may still be empty")
    try:
        watched = Watched(run_dir, overlay, refresh)
    except (OSError, ValueError) as error:
        raise LaunchError(str(error)) from error
    try:
        return _Server(port, watched)
    except (OSError, OverflowError) as error:
        raise LaunchError(
            f"port {port} cannot be used ({error}): give another with --port, or 0 for any that is free"
        ) from error


def watch(run_dir: str | Path, port: int = DEFAULT_PORT, overlay: str | Path | None = None) -> int:
    """Serve until Ctrl-C; the exit code."""
    with make_server(run_dir, port, overlay) as server:
        print(f"watching {run_dir}: {server.url}  (Ctrl-C ends it, and not the run)", flush=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            print()
    return 0
