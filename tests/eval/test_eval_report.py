"""Reports and comparisons: of real runs, and of made-up ones whose differences are known (tests/support/eval_runs.py)."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import eval_worker
from eval_runs import METHODS, WRONG, write_run, write_set
from kvgraph import Engine, demo, models
from kvgraph.eval import plots, report, runs, stats
from kvgraph.eval.compare import compare
from kvgraph.eval.plots import Panel
from kvgraph.eval.run import evaluate
from kvgraph.eval.runs import Run, RunError
from kvgraph.eval.stats import Interval

pytestmark = pytest.mark.filterwarnings("ignore:this model doesn't declare tuning:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def fewer_resamples():
    """Intervals are tested elsewhere; here they only have to be there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "RESAMPLES", 499)
        yield


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made-up")
    write_set(folder, 40)
    return folder


@pytest.fixture(scope="module")
def built(made_up) -> report.Report:
    return report.build([made_up])


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """Runs of the tiny random model by two methods."""
    folder = tmp_path_factory.mktemp("real")
    demo.write_model(folder)
    model = models.load(str(folder))
    for method in ("full", "graph-kv"):
        with Engine(model) as engine:
            evaluate(engine, eval_worker.TASK, method, eval_worker.items(6), folder / "runs" / method)
    return folder / "runs"


@pytest.fixture(scope="module")
def page(built) -> str:
    return built.html()


def section(built: report.Report, task: str) -> report.Section:
    return next(s for s in built.sections if s.task == task)


# -- made-up runs are like real ones ----------------------------------------------------------------------------------


def test_made_up_runs_have_what_real_runs_have(real, made_up):
    mine, theirs = Run.load(made_up / "nq-positions" / "full"), Run.load(real / "full")
    assert set(mine.summary) == set(theirs.summary)
    assert set(mine.results[0]) == set(theirs.results[0])
    for part in ("model", "method", "data", "prompt"):
        assert set(mine.summary[part]) == set(theirs.summary[part])
    assert set(mine.summary["timing"]) == set(theirs.summary["timing"])
    assert set(mine.results[0]["timing"]) == set(theirs.results[0]["timing"])


def test_real_runs_make_a_report(real, tmp_path, run):
    paths = [tmp_path / name for name in ("r.html", "r.md", "r.json")]
    code, out, err = run("report", real, "--out", paths[0], "--markdown", paths[1], "--json", paths[2])
    assert code == 0 and err.count("wrote") == 3, err
    assert re.search(r"island +\S+ +full +string_match_all +[\d.]+ \[", out)
    scores = {r["label"]: r["scores"] for r in json.loads(paths[2].read_text())["sections"][0]["runs"]}
    assert scores == {name: Run.load(real / name).summary["scores"] for name in ("full", "graph-kv")}
    for path in paths[:2]:
        text = path.read_text()
        assert "string_match_all" in text.replace("\\", "") and "graph-kv" in text


def test_a_probe_is_part_of_the_cost(tmp_path):
    tokens = {"prompt": 0, "plan": 0, "live": 0, "probe": 800, "completion": 0}
    folder = write_run(tmp_path / "a", method="cacheblend", count=1, tokens=tokens)
    line = json.loads((folder / "results.jsonl").read_text())
    before = report.build([folder]).sections[0].lines[0].cost
    line["usage"]["probe_tokens"] = 800
    line["timing"] |= {"probe": 0.25, "queued": line["timing"]["queued"] + 0.25, "ttft": line["timing"]["ttft"] + 0.25}
    (folder / "results.jsonl").write_text(json.dumps(line) + "\n")
    section = report.build([folder]).sections[0]
    after = section.lines[0].cost
    assert after.computed == before.computed + 800 / 16  # the made-up model has 16 layers
    assert after.ttft == pytest.approx(before.ttft + 0.25)
    assert "1/L" in section.caption


# -- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page's elements, its text, and whether every element is closed."""

    VOID = {"meta", "br", "wbr", "link", "img"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_needs_nothing_from_elsewhere(page):
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href", "style", "clip-path"):
            assert "//" not in (attributes.get(name) or "") and "url(http" not in (attributes.get(name) or "")
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href"))
    ids = [attributes["id"] for _, attributes in parsed.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used and used <= set(ids)


def test_what_a_model_says_is_text_on_the_page_and_in_markdown(tmp_path):
    write_run(tmp_path / "a", method="full", chance=lambda i: 0.0)
    line = json.loads((tmp_path / "a" / "results.jsonl").read_text().split("\n")[0])
    hostile = "<script>alert(1)</script>|![x](http://evil)\n\n# title `"
    line |= {"prediction": hostile, "golds": ["</table>"], "id": "<b>", "kind": "<i>", "documents": ["<u>"]}
    (tmp_path / "a" / "results.jsonl").write_text(json.dumps(line) + "\n")
    built = report.build([tmp_path])
    parsed = Page(built.html())
    assert not {"script", "b", "i", "u"} & {tag for tag, _ in parsed.elements}
    assert any("<script>alert(1)</script>" in words for words in parsed.words)
    text = built.markdown()
    assert "\\<script\\>alert(1)\\</script\\>\\|\\!\\[x\\](http://evil) \\# title \\`" in text


def test_every_markdown_table_is_one(built):
    tables = [[]]
    for line in built.markdown().split("\n"):
        if line.startswith("|"):
            tables[-1].append(len(re.findall(r"(?<!\\)\|", line)))
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert len(tables) >= 12
    assert all(len(set(table)) == 1 and len(table) >= 3 for table in tables)


def test_every_figure_of_the_summaries_is_on_the_page(made_up, page):
    words = " ".join(Page(page).words)
    for run in runs.find([made_up]):
        score = run.score
        assert f"{100 * score.mean:.1f}" in words and f"{100 * score.low:.1f} – {100 * score.high:.1f}" in words
        assert run.method in words


def test_facts_are_plotted(built):
    captions = {plot.caption for s in built.sections for plot in s.plots}
    assert captions == {
        "nq-positions: substring_em by gold position",
        "nq-positions: substring_em against cost",
        "morehopqa: substring_em by hops",
        "morehopqa: substring_em against cost",
        "arxiv-qa: substring_em by distractors",
        "arxiv-qa: substring_em against cost",
    }


def test_a_fact_with_many_values_is_drawn_in_bins(tmp_path):
    run = Run.load(write_run(tmp_path / "a", facts=lambda i: {"length": 100 + 17 * i}))
    points = report._by_fact("length", [run])
    assert len(points) == report.BINS and sum(score.n for _, score in points) == 120
    assert all(100 < x < 100 + 17 * 119 for x, _ in points)


def test_variants_with_fewer_distractors_join_their_methods_line(tmp_path):
    folder = tmp_path / "ablations"
    for name, count in (("base", 9), ("distractors-0", 0), ("distractors-4", 4)):
        ablation = None if name == "base" else name
        write_run(folder / name, method="block", facts=lambda i, n=count: {"distractors": n}, ablation=ablation)
    built = section(report.build([folder]), "nq")
    assert [plot.caption for plot in built.plots][0] == "nq: substring_em by distractors"
    assert [line.label for line in built.lines] == ["block"]
    assert [line.label for line in built.ablations[0].lines] == ["base", "distractors-0", "distractors-4"]


# -- what is compared -------------------------------------------------------------------------------------------------


def test_only_a_method_that_beats_all_others_is_marked(tmp_path):
    for method, chance in (("full", 0.7), ("block", 0.4), ("pcw", 0.3)):
        write_run(tmp_path / "clear" / method, method=method, chance=lambda i, c=chance: c)
    for method, chance in (("full", 0.52), ("block", 0.5), ("pcw", 0.2)):
        write_run(tmp_path / "close" / method, method=method, chance=lambda i, c=chance: c)
    assert section(report.build([tmp_path / "clear"]), "nq").best == "full"
    assert section(report.build([tmp_path / "close"]), "nq").best is None
    assert "★ |" in report.build([tmp_path / "clear"]).markdown()
    assert "★ |" not in report.build([tmp_path / "close"]).markdown()


def test_differences_are_to_full_and_corrected(built):
    lines = section(built, "arxiv-qa").lines
    assert [line.label for line in lines] == ["full", "block", "graph-kv", "pcw"]
    assert lines[0].difference is None
    for line in lines[1:]:
        expected = runs.compared(lines[0].run, line.run)
        assert line.difference == expected and line.p >= expected.p


def test_runs_that_cannot_be_compared_are_named_and_none_is_best(tmp_path):
    write_run(tmp_path / "full", chance=lambda i: 0.9)
    write_run(tmp_path / "a", method="block", chance=lambda i: 0.1, decode={"temperature": 0.0, "max_tokens": 5})
    write_run(tmp_path / "b", method="pcw", chance=lambda i: 0.1, count=60)
    model = {"name": "made-up", "fingerprint": "0f" * 32, "dtype": "float32", "layers": 16}
    write_run(tmp_path / "c", method="kvlink", chance=lambda i: 0.1, model=model, errors=3)
    built = report.build([tmp_path])
    assert section(built, "nq").best is None
    said = "\n".join(built.warnings)
    assert "block can't be compared with full (decode.max_tokens: 100 against 5; decode.stop: [] against null)" in said
    assert "pcw can't be compared with full (items: 60 in common of 120 and 60)" in said
    assert 'kvlink can\'t be compared with full (model.dtype: "bfloat16" against "float32")' in said
    assert "kvlink: 3 items couldn't be run and score 0" in said
    assert len(built.warnings) == 4
    assert "Before comparing" in built.html() and "Before comparing" in built.markdown()
    assert {line.label: line.difference.n for line in section(built, "nq").lines[1:]}["pcw"] == 60


def test_two_runs_of_one_method_are_told_apart_by_their_folders(tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name / "nq", method="block")
    labels = report.build([tmp_path]).labels
    assert len(labels) == 2 and all("block in" in label for label in labels) and "second" in labels[1]


def test_a_base_is_shown_once(built):
    shown = section(built, "morehopqa")
    assert [line.label for line in shown.lines] == list(METHODS)
    ablation = shown.ablations[0]
    assert ablation.title == "graph-kv"
    assert [line.label for line in ablation.lines] == [
        "base",
        "mask-only",
        "neither",
        "positions-only",
        "random-edges",
    ]
    assert ablation.lines[1].difference == runs.compared(ablation.lines[0].run, ablation.lines[1].run)


def test_variants_whose_base_is_missing_are_methods_of_their_own(tmp_path):
    for name in ("mask-only", "neither"):
        write_run(tmp_path / "ablations" / name, method="graph-kv", ablation=name)
    assert report.build([tmp_path]).labels == ["graph-kv, mask-only", "graph-kv, neither"]


def test_examples_are_items_that_methods_answer_differently(built):
    for example in section(built, "arxiv-qa").examples:
        assert {score for _, _, score in example.answers} == {0.0, 1.0}
        assert [label for label, _, _ in example.answers] == list(METHODS)


# -- plots ------------------------------------------------------------------------------------------------------------


def crowded(points: int) -> tuple[list[Panel], dict]:
    labels = ["full", "block", "kvlink:links=5,link_start=128011", "graph-kv", "graph-kv:rounds=2,layout=tight"]
    labels += ["pcw", "ape:temperature=0.9", "epic:k=16", "cacheblend:ratio=0.15"]
    score = Interval(0.5, 0.4, 0.6, 50)
    series = {label: [(x, score) for x in range(points)] for label in labels}
    return [Panel("gold position", series)], plots.styles(labels)


@pytest.mark.parametrize(
    "panels",
    [
        crowded(10)[0],
        crowded(2)[0],
        [Panel("a", crowded(1)[0][0].series, lines=False)] * 2,
        [Panel("length", {"full": [(x, Interval(0.5, 0.4, 0.6, 5)) for x in range(10_000, 90_000, 7_777)]})],
        [Panel("tokens", {"full": [(30.0, Interval(0, 0, 0.1, 5))], "block": [(90_000.0, Interval(1, 0.9, 1, 5))]}, False, True)],
    ],
    ids=["nine methods", "narrow", "two panels", "bins", "log"],
)  # fmt: skip
def test_no_text_of_a_plot_lies_on_other_text_or_outside(panels):
    figure = plots.draw(panels, "substring_em (points)", crowded(1)[1])
    FigureCanvasAgg(figure).draw()
    texts = [text for axis in figure.axes for text in (axis.xaxis.label, axis.yaxis.label)]
    for axis in figure.axes:
        shown = [axis.xaxis, *([axis.yaxis] if axis is figure.axes[0] else [])]
        for side in shown:
            low, high = sorted(side.get_view_interval())
            texts += [
                label for at, label in zip(side.get_ticklocs(), side.get_ticklabels(), strict=True) if low <= at <= high
            ]
    texts += figure.legends[0].get_texts()
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text() and t.get_visible()]
    width, height = figure.canvas.get_width_height()
    inside = [(name, box) for name, box in boxes if box.width]
    assert len(inside) >= 4
    for name, box in inside:
        assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1, name
    for (one, a), (two, b) in combinations(inside, 2):
        assert not a.overlaps(b), f"{one!r} lies on {two!r}"


def test_a_plot_takes_the_pages_colours_and_is_the_same_every_time():
    panels, looks = crowded(3)
    one = plots.svg(panels, "score", looks, 'a "title" <b>')
    assert one == plots.svg(panels, "score", looks, 'a "title" <b>')
    assert 'aria-label="a &quot;title&quot; &lt;b>"' in one
    assert plots.INK not in one and plots.FAINT not in one and "currentColor" in one
    assert not re.search(r"(fill|stroke): #(000000|ffffff)", one)


def test_no_two_of_many_methods_look_alike():
    looks = plots.styles([str(i) for i in range(32)])
    assert len(set(map(str, looks.values()))) == 32


# -- comparing two runs -----------------------------------------------------------------------------------------------


def test_a_comparison_says_what_changed_and_that_it_is_real(tmp_path, run):
    a = write_run(tmp_path / "a", method="full", chance=lambda i: 0.7)
    b = write_run(tmp_path / "b", method="block", chance=lambda i: 0.4, cost=(10, 0.01))
    found = compare(a, b)
    assert [name for name, _, _ in found.settings] == ["method.spec", "method.name"]
    row = found.rows[0]
    assert row.name == "substring_em" and row.difference == runs.compared(found.a, found.b)
    assert len(found.flips) == row.difference.better + row.difference.worse
    assert found.warnings == () and "worse than A" in found.verdict and "more than noise" in found.verdict
    code, out, _ = run("report", "--compare", a, b, "--json", tmp_path / "c.json")
    assert code == 0 and out.rstrip().endswith("more than noise.")
    assert "method.spec" in out and "gold position 3" in out and "tokens computed" in out
    stored = json.loads((tmp_path / "c.json").read_text())
    assert stored["more_than_noise"] is True and len(stored["flips"]) == len(found.flips)
    assert stored["flips"][0]["b"]["prediction"] == WRONG


def test_a_comparison_of_the_same_answers_finds_no_difference(tmp_path):
    a, b = (write_run(tmp_path / name, method="block") for name in "ab")
    found = compare(a, b)
    assert found.settings == () and found.flips == ()
    assert "No difference beyond noise" in found.verdict


def test_a_comparison_across_prompts_says_so(tmp_path, run):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", method="block", extract="first_line")
    code, _, err = run("report", "--compare", a, b)
    assert code == 0 and 'warning: more than the method differs: extract: "" against "first_line"' in err


def test_a_comparison_across_chat_templates_says_so_where_both_are_known(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b", "old")]
    for folder, template in zip(runs[1:], ({"chat_template_sha256": "00" * 32}, {}), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        del summary["prompt"]["chat_template_sha256"]
        summary["prompt"] |= template
        (folder / "summary.json").write_text(json.dumps(summary))
    a, b, old = runs
    (warning,) = compare(a, b).warnings
    assert "prompt.chat_template_sha256" in warning
    assert compare(a, old).warnings == compare(old, b).warnings == compare(a, old).settings == ()


def test_a_real_comparison(real, run):
    code, out, err = run("report", "--compare", real / "full", real / "graph-kv")
    assert code == 0, err
    assert "string_match_all on 6 items" in out


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_run(tmp_path / "good")
    other = write_run(tmp_path / "other", task="xsum")
    (tmp_path / "empty").mkdir()
    for words, code, says in (
        (["report"], 2, "give folders of runs, or --compare"),
        (["report", good, "--compare", good, good], 2, "give folders of runs, or --compare"),
        (["report", "--compare", good, good, "--out", "x.html"], 2, "--compare prints"),
        (["report", tmp_path / "empty"], 1, "no finished run in or below"),
        (["report", tmp_path / "nowhere"], 1, "no finished run in or below"),
        (["report", "--compare", good, tmp_path / "empty"], 1, "no finished run here"),
        (["report", "--compare", good, other], 1, "have no items or no metric in common"),
    ):
        found, _, err = run(*words)
        assert found == code and says in err and err.count("\n") == 1, err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("summary.json", "{", "isn't valid JSON"),
        ("summary.json", "[]", "isn't the summary of an evaluation in format 1"),
        ("summary.json", '{"format": 2}', "isn't the summary of an evaluation in format 1"),
        ("summary.json", '{"format": 1, "task": "nq"}', "has no 'headline'"),
        ("results.jsonl", "", "holds no item"),
        ("results.jsonl", '{"id": "a"}\n', "aren't results"),
        ("results.jsonl", '{"id": "a", "scores": {}}\n{"id"', "results.jsonl:2 isn't valid JSON"),
    ],
)
def test_damaged_runs_are_named(tmp_path, file, text, says):
    folder = write_run(tmp_path / "a")
    (folder / file).write_text(text)
    with pytest.raises(RunError, match=re.escape(says)):
        report.build([tmp_path])


def test_the_page_is_written_to_report_html_by_default(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a")
    assert run("report", "runs")[0] == 0
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
