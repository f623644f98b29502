"""A page taken apart as a browser would, and the letters of a terminal with their colours."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """The text under each kind of tag, the attributes, the styled stretches of rows, and whether the tags close in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.spans: list[tuple[set[str], str, str]] = []
        """(classes, title, text) of every span."""
        self.open: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in named.items()]
        if tag not in VOID:
            self.open.append((tag, named, []))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        opened, named, text = self.open.pop()
        assert opened == tag
        self.texts.setdefault(tag, []).append("".join(text))
        if tag == "span":
            self.spans.append((set(named.get("class", "").split()), named.get("title", ""), "".join(text)))

    def handle_data(self, data: str) -> None:
        for _, _, text in self.open:
            text.append(data)

    @property
    def cards(self) -> dict[str, str]:
        """Name and value of the key figures."""
        return dict(zip(self.texts["dt"], self.texts["dd"][::2], strict=True))

    def assert_asks_for_nothing(self) -> None:
        """No script, no address outside the page, no handler."""
        assert "script" not in self.texts
        for tag, name, value in self.attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("data:"), (tag, name, value[:60])
        assert "default-src 'none'" in self.source
        assert "@import" not in self.source
