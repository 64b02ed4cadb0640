"""A page opened in headless Chromium, spoken to over its debugging pipe: what it complains of and asks for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking")


@dataclass
class Opened:
    """`complaints` are console messages and errors; `requests` all addresses asked for; `width` is of the content."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    width: int = 0
    picture: bytes = b""


class _Pipe:
    """Chromium's debugging protocol: JSON messages, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        (ours_in, theirs_out), (theirs_in, ours_out) = os.pipe(), os.pipe()
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the numbers that Chromium expects
        self.process = subprocess.Popen(
            ["bash", "-c", script, "bash", *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.reading, self.writing = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.events: list[dict[str, Any]] = []
        self.number, self.rest, self.session = 0, b"", None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.writing.write(json.dumps(message).encode() + b"\0")
        self.writing.flush()
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = self.reading.read1(2**20)
            assert more, "Chromium has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self.receive())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reading.close()
        self.writing.close()


def open_page(page: Path, profile: Path, width: int = 1280, dark: bool = False) -> Opened:
    pipe = _Pipe(profile)
    try:
        target = pipe.call("Target.createTarget", url="about:blank")["targetId"]
        pipe.session = pipe.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            pipe.call(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        pipe.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        pipe.call("Emulation.setEmulatedMedia", features=[scheme])
        pipe.call("Page.navigate", url=page.absolute().as_uri())
        pipe.wait_for("Page.loadEventFired")
        found = pipe.call("Runtime.evaluate", expression="document.documentElement.scrollWidth")["result"]["value"]
        picture = pipe.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return _told(pipe.events, found, base64.b64decode(picture))
    finally:
        pipe.close()


def _told(events: list[dict[str, Any]], width: int, picture: bytes) -> Opened:
    opened = Opened(width=width, picture=picture)
    for event in events:
        method, values = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            opened.complaints.append(json.dumps(values))
        elif method == "Network.requestWillBeSent":
            opened.requests.append(values["request"]["url"])
    return opened
