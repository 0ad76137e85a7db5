"""The report as a browser and a reader meet it: whole in one file, escaped, with what the run's folder has."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy import environment, html_report, report
from deploy.charts import Chart, draw, running_mean, thinned
from deploy.html_report import Metrics
from system import config_file, evaluation_files
from system.config import ConfigError
from system.evaluation import Evaluation
from system.journal import Journal
from system.loop_state import Counters

EVIL = '<script>alert("x")</script><img src="https://example.com/x.png" onerror=alert(1)>{{ 7 * 7 }}'


def evaluated(spread: float, text: str) -> Evaluation:
    row = {"log_z_lower": -spread, "log_z_weighted": -1.0, "spread": spread, "ess": 0.5, "length": 3.0}
    metrics = {"posterior/log_z_lower": -spread, "posterior/spread": spread}
    samples = [{"prompt": "line-1", "text": text, "log_q": -float(k), "log_reward": -2.0 * k} for k in range(3)]
    return Evaluation(metrics, [{"prompt": "line-1", **row}, {"prompt": "line-2", **row}], samples)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a job of 90 updates leaves, with a model that writes HTML."""
    folder = tmp_path / "runs" / "one"
    config = config_file.parse(
        {
            "task": {"kind": "continuation"},
            "learner": {"reward_temperature": {"start": 0.5, "end": 0.5}},
        }
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config_file.dump(config))
    journal = Journal(folder / "journal.jsonl")
    for step in [*range(1, 61), *range(51, 91)]:
        values = {"loss": 1 / step, "log_z": -5.0, "spread": 3.0, "length/mean": 4.0, "system/sampler-0/busy": 0.75}
        journal.append("metrics", step=step, values=values)
    journal.append("metrics", step=90, values={"posterior/spread": 4.0})
    journal.append("status", status="RUNNING")
    table(folder / "datasets" / "continuation.json", [{"id": "line-1", "text": f"context {EVIL}"}])
    table(folder / "tables" / "samples" / "000090.json", [sample(EVIL)])
    evaluation_files.write(folder / "evaluations", 0, config.task, evaluated(100.0, "before " + EVIL))
    evaluation_files.write(folder / "evaluations", 90, config.task, evaluated(4.0, "after " + EVIL))
    (folder / "plots").mkdir()
    (folder / "plots" / "posterior.png").write_bytes(b"\x89PNG plot")
    (folder / "environment.json").write_text(json.dumps({"torch": "9.9.9", "commit": "abc123"}))
    return folder


def table(path: Path, rows: list[dict[str, Any]]) -> None:
    """As `Tracker` writes it."""
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}))


def sample(text: str) -> dict[str, Any]:
    figures = {"log_reward": -1.0, "length": 3, "temperature": 1.0, "epsilon": 0.0, "version": 2}
    return {"prompt": "line-1", "text": text, **figures}


class Page(HTMLParser):
    """Tags, the addresses they load from, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def page(run_dir: Path) -> Page:
    return Page(html_report.write(run_dir).read_text(encoding="utf-8"))


def test_the_file_stands_alone_and_shows_what_a_model_wrote_as_text(run_dir: Path) -> None:
    shown = page(run_dir)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(shown.tags)
    assert shown.handlers == []
    assert len(shown.addresses) >= 6 and all(address.startswith("data:image/") for address in shown.addresses)
    for text in (f"context {EVIL}", f"before {EVIL}", f"after {EVIL}"):
        assert text in shown.text
    style = (run_dir / "report.html").read_text().partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in style


def test_it_has_the_figures_the_config_and_what_the_run_was_made_with(run_dir: Path) -> None:
    shown = page(run_dir)
    words = re.sub(r"\s+", " ", shown.text)
    assert "variance of u, nats²" in words and "100 → 4" in words
    assert "posterior/spread 100 4" in re.sub(r"[^\w/.]+", " ", words)
    assert "9.9.9" in words and "abc123" in words
    assert "kind: continuation" in shown.text
    after = words[words.index("step 90") :]
    # At T = 0.5: u = -2 / 0.5 + 1.
    assert "-1 -2 -3" in after


def test_the_idle_share_is_of_each_sampler_or_of_all_and_no_other_figure_of_a_process_is_read(run_dir: Path) -> None:
    def idle() -> dict[str, float]:
        [chart] = [chart for chart in html_report.charts(Metrics.read(run_dir / "journal.jsonl")) if chart.title == "Idle"]
        return {label: points[90] for label, points in chart.lines.items()}

    assert idle() == {"sampler-0 (since its start)": 0.25}
    journal = Journal(run_dir / "journal.jsonl")
    journal.append("metrics", step=90, values={"system/driver/cpu_percent": 1.0, "system/samplers/mean_tokens": 9.0})
    assert not any("cpu" in name or "tokens" in name for name in Metrics.read(run_dir / "journal.jsonl").series)
    shares = {"mean": 0.75, "min": 0.5, "max": 0.875}
    journal.append("metrics", step=90, values={f"system/samplers/{which}_busy": share for which, share in shares.items()})
    assert idle() == {
        "samplers, mean (since their starts)": 0.25, "least idle sampler": 0.125, "most idle sampler": 0.5,
    }  # fmt: skip


def test_a_run_that_went_back_shows_nothing_of_what_came_after(run_dir: Path) -> None:
    config = config_file.load(run_dir / "config.yaml", [])
    (run_dir / "summary.json").write_text(json.dumps(report.summary(config, Counters(step=90, seconds=1.0), [], 1.0, True)))
    assert "finished" in page(run_dir).text
    Journal(run_dir / "journal.jsonl").append("metrics", step=71, values={"loss": 0.5})
    assert max(Metrics.read(run_dir / "journal.jsonl").series["spread"]) == 70
    shown = page(run_dir).text
    assert "before <script>" in shown
    assert "after <script>" not in shown and "finished" not in shown


def test_a_run_that_goes_on_has_a_report_without_evaluations_and_summary(run_dir: Path) -> None:
    for folder in ("evaluations", "plots", "tables", "datasets"):
        for path in (run_dir / folder).rglob("*"):
            path.unlink() if path.is_file() else None
    (run_dir / "environment.json").unlink()
    text = page(run_dir).text
    assert "There was no evaluation yet." in text and "running" in text


def test_a_figure_that_only_some_prompts_or_evaluations_have_is_a_dash_elsewhere(run_dir: Path) -> None:
    first, last = evaluated(100.0, "before"), evaluated(4.0, "after")
    first.metrics["task/distinct_answers"] = 2.0
    last.metrics["task/bleu_4"] = 0.125
    first.per_prompt[0]["task/bleu_4"] = 0.25
    last.per_prompt[1]["task/bleu_4"] = 0.375
    task = config_file.load(run_dir / "config.yaml").task
    evaluation_files.write(run_dir / "evaluations", 0, task, first)
    evaluation_files.write(run_dir / "evaluations", 90, task, last)
    words = re.sub(r"\s+", " ", page(run_dir).text)
    assert "task/distinct_answers 2 – " in words
    assert "task/bleu_4 – 0.125 " in words
    assert "0.25 → – " in words and "– → 0.375 " in words


def test_a_resumed_runs_curve_has_each_step_once(run_dir: Path) -> None:
    metrics = Metrics.read(run_dir / "journal.jsonl")
    assert list(metrics.series["loss"]) == list(range(1, 91))
    titles = {chart.title: chart for chart in html_report.charts(metrics)}
    assert "Staleness" not in titles, "the run has no such points"
    assert titles["Idle"].lines["sampler-0 (since its start)"][90] == 0.25
    assert titles["Spread: variance of u"].lines["evaluation"] == {90: 4.0}


def test_a_folder_without_a_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no journal\.jsonl"):
        html_report.write(tmp_path)


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, -1.0], [float("nan"), 1.0], list(range(3000))])
def test_a_chart_is_an_image_whatever_the_values(values: list[float]) -> None:
    uri = draw(Chart("title", "nats", {"line": dict(enumerate(values))}, log=True))
    assert uri.startswith("data:image/svg+xml;base64,")
    assert len(uri) < 120_000


def test_a_long_line_keeps_its_means_and_gaps_are_no_values() -> None:
    values = np.arange(8.0)
    values[0] = np.nan
    np.testing.assert_array_equal(thinned(values, 4), [1.0, 2.5, 4.5, 6.5])
    np.testing.assert_array_equal(thinned(values, 100), values)
    np.testing.assert_allclose(running_mean(values, 1)[:4], [1.0, 1.5, 2.0, 3.0])


def test_the_environment_has_versions_and_the_commit() -> None:
    known = environment.describe()
    assert known["numpy"] == np.__version__
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", known.get("commit", "0" * 40))
