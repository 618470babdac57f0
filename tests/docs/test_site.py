"""The documentation as a site: built once, looked at in a real browser on a phone and on a desk, and each link followed."""

from __future__ import annotations

import http.server
import subprocess
import sys
import threading
import time
from functools import partial
from html.parser import HTMLParser
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

import vflair_core
from support.browser import PROGRAM, WHY_NOT, browser
from support.paths import DOCS
from vflair_core import testing
from vflair_core.testing import fixtures

pytestmark = pytest.mark.slow
in_a_browser = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1440, "height": 900}
FIXTURES = [name for name in vars(fixtures) if name.startswith("vflair_")]
USERS = ["researcher", "engineer", "integrator"]
LOOKED_AT = ["index", *USERS, "gallery", "api", "others", "choosing-a-defense"]
WIDE = ["others", "choosing-a-defense"]  # pages with tables that are wider than a phone


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The folder of the built site; a warning of sphinx is an error, a link without an anchor is one too."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html"]
    places = ["-d", str(out / "trees"), str(DOCS), str(out / "html")]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / "html"


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files, and tells nobody."""

    def log_message(self, *words):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served on this machine."""
    handler = partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


# -- links -----------------------------------------------------------------------------------------------


class Anchors(HTMLParser):
    """What a page links to and loads, and what can be linked to in it."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.places, self.instead = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        of = dict(attrs)
        self.targets += [of[key] for key in ("href", "src") if of.get(key)]
        self.places |= {of[key] for key in ("id", "name") if of.get(key)}
        if tag == "img":
            self.instead.append(of.get("alt"))


@pytest.fixture(scope="module")
def pages(site):
    """Every page by its path in the site."""
    paths = [
        path for path in site.rglob("*.html") if "_downloads" not in path.parts
    ]  # tested as reports
    return {str(path.relative_to(site)): Anchors(path.read_text("utf-8")) for path in paths}


def inner_targets(pages):
    """Page, target and anchor of each link that stays in the site."""
    for page, anchors in pages.items():
        for target in anchors.targets:
            if not urlsplit(target).scheme and not target.startswith("#svg-"):
                path, anchor = urldefrag(target)
                yield page, unquote(path.split("?")[0]) or page, unquote(anchor)


def test_every_link_of_the_site_leads_to_a_file_and_a_place_in_it(site, pages):
    lost = []
    for page, path, anchor in inner_targets(pages):
        if not (site / page).parent.joinpath(path).is_file():
            lost.append(f"{page}: {path}")
        elif anchor and path in pages and anchor not in pages[path].places:
            lost.append(f"{page}: {path}#{anchor}")
    assert lost == []


def test_every_page_is_reached_by_links_from_the_first(pages):
    links = {}
    for page, path, _ in inner_targets(pages):
        links.setdefault(page, set()).add(path)
    reached, ahead = set(), {"index.html"}
    while ahead:
        reached |= ahead
        ahead = {path for page in ahead for path in links[page] if path in pages} - reached
    # What sphinx makes beside the pages is reached by its search field and by its indices.
    assert {path for path in pages if path not in reached} <= {"search.html", "py-modindex.html"}
    assert {f"{path.stem}.html" for path in DOCS.glob("*.md")} <= reached


def test_every_picture_has_a_text_instead(pages):
    texts = [text for page in ("gallery.html", "choosing-a-defense.html") for text in pages[page].instead]  # fmt: skip
    assert texts
    assert all(texts)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("vflair_core", vflair_core.__all__),
        ("vflair_core.testing", testing.__all__),
        ("vflair_core.testing.fixtures", FIXTURES),
    ],
    ids=["core", "testing kit", "fixtures"],
)
def test_every_public_name_can_be_linked_to(pages, module, names):
    missing = {f"{module}.{name}" for name in names} - pages["api.html"].places
    assert missing <= {"vflair_core.__version__"}


# -- in a browser ----------------------------------------------------------------------------------------


def overflow(page):
    """How many pixels the page is wider than the screen: as a whole, and the box of the text, which furo lets scroll."""
    return page.says(
        "['html', '.main', '.content'].map(each => document.querySelector(each))"
        ".map(each => each.scrollWidth - each.clientWidth)"
    )


def until(page, condition):
    """Wait until a condition holds on the page."""
    end = time.monotonic() + 30
    while not page.says(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def press_until(page, wanted):
    """Press Tab until what has the focus is `wanted`; say how often."""
    for count in range(1, 40):
        page.press("Tab")
        if page.says(f"document.activeElement.matches({wanted!r})"):
            return count
    raise AssertionError(f"the keyboard does not reach {wanted}")


@in_a_browser
@pytest.mark.parametrize("screen", [PHONE, DESK], ids=["phone", "desk"])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_a_page_is_quiet_asks_for_nothing_outside_and_is_no_wider_than_the_screen(
    chromium, address, name, screen
):
    page = chromium.open(f"{address}{name}.html", **screen)
    page.says("new Promise(done => setTimeout(done, 200))")
    said = page.happened("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert said == []
    asked = {event["request"]["url"] for event in page.happened("Network.requestWillBeSent")}
    assert f"{address}{name}.html" in asked
    assert {url for url in asked if not url.startswith((address, "data:"))} == set()
    assert overflow(page) == [0, 0, 0]
    assert page.says("document.querySelectorAll('.sidebar-tree .caption').length") == 6


@in_a_browser
def test_a_page_that_is_too_wide_would_be_noticed(chromium, address):
    page = chromium.open(f"{address}index.html", **PHONE)
    page.says("document.querySelector('article').insertAdjacentHTML('beforeend', '<div style=width:900px>x</div>')")  # fmt: skip
    assert max(overflow(page)) > 0


@in_a_browser
@pytest.mark.parametrize("name", WIDE)
def test_a_wide_table_scrolls_in_its_own_box(chromium, address, name):
    page = chromium.open(f"{address}{name}.html", **PHONE)
    tables = page.says("""[...document.querySelectorAll('article table')].map(table => {
        const box = table.parentElement;
        box.scrollLeft = 1e6;
        return [box.scrollWidth - box.clientWidth, box.scrollLeft, getComputedStyle(box).overflowX];
    })""")
    assert any(wider > 0 for wider, _, _ in tables)
    assert all(moved > 0 and how == "auto" for wider, moved, how in tables if wider > 1)


@in_a_browser
@pytest.mark.parametrize("name", ["gallery", "choosing-a-defense"])
def test_a_figure_is_shown_and_fits_a_phone(chromium, address, name):
    page = chromium.open(f"{address}{name}.html", **PHONE)
    page.says("document.querySelectorAll('article img').forEach(each => each.loading = 'eager')")
    until(page, "[...document.querySelectorAll('article img')].every(each => each.complete)")
    images = page.says("[...document.querySelectorAll('article img')].map(each => [each.naturalWidth, each.getBoundingClientRect().right])")  # fmt: skip
    assert images
    assert all(real > 0 and right <= PHONE["width"] for real, right in images)


MENU_IS_THERE = """(() => { const r = document.querySelector('.sidebar-drawer').getBoundingClientRect();
    return r.left >= 0 && getComputedStyle(document.querySelector('.sidebar-drawer')).visibility === 'visible'; })()"""


@in_a_browser
def test_the_menu_opens_and_shuts_by_touch_on_a_phone(chromium, address):
    page = chromium.open(f"{address}index.html", **PHONE)
    assert page.says(MENU_IS_THERE) is False
    page.tap(".mobile-header label.nav-overlay-icon")
    until(page, MENU_IS_THERE)
    link = ".sidebar-tree a[href='researcher.html']"
    assert page.says(f"document.querySelector({link!r}).getBoundingClientRect().left") >= 0
    page.tap("label.sidebar-overlay", across=0.95)  # beside the menu
    until(page, f"!({MENU_IS_THERE})")


@in_a_browser
def test_the_menu_opens_by_keyboard_on_a_phone_and_leads_to_a_page(chromium, address):
    page = chromium.open(f"{address}index.html", **PHONE)
    press_until(page, "#__navigation")
    icon = "getComputedStyle(document.querySelector('label.nav-overlay-icon')).outlineStyle"
    assert page.says(icon) == "solid"  # who looks sees where the focus is
    page.press(" ")
    until(page, MENU_IS_THERE)
    press_until(page, ".sidebar-tree a[href='researcher.html']")
    page.press("Enter")
    until(page, "location.pathname.endsWith('/researcher.html')")


@in_a_browser
def test_links_of_a_menu_that_is_shut_are_no_stops(chromium, address):
    page = chromium.open(f"{address}index.html", **PHONE)
    for _ in range(25):
        page.press("Tab")
        assert page.says("document.activeElement.closest('.sidebar-drawer, .toc-drawer')") is None


@in_a_browser
def test_on_a_desk_the_menu_is_there(chromium, address):
    page = chromium.open(f"{address}index.html", **DESK)
    assert page.says(MENU_IS_THERE)
    assert page.says("getComputedStyle(document.querySelector('#__navigation')).display") == "none"


FOUND = "[...document.querySelectorAll('#search-results li a')].map(each => each.getAttribute('href').split(/[#?]/)[0])"


@in_a_browser
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("gaussian-noise", "defenses.html"),
        ("load_data_party", "api.html"),
        ("vflair_parties", "api.html"),
        ("certificates", "two-machines.html"),
        ("Petals", "others.html"),
    ],
)
def test_the_search_finds(chromium, address, words, wanted):
    page = chromium.open(f"{address}index.html", **DESK)
    page.says("document.querySelector('.sidebar-search').focus()")
    page.type(words)
    page.press("Enter")
    until(page, "location.pathname.endsWith('/search.html')")
    until(page, f"{FOUND}.some(each => each.endsWith({wanted!r}))")
    asked = {event["request"]["url"] for event in page.happened("Network.requestWillBeSent")}
    assert {url for url in asked if not url.startswith((address, "data:"))} == set()


@in_a_browser
def test_the_search_says_when_there_is_nothing(chromium, address):
    page = chromium.open(f"{address}search.html?q=xylophonic", **DESK)
    until(page, "document.querySelector('.search-summary').textContent.includes('did not match')")
    assert page.says(FOUND) == []


@in_a_browser
def test_the_search_works_from_a_disk(chromium, site):
    page = chromium.open(f"{(site / 'search.html').as_uri()}?q=gaussian-noise", **PHONE)
    until(page, f"{FOUND}.some(each => each.endsWith('defenses.html'))")
    assert overflow(page) == [0, 0, 0]
