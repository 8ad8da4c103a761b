"""A page in headless Chromium, driven by its DevTools protocol through a pipe: no driver, no port."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

START = """if True:
    import os, sys
    for target, number in enumerate(map(int, sys.argv[1:3]), start=100):  # out of each other's way
        os.dup2(number, target)
    os.dup2(100, 3)
    os.dup2(101, 4)
    os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3, and writes replies and events to 4. Each ends with a NUL."""


class Page:
    """One page.

    Attributes:
      faults: since it was opened: exceptions of its scripts, and what the browser could not load or refused to run.
    """

    def __init__(self, commands: int, replies: int):
        self._commands, self._replies, self._rest = commands, replies, b""
        self._number, self._session, self.faults = 0, "", list[str]()
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Runtime", "Log", "Page"):
            self._call(f"{domain}.enable")

    def open(self, url: str, *, width: int = 1200, dark: bool = False) -> None:
        """Loads a page in a window of this width, in pixels of CSS."""
        size = dict(width=width, height=800, deviceScaleFactor=1, mobile=False)
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", features=scheme)
        self.faults.clear()
        self._call("Page.navigate", url=url)
        self.until(f"location.href.startsWith({json.dumps(url)}) && document.readyState == 'complete'")

    def js(self, expression: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.02)

    def press(self, key: str, *, control: bool = False) -> None:
        codes = {"Tab": 9, "Enter": 13}
        about = dict(key=key, code=key, windowsVirtualKeyCode=codes[key], modifiers=2 * control)
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **about)

    def _call(self, method: str, **params: Any) -> Any:
        self._number += 1
        command = {"id": self._number, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                return message["result"]
            said = message.get("params", {})
            if message["method"] == "Runtime.exceptionThrown":
                self.faults.append(str(said["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded" and said["entry"]["level"] == "error":
                self.faults.append(f"{said['entry'].get('url')}: {said['entry']['text']}")

    def _read(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._replies, 65536)
            assert part, "Chromium ended."
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator[Page]:
    """A browser with one page, and its profile in a folder."""
    assert CHROMIUM
    (given, commands), (replies, taken) = os.pipe(), os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
    line = [
        sys.executable,
        "-c",
        START,
        f"{given}",
        f"{taken}",
        CHROMIUM,
        *flags,
        f"--user-data-dir={folder}",
    ]
    process = subprocess.Popen(line, pass_fds=(given, taken), stderr=subprocess.DEVNULL)
    os.close(given)
    os.close(taken)
    try:
        yield Page(commands, replies)
    finally:
        process.kill()
        process.wait()
        os.close(commands)
        os.close(replies)
