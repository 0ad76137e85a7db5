"""What sampling without training gives: `python deploy/baselines.py CONFIG [key=value …] --methods ancestral,smc --samples K`.

For each prompt of the config's task, each method draws K samples from the base model; `--run RUN` adds the adapter of a
finished run as the method `gflownet`, and `gflownet_METHOD` among `--methods` is one of the others with it in place of the
base: `gflownet_sir`, say, resamples its draws by their weights. Writes OUTPUT_DIR/NAME-baselines-…/ with baselines.json and a
folder a method (its samples, its MLflow run), for `deploy/compare.py`. All metrics are means over prompts:

    task/{max,mean}_log_reward       log R of the K samples, untempered, nats
    task/{max,mean}_log_likelihood   log p(Z stop | X) of the frozen model, nats, where the reward needs one
    task/diversity, task/distinct    1 - mean cosine of sentence embeddings; share of distinct samples
    task/reward/NAME                 what a factor of a product says, means over the K samples
    task/…                           what the task's own judge says, and the samples' vote where the evidence has alternatives
    reward_faults                    how often the reward could not score what it was asked for: no sample, and no right one
    posterior/…                      bounds on log Z at the config's last reward temperature, where the method has weights
    model_tokens, seconds            what K samples of a prompt cost: tokens read by policy and reward, and time
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command, log_to_stderr  # noqa: E402
from deploy.machine import take_machine  # noqa: E402
from deploy.runs import adapter_at, add_step, find_run, load_adapter, make_folder  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402
from system.reward_config import at_ends, functions_at_every_prefix  # noqa: E402
from system.run_error import RunError  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from actors.decoder import Decoder, Draws
    from system.scores import Scores
    from system.trajectory import Prompt, Trajectory

logger = logging.getLogger("headwater")

TUNED = "gflownet"
BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: 0 < value < math.inf, "above 0"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "penalty": (lambda value: 0 <= value < math.inf, "0 or more"),
    "oversample": (lambda value: value >= 1, "1 or more"),
}
"""Of the numbers among the settings of `actors.decoding`."""
MEANS = ("task/", "posterior/", "model_tokens", "seconds")


class Baselines:
    """The models, the reward and the encoder, loaded once; `measure` then takes one method after the other.

    Raises:
        ConfigError: the model cannot be had, the run has no adapter or one of another model, or the task has a tool.
    """

    def __init__(self, config: Config, settings: dict[str, Any], run_dir: Path | None, step: int | None = None) -> None:
        import torch

        from actors import rewards
        from actors.build import build_reward
        from actors.decoder import DecodingSettings
        from actors.posterior_reward import Posterior
        from deploy.prepare import prepare
        from system import evaluation
        from system.diversity import diversity_measure
        from system.language_model import LanguageModel
        from system.pretrained import load_pretrained, resolve_device
        from system.text import decode

        # All methods score whole sequences: evidence after every prefix would be charged to them for nothing.
        early = functions_at_every_prefix(config.task.reward)
        config = _with_reward(config, at_ends(config.task.reward))
        self.config, self.settings = config, DecodingSettings(**settings)
        prepared = prepare(config)
        self.folder, self.tokenizer, self.problem = prepared.folder, prepared.tokenizer, prepared.problem
        if self.problem.tool is not None:
            raise ConfigError(
                f"task.kind={config.task.kind}: its samples need a tool while they are drawn, which decoding without training "
                "does not run; compare with loss.kind=mle or grpo, or with the base column of deploy/evaluate.py"
            )
        self.device = resolve_device(config.learner.device)
        self.base = load_pretrained(self.folder, getattr(torch, config.sampler.reward_dtype), self.device)
        frozen = LanguageModel(self.base)
        self.reward = build_reward(config, self.problem, self.tokenizer, frozen)
        self._early = early and _with_reward(config, at_ends(early))
        self.likelihood: Posterior | None = None
        if rewards.needs_language_model(config.task.reward):
            self.likelihood = Posterior(frozen, self.problem.reward_stop, config.sampler.token_budget)
        self.tuned = self._adapted(run_dir, step) if run_dir else None
        self.text_of = lambda tokens: decode(self.tokenizer, tokens)
        self.judge = evaluation.judge(self.problem, self.text_of, self, diversity_measure())

    @cached_property
    def prefix_reward(self) -> Any:
        """The factors of the reward that are functions known at every prefix; None where there are none."""
        from actors.build import build_reward

        return self._early and build_reward(self._early, self.problem, self.tokenizer, None)

    def _adapted(self, run_dir: Path, step: int | None) -> Any:
        import torch

        from learner.policy import Policy

        run = config_file.load(run_dir / "config.yaml", [])
        if run.model != self.config.model:
            own, here = run.model.model_dump(), self.config.model.model_dump()
            differs = [f"model.{name}={own[name]!r}, not {here[name]!r}" for name in own if own[name] != here[name]]
            raise ConfigError(f"--run: it was trained with {'; '.join(differs)}: set that, or name a run of the config's model")
        path = adapter_at(run_dir, run, step)
        dtype = getattr(torch, self.config.learner.dtype)
        policy = Policy(self.folder, run.lora, self.problem.constraints, dtype=dtype, device=self.device)
        load_adapter(policy, path, run.model.path, run.lora)
        return policy.language_model.model.eval()

    def log_reward(self, prompt: Prompt, trajectories_K: Sequence[Trajectory]) -> Future[Scores]:
        answer: Future[Scores] = Future()
        answer.set_result(self.reward.score(prompt, trajectories_K))
        return answer

    def measure(self, method: str, samples: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(metrics, one row a sample) of a method of `actors.decoding`, or of `gflownet`."""
        from actors.decoder import Decoder
        from system import evaluation

        name, temperature = _of_base(method), self.config.learner.reward_temperature.end
        model: Any = self.tuned if is_tuned(method) else self.base
        early = self.prefix_reward if name == "smc" and self.settings.twist == "likelihood" else None
        decoder = Decoder(model, self.problem.constraints, self.reward, temperature, self.settings, self.config.seed, early)
        results = [self._prompt(decoder, name, prompt, samples) for prompt in self.problem.evaluated]
        if not any(rows for _, rows in results):
            raise RunError(
                f"{method}: no prompt has two samples with a reward; the log has the reasons: mend the reward, or "
                "raise --samples"
            )
        metrics = evaluation.means([metrics for metrics, _ in results], MEANS)
        return metrics | {"reward_faults": float(decoder.faults)}, [row for _, rows in results for row in rows]

    def _prompt(
        self, decoder: Decoder, method: str, prompt: Prompt, samples: int
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Without a row, and with what the task says alone, where the prompt has no two samples with a reward."""
        from dataclasses import replace

        from actors.decoding import draw
        from system.evaluation import ENOUGH, of_task
        from system.trajectory import sampled

        started = time.perf_counter()
        draws = draw(decoder, method, prompt, samples)
        metrics = {"model_tokens": float(draws.model_tokens), "seconds": time.perf_counter() - started}
        drawn_K = [sampled(list(tokens)) for tokens in draws.tokens_K]
        scores = decoder.scores(prompt, drawn_K)
        group = scores.group(prompt, drawn_K, 0, 0)
        metrics |= of_task(group, self.judge)
        # Bounds need two; of a search there may be one in all.
        if len(group) < min(ENOUGH, len(drawn_K)):
            return metrics, []
        draws = draws.take(scores.kept)
        log_reward_K = group.end_log_reward_K
        if self.likelihood is not None:
            log_p_KT = self.likelihood.log_rewards(replace(prompt, evidence_tokens=None), group.trajectories_K)
            log_p_K = [float(log_p_T[-1]) for log_p_T in log_p_KT]
            metrics |= {"task/max_log_likelihood": max(log_p_K), "task/mean_log_likelihood": sum(log_p_K) / len(log_p_K)}
        log_weight_K = draws.log_weights(log_reward_K / decoder.reward_temperature)
        metrics |= _bounds(draws, log_weight_K, group.drawn)
        rows = [
            {"prompt": prompt.id, "text": self.text_of(tokens), "tokens": list(tokens), "log_reward": float(log_reward)}
            for tokens, log_reward in zip(draws.tokens_K, log_reward_K, strict=True)
        ]
        for row, log_weight in zip(
            rows, [] if log_weight_K is None else log_weight_K.tolist(), strict=log_weight_K is not None
        ):
            row["log_weight"] = log_weight
        return metrics, rows


def _bounds(draws: Draws, log_weight_K: np.ndarray | None, drawn: int) -> dict[str, float]:
    """All of them for independent draws; a resampled set has an estimate of log Z alone."""
    from system.posterior import Bounds, mean_metrics

    if draws.log_z is not None:
        return {"posterior/log_z_weighted": draws.log_z}
    return {} if log_weight_K is None else mean_metrics([Bounds.of(log_weight_K, drawn)])


def _with_reward(config: Config, reward: Any) -> Config:
    return config.model_copy(update={"task": config.task.model_copy(update={"reward": reward})})


def is_tuned(method: str) -> bool:
    """It draws from a run's adapter, not from the base."""
    return method == TUNED or method.startswith(f"{TUNED}_")


def _of_base(method: str) -> str:
    """The method of `actors.decoding` that is taken: of the adapter without another word, its draws as they are."""
    return "ancestral" if method == TUNED else method.removeprefix(f"{TUNED}_")


def check(methods: list[str], settings: dict[str, Any], *, tuned: bool) -> None:
    """Raises ConfigError for a method that does not exist or comes twice, and for a setting out of its bounds."""
    from actors.decoding import METHODS

    for method in methods:
        if _of_base(method) not in METHODS or method in (TUNED, f"{TUNED}_ancestral"):
            raise ConfigError(
                f"--methods: no {method!r}; there are {', '.join(METHODS)}, and with --run {TUNED}_ before each but ancestral"
            )
        if is_tuned(method) and not tuned:
            raise ConfigError(f"--methods: {method!r} draws from the adapter of a run: name it by --run, or leave it out")
        if method == f"{TUNED}_smc" and settings.get("twist") != "reward":
            raise ConfigError(
                f"--methods: {method!r} needs --twist reward: the prefixes of a trained policy do not say how much its samples "
                f"will weigh; or take {TUNED}_sir"
            )
        if methods.count(method) > 1:
            raise ConfigError(f"--methods: {method!r} is there {methods.count(method)} times; name each method once")
    for name, (holds, bounds) in BOUNDS.items():
        if name in settings and not holds(settings[name]):
            raise ConfigError(f"--{name.replace('_', '-')}={settings[name]}: must be {bounds}")


def run(
    config: Config, methods: list[str], samples: int, settings: dict[str, Any], run_dir: Path | None, step: int | None = None
) -> Path:
    """Measures the methods, one MLflow run each. Returns the folder with baselines.json.

    Raises:
        ConfigError: as `Baselines`, or as `check`.
    """
    from system.tracking import Tracker
    from system.tracking_uri import resolve_uri

    check(methods, settings, tuned=run_dir is not None)
    resolve_uri(config.tracking.uri)
    baselines = Baselines(config, settings, run_dir, step)
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    folder = (Path(config.output_dir) / f"{config.name}-baselines-{stamp}").resolve()
    result: dict[str, Any] = {"run": config.name, "task": config.task.kind, "seed": config.seed, "samples": samples}
    result |= {"settings": settings, "adapter": None, "methods": {}}
    if run_dir:
        trained = config_file.load(run_dir / "config.yaml", [])
        result |= {"adapter": str(run_dir), "adapter_config": trained.model_dump(mode="json"), "adapter_step": step}
    make_folder(config, folder)
    (folder / "config.yaml").write_text(config_file.dump(config), encoding="utf-8")
    for method in [*methods, TUNED] if run_dir else methods:
        metrics, rows = baselines.measure(method, samples)
        logger.info("%s: %s", method, " ".join(f"{name}={value:.4g}" for name, value in metrics.items()))
        result["methods"][method] = metrics
        # After each method: what is measured stays if the next one is interrupted.
        (folder / "baselines.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        tracker = Tracker(folder / method, config.model_copy(update={"name": f"{config.name}-{method}"}))
        of_method = json.dumps(result | {"methods": {method: metrics}}, indent=2)
        for name, text in (("config.yaml", config_file.dump(config)), ("baselines.json", of_method)):
            (folder / method / name).write_text(text, encoding="utf-8")
            tracker.artifact(folder / method / name)
        tracker.tags({"method": method, "samples": str(samples)} | {f"method.{k}": str(v) for k, v in settings.items()})
        tracker.metrics(metrics, 0)
        tracker.table("samples", rows, 0)
        tracker.close("FINISHED")
    return folder


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python deploy/baselines.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as deploy/configs/continuation.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as task.prompts=OTHERS")
    parser.add_argument("--methods", default="ancestral,tempered,nucleus,beam,diverse_beam,best_of_n,sir,smc")
    parser.add_argument("--samples", type=int, default=16, help="K, kept of each prompt")
    parser.add_argument("--run", help="folder of a finished run, or its name under runs/: its adapter is a method too")
    add_step(parser)
    parser.add_argument("--temperature", type=float, help="of tempered (0.8)")
    parser.add_argument("--top-p", type=float, help="of nucleus (0.95)")
    parser.add_argument("--penalty", type=float, help="of diverse_beam, nats (1.0)")
    parser.add_argument("--oversample", type=int, help="of best_of_n, sir and smc: sequences drawn for each one kept (4)")
    parser.add_argument("--twist", choices=("likelihood", "reward"), help="of smc: its intermediate targets (likelihood)")
    arguments = parser.parse_intermixed_args(argv)
    log_to_stderr()
    names = ("temperature", "top_p", "penalty", "oversample", "twist")
    settings = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.samples < 2:
        raise ConfigError(f"--samples={arguments.samples}: one draw says nothing about the spread; take 2 at least")
    config = config_file.load(arguments.config, arguments.overrides)
    # For torch's threads. The config stays: no part of a run is built here, and what is written is to be what was given.
    take_machine(config)
    run_dir = find_run(arguments.run) if arguments.run else None
    folder = run(config, arguments.methods.split(","), arguments.samples, settings, run_dir, arguments.step)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
