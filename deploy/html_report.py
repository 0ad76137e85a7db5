"""A run as one HTML file that stands alone: `python deploy/html_report.py RUN [--output FILE]`.

A run ends with RUN/report.html; this writes it again, from what is in the run's folder, for a run that still goes on or was
killed too. The file loads nothing from anywhere: images are inside it, and its content security policy forbids the rest.
What a model wrote is shown as text: the template escapes all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from jinja2 import Environment, FileSystemLoader, StrictUndefined  # noqa: E402

from deploy.charts import Chart, data_uri, draw  # noqa: E402
from deploy.command import command  # noqa: E402
from deploy.report import shown  # noqa: E402
from deploy.runs import check_output, find_run  # noqa: E402
from system import config_file, evaluation_files, journal  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402
from system.evaluation import Evaluation  # noqa: E402
from system.whole_file import replace_text  # noqa: E402

PROMPTS, SAMPLES = 8, 8
"""Prompts whose samples are shown, and samples of each."""
ROWS = 40
"""Of the table of the bounds by prompt, and of the training's samples."""
SAMPLERS_BUSY = {
    "system/samplers/mean_busy": "samplers, mean (since their starts)",
    "system/samplers/max_busy": "least idle sampler",
    "system/samplers/min_busy": "most idle sampler",
}
"""Metric of all samplers of a large pool -> what 1 less it is called."""
MEANING = {
    "exact/kl_target_q": "KL(target ‖ q), nats, over all outcomes; 0 at the posterior",
    "exact/kl_q_target": "KL(q ‖ target), nats",
    "exact/total_variation": "half of the sum of |q - target|, in 0 … 1",
    "exact/listed_mass": "q's mass on the listed outcomes",
    "exact/worst_ratio": "smallest q / target: the outcome with the least of its due",
    "posterior/log_z_lower": "mean of u = log R / T - log q, nats: a lower bound on log Z, equal to it at the posterior",
    "posterior/log_z_weighted": "log of the mean of exp u, nats: a tighter bound",
    "posterior/spread": "variance of u, nats²; 0 at the posterior",
    "posterior/ess": "effective share of the samples under the weights exp u; 1 at the posterior",
    "posterior/log_q_stop": "mean log q of the stop where samples ended, nats",
    "posterior/length": "tokens of a sample",
    "posterior/engine_gap": "mean |log q of a sample by the engine that drew it - by the learner|, nats; rounding alone",
    "task/max_log_reward": "largest log R of a prompt's samples, nats",
    "task/mean_log_reward": "mean log R of a prompt's samples, nats",
    "seconds_training": "training time until then, seconds",
}


@dataclass
class Metrics:
    """What the journal of a run says, but for the system metrics that no chart shows. Of a run that was resumed from an earlier
    step, what it said of later ones is gone."""

    step: int = 0
    """Updates done."""
    series: dict[str, dict[int, float]] = field(default_factory=dict)
    started: int = 0
    """Milliseconds since 1970."""
    status: str = "RUNNING"

    @classmethod
    def read(cls, path: Path) -> Metrics:
        result = cls()
        for entry, _end in journal.read(path):
            result.started = result.started or entry.get("time", 0)
            result.status = entry.get("status", result.status)
            if entry["kind"] == "metrics":
                if "loss" in entry["values"]:
                    result._go_to(entry["step"])
                for name, value in entry["values"].items():
                    # What processes use of their machines is most of a long run's points, and in no chart.
                    if name.startswith("system/") and not name.endswith("busy"):
                        continue
                    result.series.setdefault(name, {})[entry["step"]] = value
        for name, points in result.series.items():
            result.series[name] = dict(sorted(points.items()))
        return result

    def _go_to(self, step: int) -> None:
        """The update that the run does next."""
        if step <= self.step:
            for name, points in self.series.items():
                self.series[name] = {at: value for at, value in points.items() if at < step}
        self.step = step

    def lines(self, names: dict[str, str]) -> dict[str, dict[int, float]]:
        """Those of these metrics that the run has, by their labels."""
        return {label: self.series[name] for name, label in names.items() if name in self.series}


def charts(metrics: Metrics) -> list[Chart]:
    """The curves of a run; those that it has no points of are left out."""
    each = {
        name: f"{name.split('/')[1]} (since its start)"
        for name in sorted(metrics.series)
        if name.startswith("system/sampler") and name.endswith("/busy")
    }
    # Of many samplers a run tells of all together.
    busy = metrics.lines(SAMPLERS_BUSY) or dict(list(metrics.lines(each).items())[:4])
    idle = {label: {step: 1 - value for step, value in points.items()} for label, points in busy.items()}
    kl = metrics.lines({"exact/kl_target_q": "KL(target ‖ q)", "exact/kl_q_target": "KL(q ‖ target)"})
    bounds = metrics.lines({"posterior/log_z_lower": "evaluation: lower bound"})
    spread = metrics.lines({"posterior/spread": "evaluation"})
    stop = metrics.lines({"posterior/log_q_stop": "evaluation"})

    prefix = "reward/"
    factors = metrics.lines({name: name.removeprefix(prefix) for name in metrics.series if name.startswith(prefix)})

    def of_samples(name: str) -> dict[str, dict[int, float]]:
        return metrics.lines({name: "training samples"})

    made = [
        Chart("Distance to the posterior, exact", "nats", kl, True, frozenset(kl)),
        Chart("Loss", "", metrics.lines({"loss": "loss"}), True),
        Chart("Mean of u, log Z at the posterior", "nats", of_samples("log_z") | bounds, False, frozenset(bounds)),
        Chart("Spread: variance of u", "nats²", of_samples("spread") | spread, True, frozenset(spread)),
        Chart("Effective share of the samples", "", metrics.lines({"ess": "ess"})),
        Chart("log q of the stop where samples end", "nats", of_samples("log_q_stop") | stop, False, frozenset(stop)),
        Chart("Length of the samples", "tokens", metrics.lines({"length/mean": "mean", "length/max": "longest"})),
        Chart("log R of the samples", "nats", metrics.lines({"log_reward/mean": "mean", "log_reward/max": "best"})),
        Chart("Factors of the reward, means", "in their own units", factors),
        Chart("Idle", "share of the time", metrics.lines({"idle/learner": "learner"}) | idle),
        Chart("Staleness", "updates", metrics.lines({"staleness": "mean"})),
        Chart("Rate", "trajectories/s", metrics.lines({"rate/trajectories_per_second": "trajectories/s"})),
    ]
    return [chart for chart in made if chart.lines]


def comparison(evaluations: list[tuple[int, Evaluation]]) -> dict[str, Any]:
    """The evaluations side by side, as the table that a run prints."""
    columns = shown(evaluations) if evaluations else []
    names = dict.fromkeys(name for _, result in columns for name in result.metrics)
    rows = [(name, MEANING.get(name, ""), [result.metrics.get(name) for _, result in columns]) for name in names]
    return {"steps": [step for step, _ in columns], "rows": rows}


def by_prompt(evaluations: list[tuple[int, Evaluation]]) -> dict[str, Any]:
    """The bounds of each prompt before and after, and the task's verdicts; None where a prompt has no such figure."""
    if not evaluations or not evaluations[-1][1].per_prompt:
        return {"names": [], "rows": [], "total": 0}
    before, after = evaluations[0][1].per_prompt, evaluations[-1][1].per_prompt
    names = [name for name in dict.fromkeys(name for row in after for name in row) if name != "prompt"]
    earlier = {row["prompt"]: row for row in before}
    rows = [
        (row["prompt"], [(earlier.get(row["prompt"], {}).get(name), row.get(name)) for name in names]) for row in after[:ROWS]
    ]
    return {"names": names, "rows": rows, "total": len(after)}


def samples(evaluations: list[tuple[int, Evaluation]], temperature: float, contexts: dict[str, str]) -> list[dict[str, Any]]:
    """For some prompts, samples from before and after, the likeliest first, with log R / T - log q."""

    def of(result: Evaluation, prompt: str) -> list[dict[str, Any]]:
        rows = [row for row in result.samples if row["prompt"] == prompt][:SAMPLES]
        rows = [row | {"log_weight": row["log_reward"] / temperature - row["log_q"]} for row in rows]
        return sorted(rows, key=lambda row: -row["log_q"])

    if not evaluations:
        return []
    (first, before), (last, after) = evaluations[0], evaluations[-1]
    names = list(dict.fromkeys(row["prompt"] for row in after.samples))[:PROMPTS]
    which = {f"step {first}": before, f"step {last}": after}
    return [
        {
            "prompt": name,
            "context": contexts.get(name, ""),
            "columns": {head: of(result, name) for head, result in which.items()},
        }
        for name in names
    ]


def _table(path: Path) -> list[dict[str, Any]]:
    """Rows of a table as `Tracker` writes it; none where there is no file."""
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def number(value: Any) -> str:
    """For a table: four digits, a dash for nothing."""
    if value is None or isinstance(value, bool):
        return "–" if value is None else str(value).lower()
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def context(run_dir: Path, config: Config) -> dict[str, Any]:
    """All that the template shows."""
    metrics = Metrics.read(run_dir / "journal.jsonl")
    evaluations = evaluation_files.read(run_dir / "evaluations", config.task, metrics.step)
    contexts = {str(row["id"]): row["text"] for row in _table(run_dir / "datasets" / f"{config.task.kind}.json")}
    tables = [path for path in sorted((run_dir / "tables" / "samples").glob("*.json")) if int(path.stem) <= metrics.step]
    drawn = _table(tables[-1]) if tables else []
    summary = _json(run_dir / "summary.json")
    if summary.get("steps") != metrics.step:
        # Of before the run was resumed.
        summary = {}
    temperature = config.learner.reward_temperature.end
    return {
        "name": run_dir.name,
        "config": config,
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(metrics.started / 1000)),
        "status": "finished" if summary.get("finished") else "stopped" if summary else metrics.status.lower(),
        "summary": {name: value for name, value in summary.items() if not isinstance(value, dict)},
        "before": evaluations[0][1].metrics if len(evaluations) > 1 else {},
        "after": evaluations[-1][1].metrics if len(evaluations) > 1 else {},
        "comparison": comparison(evaluations),
        "plots": [data_uri(path.read_bytes(), "png") for path in sorted((run_dir / "plots").glob("*.png"))],
        "charts": [(chart.title, draw(chart)) for chart in charts(metrics)],
        "by_prompt": by_prompt(evaluations),
        "samples": samples(evaluations, temperature, contexts),
        "drawn": drawn[:ROWS],
        "drawn_step": int(tables[-1].stem) if tables else 0,
        "drawn_total": len(drawn),
        "contexts": contexts,
        "yaml": (run_dir / "config.yaml").read_text(encoding="utf-8"),
        "environment": _json(run_dir / "environment.json"),
    }


def write(run_dir: Path, output: Path | None = None) -> Path:
    """Writes `output`, by default report.html in the run's folder, and returns its path.

    Raises:
        ConfigError: the folder has no journal.
    """
    if not (run_dir / "journal.jsonl").is_file():
        raise ConfigError(f"{run_dir} has no journal.jsonl: it is no run, or one that never started")
    config = config_file.load(run_dir / "config.yaml", [])
    environment = Environment(
        loader=FileSystemLoader(ROOT / "deploy" / "templates"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = number
    path = output or run_dir / "report.html"
    replace_text(path, environment.get_template("report.html").render(context(run_dir, config)))
    return path


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/html_report.py", description=__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("--output", metavar="FILE", type=Path, help="instead of RUN/report.html")
    arguments = parser.parse_args(argv)
    if arguments.output:
        check_output("--output", arguments.output)
    print(write(find_run(arguments.run), arguments.output))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
