"""Looks at every page of the built site in headless Chromium: a picture each, and what is wrong.

    mkdocs build -f docs/mkdocs.yml -d site
    python docs/screenshots.py site pictures

Each page is seen on a desktop and on a phone of 390 pixels, light and dark, and asked whether it
scrolls sideways, in which colours it is, and what it wrote to the console. Without a folder for
pictures it is only asked. Needs `chromium` (or `--browser`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = {"light": "default", "dark": "slate"}
VIEWS = [("phone", "light"), ("phone", "dark"), ("desktop", "dark"), ("desktop", "light")]
#: Which elements reach beyond the page's right edge, of those that nothing around them clips.
SIDEWAYS = """
(() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll("article *")]
    .filter(e => e.getBoundingClientRect().right > width + 1)
    .map(e => e.tagName + ": " + e.textContent.trim().slice(0, 60)).slice(0, 5);
})()
"""


@contextlib.contextmanager
def served(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Browser:
    """Chromium over its debugging pipe: requests and events as JSON, each ended by a zero byte."""

    def __init__(self, path: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        # The browser reads from file descriptor 3 and writes to 4.
        command = 'exec "$0" "$@" 3<&0 4>&1 1>/dev/null'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        flags += ["--hide-scrollbars", f"--user-data-dir={self.folder.name}"]
        self.process = subprocess.Popen(
            ["sh", "-c", command, path, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.number, self.events, self.session = 0, [], None
        self.unread = bytearray()
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        # The theme would stay with the scheme that it chose first.
        self.ask(
            "Page.addScriptToEvaluateOnNewDocument", source="Storage.prototype.getItem = () => null"
        )

    def _read(self) -> Any:
        searched = 0
        while (end := self.unread.find(0, searched)) < 0:
            searched = len(self.unread)
            more = os.read(self.process.stdout.fileno(), 2**20)
            if not more:
                raise RuntimeError("the browser has ended")
            self.unread += more
        message = json.loads(self.unread[:end])
        del self.unread[: end + 1]
        return message

    def ask(self, method: str, **params: Any) -> Any:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        while all(seen.get("method") != event for seen in self.events):
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def open(self, url: str) -> None:
        self.events.clear()
        self.ask("Page.navigate", url=url)
        self.wait_for("Page.loadEventFired")

    def set_size(self, width: int, height: int = 900) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str) -> None:
        """As a reader's system does, before a page is opened."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def switch(self, scheme: str) -> None:
        """By the page's own switch."""
        self.run(f"document.querySelector('input[data-md-color-scheme={SCHEMES[scheme]}]').click()")

    def look(self, scheme: str) -> list[str]:
        """What is wrong with the page as it stands, and with what it wrote since it was opened."""
        wrong = [f"scrolls sideways at {e}" for e in self.run(SIDEWAYS)]
        if (found := self.run("document.body.dataset.mdColorScheme")) != SCHEMES[scheme]:
            wrong.append(f"has the colours {found}")
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                wrong.append(f"console: {params['exceptionDetails'].get('text')}")
            entry = params.get("entry", {})
            if event.get("method") == "Log.entryAdded" and entry.get("level") == "error":
                wrong.append(f"console: {entry['text']} {entry.get('url', '')}")
        return wrong

    def photograph(self, width: int, picture: Path) -> None:
        """The whole page: in a window as high as it is, so that nothing of it has been scrolled."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        self.set_size(width, min(int(size["height"]), 16000))
        self.run("document.getAnimations().forEach(animation => animation.finish())")
        shot = self.ask("Page.captureScreenshot")
        picture.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.ask("Browser.close") if self.process.poll() is None else None
        self.process.wait(timeout=20)
        self.process.stdin.close()
        self.process.stdout.close()
        self.folder.cleanup()


def look_at(
    site: Path, browser: str, views: list[tuple[str, str]], pictures: Path | None = None
) -> Iterator[tuple[str, list[str]]]:
    """Each page and how it was looked at, "home-phone-dark", with what is wrong there.

    For a picture the page is loaded anew, as a reader would load it; else once, and switched.
    """
    pages = sorted(page.parent.relative_to(site) for page in site.rglob("index.html"))
    chromium = Browser(browser)
    try:
        with served(site) as address:
            for page in pages:
                for number, (view, scheme) in enumerate(views):
                    chromium.set_size(WIDTHS[view])
                    if pictures or number == 0:
                        chromium.prefer(scheme)
                        chromium.open(f"{address}/{page.as_posix()}/")
                    else:
                        chromium.switch(scheme)
                    stem = "-".join([*(page.parts or ["home"]), view, scheme])
                    yield stem, chromium.look(scheme)
                    if pictures:
                        chromium.photograph(WIDTHS[view], pictures / f"{stem}.png")
    finally:
        chromium.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("pictures", type=Path, nargs="?")
    parser.add_argument("--browser", default=shutil.which("chromium") or "chromium")
    args = parser.parse_args()
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    found = dict(look_at(args.site, args.browser, VIEWS, args.pictures))
    for page, wrong in found.items():
        if wrong:
            print(page, *wrong, sep="\n  ")
    sys.exit(any(found.values()))


if __name__ == "__main__":
    main()
