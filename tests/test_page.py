from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest

from llm_streamline import charts, page, verdict
from llm_streamline.analyze import analyze
from llm_streamline.evaluation import Evaluation
from llm_streamline.records import LinearFit, Loss, Manifest, Scores, Verification, Window
from tests import browser, evaluations, tiny
from tests.test_families import plan_for
from tests.test_rank import made
from tests.test_report import fit

VOID = {"meta", "link", "br", "img", "hr"}


def scores(dense=3.0, cut=3.5, saved=3.2, sequences=16) -> Scores:
    losses = [Loss(nats=nats, se=0.01, tokens=1000, sequences=sequences) for nats in (dense, cut, saved)]
    return Scores(dense=losses[0], cut=losses[1], saved=losses[2])


@pytest.fixture(scope="module")
def model():
    return tiny.make_model("llama")


@pytest.fixture(scope="module")
def similarity(model):
    return analyze(model, tiny.random_ids(3, 16), batch=3)


@pytest.fixture(scope="module")
def plan(model):
    return plan_for(model, Window(start=1, stop=4), 1)


@pytest.fixture
def manifest(plan):
    verified = {"logits_error": 1e-7, "tolerance": 1e-5, "cached_equals_uncached": True, "problems": []}
    part = {"blocks": 2, "tokens": 1234, "sha256": "ab" * 32}
    share = {"asked": 0.7, "got": 0.65, "tokens": 70, "documents": 5}
    return Manifest(
        command="llm-streamline compress <b>x</b> -o out",
        recipe={"model": "x"},
        plan=plan,
        layer_map=plan.layer_map(),
        tensors={"kept": 1, "renamed": 2, "removed": 3, "replaced": 4, "stored": 7},
        fit=fit(),
        data={"calibration": part, "training": part, "validation": part, "domains": {"books": share}},
        layer_similarities=[],
        versions={"torch": "9.9"},
        verification=Verification(
            parameters=10, tensors=7, limits=["checked with short prompts"], versions={}, **verified
        ),
        scores=scores(),
    )


class Reader(HTMLParser):
    """Balanced tags, addresses, and the text as a reader sees it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.addresses, self.images, self.text = [], [], [], ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "xlink:href", "action")]
        self.images += [dict(attrs) for _ in [0] if tag == "img"]
        assert tag != "script"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_is_whole_and_refers_to_nothing_outside(manifest, similarity):
    html = page.render(manifest, similarity, "model: x\n", evaluations.of_a_run())
    reader = Reader(html)
    assert all(address.startswith("data:") for address in reader.addresses)
    assert all(image.get("alt") for image in reader.images)
    assert "@import" not in html and "url(" not in html
    for words in (
        *(
            "llm-streamline compress <b>x</b> -o out",
            "model: x",
            "torch 9.9",
            "3.2000 ± 0.0100",
            "+0.2000",
            "0.90 → 0.86",
        ),
        *("Layers 1 to 3 (3 of 6) are gone", "checked with short prompts", "books", "65.0 %", "1,234", "abababab"),
        *(str(manifest.plan), f"{manifest.plan.parameters_after:,}", "brings back 60% of the loss", "1.0e-07"),
    ):
        assert words in reader.text, words
    assert "<b>x</b>" not in html  # what a user gave is text, never markup


def test_a_runs_page_has_its_evaluation_and_the_warnings_come_first(manifest, similarity):
    text = Reader(page.render(manifest, similarity, "", evaluations.of_a_run())).text
    places = [
        *("keeps 98% of the dense model's accuracy", "Do not go by accuracy alone", "but <i>loops</i>"),
        *("The plan", "Share of right answers", "ranks nothing: at chance", "ranks nothing: a few items decide"),
        *("30 → 18 of 50", "1.65 times", "Prefill reads a prompt", "2.05 kB", "Once <b>upon</b>", "and on and on"),
    ]
    found = [text.find(words) for words in places]
    assert -1 not in found and found == sorted(found), dict(zip(places, found, strict=True))
    without = Reader(page.render(manifest, similarity, "")).text
    assert "Do not go by" not in without and "Stability" not in without and "measure what you need" in without


def test_the_accuracy_column_is_of_the_first_task_that_ranks(manifest, similarity):
    assert page.accuracy_column(evaluations.of_a_run()) == page.Column("questions", ["0.90", "0.70", "0.86"])
    assert page.accuracy_column(evaluations.pair()) == page.Column("questions", ["0.90", "", "0.86"])
    assert page.accuracy_column(None) is None
    assert "Accuracy is on questions." in Reader(page.render(manifest, similarity, "", evaluations.pair())).text


@pytest.mark.parametrize(
    "found, words",
    [
        (
            evaluations.of_a_run(),
            (
                "cut, saved against dense",
                "The cut model keeps",
                "The saved model keeps",
                "Do not go by accuracy alone",
                "torch 9.9",
            ),
        ),
        (evaluations.pair(), ("saved against dense", "(called from Python)", "folder/saved", "0.90 → 0.86")),
        (evaluations.of_groups(), ("one, two against big", "Its 3 tasks", "Means over the tasks that rank")),
        (
            Evaluation(against=None, models=[evaluations.model("x", [evaluations.task()])]),
            ("Nothing is compared", "0.900"),
        ),
    ],
)
def test_an_evaluation_has_a_page_of_its_own_made_of_its_file_alone(tmp_path, found, words):
    found.write(tmp_path / "evaluation.json")
    file = page.write_evaluation_report(tmp_path)
    html = file.read_text(encoding="utf-8")
    reader = Reader(html)
    assert all(address.startswith("data:") for address in reader.addresses)
    assert [one for one in words if one not in reader.text] == []
    assert "<b>x</b>" not in html and "<i>loops" not in html and "<b>upon" not in html
    assert page.write_evaluation_report(tmp_path).read_text(encoding="utf-8") == html


def test_the_strips_show_every_layer(manifest, similarity):
    html = page.render(manifest, similarity, "")
    assert html.count('<li class="removed"') == 3 and html.count('<li class="replacement"') == 1
    assert html.count("<li>") - html[html.index('class="checks"') :].count("<li>") == 3 + 3


def test_a_replacement_that_did_not_help_is_called_that(manifest, similarity):
    worse = manifest.model_copy(update={"scores": scores(cut=3.05, saved=3.15)})
    text = Reader(page.render(worse, similarity, "")).text
    assert "The replacement did not help" in text and "0.1000 nats above that of the merely cut model" in text
    assert "brings back" not in text


@pytest.mark.parametrize(
    "saved, grade, title",
    [(3.01, "good", "Hardly"), (3.09, "good", "A little"), (3.2, "fair", "noticeable"), (3.9, "poor", "Much")],
)
def test_words_follow_the_excess(plan, saved, grade, title):
    found = verdict.judge(plan, scores(cut=4.5, saved=saved))
    assert found.grade == grade and title in found.title


def test_hopeless_and_missing_figures_have_words_too(plan):
    assert verdict.judge(plan, scores(cut=9, saved=8)).grade == "bad"
    assert verdict.judge(plan, scores(saved=math.nan)).title == "The replacement did not help"
    none = plan.model_copy(update={"replace": "none", "occupied": 0})
    assert verdict.judge(none, scores(cut=3.2)).sentences[2].startswith("Nothing was trained")
    assert "costs nothing" in verdict.judge(plan, scores(cut=2.9, saved=2.8)).sentences[2]
    assert verdict.rise(scores(), scores(saved=8.0).saved) == "more than 10 times as high"


def test_what_one_has_to_know_is_noted(manifest):
    mlp = manifest.plan.model_copy(update={"replace": "mlp", "custom_code": True})
    unmoved = fit().model_copy(update={"best_step": 0})
    noted = {"plan": mlp, "fit": unmoved, "scores": scores(sequences=2)}
    text = " ".join(verdict.notes(manifest.model_copy(update=noted)))
    for words in ("take them as rough", "saved as it started", "attention is silent", "trust_remote_code"):
        assert words in text
    plain = manifest.model_copy(update={"fit": fit(), "scores": scores()})
    assert verdict.notes(plain) == []
    assert "saved as it was before" in verdict.notes(plain.model_copy(update={"healing": unmoved}))[0]


def test_what_made_up_for_the_window_has_its_name(plan):
    healed = plan.model_copy(update={"heal": "lora"})
    alone = healed.model_copy(update={"replace": "none", "occupied": 0})
    assert "The replacement, with healing, brings back" in verdict.judge(healed, scores()).sentences[2]
    assert verdict.judge(alone, scores()).sentences[2].startswith("Healing brings back")
    below = verdict.judge(alone, scores(dense=2.0, cut=3.0, saved=1.95)).sentences[2]
    assert below.startswith("Healing brings back all of the loss") and "0.0500 nats below the dense model" in below
    assert "healing, makes it worse" in verdict.judge(healed, scores(cut=3.0, saved=3.5)).sentences[2]


def test_each_part_of_the_text_is_told_for_what_it_was(manifest):
    solved = LinearFit.model_construct(loss="nmse")
    told = {
        "trained": page.part_purposes(manifest.model_copy(update={"healing": manifest.fit})),
        "solved": page.part_purposes(manifest.model_copy(update={"fit": solved, "healing": None})),
        "healed": page.part_purposes(manifest.model_copy(update={"fit": None, "healing": manifest.fit})),
        "cut": page.part_purposes(manifest.model_copy(update={"fit": None, "healing": None})),
    }
    training = {name: own["training"] for name, own in told.items()}
    assert training == {
        "trained": "teaches what stands in and what stays",
        "solved": "teaches what stands in",
        "healed": "teaches what stays",
        "cut": "nothing learns from it",
    }
    assert told["trained"]["validation"] == told["healed"]["validation"]
    assert told["trained"]["validation"] == "judges: chooses the best weights and gives the losses"
    assert told["solved"]["validation"] == "judges: chooses the ridge and gives the losses"
    assert told["cut"]["validation"] == "judges: gives the losses"


def test_the_cut_is_told_for_what_it_is(manifest, similarity):
    plan, alone = manifest.plan, "removed and nothing in their place"
    other = plan.model_copy(update={"plain_window": Window(start=0, stop=2)})
    assert verdict.cut(other) == f"layers 0:2 {alone}, chosen by cosine; by another score there may be a better cut"
    own = plan.model_copy(update={"plain_window": plan.window, "replace": "none", "occupied": 0})
    assert verdict.cut(own) == f"layers {plan.window} {alone}"
    text = Reader(page.render(manifest.model_copy(update={"plan": other}), similarity, "")).text
    assert f"Cut is the source with {verdict.cut(other)}." in text


def test_layers_that_go_outside_the_window_are_shaded_and_outlined_too(manifest, similarity):
    plan = manifest.plan.model_copy(update={"dropped": [5]})
    text = Reader(page.render(manifest.model_copy(update={"plan": plan}), similarity, "")).text
    assert f"Shaded: the layers {plan.window}, 5:6, which are gone." in text
    assert f"Outlined: the windows {plan.window}, " in text and "; 5:6, " in text


def test_maps_are_told_of_where_some_were_fitted(manifest, similarity):
    ranking = made()
    assert "Maps are least squares" not in page.render(manifest, similarity, "", ranking=ranking)
    fitted = {**ranking.winners, "replaceability": ranking.winners["patched"]}
    mapped = page.render(manifest, similarity, "", ranking=ranking.model_copy(update={"winners": fitted}))
    assert "Maps are least squares" in mapped


def test_axes_have_round_ticks_within_their_ends():
    axis = charts.Axis(0.81, 0.99, 86, 4)
    assert [tick.label for tick in axis.ticks()] == ["0.85", "0.9", "0.95"]
    assert axis.at(0.81) == 86 and axis.at(0.99) == 4
    assert " ".join(t.label for t in charts.Axis(-0.5, 31.5, 0, 100).ticks(8, whole=True)) == "0 5 10 15 20 25 30"
    assert [t.label for t in charts.Axis(-0.5, 0.5, 0, 100).ticks(8, whole=True)] == ["0"]
    log = charts.Axis(0.009, 0.4, 86, 4, log=True)
    assert [tick.label for tick in log.ticks()] == ["0.01", "0.02", "0.05", "0.1", "0.2"]


def test_every_window_is_in_the_heat_map_and_every_layer_in_the_chart(similarity):
    drawn = charts.heat_map(similarity, [Window(start=1, stop=4), Window(start=5, stop=6)])
    assert len(drawn.cells) == tiny.LAYERS * (tiny.LAYERS + 1) // 2
    assert all(charts.FAINTEST <= cell.shade <= 1 for cell in drawn.cells)
    assert len(drawn.chosen) == 2 and all(cell in drawn.cells for cell in drawn.chosen)
    chart = charts.layer_chart(similarity, [Window(start=1, stop=4), Window(start=5, stop=6)])
    one = chart.bands[1][1]
    assert len(chart.dots) == tiny.LAYERS and chart.bands[0][1] == pytest.approx(3 * one, abs=0.01)


def test_a_layer_far_below_the_others_does_not_squash_them(similarity):
    cosine = [list(row) for row in similarity.cosine]
    for layer in range(tiny.LAYERS):
        cosine[layer][layer + 1] = 0.9 + 0.01 * layer
    cosine[0][1] = 0.1
    chart = charts.layer_chart(similarity.model_copy(update={"cosine": cosine}), [Window(start=1, stop=2)])
    assert [dot.clipped for dot in chart.dots] == [True] + [False] * (tiny.LAYERS - 1)
    assert chart.below == "layer 0: 0.10" and chart.dots[1].y - chart.dots[-1].y > 40


def test_a_training_that_went_to_nothing_has_no_curve(manifest, similarity):
    lost = fit((1.0, math.inf))
    assert charts.training_chart(lost) is None and charts.training_chart(fit((4.0, 0.2))).log
    text = Reader(page.render(manifest.model_copy(update={"fit": lost}), similarity, "")).text
    assert "not all finite" in text


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width, dark", [(390, False), (1280, True)])
def test_chromium_opens_it_without_complaint_request_or_sideways_scrolling(manifest, similarity, tmp_path, width, dark):
    file = tmp_path / "report.html"
    file.write_text(page.render(manifest, similarity, "model: x\n", evaluations.of_a_run()), encoding="utf-8")
    opened = browser.open_page(file, tmp_path / "profile", width, dark)
    assert opened.complaints == [] and opened.width <= width
    assert [address for address in opened.requests if not address.startswith("data:")] == [file.as_uri()]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width, dark", [(390, True), (1280, False)])
def test_chromium_opens_an_evaluation_too(tmp_path, width, dark):
    long = evaluations.of_a_run()
    long = long.model_copy(update={"models": [one.model_copy(update={"model": "m" * 200}) for one in long.models]})
    long.write(tmp_path / "evaluation.json")
    file = page.write_evaluation_report(tmp_path)
    opened = browser.open_page(file, tmp_path / "profile", width, dark)
    assert opened.complaints == [] and opened.width <= width
    assert [address for address in opened.requests if not address.startswith("data:")] == [file.as_uri()]


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_the_browser_would_have_noticed(tmp_path):
    file = tmp_path / "bad.html"
    script = "<script>console.error('oh')</script>"
    file.write_text(f"<!DOCTYPE html><title>x</title><img src='missing.png'>{script}<p style='width:2000px'>x")
    opened = browser.open_page(file, tmp_path / "profile", 390)
    assert any("oh" in complaint for complaint in opened.complaints) and opened.width > 390
    assert (tmp_path / "missing.png").as_uri() in opened.requests
