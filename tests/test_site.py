"""The documentation site builds without a broken link, and a browser shows it offline."""

import importlib.util
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT

chromium = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
sizes = dict(desktop=dict(width=1280, height=800), phone=dict(width=390, height=844))
args = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"


def build(out):
    "Run .ci/site.py; returns the finished process."
    command = [sys.executable, ".ci/site.py", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The built site's folder."
    pytest.importorskip(
        "material", reason="the site is built with mkdocs-material: pip install '.[dev]'"
    )
    out = tmp_path_factory.mktemp("site") / "site"
    done = build(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def address(site):
    "The site's address on this machine."

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    server.handle_error = lambda *args: None  # the browser went on to another page
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not chromium:
        pytest.skip("chromium is not installed: apt-get install chromium")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(executable_path=chromium, args=args.split())


@pytest.fixture(params=sizes)
def page(request, browser, address):
    "An open page; at the end nothing may have been fetched from elsewhere, failed or complained."
    page = browser.new_page(viewport=sizes[request.param])
    problems = []

    def console(message):
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def failed(request):
        if request.failure != "net::ERR_ABORTED":  # the next page was opened
            problems.append(f"{request.failure}: {request.url}")

    def response(response):
        if response.status >= 400:
            problems.append(f"{response.status}: {response.url}")

    def local_only(route):
        if not route.request.url.startswith((address, "data:", "blob:")):
            problems.append(f"not ours: {route.request.url}")
        route.continue_()

    page.on("console", console)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", failed)
    page.on("response", response)
    page.route("**/*", local_only)
    page.goto(address + "/index.html", wait_until="networkidle")
    yield page
    page.close()
    assert not problems, problems


def test_start_page_is_the_readme_and_leads_on(page):
    assert page.title() == "fade"
    assert page.locator("h1").inner_text().startswith("fade")
    figure = page.locator("article img").first
    figure.scroll_into_view_if_needed()
    assert figure.evaluate("image => image.complete && image.naturalWidth") > 300
    page.locator("article a", has_text="neighborhood").first.click()
    page.wait_for_url("**/pages/31_neighborhood.html")
    assert page.title() == "neighborhood - fade"


def test_a_page_shows_its_formulas_and_code(page, address):
    page.goto(address + "/pages/42_losses.html")
    assert page.locator("article math").count() > 5
    assert not page.locator("article p", has_text="\\mathcal").count(), "a formula is left as text"
    assert page.locator(".highlight .filename", has_text="exported to fade.losses").count() > 2
    assert page.locator("article", has_text="#| export").count() == 0
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "the page is wider than the screen"


def test_a_page_of_results_shows_its_figures_and_tables(page, address):
    page.goto(address + "/results/tables.html")
    images = page.locator("article img")
    assert images.count()
    assert images.evaluate_all("all => all.every(image => image.naturalWidth > 100)")
    assert page.locator("article table").count()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= page.viewport_size["width"], "the page is wider than the screen"


def test_navigation_reaches_every_section(page, address):
    page.goto(address + "/pages/index.html")
    for title, target in (
        ("API", "api/fade.api.html"),
        ("Results", "results/"),
        ("How-to", "howto/"),
    ):
        link = page.locator("nav a.md-tabs__link, nav a.md-nav__link", has_text=title).first
        assert target in link.evaluate("link => link.href")


def test_api_reference_documents_parameters_and_patched_methods(page, address):
    page.goto(address + "/api/fade.mesh.html")
    assert page.locator("[id='fade.mesh.Mesh.detach']").count() == 1
    assert page.locator("[id='fade.mesh.attach']").count() == 1
    assert page.locator("article table td", has_text="rank").count()


def test_search_finds_a_page(page):
    page.wait_for_load_state("networkidle")  # the search index is loaded by a worker
    if page.viewport_size["width"] < 600:
        page.locator("label[for=__search]").first.click()
    page.locator("input.md-search__input").press_sequentially("expungement", delay=50)
    found = page.locator(".md-search-result__link")
    found.first.wait_for(timeout=120_000)
    assert any("42_losses" in link.get_attribute("href") for link in found.all())


def test_every_module_and_notebook_has_its_page(site):
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    for notebook in (ROOT / "nbs").glob("[0-9]*.ipynb"):
        assert f"pages/{notebook.stem}.html" in built
    for module in (ROOT / "fade").rglob("[a-z]*.py"):
        name = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        assert f"api/{name}.html" in built


@pytest.fixture(scope="module")
def script():
    "The module .ci/site.py."
    pytest.importorskip("latex2mathml")
    spec = importlib.util.spec_from_file_location("fade_site", ROOT / ".ci" / "site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_between_sources_become_links_between_pages(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    links = script.Links(script.published())
    page, here = Path("nbs/40_mesh.ipynb"), "pages/40_mesh.md"
    text = "[a](42_losses.ipynb#The-sum) `[b](c.md)` [d](../LICENSE) [e](https://f.org)"
    moved = links.rewrite(text, page, here)
    assert "[a](42_losses.md#the-sum)" in moved and "`[b](c.md)`" in moved
    assert "/blob/main/LICENSE)" in moved and "(https://f.org)" in moved
    assert not links.broken
    links.rewrite("[a](43_none.ipynb)", page, here)
    assert links.broken == ["nbs/40_mesh.ipynb: 43_none.ipynb"]


def test_dead_links_of_a_built_site_are_found(script, tmp_path):
    (tmp_path / "a.html").write_text('<h1 id="x"></h1><a href="b.html#y"></a><a href="#x"></a>')
    (tmp_path / "b.html").write_text('<a href="a.html#z"></a><img src="c.png"><a href="a.html#x">')
    assert sorted(script.dead_links(tmp_path)) == [
        "a.html: b.html#y",
        "b.html: a.html#z",
        "b.html: c.png",
    ]
