"""What a run ends with: the figures before and after, as a table, plots, and a summary for machines."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from transformers import PreTrainedTokenizerBase

from system.adapters import Adapter
from system.config import Config
from system.evaluation import Evaluation
from system.loop_state import Counters
from system.tasks.problem import Problem
from system.text import decode
from system.timeline import Span, busy_fraction, chrome_trace

BASE, TUNED, TARGET = "#9aa5b1", "#1f6f8b", "#d1495b"


def replace_folder(folder: Path, adapter: Adapter) -> None:
    """The adapter as a PEFT folder, in place of one that a resumed run left there."""
    shutil.rmtree(folder, ignore_errors=True)
    adapter.materialise(folder)


def summary(
    config: Config,
    counters: Counters,
    evaluations: list[tuple[int, Evaluation]],
    seconds: float,
    finished: bool,
    sampler_idle: float = math.nan,
) -> dict[str, Any]:
    """Figures of a run, for summary.json and the last line of the job: seconds, nats, rates per second."""
    training = max(counters.seconds, 1e-9)
    result: dict[str, Any] = {
        "run": config.name,
        "task": config.task.kind,
        "loss": config.loss.kind,
        "seed": config.seed,
        "finished": finished,
        "steps": counters.step,
        "groups": counters.groups,
        "trajectories": counters.trajectories,
        "sampled_tokens": counters.sampled_tokens,
        "seconds_total": round(seconds, 1),
        "seconds_training": round(counters.seconds, 1),
        "trajectories_per_second": round(counters.trajectories / training, 2),
        "learner_idle": round(1.0 - counters.learner_busy_seconds / training, 3),
        "sampler_idle": None if math.isnan(sampler_idle) else round(sampler_idle, 3),
        "sampler_deaths": counters.deaths,
    }
    # A run that was stopped before its next evaluation has nothing to say of what it learned.
    if len(evaluations) > 1:
        result["before"], result["after"] = evaluations[0][1].metrics, evaluations[-1][1].metrics
        result["after_step"] = evaluations[-1][0]
        result |= _improvement(evaluations[0][1], evaluations[-1][1])
    return result


def _improvement(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Prompt by prompt, where the evaluation has bounds: how often the bound rose, and by what factor the spread fell."""
    rows = {row["prompt"]: row for row in before.per_prompt}
    pairs = [(rows[row["prompt"]], row) for row in after.per_prompt if row["prompt"] in rows]
    if not pairs or "spread" not in pairs[0][0]:
        return {}
    rose = [new["log_z_lower"] > old["log_z_lower"] for old, new in pairs]
    factor = [old["spread"] / max(new["spread"], 1e-12) for old, new in pairs]
    mean_before, mean_after = (np.mean([row["spread"] for row in e.per_prompt]) for e in (before, after))
    return {
        "prompts": len(pairs),
        "prompts_bound_rose": int(np.sum(rose)),
        "spread_factor_median": float(np.median(factor)),
        "spread_factor_of_means": float(mean_before / max(mean_after, 1e-12)),
    }


def timeline(path: Path, processes: Mapping[str, Iterable[Span]], alive: Collection[str]) -> float:
    """Writes a Chrome trace. Returns the share of the training time in which samplers neither drew nor installed, or NaN.

    A sampler's time is from its first known span to the end of training, or to its last span if it is not one of those `alive`.
    """
    spans = {process: list(spans) for process, spans in processes.items()}
    path.write_text(json.dumps(chrome_trace(spans)), encoding="utf-8")
    trained = _training(spans.get("driver", []))
    busy = present = 0.0
    for process, each in spans.items():
        engine = [span for span in each if span.track == "engine"]
        if not engine:
            continue
        first, last = min(span.start for span in engine), max(span.end for span in engine)
        for start, end in trained:
            start, end = max(start, first), end if process in alive else min(end, last)
            if end > start:
                busy += busy_fraction(engine, start, end) * (end - start)
                present += end - start
    return 1.0 - busy / present if present else math.nan


def _training(driver: Sequence[Span]) -> list[tuple[float, float]]:
    """From when to when the loop trained: from its first update or wait to its last one, but for the evaluations between."""
    loop = [span for span in driver if span.name in ("update", "wait for groups")]
    if not loop:
        return []
    start, last, trained = loop[0].start, loop[-1].end, []
    for pause in (span for span in driver if span.name == "evaluate"):
        trained.append((start, min(pause.start, last)))
        start = max(start, pause.end)
    return [(start, end) for start, end in (*trained, (start, last)) if end > start]


def shown(evaluations: list[tuple[int, Evaluation]]) -> list[tuple[int, Evaluation]]:
    """Those that a table has room for: all, or the first and the last of many."""
    return [evaluations[0], evaluations[-1]] if len(evaluations) > 6 else evaluations


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by the head of their column: a row a metric, NaN where a column has no such metric."""
    names = list(dict.fromkeys(name for metrics in columns.values() for name in metrics))
    width = max(map(len, names))
    lines = [f"{'':{width}}  " + "  ".join(f"{head:>12}" for head in columns)]
    for name in names:
        values = (f"{metrics.get(name, math.nan):12.5g}" for metrics in columns.values())
        lines.append(f"{name:{width}}  " + "  ".join(values))
    return "\n".join(lines)


def plots(
    folder: Path, problem: Problem, tokenizer: PreTrainedTokenizerBase, evaluations: list[tuple[int, Evaluation]]
) -> list[Path]:
    """PNG files: the distribution before, after, and the target, or log-weights of the samples; none without either."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = evaluations[0][1], evaluations[-1][1]
    if problem.outcomes is not None:
        labels = [decode(tokenizer, outcome.tokens_T.tolist()) for outcome in problem.outcomes]
        return [_distribution(folder / "distribution.png", problem, labels, before, after)]
    if not before.samples:
        return []
    return [posterior_plot(folder / "posterior.png", {"before training": before, "after training": after})]


def _distribution(path: Path, problem: Problem, labels: list[str], before: Evaluation, after: Evaluation) -> Path:
    assert problem.log_target_O is not None and before.log_q_O is not None and after.log_q_O is not None
    figure, axis = plt.subplots(figsize=(11, 4.2), layout="constrained")
    at = np.arange(len(labels))
    axis.bar(at, np.exp(before.log_q_O), width=0.9, color=BASE, label=_label("before training", before))
    axis.bar(at, np.exp(after.log_q_O), width=0.5, color=TUNED, label=_label("after training", after))
    axis.step(np.append(at - 0.5, at[-1] + 0.5), np.exp(np.append(problem.log_target_O, problem.log_target_O[-1])),
              where="post", color=TARGET, lw=1.6, label="target")  # fmt: skip
    every = max(1, len(labels) // 20)
    axis.set_xticks(at[::every], labels[::every])
    axis.set_xlim(-1, len(labels))
    highest = float(np.exp(np.concatenate([after.log_q_O, problem.log_target_O])).max())
    axis.set_ylim(0, max(4 * highest, float(np.percentile(np.exp(before.log_q_O), 97))))
    axis.set_xlabel("outcome")
    axis.set_ylabel("probability")
    axis.legend(frameon=False, loc="upper right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _label(name: str, evaluation: Evaluation) -> str:
    return f"{name}: KL(target ‖ q) = {evaluation.metrics['exact/kl_target_q']:.3g} nats"


def posterior_plot(path: Path, policies: Mapping[str, Evaluation | None]) -> Path:
    """PNG: u by prompt, and log R, log q and the lengths of the samples, of the two policies of these names, or of the one
    that is not None."""
    drawn = [(name, of, color) for (name, of), color in zip(policies.items(), (BASE, TUNED), strict=True) if of is not None]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.8), layout="constrained")
    left, middle, right, last = axes
    longest = max(row["length"] for _, result, _ in drawn for row in result.samples)
    # A prompt whose samples got no reward is in one of the two alone, so a row's number says nothing of its prompt.
    first, *others = (result.per_prompt for _, result, _ in drawn)
    ordered = [*sorted(first, key=lambda row: row["log_z_lower"]), *(row for rows in others for row in rows)]
    place = {prompt: at for at, prompt in enumerate(dict.fromkeys(row["prompt"] for row in ordered))}
    for label, result, color in drawn:
        at = [place[row["prompt"]] for row in result.per_prompt]
        lower = [row["log_z_lower"] for row in result.per_prompt]
        deviation = np.sqrt([row["spread"] for row in result.per_prompt])
        left.errorbar(at, lower, yerr=deviation, fmt="o", ms=3.5, lw=1, color=color, label=label)
        middle.hist([row["log_reward"] for row in result.samples], bins=40, color=color, alpha=0.7, label=label)
        right.hist([row["log_q"] for row in result.samples], bins=40, color=color, alpha=0.7, label=label)
        lengths = [row["length"] for row in result.samples]
        last.hist(lengths, bins=np.arange(longest + 2) - 0.5, color=color, alpha=0.7, label=label)
    left.set(title="u = log R / T - log q: mean ± deviation", xlabel="prompt", ylabel="nats")
    middle.set(title="log R of the samples", xlabel="nats")
    right.set(title="log q of the samples", xlabel="nats")
    last.set(title="length of the samples", xlabel="tokens")
    left.legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
