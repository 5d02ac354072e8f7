"""The playground opened in a real browser: a visit, what the browser reported of it, and a server on loopback."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from playwright.sync_api import expect

from tests.playground_stub import EXAMPLES, Seen

QUERY = EXAMPLES[0]

# The contrast ratio of every visible text with what is behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => {
    const parts = rgb.slice(0, 3).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = read(getComputedStyle(node).backgroundColor);
      if (color[3] === 255) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === 3 && each.data.trim());
    if (!own || !node.checkVisibility() || node.closest("script, .hidden, :disabled, option")) continue;
    const [a, b] = [light(read(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), node.className + ": " + node.textContent.slice(0, 30)]);
  }
  return found;
}"""


@dataclass
class Visit:
    """One opened page: its handle, the stub's notes, and what the browser reported."""

    page: Any
    seen: Seen
    origin: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    refusals_expected: bool = False

    def open(self) -> None:
        self.page.goto(self.origin + "/")
        expect(self.page.locator("#starters button")).to_have_count(3)

    def start(self, query: str = QUERY, compare: bool = False) -> None:
        self.page.fill("#query", query)
        self.page.set_checked("#compare", compare)
        self.page.click("#run")

    def run(self, query: str = QUERY, compare: bool = False) -> None:
        self.start(query, compare)
        expect(self.page.locator(".run")).to_have_count(3 if compare else 1)
        expect(self.page.locator("#run")).to_have_text("Run", timeout=15_000)

    def texts(self, role: str = "routed") -> list[str]:
        return self.page.locator(f".run[data-role={role}] .step .text").all_inner_texts()


@contextlib.contextmanager
def serve_app(app: Any) -> Iterator[str]:
    """An application on a free port of loopback, in a thread; gives its origin."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
