"""The playground in a real browser, against a stub of the service: what a reader sees, sends, and can be hurt by.

Every test also asserts that no request left the page's origin and that the console stayed free of errors.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
pytest.importorskip("uvicorn", reason="needs uvicorn")
pytest.importorskip("fastapi", reason="needs fastapi")

from tests.browser import CONTRASTS, QUERY, Visit, serve_app  # noqa: E402
from tests.playground_stub import EXAMPLES, HOSTILE, POINTS, Seen, Solution, make_stub  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (`apt-get install chromium`)"),
]
expect = sync_api.expect


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Seen, str]]:
    """The stub and its notes."""
    seen = Seen()
    with serve_app(make_stub(seen)) as origin:
        yield seen, origin


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, service: tuple[Seen, str], request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh page that has loaded; parametrized indirectly with options of the browser's context."""
    seen, origin = service
    seen.__init__()  # type: ignore[misc]
    context = browser.new_context(**{"viewport": {"width": 1360, "height": 900}, **getattr(request, "param", {})})
    visit = Visit(context.new_page(), seen, origin)
    visit.page.set_default_timeout(10_000)
    visit.page.on("request", lambda each: visit.requests.append(each.url))
    visit.page.on("console", lambda each: visit.complaints.append(each.text) if each.type == "error" else None)
    visit.page.on("pageerror", lambda each: visit.complaints.append(str(each)))
    visit.open()
    yield visit
    foreign = [url for url in visit.requests if not url.startswith((origin + "/", "data:"))]
    expected = "Failed to load resource: the server responded with a status of 4" if visit.refusals_expected else "-"
    complaints = [each for each in visit.complaints if not each.startswith(expected)]
    context.close()
    deadline = time.monotonic() + 5
    while seen.active and time.monotonic() < deadline:
        time.sleep(0.02)  # the next test starts with no stream of this one
    assert not foreign, f"requests left the origin: {foreign}"
    assert not complaints, f"the console complained: {complaints}"


def solve(model: str, cost_weight: float = 0.2) -> Solution:
    """What the stub writes for QUERY."""
    solution = Solution(QUERY, model, cost_weight)
    while not solution.done:
        solution.next_step()
    return solution


def test_steps_arrive_in_order_with_their_model_probability_and_cost(visit: Visit) -> None:
    visit.page.focus("#weight")
    visit.run()
    (body,) = visit.seen.bodies
    assert body["model"] == "auto" and body["messages"] == [{"role": "user", "content": QUERY}]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    solution = solve("auto", body["routing"]["cost_weight"])
    assert body["routing"]["trace"] is True
    assert visit.texts() == [step["text"] for step in solution.steps]
    badges = visit.page.locator(".step .badge")
    models = [step["model"] for step in solution.steps]
    assert badges.all_inner_texts() == models and len(set(models)) == 2
    colours = badges.evaluate_all("nodes => nodes.map((node) => getComputedStyle(node).color)")
    fills = visit.page.locator(".step").evaluate_all(
        "nodes => nodes.map((node) => getComputedStyle(node, '::before').backgroundImage)"
    )
    by_model = {model: (colour, fill) for model, colour, fill in zip(models, colours, fills, strict=True)}
    assert by_model["small"][0] != by_model["large"][0], "told apart by colour"
    assert by_model["small"][1] != by_model["large"][1], "and by pattern"
    shown = visit.page.locator(".step .chance.picked .number").all_inner_texts()
    assert shown == [f"{step['probability']:.2f}" for step in solution.steps]
    summary = solution.summary()
    share = 100 * summary["flops"] / summary["flops_large_only"]
    expect(visit.page.locator(".headline b")).to_have_text(f"{share:.0f}%")
    facts = visit.page.locator(".facts").inner_text()
    assert f"{summary['steps']['small']} small" in facts and f"{summary['steps']['large']} large" in facts
    assert f"{solution.usage[1]} written, {solution.usage[0]} read" in facts
    expect(visit.page.locator(".run header + p")).to_have_text("Step by step by router-v30, at cost weight 0.2")
    assert re.search(r"First token\s+\d", facts) and re.search(r"Total\s+\d", facts)


def test_the_page_and_the_real_api_understand_each_other(browser: Any) -> None:
    torch = pytest.importorskip("torch")
    from roro_ray.config import Config
    from roro_ray.engines.pool import EnginePool
    from roro_ray.routing.router import make_router
    from roro_ray.routing.router_policy import RouterPolicy
    from serve.api import ApiOptions, make_api
    from serve.backend import LoadedRouters, LocalBackend, RouterFacts
    from serve.metrics import MemoryMetrics
    from serve.service import RoutingService, ServiceOptions
    from tests.scripted_world import make_engines, make_scripted_config

    torch.manual_seed(0)
    config: Config = make_scripted_config()
    policy = RouterPolicy(make_router(config.router, 2), version=7)
    routers = LoadedRouters()
    routers.add(policy, RouterFacts(7, policy.peek))
    backend = LocalBackend(EnginePool(make_engines()), routers)
    service = RoutingService(backend, ServiceOptions(episode=config.episode), MemoryMetrics())
    app = make_api(service, ApiOptions(examples=["Task 1.", "Task 2."]))
    with serve_app(app) as origin:
        page = browser.new_page()
        page.goto(origin + "/")
        page.get_by_role("button", name="Task 1.").click(timeout=20_000)
        expect(page.locator("#live")).to_contain_text("Done: 4 steps")
        assert page.locator(".step").count() == page.locator(".step .chance.picked").count() == 4
        page.check("#compare")
        page.click("#run")
        expect(page.locator("[data-role=dearest] .verdict")).to_have_text("Answer 42")
        expect(page.locator("[data-role=cheapest] .verdict")).to_have_text("\u2260 Answer 0, large only says 42")
        assert page.locator(".notice").count() == 0
        page.close()


def test_text_grows_while_it_is_written(visit: Visit) -> None:
    visit.start(QUERY + " [slow]")
    words = visit.page.locator(".step .text").first
    expect(words).to_have_text(re.compile(r"^A: "))
    early = words.inner_text()
    assert early != "A: dbl 47 = 94" and "A: dbl 47 = 94".startswith(early.strip())
    expect(visit.page.locator(".step")).to_have_count(1)
    expect(words).to_have_text("A: dbl 47 = 94")
    expect(visit.page.locator(".caption, .headline .quiet")).to_have_text("of large-only's FLOPs, so far")
    expect(visit.page.locator("#live")).to_have_text("Step 1 by small: A: dbl 47 = 94")
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator(".notice")).to_contain_text("Stopped")


def test_the_slider_walks_the_calibrated_points_and_changes_what_is_sent(visit: Visit) -> None:
    weight, expected = visit.page.locator("#weight"), visit.page.locator("#expected")
    weight.focus()
    for key, (cost_weight, share, accuracy, _) in [("Home", POINTS[0]), ("ArrowRight", POINTS[1]), ("End", POINTS[-1])]:
        visit.page.keyboard.press(key)
        expect(visit.page.locator("#weight-value")).to_have_text(str(cost_weight))
        expect(expected).to_contain_text(f"{100 * accuracy:.1f}%")
        expect(expected).to_contain_text(f"{100 * share:.1f}%")
        assert f"{100 * share:.1f}%" in (weight.get_attribute("aria-valuetext") or "")
        visit.run()
        assert visit.seen.bodies[-1]["routing"]["cost_weight"] == cost_weight
        weight.focus()
    assert visit.page.locator(".step[data-model=large]").count() == 0, "at the dearest weight the small one writes all"
    box = weight.bounding_box()
    assert box is not None
    visit.page.mouse.click(box["x"] + box["width"] * 0.52, box["y"] + box["height"] / 2)
    visit.run()
    near = min((point[0] for point in POINTS), key=lambda each: abs(each - (0.05 * 24**0.52)))
    assert visit.seen.bodies[-1]["routing"]["cost_weight"] == near


def test_without_a_calibration_the_slider_gives_the_weight_alone(visit: Visit) -> None:
    visit.seen.calibrated = False
    visit.open()
    expect(visit.page.locator("#weight-words")).to_contain_text("not been calibrated")
    expect(visit.page.locator("#chart")).to_be_hidden()
    visit.page.focus("#weight")
    visit.page.keyboard.press("Home")
    visit.page.keyboard.press("ArrowRight")
    visit.run()
    assert visit.seen.bodies[0]["routing"]["cost_weight"] == pytest.approx(0.05, rel=0.02)


def test_compare_runs_three_at_once_side_by_side(visit: Visit) -> None:
    visit.run(compare=True)
    assert visit.seen.peak == 3, "not one after the other"
    assert sorted(body["model"] for body in visit.seen.bodies) == ["auto", "large", "small"]
    assert all("cost_weight" not in body["routing"] for body in visit.seen.bodies if body["model"] != "auto")
    boxes = [each.bounding_box() for each in visit.page.locator(".run").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    weight = next(body for body in visit.seen.bodies if body["model"] == "auto")["routing"]["cost_weight"]
    for role, model in [("routed", "auto"), ("cheapest", "small"), ("dearest", "large")]:
        assert visit.texts(role) == [step["text"] for step in solve(model, weight).steps]
    assert visit.page.locator(".run:not([data-role=routed]) .chance").count() == 0, "nothing was routed there"
    verdicts = visit.page.locator(".verdict").all_inner_texts()
    assert verdicts == ["Answer 69, same as large only", "\u2260 Answer 77, large only says 69", "Answer 69"]
    expect(visit.page.locator("[data-role=dearest] .headline b")).to_have_text("100%")
    visit.page.set_viewport_size({"width": 700, "height": 900})
    assert len({each.bounding_box()["x"] for each in visit.page.locator(".run").all()}) == 1


def test_stop_ends_the_request_and_keeps_what_arrived(visit: Visit) -> None:
    visit.start(QUERY + " [slow]", compare=True)
    expect(visit.page.locator("[data-role=routed] .text")).to_have_text(re.compile(r"^A: "))
    assert visit.seen.active == 3
    visit.page.click("#stop")
    expect(visit.page.locator(".notice")).to_contain_text(["Stopped"] * 3)
    expect(visit.page.locator("#run")).to_be_focused()
    deadline = time.monotonic() + 5
    while visit.seen.active and time.monotonic() < deadline:
        time.sleep(0.02)
    assert visit.seen.active == 0, "the service still writes for a reader who left"
    before = visit.texts()
    time.sleep(0.5)
    assert visit.texts() == before


def test_everything_by_keyboard_alone(visit: Visit) -> None:
    page, keyboard = visit.page, visit.page.keyboard
    reached: list[str] = []
    while "Health" not in reached and len(reached) < 30:
        keyboard.press("Tab")
        focus = page.evaluate(
            "() => { const node = document.activeElement; const style = getComputedStyle(node);"
            " return [node.id || node.textContent, style.outlineStyle, style.outlineWidth]; }"
        )
        assert focus[1:] == ["solid", "2px"], f"focus cannot be seen on {focus[0]}"
        reached.append(focus[0])
    wanted = ["Skip to the answer", "examples", "query", "run", "compare", "weight", *EXAMPLES, "API schema", "Health"]
    assert reached == wanted
    page.focus("#query")
    keyboard.press("Control+Enter")
    expect(page.locator("#query-wrong")).to_have_text("Type a query, or pick an example.")
    expect(page.locator("#query")).to_be_focused()
    keyboard.type("Start with 36. A: double;")
    keyboard.press("Enter")
    keyboard.type("B: times 04.")
    assert not visit.seen.bodies, "Enter alone makes a new line"
    keyboard.press("Control+Enter")
    expect(page.locator(".step")).to_have_count(3)
    keyboard.press("Tab")
    expect(page.locator("#run")).to_be_focused()
    expect(page.locator("#run")).to_have_text("Run")
    keyboard.press("Enter")
    expect(page.locator("#live")).to_contain_text("Done: 3 steps")
    assert len(visit.seen.bodies) == 2


def test_a_starter_runs_at_once_and_the_list_only_fills_in(visit: Visit) -> None:
    visit.page.focus("#starters li:nth-child(2) button")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#live")).to_contain_text("Done: 4 steps")
    assert visit.page.locator("#query").input_value() == EXAMPLES[1]
    expect(visit.page.locator("#empty")).to_be_hidden()
    visit.page.select_option("#examples", EXAMPLES[2])
    assert visit.page.locator("#query").input_value() == EXAMPLES[2]
    assert len(visit.seen.bodies) == 1


@pytest.mark.parametrize("visit", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_no_sideways_scrolling_on_a_phone(visit: Visit) -> None:
    width = "() => document.scrollingElement.scrollWidth"
    assert visit.page.evaluate(width) == 360
    visit.run("[hostile] [degraded] " + QUERY, compare=True)
    assert visit.page.evaluate(width) == 360
    assert all(box["width"] <= 360 for box in (each.bounding_box() for each in visit.page.locator(".run").all()))
    visit.refusals_expected = True
    visit.run("[full]" + "w" * 300)
    expect(visit.page.locator(".notice")).to_be_visible()
    assert visit.page.evaluate(width) == 360


def test_hostile_text_stays_text(visit: Visit) -> None:
    visit.run("[hostile] " + QUERY, compare=True)
    assert [visit.texts(role)[0] for role in ("routed", "cheapest", "dearest")] == [HOSTILE] * 3
    assert visit.page.locator("#results img, #results script").count() == 0
    assert visit.page.title() == "roro_ray playground"


def test_events_cut_anywhere_give_the_same_answer(visit: Visit) -> None:
    visit.run("[split] [hostile] " + QUERY)
    expect(visit.page.locator("#live")).to_contain_text("Done: 7 steps")
    assert visit.texts()[0] == HOSTILE and visit.texts()[1:] == [step["text"] for step in solve("auto").steps[1:]]


@pytest.mark.parametrize(
    ("word", "title", "detail"),
    [
        ("[bad]", "The service did not accept this request", "cost_weight must be at least 0."),
        ("[bad]", "The service did not accept this request", "Parameter: routing.cost_weight"),
        ("[lost]", "The connection was lost", "broke off before the answer was complete"),
        ("[broken]", "The service could not finish this answer", "Every model is unavailable."),
    ],
)
def test_what_goes_wrong_is_said_in_words(visit: Visit, word: str, title: str, detail: str) -> None:
    visit.refusals_expected = word == "[bad]"
    visit.run(f"{word} {QUERY}")
    notice = visit.page.get_by_role("alert").filter(has_text=title)
    expect(notice).to_contain_text(detail)
    assert len(visit.texts()) == (0 if word == "[bad]" else 2), "what had arrived stays"


def test_a_full_service_counts_down_until_it_may_be_asked_again(visit: Visit) -> None:
    visit.refusals_expected = True
    visit.run("[full] " + QUERY)
    button = visit.page.locator(".notice button")
    expect(button).to_have_text("Try again in 2 s")
    expect(button).to_be_disabled()
    expect(button).to_have_text("Try again in 1 s")
    expect(button).to_have_text("Try again")
    button.click()
    expect(button).to_have_text("Try again in 2 s")
    assert len(visit.seen.bodies) == 2


def test_a_key_is_asked_for_used_and_forgotten(visit: Visit) -> None:
    visit.refusals_expected = True
    visit.seen.key = "secret"
    visit.start(compare=True)
    expect(visit.page.get_by_label("API key")).to_be_focused()
    visit.page.keyboard.type("secret")
    visit.page.keyboard.press("Enter")
    expect(visit.page.locator("#live")).to_contain_text("Done: 7 steps")
    expect(visit.page.locator("#key-form")).to_be_hidden()
    kept = visit.page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie, location.href]")
    assert kept == [0, 0, "", visit.origin + "/"]


def test_a_service_that_is_gone_is_said(visit: Visit) -> None:
    visit.page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    visit.run()
    expect(visit.page.get_by_role("alert").filter(has_text="The connection was lost")).to_contain_text(
        "cannot be reached"
    )
    visit.page.unroute("**/v1/chat/completions")
    visit.page.click(".notice button")
    expect(visit.page.locator("#live")).to_contain_text("Done: 7 steps")
    visit.complaints = [each for each in visit.complaints if "ERR_CONNECTION_REFUSED" not in each]


def test_a_degraded_answer_is_marked(visit: Visit) -> None:
    visit.run("[degraded] " + QUERY)
    expect(visit.page.get_by_role("status").filter(has_text="Degraded answer")).to_be_visible()
    assert visit.page.locator(".step .tag").all_inner_texts() == ["Stand-in: the model chosen was unavailable"]
    expect(visit.page.locator(".step").nth(1)).to_contain_text("Stand-in")


@pytest.mark.parametrize("visit", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True)
def test_every_text_has_contrast_aa(visit: Visit) -> None:
    found = visit.page.evaluate(CONTRASTS)
    visit.run("[degraded] " + QUERY, compare=True)
    found += visit.page.evaluate(CONTRASTS)
    visit.run("[broken] " + QUERY)
    found += visit.page.evaluate(CONTRASTS)
    assert len(found) > 100
    weak = [(round(ratio, 2), words) for ratio, words in found if ratio < 4.5]
    assert not weak, weak


@pytest.mark.parametrize("visit", [{"reduced_motion": "reduce"}], indirect=True)
def test_nothing_moves_where_motion_is_to_be_reduced(visit: Visit) -> None:
    visit.start(QUERY + " [slow]")
    expect(visit.page.locator(".step.writing")).to_have_count(1)
    style = "node => getComputedStyle(node.querySelector('.text'), '::after').animationName"
    assert visit.page.locator(".step.writing").evaluate(style) == "none"
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator(".notice")).to_contain_text("Stopped")
