"""How good a finished run's samples are, on other data than it was trained on: `python deploy/evaluate.py RUN [key=value …]`.

Draws on-policy samples of each prompt from the base model and from the run's adapter, in this process and without Ray, and
bounds the distance of both to the posterior. `key=value` changes the run's config: another file (task.prompts=OTHERS), or the
lines of the same one that were not trained on (task.offset=950). Writes RUN/heldout.json, which says too what was changed and
how many samples there were, and logs the metrics to the run in MLflow as heldout/… and heldout/base/… (one of the two with
`--only`: runs on the same data need the base model once). With `--name NAME` all of these are heldout-NAME, so that results on
several data sets stay beside each other, and with `--step N`, which takes a checkpoint's adapter, heldout-step-N. With
`--temperature T` the draws are from q^(1/T), token by token, for votes that are less spread: these say nothing of the
posterior, and only the metrics of the task and the samples' length are left.
The adapter's samples go to RUN/heldout_samples.jsonl, or to the file of --samples-file: one line a sample, with its prompt's
id and text, its length in tokens, log q and log R in nats. RUN/heldout.png has the bounds by prompt, and the spread of the
samples' log R, log q and lengths, of the models that were evaluated last.

For stories that the model told itself (python deploy/self_consistent.py) the true Z is an exact sample of the posterior at
T = 1, so that E[u] over it is an upper bound on log Z: the gap between the bounds is KL(q || p) + KL(p || q), and zero means
done.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command, log_to_stderr  # noqa: E402
from deploy.machine import take_machine  # noqa: E402
from deploy.runs import adapter_at, adapter_tensors, add_step, check_output, find_run  # noqa: E402
from system import config_file  # noqa: E402
from system.config import NAME, Config, ConfigError, Tracking  # noqa: E402
from system.journal import TrackingError  # noqa: E402
from system.task_config import PROMPT_FILES, WHOLE  # noqa: E402
from system.trajectory import ON_POLICY, Behaviour  # noqa: E402
from system.whole_file import replace_text  # noqa: E402

if TYPE_CHECKING:
    from deploy.local import Local
    from system.evaluation import Evaluation
    from system.tasks.problem import Problem

logger = logging.getLogger("headwater")

WHICH = {"base": "base model", "adapter": "adapter"}
ROUND = 1_000_003
"""Of the draws: no training evaluation has this number, so no seed is used twice."""
OTHER_TELLER = 0.1
"""Nats a token by which log p of told stories differs where another model told them: bfloat16 makes a third of it at most."""


def evaluate(
    config: Config, adapter: Path, samples: int, only: str | None = None, behaviour: Behaviour = ON_POLICY
) -> Iterator[tuple[str, Evaluation]]:
    """("base", …) and ("adapter", …), or one of them, each as soon as it is found. `adapter` is a file of the run.

    Raises:
        ConfigError: the adapter is not of this model and lora section; `behaviour` is another than the policy's own, and the
            task is evaluated without samples.
    """
    from deploy.local import opened
    from system import evaluation
    from system.diversity import diversity_measure
    from system.text import decode

    with opened(config, samples) as local:
        problem, tokenizer = local.problem, local.tokenizer
        if behaviour != ON_POLICY and not evaluation.needs_samples(problem):
            raise ConfigError(
                f"--temperature={behaviour.temperature:g}: task.kind={config.task.kind} is evaluated here from the log-probs "
                "of all that it may answer, and nothing is drawn; leave it out"
            )
        text_of = partial(decode, tokenizer)
        judge = evaluation.judge(problem, text_of, local, diversity_measure())

        def evaluated() -> Evaluation:
            if (listed := evaluation.without_samples(problem, local)) is not None:
                return listed
            temperature = config.learner.reward_temperature.end
            result = evaluation.sampled(
                problem.evaluated, local, local, samples=samples, temperature=temperature, seed=config.seed, round_=ROUND,
                decode=text_of, judge=judge, behaviour=behaviour,
            )  # fmt: skip
            metrics = result.metrics
            # What the model told is a sample of its own posterior, not of a tempered or sharpened one.
            if temperature == 1 and config.task.reward.kind == "lm_posterior" and behaviour == ON_POLICY:
                metrics = metrics | _upper_bound(problem, local, result)
            contexts = {prompt.id: text_of(prompt.policy_tokens) for prompt in problem.prompts}
            rows = [row | {"context": contexts[row["prompt"]]} for row in result.samples]
            return replace(result, metrics=metrics, samples=rows)

        if only != "adapter":
            yield "base", evaluated()
        if only != "base":
            # There is no way back to the base.
            local.use(adapter)
            yield "adapter", evaluated()


def _upper_bound(problem: Problem, local: Local, result: Evaluation) -> dict[str, float]:
    """From the prompts whose true Z is an exact sample and could have been drawn; nothing where there is none, or another model
    told them."""
    import numpy as np

    from system.trajectory import Group

    upper, lower, differ = [], [], []
    prompts = {prompt.id: prompt for prompt in problem.prompts}
    for row in result.per_prompt:
        prompt = prompts[row["prompt"]]
        if prompt.id not in problem.exact:
            continue
        trajectories_K = problem.demonstrations[prompt.id]
        scores = local.sampler.score(prompt, trajectories_K)
        group = Group(prompt, trajectories_K, tuple(scores.complete()), 0, 0)
        [score] = local.learner.score([group])
        told_tokens = len(trajectories_K[0]) + len(problem.reward_stop) + len(prompt.evidence_tokens or ())
        differ.append(abs(group.end_log_reward_K[0] - prompt.meta["log_p"]) / told_tokens)
        upper.append(float(np.mean(group.end_log_reward_K - score.log_q_K)))
        lower.append(row["log_z_lower"])
    if elsewhere := sum("log_p" in prompt.meta and prompt.id not in problem.exact for prompt in prompts.values()):
        logger.warning("no bound from above for %d stories, which were told within other lengths or tokens", elsewhere)
    if not upper:
        return {}
    if (difference := float(np.mean(differ))) > OTHER_TELLER:
        logger.warning(
            "no bound from above: another model told these stories, and its log p of them is %.2f nats a token away; tell them "
            "anew with python deploy/self_consistent.py and this model.path", difference
        )  # fmt: skip
        return {}
    return {
        "posterior/log_z_upper": float(np.mean(upper)),
        "posterior/symmetrised_kl": float(np.mean(upper) - np.mean(lower)),
        "posterior/prompts_with_true_z": float(len(upper)),
    }


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/evaluate.py", description=__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as task.prompts=OTHERS")
    parser.add_argument("--samples", type=int, default=32, help="draws of each prompt")
    parser.add_argument("--samples-file", metavar="FILE", type=Path, help="instead of RUN/heldout_samples.jsonl")
    parser.add_argument("--only", choices=WHICH, help="instead of both")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the draws: 1 is the policy itself")
    add_step(parser)
    parser.add_argument("--name", metavar="NAME", help="of the data: heldout-NAME in place of heldout, in files and metrics")
    arguments = parser.parse_intermixed_args(argv)
    log_to_stderr()
    if arguments.samples < 2:
        raise ConfigError(f"--samples={arguments.samples}: one draw says nothing about the spread; take 2 at least")
    if not 0 < arguments.temperature < math.inf:
        raise ConfigError(f"--temperature={arguments.temperature:g}: divides logits; give one above 0, such as 0.1")
    if arguments.samples_file:
        if arguments.only == "base":
            raise ConfigError(
                "--samples-file with --only base: the samples that are kept are the adapter's; leave one of them out"
            )
        check_output("--samples-file", arguments.samples_file)
    if arguments.name is not None and not re.fullmatch(NAME, arguments.name):
        raise ConfigError(f"--name {arguments.name!r}: letters, digits, dots and dashes make a name")
    if arguments.name and arguments.name.startswith("step-"):
        raise ConfigError(f"--name {arguments.name!r}: a checkpoint's evaluation is called so; take another name, or --step N")
    at = None if arguments.step is None else f"step-{arguments.step}"
    stem = "-".join(part for part in ("heldout", at, arguments.name) if part)
    run_dir = find_run(arguments.run)
    overrides = [*all_of_others(arguments.overrides), *arguments.overrides]
    config = take_machine(config_file.load(run_dir / "config.yaml", overrides))
    how = {"overrides": overrides, "samples": arguments.samples, "temperature": arguments.temperature}
    path = run_dir / f"{stem}.json"
    # Refused now, and not when the work is done.
    check_output("RUN", path)
    _earlier(path, how)
    adapter = adapter_at(run_dir, config, arguments.step)
    if arguments.only != "base":
        adapter_tensors(adapter, config.model.path, config.lora)
    behaviour, prefixes = Behaviour(arguments.temperature), {"base": f"{stem}/base/", "adapter": f"{stem}/"}
    results: dict[str, Evaluation] = {}
    metrics: dict[str, float] = {}
    for which, result in evaluate(config, adapter, arguments.samples, arguments.only, behaviour):
        results[which] = result
        metrics |= {prefixes[which] + name: value for name, value in result.metrics.items()}
        # The other model's may have come in meanwhile, from another process.
        replace_text(path, json.dumps(how | {"metrics": _earlier(path, how) | metrics}, indent=2))
        if which == "adapter" and result.samples:
            lines = "".join(json.dumps(row) + "\n" for row in result.samples)
            (arguments.samples_file or run_dir / f"{stem}_samples.jsonl").write_text(lines, encoding="utf-8")
    if arguments.samples_file and not results["adapter"].samples:
        logger.warning("--samples-file: nothing was drawn, as task.kind=%s is evaluated from log-probs", config.task.kind)
    from deploy.report import posterior_plot, table

    print(table({which: result.metrics for which, result in results.items()}))
    print(json.dumps(metrics), flush=True)
    files, plot = [path], run_dir / f"{stem}.png"
    sampled = {which: result for which, result in results.items() if result.samples}
    if behaviour == ON_POLICY and sampled:
        files.append(posterior_plot(plot, {label: sampled.get(which) for which, label in WHICH.items()}))
    else:
        # Of an earlier evaluation, beside whose figures it would now stand.
        plot.unlink(missing_ok=True)
    try:
        _track(run_dir, config.tracking, metrics, files)
    except TrackingError as error:
        print(f"error: {path} has the metrics, but MLflow does not: {error}", file=sys.stderr)
        return 1
    return 0


def all_of_others(overrides: list[str]) -> list[str]:
    """Where other data are named, what takes back the part that the run took of its own; a part that is named comes after."""
    named = {override.partition("=")[0] for override in overrides}
    files = {f"task.{field}" for field in PROMPT_FILES.values()}
    return [f"task.{field}={json.dumps(value)}" for field, value in WHOLE.items()] if named & files else []


def _earlier(path: Path, how: dict[str, Any]) -> dict[str, float]:
    """The metrics that are there already, such as the other model's, if they were found in the same way.

    Raises:
        ConfigError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        known = {"temperature": 1.0} | json.loads(path.read_text(encoding="utf-8"))
        return known["metrics"] if {name: known.get(name) for name in how} == how else {}
    except (ValueError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {type(error).__name__}: {error}; remove it") from error


def _track(run_dir: Path, tracking: Tracking, metrics: dict[str, float], files: list[Path]) -> None:
    """Raises TrackingError if the run's journal is in use."""
    from system.tracking import Tracker

    # The run's own config: what this evaluation changes is no param of the run.
    config = config_file.load(run_dir / "config.yaml", []).model_copy(update={"tracking": tracking})
    tracker = Tracker(run_dir, config, amend=True)
    tracker.metrics(metrics, 0)
    for file in files:
        tracker.artifact(file)
    tracker.close("FINISHED")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
