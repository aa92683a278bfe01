"""The picture of the page to talk, tutorials/talk.png: the sample model and what the quick start has trained.

    PYTHONPATH=tests python tests/benchmarks/talk_picture.py

It is taken by what the tests drive the page with, hence the path. It needs Chromium and out/lora/quickstart.
"""

import tempfile
from pathlib import Path

from helpers.browser import Browser, Page
from helpers.server import Server

ROOT = Path(__file__).parents[2]
QUESTIONS = ["What does the function `shutil.move` do?", "And `shutil.copy`?"]


def main() -> None:
    sample = ROOT / "checkpoints/sample/SmolLM2-135M-Instruct-Q4_1"
    server = Server(sample, "--finetuned", ROOT / "out/lora/quickstart", "--with_base")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(Path(folder))
        page = Page(browser, server.url, width=1000, height=670)
        page.wait_for("models.length === 2")
        page.fill("#max_tokens", "45")
        for number, question in enumerate(QUESTIONS, 1):
            page.fill("#question", question)
            page.press("Enter")
            page.wait_for(f"document.querySelectorAll('.turn').length === {number}")
            page.wait_for("stopper === null", seconds=120)
        page.screenshot(ROOT / "tutorials/talk.png")
        browser.end()
    server.end()


if __name__ == "__main__":
    main()
