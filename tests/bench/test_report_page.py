from html.parser import HTMLParser

from speclm.bench.report_page import Section, html_page, markdown_page

SECTIONS = [
    Section(header=("", ""), rows=[("base", "a|<b>")]),
    Section("Speed", ["One & two."], ("tau",), [(1.5,)], ["a note"], [("Speed-up", "speed.png")]),
]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_markdown_page_has_headings_tables_notes_and_images():
    page = markdown_page("Title <x>", SECTIONS)
    assert page.startswith("# Title &lt;x>\n\n| | |\n| --- | --- |\n| base | a\\|&lt;b> |\n")
    assert "## Speed\n\nOne & two.\n\n| tau |\n| --- |\n| 1.5 |\n\n- a note\n\n" in page
    assert page.endswith("![Speed-up](speed.png)\n")


def test_html_page_is_whole_and_needs_nothing_else():
    page = html_page("Title <x>", SECTIONS, {"speed.png": b"png"})
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    (image,) = [attributes for tag, attributes in tags.found if tag == "img"]
    assert image == {"src": "data:image/png;base64,cG5n", "alt": "Speed-up"}
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "http" not in page
    assert '<table class="facts">\n<tr><td>base</td><td>a|&lt;b&gt;</td>' in page
    assert "<h1>Title &lt;x&gt;</h1>" in page
    assert "<p>One &amp; two.</p>" in page
    assert "<li>a note</li>" in page
