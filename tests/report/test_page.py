"""The report page: what it says, that names cannot harm it, and how a browser shows it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

import eigendamage as ed
from eigendamage.compress._call import call_in_words
from eigendamage.report import (
    Environment,
    LayerReport,
    LayerTruth,
    Measured,
    RoundReport,
    Row,
    Settings,
    Spectra,
    Spectrum,
    SweepRow,
)
from eigendamage.report._page_axes import linear, logarithmic, spread

HOSTILE = "<script>alert('x')</script>\"'&<img src=http://example.org/x.png>"
VOID = {"meta", "link"}


def _report(names: tuple[str, ...] = ("stem", "block.conv1", "block.conv2", "head")) -> ed.Report:
    """A report in which everything is known, made by hand."""
    actions = ("kept: it is the classifier", "low rank: 1×1, K", "factored: K, 1×1", "channels: 3")
    layers = {
        name: LayerReport(
            action=actions[k % 4],
            ranks=(8, 4) if k % 4 in (1, 2) else None,
            price=0.001 * (k % 4),
            calibrated=0.002 * (k % 4),
            macs=(1e6 * (1 + k % 3), 0.5e6 * (1 + k % 3)),
            parameters=(9216, 4608),
        )
        for k, name in enumerate(names)
    }
    spectrum = Spectrum.of(torch.logspace(0, -4, 64))
    return ed.Report(
        model="ResNet",
        method="auto",
        budget="macs 0.5",
        asked={"macs": 0.5},
        command="eigendamage compress --macs 0.5",
        made="2026-01-02T03:04:05+00:00",
        ratio=None,
        macs=(4e6, 2e6),
        parameters=(40_000, 20_000),
        examples=1750,
        predicted=0.004,
        measured_on="eval_data",
        measured_examples=2000,
        original=Measured(loss=0.25, accuracy=0.88),
        compressed=Measured(loss=0.5, accuracy=0.8, divergence=0.2),
        repaired=Measured(loss=0.3, accuracy=0.861, divergence=0.05),
        recalibrated=None,
        polished=Measured(loss=0.28, accuracy=0.865, divergence=0.03),
        layers=layers,
        left_alone={"bn1": "BatchNorm2d has no weight matrix"},
        calibration={},
        spectra={name: Spectra(outputs=spectrum, inputs=spectrum) for name in names},
        truth=ed.Truth(
            examples=250,
            priced=0.01,
            calibrated=0.02,
            quadratic=0.03,
            before_repair=0.04,
            after_repair=0.03,
            layers={
                name: LayerTruth(price=0.001 * k, calibrated=0.002 * k, measured=0.002 * k)
                for k, name in enumerate(names)
                if k
            },
        ),
        gap=0.0,
        seconds={"curvature": 12.5, "plan": 3.0},
        environment=Environment.here(torch.device("cpu"), 7),
        notes=("the learning rate was halved",),
    )


class _Page(HTMLParser):
    """The elements of a page, which have to close in order, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def within(self, tag: str) -> list[str]:
        """The pieces of text right inside elements of a kind."""
        return [words for element, words in self.words if element == tag]

    @property
    def text(self) -> str:
        return " ".join(words for _, words in self.words).replace("\N{NO-BREAK SPACE}", " ")


def test_the_page_says_what_was_predicted_measured_asked_and_done() -> None:
    page = _Page(ed.report_page(_report()))
    for words in (
        "With 50.0 % of its MACs, ResNet goes from 88.0 % to 86.5 % accuracy.",
        "a standard error of 0.8 points",
        "the learning rate was halved",
        "0.02 → 0.03",
        "1.50×, trusted",
        "budget 50 %",
        "low rank: 1×1, K",
        "16 of 64 out",
        "BatchNorm2d has no weight matrix",
        "eigendamage compress --macs 0.5",
        ed.__version__,
        "15.5 s in all",
    ):
        assert words in page.text
    facts = dict(zip(page.within("dt"), page.within("dd"), strict=True))
    assert (facts["seed"], facts["made"]) == ("7", "2026-01-02T03:04:05+00:00")


def test_hostile_names_are_text() -> None:
    report = _report((HOSTILE, "a", "b", "c")).model_copy(
        update={
            "model": HOSTILE,
            "method": HOSTILE,
            "budget": HOSTILE,
            "command": HOSTILE,
            "notes": (HOSTILE,),
            "left_alone": {HOSTILE: HOSTILE},
            "seconds": {HOSTILE: 1.0},
        }
    )
    page = _Page(ed.report_page(report))
    plain = _Page(ed.report_page(_report()))
    assert {tag for tag, _ in page.seen} == {tag for tag, _ in plain.seen}
    assert not {tag for tag, _ in page.seen} & {"script", "img", "iframe", "object"}
    assert page.text.count("<script>alert") >= 8
    for _, attributes in page.seen:
        assert not any(name.startswith("on") for name in attributes)


def test_the_page_fetches_nothing_and_names_its_pictures() -> None:
    page = _Page(ed.report_page(_report()))
    links = [a[k] for _, a in page.seen for k in ("src", "href") if k in a]
    assert links == ["data:,"]
    assert "url(" not in page.text
    identities = [a["id"] for _, a in page.seen if "id" in a]
    assert len(identities) == len(set(identities))
    pictures = [a for tag, a in page.seen if tag == "svg"]
    assert len(pictures) == 4 + 4  # tradeoff, agreement, two rows of bars, four spectra
    for picture in pictures:
        assert picture["role"] == "img"
        assert set((picture["aria-labelledby"] or "").split()) <= set(identities)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"original": Measured(), "polished": Measured(divergence=0.03)},
            "ResNet diverges by 0.03 from what it predicted before",
        ),
        ({"original": Measured(loss=1.0), "polished": Measured(loss=1.5)}, "a loss of 1 to 1.5"),
        ({"macs": (4e6, 4e6)}, "With 50.0 % of its parameters, ResNet"),
        ({"macs": (4e6, 4e6), "parameters": (9, 9)}, "With its size as it was, ResNet"),
        ({"polished": Measured(accuracy=0.88)}, "ResNet keeps its 88.0 % accuracy"),
        ({"measured_on": "data"}, "they look better here than elsewhere"),
        ({"truth": None}, "predictions were not held against inputs"),
        ({"predicted": None, "truth": None}, "the method predicts none"),
        ({"latency": 0.75}, "latency left, measured"),
        ({"asked": {"params": 0.5}, "budget": "params 0.5"}, "The budget, params 0.5, is no line"),
    ],
)
def test_what_is_not_known_is_said_in_other_words(changes: dict[str, Any], said: str) -> None:
    assert said in _Page(ed.report_page(_report().model_copy(update=changes))).text


def test_a_standard_error_that_was_measured_takes_the_place_of_that_of_single_predictions() -> None:
    final = Measured(accuracy=0.865, divergence=0.03, accuracy_error=0.021)
    text = _Page(ed.report_page(_report().model_copy(update={"polished": final}))).text
    assert "a standard error of 2.1 points" in text


def test_rounds_sweeps_and_a_budget_of_loss_are_drawn() -> None:
    one = RoundReport(
        method="auto",
        budget="macs 0.7",
        macs=3e6,
        parameters=30_000,
        predicted=0.1,
        untrained=Measured(accuracy=0.84, divergence=0.1),
        finetuned=Measured(accuracy=0.87, divergence=0.1),
        training=None,
    )
    report = _report().model_copy(update={"rounds": (one, one.model_copy(update={"macs": 2e6}))})
    rows = (
        SweepRow(budget="macs 0.25", macs=0.25, measured=Measured(accuracy=0.7), seconds=1.0),
        SweepRow(budget="macs 0.1", seconds=1.0, error="too small"),
    )
    sweep = ed.Sweep(
        model="ResNet",
        examples=10,
        measured_on="data",
        measured_examples=10,
        original=Measured(),
        rows=rows,
        left_alone={},
        seconds={},
        environment=Environment.here(torch.device("cpu"), 0),
    )
    text = _Page(ed.report_page(report, sweep=sweep)).text
    assert "round 1 87.0 %" in text
    assert "70.0 % at 25.0 % of the MACs" in text
    assert "of the last round" in text
    unlabeled = {"original": Measured(), "asked": {"loss": 0.02}, "budget": "loss 0.02"}
    assert "budget 0.02" in _Page(ed.report_page(report.model_copy(update=unlabeled))).text


def test_the_methods_of_a_comparison_are_named_beside_their_lines() -> None:
    points = (("kron-obs", 0.8, 0.85), ("kron-obs", 0.5, 0.8), ("random", 0.5, 0.3))
    rows = tuple(
        Row(method=method, budget=left, macs=left, surgery=Measured(accuracy=accuracy))
        for method, left, accuracy in (*points, (HOSTILE, 0.6, 0.5))
    )
    settings = Settings(
        **dict.fromkeys(("model", "weights", "data", "measured_on", "eval_data"), "x"),
        unit="macs", max_examples=3, train_batches=0, train_data=None, epochs=0,
        learning_rate=0.0, fisher="mc", seed=0,
    )  # fmt: skip
    comparison = ed.Comparison(
        command="eigendamage compare", settings=settings, original=Measured(accuracy=0.9),
        measured_examples=9, rows=rows, environment=Environment.here(torch.device("cpu"), 0),
    )  # fmt: skip
    text = ed.report_page(_report(), comparison=comparison)
    assert "Methods of the comparison are" in text
    page = _Page(text)
    drawn = [words.replace("\N{NO-BREAK SPACE}", " ") for words in page.within("text")]
    assert [w for w in drawn if w.startswith(("kron-obs", "random", "<script"))] == [
        "kron-obs 80.0 %", "random 30.0 %", f"{HOSTILE} 50.0 %",
    ]  # fmt: skip
    assert "kron-obs: 85.0 % at 80.0 % of the MACs" in page.text
    assert "another budget" not in page.text
    assert "<script" not in text


def test_a_report_of_before_there_were_pages_is_shown(tmp_path: Path) -> None:
    old = _report().model_dump(mode="json", exclude={"asked", "command", "made", "spectra"})
    text = _Page(ed.report_page(ed.Report.model_validate(old))).text
    assert "The command was not recorded." in text
    assert "Spectra" not in text
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ed.write_page(_report(), tmp_path / "nowhere" / "report.html")


def test_a_spectrum_is_relative_descending_and_counts_what_holds_most() -> None:
    few = Spectrum.of(torch.tensor([1.0, 16.0, 1.0, 2.0, -1e-9]))
    assert few == Spectrum(
        size=5, ranks=(0, 1, 2, 3, 4), values=(1.0, 0.125, 0.0625, 0.0625, 0.0), ninety=2
    )
    many = Spectrum.of(torch.logspace(0, -6, 1000))
    assert (many.ranks[0], many.ranks[-1], len(many.ranks)) == (0, 999, 17)
    assert all(a > b for a, b in pairwise(many.values))
    exact = torch.logspace(0, -6, 1000).double().cumsum(0)
    assert exact[many.ninety - 2] < 0.9 * exact[-1] <= exact[many.ninety - 1]
    assert Spectrum.of(torch.zeros(3)).ninety == 0


def test_axes_name_round_values_between_their_ends() -> None:
    assert linear(0.0, 1.0, 0.0, 100.0).ticks == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert linear(0.86, 0.91, 0.0, 100.0).ticks == (0.86, 0.87, 0.88, 0.89, 0.9, 0.91)
    axis = logarithmic(1e-4, 1e2, 10.0, 70.0)
    assert axis.place(1e-1) == pytest.approx(40.0)
    assert axis.ticks == pytest.approx((1e-4, 1e-2, 1.0, 1e2))


def test_labels_keep_their_order_and_do_not_overlap() -> None:
    placed = spread([50.0, 51.0, 49.0, 99.0], 15.0, 0.0, 100.0)
    assert sorted(range(4), key=placed.__getitem__) == [2, 0, 1, 3]
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(sorted(placed)))
    assert all(0 <= at <= 100 for at in placed)
    crowded = sorted(spread([1.0] * 30, 15.0, 0.0, 100.0))
    assert (crowded[0], crowded[-1]) == pytest.approx((0.0, 100.0))


def test_a_call_is_told_without_defaults_and_without_what_is_in_tensors() -> None:
    def compress(
        model: Any, data: Any, *, budget: Any, method: str = "auto", also: Any = ()
    ) -> None:
        """A function of the same form."""

    given = {"model": 1, "data": 2, "budget": ed.Budget(macs=0.5), "method": "auto", "also": [{}]}
    assert call_in_words(compress, given) == (
        "eigendamage.compress(model, data, budget=Budget(macs=0.5), also=<list>)"
    )


# [contrast with the nearest background that is not transparent, words] of every text.
_CONTRASTS = """() => {
  const channel = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const light = rgb => {
    const [r, g, b] = rgb.map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    const found = parse(getComputedStyle(e).backgroundColor);
    return found.length < 4 || found[3] === 1 ? found : behind(e.parentElement);
  };
  const words = e => [...e.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('');
  return [...document.querySelectorAll('body *:not(title):not(desc)')]
    .filter(e => words(e).trim() && e.checkVisibility())
    .map(e => {
      const { color, fill } = getComputedStyle(e);
      const own = light(parse(e.namespaceURI.endsWith('svg') ? fill : color));
      const [low, high] = [own, light(behind(e))].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), words(e)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    programs = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in programs if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no Chromium is installed; the page is not looked at")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    arguments = [
        *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    ]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of few layers, and one of many with long names."""
    deep = tuple(f"encoder.layers.{k}.self_attention.output_projection" for k in range(100))
    reports = {"few": _report(), "many": _report((HOSTILE, *deep))}
    folder = tmp_path_factory.mktemp("pages")
    for name, report in reports.items():
        ed.write_page(report, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in reports}


@pytest.mark.parametrize(("name", "pictures"), [("few", 8), ("many", 105)])
def test_a_browser_shows_it_offline_without_an_error_and_without_scrolling_sideways(
    browser: Any, pages: dict[str, Path], name: str, pictures: int
) -> None:
    said: list[str] = []
    requests: list[str] = []
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    for width, scheme in product((1280, 400), ("light", "dark")):
        tab.set_viewport_size({"width": width, "height": 900})
        tab.emulate_media(color_scheme=scheme)
        tab.goto(pages[name].as_uri())
        tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true })")
        wide, seen = tab.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen == width
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, paper[4:-1].split(","))) < 300) == (scheme == "dark")
        drawn = tab.evaluate("[...document.querySelectorAll('svg')].map(e => e.clientHeight)")
        assert len(drawn) == pictures
        assert min(drawn) >= 40
    assert said == []
    assert {url for url in requests if not url.startswith("data:")} == {pages[name].as_uri()}
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(
    browser: Any, pages: dict[str, Path], scheme: str
) -> None:
    """At least 4.5 to 1, as WCAG 2 asks for at level AA."""
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(pages["few"].as_uri())
    contrasts = tab.evaluate(_CONTRASTS)
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)
    tab.close()
