"""The pages as a browser shows them: Chromium, driven over file://, without a network."""

import json
import re
import shutil
from itertools import pairwise
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
    score = {"target": {"forget": 1.0, "retain": 1.0}, "merged": {"forget": 0.1, "retain": 0.9}}
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
    epochs = [
        {"branch": branch, "epoch": epoch, "step": 5 * epoch, "half": half, "task": "all"}
        | {"regurgitation": 0.9 / (1 + epoch), "knowledge": 0.5}
        for branch in ("strong", "weak")
        for epoch in (0, 1, 2)
        for half in ("forget", "retain")
    ]
    (run / "analysis").mkdir()
    (run / "analysis" / "trajectories.json").write_text(json.dumps({"tables": {"epochs": epochs}}))
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
        *("strong", "Knowledge and regurgitation over epochs"),
    ]
    assert page.locator(".chart svg").count() == len(titles)


def test_analyses_come_after_the_items_and_their_tables_open_by_the_keyboard(page_path, visit):
    page = visit(page_path)
    links = page.locator("nav a").all_inner_texts()
    order = ["Documents", "Items", "Analysis", "How it was made"]
    assert links[-4:] == order
    tops = [page.locator(link).bounding_box()["y"] for link in ("#items-section", "#analysis")]
    assert tops == sorted(tops)
    summary = page.locator("#analysis details.table summary")
    table = page.get_by_role("region", name="trajectories: epochs")
    assert summary.inner_text() == "trajectories: epochs 12 rows" and table.is_hidden()
    summary.focus()
    page.keyboard.press("Enter")
    assert table.is_visible()


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


def test_the_worst_comes_first_until_another_order_is_chosen(page_path, visit):
    page = visit(page_path)
    page.click("#item-more")
    halves = page.locator("article h4 span:first-of-type").all_inner_texts()
    assert halves == ["forget"] * 12 + ["retain"] * 12
    said = [
        float(text.split()[0])
        for text in page.locator("article dd.score:last-child").all_inner_texts()
    ]
    assert said == [0.5] * 6 + [0.1] * 6 + [0.5] * 6 + [0.9] * 6
    rows_ = page.locator("#documents tbody tr")
    shown = [row.locator("td").all_inner_texts() for row in rows_.all()]
    assert [cells[0] for cells in shown] == ["forget"] * 6 + ["retain"] * 6
    assert [cells[3] for cells in shown] == ["0.50"] * 3 + ["0.10"] * 3 + ["0.50"] * 3 + [
        "0.90"
    ] * 3
    page.select_option("[name=order]", "low")
    first = page.locator("article dd.score:last-child").first
    assert first.inner_text().startswith("0.10")  # control: another order begins elsewhere


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


@pytest.mark.parametrize("width", [1280, 700, 390])
def test_every_link_to_a_section_is_seen_without_scrolling_sideways(page_path, visit, width):
    page = visit(page_path, width=width)
    links = page.locator("nav a")
    ends = [link.bounding_box() for link in links.all()]
    assert len(ends) == 8 and all(end["x"] + end["width"] <= width for end in ends)
    assert page.locator("nav").evaluate("(nav) => nav.scrollWidth <= nav.clientWidth")


def test_marks_at_the_ends_of_the_scale_are_whole(page_path, visit):
    """The mark of a model that keeps all lies within the frame that cuts what leaves it."""
    page = visit(page_path)
    chart = page.locator('.chart[data-chart="halves"]')
    frame = chart.locator("svg clipPath rect").first.evaluate("(e) => e.width.baseVal.value")
    marks = chart.locator(".mark-symbol.role-mark path").evaluate_all(
        "(all) => all.map((one) => [one.transform.baseVal[0].matrix.e, one.getBBox().width / 2])"
    )
    assert len(marks) == 2
    assert all(x - half >= 0 and x + half <= frame for x, half in marks)


CUT = """(all) => all.flatMap((chart) => {
  const edge = chart.getBoundingClientRect();
  const svg = chart.querySelector("svg");
  const shown = [svg, ...svg.querySelectorAll("text")].map((one) => one.getBoundingClientRect());
  const cut = shown.some((box) => box.left < edge.left - 1 || box.right > edge.right + 1);
  return cut ? [chart.dataset.chart] : [];
})"""
"""The charts of which a part lies beyond their edge."""


def test_no_chart_is_cut_and_panels_stand_below_each_other_where_the_screen_is_narrow(
    page_path, visit
):
    page = visit(page_path)
    charts = page.locator(".chart")
    frames = page.locator('.chart[data-chart="terms-by-model"] .mark-group.cell > g > .background')
    assert charts.evaluate_all(CUT) == []
    wide = [frame.bounding_box() for frame in frames.all()]
    assert len(wide) == 2 and wide[0]["y"] == wide[1]["y"] and wide[0]["x"] < wide[1]["x"]
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_function(
        "() => [...document.querySelectorAll('.chart svg')]"
        ".every((svg) => svg.width.baseVal.value < 390)"
    )
    assert charts.evaluate_all(CUT) == []
    narrow = [frame.bounding_box() for frame in frames.all()]
    assert narrow[0]["x"] == narrow[1]["x"] and narrow[0]["y"] < narrow[1]["y"]


@pytest.mark.parametrize("width", [1280, 390])
def test_epochs_are_whole_numbers_that_do_not_touch(page_path, visit, width):
    page = visit(page_path, width=width)
    labels = page.locator('.chart[data-chart="trajectory-epochs"] g[aria-label^="X-axis"]').first
    texts = labels.locator(".role-axis-label text").all()
    assert [text.text_content() for text in texts] == ["0", "1", "2"]
    boxes = [text.bounding_box() for text in texts]
    assert all(a["x"] + a["width"] < b["x"] for a, b in pairwise(boxes))


def test_a_number_and_its_percent_sign_stay_on_one_line(page_path, visit):
    text = visit(page_path).locator("main").evaluate("(main) => main.textContent")
    assert "\N{NO-BREAK SPACE}% of the passages" in text
    assert not re.search(r"\d %", text)


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
    page_file.write_text(comparison_page(readings, [compare(*readings)], {"run": "Kept."}))
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
