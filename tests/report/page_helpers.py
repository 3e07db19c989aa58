"""What the tests of the pages share."""

import re
from html.parser import HTMLParser

# names that a page could take for its own code, in the order of the folders
HOSTILE = ["'quoted' & \"double\"", "<script>alert(1)<b>", "עברית ימין", "😀 emoji", "${1+1} {{7*7}}"]


class Texts(HTMLParser):
    """Collects the elements of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.texts, self._skip = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag) -> None:
        self._skip = False

    def handle_data(self, data) -> None:
        if not self._skip:
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(text for text in self.texts if text)


def rows_of(page: str, table: str) -> list[list[str]]:
    body = re.search(rf"<table[^>]*{table}.*?<tbody>(.*?)</tbody>", page, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in rows]
