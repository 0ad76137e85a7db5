"""Posterior samples from a finished run: `python deploy/sample.py RUN [--prompt TEXT | --input FILE] [--output FILE]`.

Draws K samples of each prompt from the run's adapter, in this process and without Ray. The prompts are those of the run's
task (`task.limit=1` takes the first), that of --prompt, or those of --input: JSONL, one record a line, as the task reads it:

    continuation, constrained     {"prompt": text}                       --prompt takes the text alone, too
    infilling                     {"before": text, "after": text}
    verifiable                    {"question": text, "answer": text or number}
    arithmetic                    {"question": "Question: 1 + 2 - 3 = ? Answer:", "answer": 0}
    subjectivity                  {"text": text, "label": label}

--output gets one record for each prompt: its id, its context, and its samples, each with log_q and log_reward (untempered),
log_weight = log R / T - log q (all in nats) and weight, the self-normalised importance weight. `ess` is the effective share of
the samples under these weights, in (0, 1]: at 1 the samples are already draws of the posterior; below, resample by weight.
`log_z` is the log of the mean weight. Without --output the same is printed as a table.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command, log_to_stderr  # noqa: E402
from deploy.machine import take_machine  # noqa: E402
from deploy.runs import adapter_at, adapter_file, add_step, check_output, find_run  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402
from system.task_config import PROMPT_FILES, WHOLE  # noqa: E402

if TYPE_CHECKING:
    from deploy.local import Local
    from system.trajectory import Group

logger = logging.getLogger("headwater")

TEXTS = ("continuation", "constrained")
"""Tasks whose record is a text and nothing else."""
ROUND = 1_000_004
"""Of the draws: neither training nor deploy/evaluate.py has this number, so no seed is used twice."""


def with_prompts(config: Config, path: Path) -> Config:
    """The config with the prompts of a JSONL file in place of its own. Raises ConfigError for a task without such a file."""
    field = PROMPT_FILES.get(config.task.kind)
    if field is None:
        raise ConfigError(
            f"task.kind={config.task.kind} has a prompt of its own and reads no file; "
            "leave --prompt and --input out, or change its fields, as in task.prompt=TEXT"
        )
    if path.suffix != ".jsonl":
        raise ConfigError(f"--input {str(path)!r}: records are read from JSONL; name a file that ends in .jsonl")
    update: dict[str, Any] = {field: str(path)} | WHOLE
    if config.task.kind == "arithmetic":
        update["split"] = "test"  # no example comes from the file
    return config.model_copy(update={"task": config.task.model_copy(update=update)})


def record_of(config: Config, text: str) -> dict[str, Any]:
    """The record that --prompt stands for. Raises ConfigError for a text where the task needs more than one."""
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if isinstance(record, dict):
        return record
    if config.task.kind in TEXTS:
        return {"prompt": text}
    raise ConfigError(f"--prompt={text!r}: task.kind={config.task.kind} needs a record in JSON; --help shows it for each task")


def draw(local: Local, samples: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """A record for each prompt, in order, as soon as it is there."""
    from system.requests import evaluation_request

    run_seed, round_ = local.config.seed, ROUND + seed
    futures = deque(
        local.sample(evaluation_request(prompt, index, samples, seed=run_seed, round_=round_))
        for index, prompt in enumerate(local.problem.prompts)
    )
    while futures:
        yield _record(local, futures.popleft().result())


def _record(local: Local, group: Group) -> dict[str, Any]:
    from system.posterior import effective_share, log_mean_exp, self_normalised
    from system.text import decode

    record: dict[str, Any] = {"prompt": group.prompt.id, "context": decode(local.tokenizer, group.prompt.policy_tokens)}
    if group.faults:
        logger.warning("%s: %d samples have no reward: %s", group.prompt.id, len(group.faults), group.faults[0])
    if not len(group):
        return record | {"log_z": None, "ess": None, "samples": []}
    [score] = local.learner.score([group])
    log_reward_K = group.end_log_reward_K
    log_weight_K = log_reward_K / local.config.learner.reward_temperature.end - score.log_q_K
    weights_K = self_normalised(log_weight_K)
    rows = []
    for k, trajectory in enumerate(group.trajectories_K):
        tokens = trajectory.tokens_T.tolist()
        rows.append(
            {
                "text": decode(local.tokenizer, tokens),
                "tokens": tokens,
                "stop": trajectory.stop,
                "log_q": float(score.log_q_K[k]),
                "log_reward": float(log_reward_K[k]),
                "log_weight": float(log_weight_K[k]),
                "weight": float(weights_K[k]),
            }
            | group.factors_of(k)
        )
    estimates = {"log_z": log_mean_exp(log_weight_K, group.drawn), "ess": effective_share(log_weight_K, group.drawn)}
    return record | estimates | {"samples": rows}


def table(record: dict[str, Any]) -> str:
    """A record for a terminal, the likeliest first. Texts are quoted: a model may write control characters."""
    if not record["samples"]:
        return f"{record['prompt']}  no sample has a reward  {record['context']!r}\n"
    lines = [f"{record['prompt']}  log Z {record['log_z']:.4g}  ESS {record['ess']:.2f}  {record['context']!r}"]
    lines.append(f"{'weight':>8} {'log q':>9} {'log R':>9}  text")
    for row in sorted(record["samples"], key=lambda row: -row["log_q"]):
        lines.append(f"{row['weight']:8.4f} {row['log_q']:9.3f} {row['log_reward']:9.3f}  {row['text']!r}")
    return "\n".join(lines) + "\n"


def run(config: Config, adapter: Path, samples: int, seed: int, output: Path | None) -> None:
    """Draws, and writes or prints each record. Raises ConfigError as `opened` and `Local.use`."""
    from deploy.local import opened

    with opened(config, samples) as local:
        local.use(adapter)
        records = draw(local, samples, seed)
        if output is None:
            for record in records:
                print(table(record), flush=True)
            return
        with output.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record) + "\n")
                file.flush()
    print(f"{len(local.problem.prompts)} prompts, {samples} samples each, in {output}")


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python deploy/sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as task.limit=1")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="a text to go on from, or a record in JSON")
    source.add_argument("--input", metavar="FILE", type=Path, help="JSONL, one record a line")
    parser.add_argument("--output", metavar="FILE", type=Path, help="JSONL, one record for each prompt")
    parser.add_argument("--samples", type=int, default=16, metavar="K", help="draws of each prompt (16)")
    add_step(parser)
    parser.add_argument("--seed", type=int, default=0, help="another one gives other draws (0)")
    arguments = parser.parse_intermixed_args(argv)
    log_to_stderr()
    if arguments.samples < 1:
        raise ConfigError(f"--samples={arguments.samples}: draw at least one")
    if arguments.seed < 0:
        raise ConfigError(f"--seed={arguments.seed}: seeds are from 0 on")
    if arguments.output:
        check_output("--output", arguments.output)
    run_dir = find_run(arguments.run)
    if arguments.step is None:
        adapter_file(run_dir)  # missed now, and not when torch is loaded
    config = config_file.load(run_dir / "config.yaml", arguments.overrides)
    with tempfile.TemporaryDirectory(prefix="headwater-prompt-") as folder:
        path = arguments.input
        if arguments.prompt is not None:
            path = Path(folder) / "prompt.jsonl"
            path.write_text(json.dumps(record_of(config, arguments.prompt)) + "\n", encoding="utf-8")
        config = take_machine(with_prompts(config, path) if path else config)
        adapter = adapter_at(run_dir, config, arguments.step)
        run(config, adapter, arguments.samples, arguments.seed, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
