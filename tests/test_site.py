"""The documentation site builds strictly and offline: pages, links, anchors, navigation."""

import importlib.util
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
_SPEC = importlib.util.spec_from_file_location("documentation_site", ROOT / "docs" / "site.py")
assert _SPEC is not None
assert _SPEC.loader is not None
SITE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(SITE)


class Page(HTMLParser):
    """Anchors, links, and what a browser fetches for a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.fetched: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if "src" in values or (tag == "link" and values.get("rel") != "canonical"):
            self.fetched.add(values.get("src") or values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    assert SITE.main(out) == 0
    return out / "site"


@pytest.mark.slow
def test_every_link_and_anchor_of_the_site_is_there(site: Path) -> None:
    found = {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}
    assert len(found) > 25
    broken = []
    for file, page in found.items():
        for link in page.links:
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            if link.startswith(("http:", "https:", "mailto:")):
                continue
            if not target.is_file() or (anchor and target in found and anchor not in found[target].ids):
                broken.append(f"{file.name}: {link}")
    assert broken == []


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        assert not [address for address in Page(file).fetched if address.startswith(("http:", "https:", "//"))]


def named(entry: object) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(entry, dict):
        return [page for value in entry.values() for page in named(value)]
    return [page for one in entry for page in named(one)] if isinstance(entry, list) else [str(entry)]


def test_every_page_is_in_the_navigation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and a new one at its end."""
    new = tmp_path / "new.md"
    new.write_text("# New\n")
    names = SITE.pages() | {new: "new.md"}
    monkeypatch.setattr(SITE, "pages", lambda: names)
    monkeypatch.setattr(SITE, "linked", lambda text, *_: text)
    navigation = named(yaml.safe_load(SITE.staged(tmp_path / "out").read_text())["nav"])
    assert navigation[-1] == "new.md"
    assert len(navigation) == len(set(navigation))
    assert set(navigation) == {file.name for file in (tmp_path / "out" / "docs").glob("*.md")}


def test_a_link_to_no_section_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "page.md").write_text("# A page\n\n[a link](other.md#nowhere)\n")
    (tmp_path / "other.md").write_text("# Another\n\n## A section\n")
    monkeypatch.setattr(SITE, "pages", lambda: {tmp_path / "page.md": "index.md", tmp_path / "other.md": "other.md"})
    monkeypatch.setattr(SITE, "ROOMS", ())
    assert SITE.main(tmp_path / "out") == 1


def test_a_link_to_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"page.md: the link to nowhere.md leads nowhere"):
        SITE.linked("[a link](nowhere.md)", tmp_path / "page.md", {})
