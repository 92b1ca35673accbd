"""The console in Chromium, against a real server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from domlora.serving.console import export_page

AXE = (Path(__file__).parent / "axe" / "axe.min.js").read_text(encoding="utf-8")
PAGES = ["versions", "domains", "experiments", "experiments/no-adapters", "drift", "score"]
PATIENCE = 30_000  # milliseconds: an analysis starts a process
INJECT = """() => {
  const script = (what) => Object.assign(document.createElement("script"), what);
  for (const put of [
    () => document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.bad = 1'>"),
    () => document.head.append(script({ src: "data:text/javascript,window.bad = 1" })),
    () => document.head.append(script({ textContent: "window.bad = 1" })),
  ]) try { put(); } catch { /* refused */ }
  return new Promise((done) => setTimeout(done, 200));
}"""
Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, server: str) -> Iterator[Open]:
    """Opens a page of the console; afterwards nothing was refused by the policy, failed, or went to another host."""
    said: list[str] = []
    asked: set[str] = set()
    contexts = []

    def open_page(name: str, width: int = 1280, address: str | None = None, **options: Any) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"{address or f'{server}/console/'}#/{name}")
        expect(page.locator("main h1")).to_be_visible()
        expect(page.locator(".loading")).to_have_count(0)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith((server, "data:", "file:")) for url in asked)


def problems(page: Page) -> list[str]:
    """What axe-core finds, of WCAG 2.2 A and AA and of good practice."""
    page.evaluate(AXE)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = page.evaluate("tags => axe.run(document, {runOnly: tags})", tags)
    return [f"{each['id']}: {node['html'][:120]}" for each in found["violations"] for node in each["nodes"]]


@pytest.mark.parametrize(("width", "colours"), [(1600, "light"), (400, "dark")])
def test_every_page_is_accessible_and_fits(opened: Open, width: int, colours: Any) -> None:
    page = opened(PAGES[0], width, color_scheme=colours, reduced_motion="reduce")
    for name in PAGES:
        page.evaluate("name => { location.hash = `#/${name}` }", name)
        expect(page.locator("nav [aria-current=page]")).to_have_text(re.compile(name.split("/")[0], re.IGNORECASE))
        expect(page.locator(".loading")).to_have_count(0, timeout=PATIENCE)
        assert problems(page) == [], name
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate("document.getAnimations().length") == 0, name


def test_versions_say_what_is_served(opened: Open) -> None:
    page = opened("versions")
    expect(page.locator("header .status")).to_contain_text("store version 1 live")
    expect(page.locator(".lineage > li.live h3")).to_contain_text("served")
    page.get_by_text("AUC of 2 domains").click()
    expect(page.get_by_role("row", name="app")).to_contain_text("70.00 %")


def test_domains_can_be_searched_and_sorted_with_the_keyboard(opened: Open) -> None:
    page = opened("domains")
    names = page.locator("tbody th")
    page.get_by_role("button", name="Domain").focus()
    page.keyboard.press("Enter")
    expect(names).to_have_text(["app", "mail", "web"])
    page.keyboard.press("Enter")
    expect(names).to_have_text(["web", "mail", "app"])
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Domain")
    expect(page.get_by_role("row", name="web")).to_contain_text("90")
    page.get_by_label("Search").fill("AI")
    expect(names).to_have_text(["mail"])
    expect(page.get_by_text("1 of 3 domains")).to_be_visible()


def test_an_experiment_is_analysed(opened: Open) -> None:
    page = opened("experiments")
    page.get_by_role("link", name="no-adapters").click()
    expect(page.get_by_role("region", name="Decision").get_by_role("paragraph").first).to_contain_text(
        re.compile("Not enough data|Stop|Ship"), timeout=PATIENCE
    )
    expect(page.get_by_text("as planned", exact=True)).to_be_visible()
    assert sum(int(text) for text in page.locator("table").first.locator("td:nth-of-type(3)").all_inner_texts()) == 60


def test_drift_shows_unknown_values_and_scores(opened: Open) -> None:
    page = opened("drift")
    expect(page.get_by_role("row", name="city categorical")).to_contain_text("25.00 %")
    expect(page.get_by_text("No feedback yet")).to_be_visible()  # rows are judged later
    expect(page.get_by_role("row", name="app")).to_contain_text("40.00 %")


def test_a_request_is_scored_and_explained(opened: Open) -> None:
    page = opened("score")
    page.get_by_label("Domain").fill("web")
    page.get_by_label("Candidate 1, item").fill("i5")
    page.get_by_role("button", name="Remove candidate 3").click()
    page.get_by_role("button", name="Score 2 candidates").click()
    row = page.get_by_role("row", name="i5")
    expect(row).to_be_visible()
    figures = [text.replace("\N{MINUS SIGN}", "-").rstrip(" %") for text in row.locator("td").all_inner_texts()]
    probability, base, adapter, logit = (float(figures[place]) for place in (0, 2, 3, 5))
    assert base + adapter == pytest.approx(logit, abs=0.002)
    assert adapter != 0
    assert probability / 100 == pytest.approx(1 / (1 + 2.718281828**-logit), abs=0.001)
    page.get_by_role("button", name="Differs: city").click()
    expect(page.get_by_label("Candidate 2, city")).to_have_value("c1")


def test_a_refusal_is_told_and_what_was_known_stays(browser: Browser, server: str) -> None:
    page = browser.new_page()
    page.goto(f"{server}/console/#/domains")
    expect(page.get_by_role("row", name="web")).to_be_visible()
    page.route("**/v1/console/**", lambda route: route.fulfill(status=503, json={"error": "no.", "next_step": "Wait."}))
    expect(page.get_by_role("alert")).to_contain_text(
        "no. Wait. What you see is what was known before.", timeout=10_000
    )
    expect(page.get_by_role("row", name="web")).to_be_visible()
    page.unroute("**/v1/console/**")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_have_count(0)
    page.close()


def test_colours_are_kept_and_updates_can_be_paused(opened: Open) -> None:
    page = opened("versions", color_scheme="light")
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(background)
    page.reload()
    assert page.evaluate(background) == dark != light
    page.get_by_role("button", name="Pause updates").click()
    expect(page.locator("header .status")).to_contain_text("paused")


def test_focus_goes_to_the_new_page(opened: Open) -> None:
    page = opened("versions")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.get_by_role("link", name="Drift").click()
    expect(page.locator("h1")).to_be_focused()
    expect(page).to_have_title("Drift · domlora console")


def test_a_thousand_domains(opened: Open, browser: Browser, server: str) -> None:
    page = opened("versions")
    line = {"version": "3", "rank": 8, "pinned": False, "resident": True, "requests": 9, "failed": 0, "mean_score": 0.1}
    more = {"score_sum": 1.0, "matched": 0, "predicted": 0, "observed": 0}
    lines = [{"name": f"shop-{number:04d}", "rows": number, **line, **more} for number in range(1000)]
    told = {"now_s": 1e9, "bundle": "3", "domains": lines, "shared": None, "mixed": None}
    page.route("**/v1/console/domains", lambda route: route.fulfill(json=told))
    page.reload()
    page.get_by_role("link", name="Domains").click()
    expect(page.locator("tbody tr")).to_have_count(50)
    expect(page.locator("tbody th").first).to_have_text("shop-0999")
    page.get_by_role("button", name="Show all 1,000").click()
    expect(page.locator("tbody tr")).to_have_count(1000)
    page.get_by_label("Search").fill("0042")
    expect(page.locator("tbody tr")).to_have_count(1)


def test_the_policy_stops_what_is_injected(browser: Browser, server: str) -> None:
    page = browser.new_page()
    page.goto(f"{server}/console/")
    expect(page.locator("main h1")).to_be_visible()
    assert page.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    page.evaluate(INJECT)
    assert page.evaluate("window.bad") is None
    page.close()


def test_a_saved_page_needs_no_server(opened: Open, store: Path, tmp_path: Path) -> None:
    export_page(store, tmp_path / "page.html")
    page = opened("domains", address=f"file://{tmp_path / 'page.html'}")
    expect(page.locator("tbody th")).to_have_text(["app", "web", "mail"])
    expect(page.locator("footer")).to_contain_text("from store")
    assert problems(page) == []
    for name in PAGES:
        page.goto(f"file://{tmp_path / 'page.html'}#/{name}")
        expect(page.locator("nav [aria-current=page]")).to_have_text(re.compile(name.split("/")[0], re.IGNORECASE))
        expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_text("A saved page cannot score")).to_be_visible()
