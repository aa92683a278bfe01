"""A real browser without a window: Chromium, driven by its DevTools protocol.

The protocol goes through a pair of pipes, `--remote-debugging-pipe`, a JSON object and a zero byte for each message, so
that no package is needed for it: https://chromedevtools.github.io/devtools-protocol/.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next((path for name in NAMES if (path := shutil.which(name))), None)
LIMIT = 20  # seconds until something has to be there
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
"""The keys that are pressed, and their codes for Windows, which Chromium goes by."""
SHIFT = 8


class Browser:
    """The browser's process."""

    def __init__(self, folder: Path) -> None:
        """Starts it, with a new profile in this folder."""
        ours_in, its_out = os.pipe()
        its_in, ours_out = os.pipe()
        flags = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run"]
        flags += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        flags += ["--no-sandbox"]  # which it refuses to root, and to containers; it reads our own page alone
        # it reads from its file descriptor 3 and writes to 4
        pipes = f"3<&{its_in} 4>&{its_out}"
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" {pipes}', "bash", PROGRAM, *flags],
            pass_fds=(its_in, its_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_in)
        os.close(its_out)
        self.ours_in, self.ours_out = ours_in, ours_out
        self.numbers = itertools.count(1)
        self.unread = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a method. What happens before it comes is kept in `events`."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self.ours_out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def receive(self) -> dict[str, Any]:
        """The next message."""
        while b"\0" not in self.unread:
            readable, _, _ = select.select([self.ours_in], [], [], LIMIT)
            assert readable, f"The browser has said nothing for {LIMIT} seconds."
            part = os.read(self.ours_in, 2**16)
            assert part, "The browser has ended."
            self.unread += part
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def end(self) -> None:
        self.call("Browser.close")
        self.process.wait(LIMIT)
        os.close(self.ours_in)
        os.close(self.ours_out)


class Page:
    """A tab in which an address has been loaded."""

    def __init__(self, browser: Browser, url: str, width: int = 1000, height: int = 700, dark: bool = False) -> None:
        self.browser = browser
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        self.call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    # ---- what is there

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is in the page. Elements and functions have no value."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, f"{expression}: {result['exceptionDetails']}"
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = LIMIT) -> None:
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"{expression} has not come true. The page:\n{self.text('body')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """The text that is shown in the first element that a selector of CSS finds."""
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """The text of each element that a selector finds, as it stands in the document."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def said(self, method: str) -> list[dict[str, Any]]:
        """The events of a kind so far."""
        self.value("0")  # what has happened is told before
        events = self.browser.events
        return [
            event["params"] for event in events if event["method"] == method and event.get("sessionId") == self.session
        ]

    def errors(self) -> list[str]:
        """What the console shows as wrong so far: exceptions, violations of a policy, requests that failed."""
        exceptions = [event["exceptionDetails"]["text"] for event in self.said("Runtime.exceptionThrown")]
        entries = [event["entry"] for event in self.said("Log.entryAdded")]
        entries = [entry for entry in entries if entry["level"] in ("error", "warning")]
        calls = [str(event) for event in self.said("Runtime.consoleAPICalled") if event["type"] in ("error", "warning")]
        return exceptions + calls + [f"{entry['text']} {entry.get('url', '')}" for entry in entries]

    def requests(self) -> list[dict[str, Any]]:
        """What the page has asked for so far."""
        return [event["request"] for event in self.said("Network.requestWillBeSent")]

    def accessible(self) -> list[tuple[str, str]]:
        """The role and the name of each node that a screen reader tells of, in its order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown]

    def screenshot(self, file: Path) -> None:
        """Writes what is shown as a PNG file."""
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")  # it is drawn
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    # ---- what a user does

    def press(self, key: str, shift: bool = False) -> None:
        """Presses a key and lets it go."""
        details = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key], modifiers=SHIFT if shift else 0)
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **details, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **details)

    def type(self, text: str) -> None:
        """Types where the focus is."""
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'nearest'}})")
        box = self.value(f"{element}.getBoundingClientRect().toJSON()")
        place = dict(x=box["x"] + box["width"] / 2, y=box["y"] + box["height"] / 2, button="left", clickCount=1)
        self.call("Input.dispatchMouseEvent", type="mousePressed", **place)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", **place)

    def fill(self, selector: str, text: str) -> None:
        """Clicks into a field and types over what is in it."""
        self.click(selector)
        self.value("document.activeElement.select()")
        if text:
            self.type(text)
        else:
            self.value("document.execCommand('delete')")

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
