"""The study's page in a browser: used as by a participant, and its answers read again."""

import shutil
from unittest.mock import patch

import pytest

from fade.core import load_json, logger, save_json, save_tensors
from fade.diffusion.adapters import model_fingerprint
from fade.diffusion.pipeline import load_pipeline
from fade.images import ImageCache
from fade.neighborhood import neighborhood
from fade.tools.study import (
    attention,
    build_study,
    ideal_answers,
    random_ids,
    read_answers,
    study_scores,
)

chromium = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A small study of one run, which is an edit by hand: nothing is trained here."
    folder = tmp_path_factory.mktemp("study")
    pipe = load_pipeline()
    cache = ImageCache(pipe)
    hood = neighborhood(cache, "crimson daisy")
    hood.save(folder / "run" / "neighborhood.json")
    record = dict(schema=3, method="by hand", target=hood.target, template=cache.template)
    record |= dict(model=dict(name="miniature", fingerprint=model_fingerprint(pipe)))
    save_json(folder / "run" / "metrics.json", record | dict(sampler=vars(cache.sampler)))
    save_tensors(
        folder / "run" / "edit.safetensors",
        {k: p * 0.5 for k, p in pipe.unet.named_parameters() if k.endswith("attn2.to_v.weight")},
    )
    arguments = dict(per_concept=1, concepts=dict(neighbors=1, heldout=1, unrelated=1), examples=1)
    key = build_study(
        [folder / "run"],
        folder / "out",
        **arguments,
        title="Flowers & <b>birds</b>",
        intro="Hello.\n\nThank you.",
    )
    return folder, key


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip(
        "playwright.sync_api", reason="the page is tried with playwright, which is not installed"
    )
    if not chromium:
        pytest.skip("the page is tried in chromium, which is not installed")
    with sync.sync_playwright() as p:
        yield p.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )


@pytest.fixture(params=["desktop", "phone"])
def page(request, browser, built):
    "The page, opened as a file; at the end there are no requests and no console messages."
    size = (
        dict(viewport=dict(width=1280, height=800))
        if request.param == "desktop"
        else dict(viewport=dict(width=360, height=740), has_touch=True, is_mobile=True)
    )
    context, url, bad = browser.new_context(**size), (built[0] / "out" / "study.html").as_uri(), []
    page = context.new_page()
    page.on("console", lambda m: bad.append(m.text))
    page.on("pageerror", lambda e: bad.append(str(e)))
    page.on(
        "request",
        lambda r: r.url == url or r.url.startswith(("data:", "blob:")) or bad.append(r.url),
    )
    page.goto(url)
    yield page
    context.close()
    assert not bad


def at(page, n):
    "Wait for question `n`, and for the time in which a second tap is ignored."
    count = "document.getElementById('count').textContent"
    page.wait_for_function(
        f"n => {count}.startsWith(n) && performance.now() > ready", arg=f"{n} of "
    )


def current(page):
    return page.evaluate(
        "({ id: screens[state.at].id, step: screens[state.at].step, total: screens.length })"
    )


def begin(page, code):
    page.fill("#code", code)
    page.keyboard.press("Enter")
    at(page, 1)


def answer(page, value):
    page.click(f".options button[data-value='{value}']")


def assert_layout(page):
    "No horizontal overflow of the page or of a button, and buttons of at least 44 pixels."
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    good = "b.getBoundingClientRect().height >= 44 && b.scrollWidth <= b.clientWidth"
    assert page.evaluate(f"[...document.querySelectorAll('main button')].every(b => {good})")


def test_a_participant(page, built, tmp_path):
    folder, key = built
    assert (
        page.locator("h1").inner_text() == "Flowers & <b>birds</b>"
        and page.locator("p", has_text="Thank you.").count() == 1
    )
    page.click("text=Begin")
    assert "type the code" in page.locator("#hint").inner_text()
    begin(page, "P03 Zoë")
    total, wanted, first = current(page)["total"], {}, None
    for n in range(1, total + 1):
        at(page, n)
        assert_layout(page)
        now = current(page)
        value = ideal_answers(key["tasks"][now["id"]])[now["step"]]
        wanted.setdefault(now["id"], []).append(value)
        if n == 2:  # a wrong answer, typed, then corrected
            keys = page.eval_on_selector_all(
                ".options button",
                "bs => bs.map(b => [b.dataset.value, b.querySelector('kbd').textContent])",
            )
            wrong, first = next(k for v, k in keys if v != value), now["id"]
            page.keyboard.press(wrong)
            at(page, 3)
            page.keyboard.press("ArrowLeft")
            at(page, 2)
            assert page.locator("[aria-pressed=true] kbd").text_content() == wrong
        if n == 4:  # a pause
            page.reload()
            at(page, 4)
            page.click("text=Back")
            at(page, 3)
            assert page.locator("[aria-pressed=true]").count() == 1
            page.keyboard.press("ArrowRight")
            at(page, 4)
            page.keyboard.press("ArrowRight")  # not before it is answered
            at(page, 4)
        answer(page, value)
    page.wait_for_selector("text=Thank you!")
    page.reload()
    page.wait_for_selector("text=Thank you!")
    with page.expect_download() as saving:
        page.click("text=Save my answers")
    (tmp_path / "in").mkdir()
    saving.value.save_as(tmp_path / "in" / saving.value.suggested_filename)
    with patch.object(logger, "warning") as warning:
        d = read_answers(tmp_path / "in", key)
    assert not warning.called and set(d.participant) == {"P03 Zoë"} and len(d) == total
    file = load_json(next((tmp_path / "in").glob("*.json")))
    assert {r["task"]: r["values"] for r in file["answers"]} == wanted
    assert {r["task"]: r["changes"] for r in file["answers"] if r["changes"]} == {first: 1}
    assert (d.ms > 0).all() and not attention(d).failed.any()
    scores = study_scores(d).set_index("score").value
    assert scores[["a_er", "a_adj", "erb"]].round(6).tolist() == [1, 1, 1]
    saved = tmp_path / "in" / saving.value.suggested_filename
    assert page.locator("textarea").input_value() == saved.read_text()
    page.on("dialog", lambda o: o.accept())
    page.click("text=Start again")
    page.wait_for_selector("#code")
    page.reload()
    assert page.locator("#code").input_value() == ""


def test_answers_survive_where_there_is_no_storage(page, built):
    page.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new Error('none') } })"
    )
    page.reload()
    begin(page, "P04")
    answer(page, ideal_answers(built[1]["tasks"][current(page)["id"]])[0])
    at(page, 2)
    page.on("dialog", lambda o: o.accept())  # the browser asks before such a page is left
    page.reload()
    at(page, 2)


def test_a_second_tap_and_a_held_key_are_one_answer(page):
    begin(page, "P05")
    page.locator(".options button").first.dispatch_event("click")
    click = "document.querySelector('.options button').click()"
    key = "document.dispatchEvent(new KeyboardEvent('keydown', { key: '1', repeat: true }))"
    page.evaluate(f"for (let i = 0; i < 5; i++) {{ {click}; {key} }}")
    at(page, 2)
    page.wait_for_timeout(300)
    at(page, 2)


def test_numbers_come_from_the_seed(built):
    "All are different, so that no number shows which pictures belong together."
    _, key = built
    numbers = [n for i, t in key["tasks"].items() for n in (i, *t["pictures"])]
    assert sorted(numbers) == sorted(random_ids(len(numbers), key["seed"]))
    assert len(set(numbers)) == len(numbers)


def test_the_page_does_not_reveal_the_condition(built):
    folder, key = built
    text = (folder / "out" / "study.html").read_text()
    words = ["by hand", "original", "edited", "heldout", "attention", "condition", "method"]
    for word in [*words, "http:", "https:"]:
        assert word not in text
    for task in key["tasks"].values():
        assert all(str(picture["seed"]) not in text for picture in task["pictures"].values())
