"""Debian's chromium without a window, spoken to over a pipe in the DevTools protocol: no port, no driver, no network."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
WHY_NOT = (
    "chromium is not installed (apt-get install chromium): no page is looked at in a real browser"
)
KEYS = {"Tab": 9, "Enter": 13, " ": 32}


@contextlib.contextmanager
def browser(home: Path) -> Iterator[Browser]:
    """Start chromium with its files in `home`; stop it by its own process."""
    ours, theirs = os.pipe(), os.pipe()  # it reads commands from 3 and writes answers to 4
    options = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
        "--force-color-profile=srgb", f"--user-data-dir={home}",
    ]  # fmt: skip
    # The shell puts the pipes where chromium looks for them: a process with threads must not run code between fork and exec.
    wired = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
    process = subprocess.Popen(
        ["bash", "-c", wired, PROGRAM, *options, "about:blank"],
        pass_fds=(ours[0], theirs[1]),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(ours[0])
    os.close(theirs[1])
    try:
        yield Browser(ours[1], theirs[0])
    finally:
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            Browser(ours[1], theirs[0]).ask("Browser.close")
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours[1])
        os.close(theirs[0])


class Browser:
    """The end of the pipe at which commands are given."""

    def __init__(self, out: int, back: int) -> None:
        self.out, self.back = out, back
        self.number, self.read = 0, b""
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Give a command and return its answer; what happens meanwhile is kept in `events`."""
        self.number += 1
        wanted = {"id": self.number, "method": method, "params": params}
        if session is not None:
            wanted["sessionId"] = session
        os.write(self.out, json.dumps(wanted).encode() + b"\0")
        while True:
            message = self.next()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def next(self, patience: float = 60.0) -> dict[str, Any]:
        """The next message."""
        until = time.monotonic() + patience
        while b"\0" not in self.read:
            ready, _, _ = select.select([self.back], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError("chromium does not answer")
            if not (piece := os.read(self.back, 1 << 20)):
                raise EOFError("chromium is gone")
            self.read += piece
        text, _, self.read = self.read.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message

    def open(self, page: Path | str, **screen: Any) -> Page:
        """Open a file or an address in a tab of its own, as wide and high as `screen` says, and wait until it is loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network", "Security"):
            tab.ask(f"{domain}.enable")
        tab.screen(**screen)
        tab.go(page if isinstance(page, str) else page.as_uri())
        return tab


class Page:
    """One tab."""

    def __init__(self, owner: Browser, session: str) -> None:
        self.browser, self.session = owner, session

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **params)

    def go(self, address: str) -> None:
        self.ask("Page.navigate", url=address)
        while not self.happened("Page.loadEventFired"):
            self.browser.next()

    def screen(
        self, width: int = 1280, height: int = 900, *, dark: bool = False, media: str = ""
    ) -> None:
        """Show the page on another screen, in dark or light, or as it is printed."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def happened(self, *methods: str) -> list[dict[str, Any]]:
        """What happened in this tab so far, of these kinds."""
        return [
            event["params"]
            for event in self.browser.events
            if event.get("sessionId") == self.session and event["method"] in methods
        ]

    def says(self, expression: str) -> Any:
        """What an expression of JavaScript is on the page."""
        answer = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key, as a keyboard does."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "code": key.strip() or "Space"}
        text = {"text": "\r" if key == "Enter" else key} if key != "Tab" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **code)

    def tap(self, selector: str, *, across: float = 0.5) -> None:
        """Touch the first element of a selector as a finger does, that share of its width from its left."""
        x, y = self.says(
            f"(() => {{ const r = document.querySelector({selector!r}).getBoundingClientRect();"
            f" return [r.x + r.width * {across}, r.y + r.height / 2]; }})()"
        )
        self.ask("Emulation.setTouchEmulationEnabled", enabled=True)
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.ask("Input.insertText", text=text)

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"])

    def picture(self, path: Path, *, whole: bool = False) -> Path:
        """A screenshot."""
        answer = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))
        return path
