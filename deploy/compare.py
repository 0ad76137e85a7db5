"""Runs side by side: `python deploy/compare.py RUN … [--tracking URI] [--metric NAME …] [--plots FOLDER] [--mlflow]`, a table.

Reads the folders of runs (summary.json, heldout*.json) and of `deploy/baselines.py` (baselines.json); no server is needed. With
`--tracking` it reads the same files from an MLflow server, where RUN is the id of a run, or the name of runs or of a sweep.

A row is a run or a method: at the end of training, and on held-out prompts where `deploy/evaluate.py` was run, the base model
beside it. Runs that differ in nothing but the seed, evaluated in the same way, are one row: their mean, with the least and the
largest. Rows that would have one name say what they differ in. `--mlflow` prints the addresses, at the tracking server, of the
compare view with all of them and of views of their experiments, which it saves there: the columns that say how near to the
posterior runs are, and how fast.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from deploy.baselines import is_tuned  # noqa: E402
from deploy.command import command  # noqa: E402
from deploy.runs import find_run  # noqa: E402
from system import config_file  # noqa: E402
from system.config import ConfigError  # noqa: E402
from system.journal import State  # noqa: E402
from system.mlflow_results import fetch  # noqa: E402
from system.tracking_uri import set_environment  # noqa: E402

SHOWN = ("task/", "posterior/", "exact/", "model_tokens", "seconds")
INCIDENTAL = {"seed", "output_dir", "tracking", "cluster", "actors"}
"""Sections of a config that say where and how it ran, not what."""
PLANE = ("task/diversity", "task/max_log_likelihood")
"""The axes of the paper's figure 3."""


@dataclass(frozen=True)
class Entry:
    """One result, in the units that its metrics have: nats, tokens, seconds."""

    name: str
    settings: dict[str, Any]
    """By dotted names; equal for results that differ in the seed alone."""
    seed: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    name: str
    seeds: tuple[int, ...]
    values: dict[str, tuple[float, ...]]
    """Metric -> a value a run, of the runs that have it."""


def read(folder: Path) -> list[Entry]:
    """What a folder has to show.

    Raises:
        ConfigError: it has no results, or its files are not what a run writes.
    """
    config = config_file.load(folder / "config.yaml", [])
    try:
        found = list(_results(folder, config.name, _kept(config.model_dump(mode="json"))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{folder}: its results cannot be read: {type(error).__name__}: {error}; repeat the command that wrote them"
        ) from error
    if not found:
        raise ConfigError(
            f"{folder} has no baselines.json, no heldout.json, and no summary.json of a run that came to its end: "
            "--resume it first"
        )
    return [Entry(name, settings, config.seed, {k: float(v) for k, v in metrics.items()}) for name, settings, metrics in found]


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config two repetitions have in common, by dotted names."""
    return config_file.leaves({name: value for name, value in config.items() if name not in INCIDENTAL})


def _results(folder: Path, run: str, config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, float]]]:
    """(row's name, what it has in common with its repetitions, metrics)."""

    def content(name: str) -> dict[str, Any]:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    summary, baselines = content("summary.json"), content("baselines.json")
    # What a stopped run had learned is no repetition of what the others had in the end.
    if "after" in summary and summary["finished"]:
        yield f"{run}: before", config, summary["before"]
        yield f"{run}: after", config, summary["after"]
    for path in sorted(folder.glob("heldout*.json")):
        heldout = content(path.name)
        _, dash, name = path.stem.partition("-")
        of = f", {name}" if dash else ""
        base, tuned = held_out(heldout["metrics"])
        evaluated = config_file.load(folder / "config.yaml", heldout["overrides"])
        there = _kept(evaluated.model_dump(mode="json"))
        changed = {field: there.get(field) for field in (*config, *there) if there.get(field) != config.get(field)}
        drawn = {"samples": heldout["samples"], "temperature": heldout.get("temperature", 1.0)}
        same = config | _under("evaluated", changed) | drawn
        if base:
            yield f"{run}: held out{of}, base", same, base
        if tuned:
            yield f"{run}: held out{of}", same, tuned
    for method, metrics in baselines.get("methods", {}).items():
        adapter = {}
        if is_tuned(method):
            adapter = _kept(baselines["adapter_config"]) | {"step": baselines.get("adapter_step")}
        same = config | _under("adapter", adapter) | baselines["settings"] | {"samples": baselines["samples"]}
        yield f"{run}: {method}", same, metrics


def _under(section: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{field}": value for field, value in fields.items()}


def held_out(content: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """What `deploy/evaluate.py` found, as metrics (of the base model, of the adapter); one of them may have been left out."""
    named = [(name.split("/", 1)[1], value) for name, value in content.items()]
    base = {name.removeprefix("base/"): value for name, value in named if name.startswith("base/")}
    return base, {name: value for name, value in named if not name.startswith("base/")}


def rows(entries: Sequence[Entry]) -> list[Row]:
    """Entries of equal key as one, in the order in which they were first given."""
    grouped: dict[str, list[Entry]] = {}
    for entry in entries:
        grouped.setdefault(json.dumps([entry.name, entry.settings], sort_keys=True), []).append(entry)
    result = []
    for same in grouped.values():
        names = dict.fromkeys(name for entry in same for name in entry.metrics)
        values = {name: tuple(e.metrics[name] for e in same if name in e.metrics) for name in names}
        others = [of[0].settings for of in grouped.values() if of[0].name == same[0].name]
        result.append(Row(same[0].name + _difference(same[0].settings, others), tuple(entry.seed for entry in same), values))
    return result


def _difference(settings: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """What tells a row from those of its name, of which it is one."""
    fields = dict.fromkeys(field for other in others for field in other)
    differing = [field for field in fields if any(other.get(field) != settings.get(field) for other in others)]
    return f" ({', '.join(f'{field}={settings.get(field)}' for field in differing)})" if differing else ""


def metrics_of(table: Sequence[Row], wanted: Sequence[str]) -> list[str]:
    """The columns: those asked for, or all of the task, the posterior and the cost.

    Raises:
        ConfigError: a metric that no row has.
    """
    known = list(dict.fromkeys(name for row in table for name in row.values))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"--metric {unknown[0]}: no run has it; there are {', '.join(known)}")
    return list(wanted) or sorted((name for name in known if name.startswith(SHOWN)), key=_rank)


def _rank(name: str) -> int:
    return next(rank for rank, prefix in enumerate(SHOWN) if name.startswith(prefix))


def cell(values: Sequence[float]) -> str:
    """The mean, and of several runs the range; empty where there is none."""
    if not values:
        return ""
    mean = f"{np.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def markdown(table: Sequence[Row], metrics: Sequence[str]) -> str:
    """A row a line, a metric a column; `runs` counts how many are behind a row."""
    lines = ["| run | runs | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 2) + "|"]
    for row in table:
        cells = [cell(row.values.get(name, ())) for name in metrics]
        name = row.name.replace("|", "\\|")
        lines.append(f"| {name} | {len(row.seeds)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plots(folder: Path, table: Sequence[Row], metrics: Sequence[str]) -> list[Path]:
    """PNG files: a panel of bars a metric, and likelihood against diversity where both are known."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(
        len(metrics), 1, figsize=(8, len(metrics) * (0.6 + 0.3 * len(table))), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[:, 0], metrics, strict=True):
        for at, row in enumerate(table):
            if values := row.values.get(name):
                mean = float(np.mean(values))
                spread = [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None
                axis.barh(at, mean, xerr=spread, color=f"C{at % 10}")
        axis.set_yticks(range(len(table)), [row.name for row in table])
        axis.invert_yaxis()
        axis.set_title(name, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    written = [folder / "metrics.png"]
    figure.savefig(written[0], dpi=120)
    plt.close(figure)
    points = [row for row in table if all(row.values.get(name) for name in PLANE)]
    if points:
        figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
        for at, row in enumerate(points):
            x, y = (float(np.mean(row.values[name])) for name in PLANE)
            axis.plot(x, y, "o", color=f"C{at % 10}")
            axis.annotate(row.name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel("diversity")
        axis.set_ylabel("highest log-likelihood of the samples, nats")
        axis.spines[["top", "right"]].set_visible(False)
        written.append(folder / "likelihood_diversity.png")
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written


def mlflow_views(folders: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Tracking URI -> addresses of views in MLflow with the runs that are there, those of baselines included.

    Raises:
        ConfigError: a folder has no run at MLflow.
        TrackingError: a server does not know a run, or cannot be reached.
    """
    from system.mlflow_views import save_views

    set_environment()
    runs: dict[str, list[str]] = {}
    for folder in folders:
        if not (found := [*folder.glob("tracking.json"), *sorted(folder.glob("*/tracking.json"))]):
            raise ConfigError(f"{folder} has no tracking.json: it was not recorded for MLflow")
        for path in found:
            state = State.load(path)
            if state.run_id is None:
                raise ConfigError(
                    f"{path.parent} has not reached {state.uri}; python -m system.tracking {path.parent} sends it"
                )
            runs.setdefault(state.uri, []).append(state.run_id)
    return {uri: save_views(uri, run_ids) for uri, run_ids in runs.items()}


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/compare.py", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run or of baselines, or its name under runs/")
    parser.add_argument("--metric", action="append", default=[], help="a column; may be given several times")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="writes PNG files there")
    parser.add_argument(
        "--tracking", metavar="URI", help="an MLflow server; RUN is the id or the name of runs there, or the name of a sweep"
    )
    parser.add_argument(
        "--mlflow", action="store_true", help="prints addresses of views in MLflow, and saves those views there"
    )
    arguments = parser.parse_args(argv)
    if arguments.plots and arguments.plots.is_file():
        raise ConfigError(f"--plots {str(arguments.plots)!r} is a file; name a folder")
    with tempfile.TemporaryDirectory() as fetched:
        if arguments.tracking:
            found = [path for name in arguments.runs for path in fetch(arguments.tracking, name, Path(fetched))]
        else:
            found = [find_run(name) for name in arguments.runs]
        folders = list(dict.fromkeys(found))
        table = rows([entry for folder in folders for entry in read(folder)])
        metrics = metrics_of(table, arguments.metric)
        views = mlflow_views(folders) if arguments.mlflow else {}
    print(markdown(table, metrics))
    for path in plots(arguments.plots, table, metrics) if arguments.plots else []:
        print(path, file=sys.stderr)
    for uri, addresses in views.items():
        start = f" (mlflow ui --backend-store-uri {uri} --host 127.0.0.1)" if uri.startswith("sqlite:") else ""
        print(f"in MLflow{start}:", *(f"  {name}: {address}" for name, address in addresses.items()), sep="\n", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
