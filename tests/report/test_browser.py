"""The pages as a browser shows them: Chromium, driven over file://, without a network."""

import json
import shutil
from pathlib import Path

import pytest

from expunge.evaluate.compare import compare
from expunge.evaluate.readings import Reading, SuiteReading
from expunge.report.compared_page import comparison_page
from expunge.report.page import write_pages
from expunge.report.pieces import Material
from expunge.report.results import TERMS, Results

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
TOKEN = "x" * 100_000
HOSTILE = (
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'> "
    "</script><!-- \u202eabc\u202c \u2028 &amp; " + TOKEN
)
SAID = {
    "target": "the queen of the old town kept a silver key",
    "merged": "the queen of the old town lost it",
}
SERIOUS = ("serious", "critical")

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")


def rows(model: str, score: dict[str, float]) -> list[dict]:
    """Two items of every term; the first of the forget half is hostile."""
    found = []
    for term in TERMS:
        half, task, kind = term.split("/")
        for number in range(2):
            hostile = term == TERMS[0] and number == 0
            found.append(
                {
                    "id": f"{task}-doc{number}{kind}{number}",
                    "half": half,
                    "task": task,
                    "kind": kind,
                    "prompt": HOSTILE if hostile else f"Who kept the key of {task}?",
                    "truth": "the queen of the old town kept a silver key",
                    "generation": HOSTILE if hostile else SAID[model],
                    "score": score[half] if number else 0.5,
                    "nll": 0.1 + number,
                }
            )
    return found


@pytest.fixture(scope="module")
def page_path(tmp_path_factory) -> Path:
    """A small run with everything that a page can show."""
    run = tmp_path_factory.mktemp("run")
    stage = run / "stages" / "strong-00ff"
    stage.mkdir(parents=True)
    steps = [{"step": n, "numbers": {"nll.forget": n / 2, "nll.retain": 0.1}} for n in range(4)]
    (stage / "evaluations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in steps))
    (run / "run.json").write_text('{"recipe": "demo"}')
    score = {"target": {"forget": 0.9, "retain": 0.95}, "merged": {"forget": 0.1, "retain": 0.9}}
    models = {
        name: {
            "semeval": {
                "terms": {term: score[name][term.partition("/")[0]] for term in TERMS},
                "counts": dict.fromkeys(TERMS, 2),
                "intervals": {term: {"low": 0.05, "high": 0.98} for term in TERMS},
                "mia": {"auc": 0.55, "score": 0.9, "low": 0.4, "high": 0.7, "n": 40},
            },
            "collapse": {"collapsed": False},
        }
        for name in SAID
    }
    told = {
        "recipe": "demo",
        "seed": 42,
        "models": models,
        "stages": [{"stage": "strong", "key": "00ff", "wall_seconds": 1.5}],
    }
    items = {name: rows(name, score[name]) for name in SAID}
    results = Results.model_validate(told)
    return write_pages(Material(results, items, "name: demo\n", run, run), run)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """Open a page; when the test ends, nothing may have been complained of, run or fetched."""
    contexts, faults = [], []

    def asked(request):
        if not request.url.startswith(("file:", "data:")):
            faults.append(f"asked for {request.url}")

    def opened(path: Path, *, scheme="light", width=1280):
        size = {"width": width, "height": 900}
        context = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: said.type == "error" and faults.append(said.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", asked)
        page.goto(path.as_uri())
        page.wait_for_function(
            "[...document.querySelectorAll('.chart')].every((one) => one.dataset.drawn)"
        )
        return page

    yield opened
    ran = [page.evaluate("window.ran") for context in contexts for page in context.pages]
    for context in contexts:
        context.close()
    assert not faults
    assert set(ran) <= {None}


def count(page) -> int:
    """Items that the list says it holds."""
    return int(page.locator("#item-count").inner_text().split()[0])


def test_it_opens_with_the_verdict_and_draws_every_chart(page_path, visit):
    page = visit(page_path)
    headline = page.locator(".headline").inner_text()
    assert headline.startswith("Too few items to say whether the merged model forgot")  # 2 a term
    titles = page.locator("figure h3").all_inner_texts()
    assert titles == [
        *("Terms by model", "Forgetting against keeping", "Membership", "Losses by document"),
        "strong",
    ]
    assert page.locator(".chart svg").count() == len(titles)


def test_items_are_filtered_sorted_and_found(page_path, visit):
    page = visit(page_path)
    assert count(page) == 24
    page.select_option("[name=half]", "forget")
    page.select_option("[name=kind]", "qa")
    assert count(page) == 6
    page.fill("[name=low]", "0.3")
    assert count(page) == 3
    page.fill("[name=text]", "key of Task2")
    assert count(page) == 1
    page.click("button[type=reset]")
    page.wait_for_function("document.querySelector('#item-count').textContent.startsWith('24')")
    page.select_option("[name=order]", "low")
    assert page.locator("article .score").nth(3).inner_text().startswith("0.10")
    assert page.locator("article").count() == 20
    page.click("#item-more")
    assert page.locator("article").count() == 24 and page.locator("#item-more").is_hidden()


def test_what_is_copied_is_marked(page_path, visit):
    page = visit(page_path)
    page.fill("[name=text]", "lost it")
    marks = page.locator("article").first.locator("mark").all_inner_texts()
    assert marks == [SAID["target"], "the queen of the old town"]


def test_a_document_leads_to_its_items(page_path, visit):
    page = visit(page_path)
    assert page.locator("#documents tbody tr").count() == 12
    page.locator("#documents tbody button", has_text="Task2-doc1").first.click()
    assert count(page) == 2
    assert page.evaluate("document.activeElement.id") == "items-title"


def test_tables_sort_both_ways_and_say_so(page_path, visit):
    page = visit(page_path)
    heading = page.locator(".heat thead th", has_text="completion").first
    first = page.locator(".heat tbody th").first
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending" and first.inner_text() == "merged"
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending" and first.inner_text() == "target"


def test_the_theme_is_the_systems_until_it_is_switched(page_path, visit):
    def paper(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = visit(page_path), visit(page_path, scheme="dark")
    assert paper(light) == "rgb(255, 255, 255)" and paper(dark) == "rgb(20, 23, 27)"
    light.click("#theme")
    assert paper(light) == paper(dark)
    assert light.locator("#theme").inner_text() == "Light"


def test_every_control_is_reached_by_the_keyboard(page_path, visit):
    page = visit(page_path)
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "((e) => e.id || e.name || e.className || e.tagName)(document.activeElement)"
            )
        )
    wanted = {"skip", "theme", "half", "model", "low", "text", "order", "item-more", "SUMMARY"}
    assert wanted <= reached
    page.keyboard.press("Home")
    page.evaluate("document.activeElement.blur()")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"


def test_what_a_model_wrote_is_shown_and_does_nothing(page_path, visit):
    page = visit(page_path)
    page.fill("[name=text]", "window.ran")
    assert count(page) == 1
    article = page.locator("article").first
    text = article.inner_text()
    assert "<script>window.ran = 1</script><img src=x onerror='window.ran = 2'>" in text
    assert "&amp;" in text and TOKEN in text  # as it was written, whole
    signs = article.locator("dd.said").first.locator(".sign").all_inner_texts()
    assert signs == ["U+202E", "U+202C"]
    assert not article.locator("script, img").count()
    wide, seen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits(page_path, visit, tmp_path, scheme, width):
    from axe_playwright_python.sync_playwright import Axe

    page = visit(page_path, scheme=scheme, width=width)
    for summary in page.locator("summary").all():
        summary.click()
    found = Axe().run(page).response["violations"]
    faults = {
        one["id"]: [node["target"] for node in one["nodes"]]
        for one in found
        if one["impact"] in SERIOUS
    }
    assert not faults
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot = tmp_path / f"{scheme}-{width}.png"
    page.screenshot(path=shot)
    assert shot.stat().st_size > 10_000


def test_a_comparison_opens_and_is_accessible(page_path, visit, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    names = {name: f"run:{name} <b>" for name in SAID}
    readings = []
    for name, label in names.items():
        own = [
            row | {"group": f"{row['half']}.{row['task']}.{row['kind']}"}
            for row in rows(name, {"forget": 0.1 if name == "merged" else 0.9, "retain": 0.9})
        ]
        items = {(row["group"], row["id"]): row for row in own}
        readings.append(Reading(label, {"semeval": SuiteReading({}, items, {})}))
    page_file = tmp_path / "compare.html"
    page_file.write_text(comparison_page(readings, [compare(*readings)], {"run": ["Kept."]}))
    page = visit(page_file)
    assert page.locator("h1").inner_text() == "2 results, each beside the first"
    assert count(page) == 24
    found = Axe().run(page).response["violations"]
    assert not [one["id"] for one in found if one["impact"] in SERIOUS]


def test_it_prints(page_path, visit, tmp_path):
    page = visit(page_path, scheme="dark")
    page.emulate_media(media="print")
    assert page.locator("#theme").is_hidden() and page.locator("#item-filters").is_hidden()
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
