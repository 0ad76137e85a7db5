"""The bounds on log Z around its exact value, on stories that a tiny model told itself; and the command, on a real engine."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.posterior_reward import Posterior
from deploy import evaluate, runs, self_consistent
from deploy.machine import alone, take_machine
from deploy.prepare import prepare
from learner.learner import Learner
from system import config_file, diversity
from system.config import Config, ConfigError
from system.evaluation import Evaluation
from system.language_model import LanguageModel
from system.models import locate
from system.posterior import log_mean_exp
from system.pretrained import load_pretrained, load_tokenizer
from system.tasks.problem import context_tokens
from system.trajectory import ON_POLICY, Behaviour, Group, Prompt, sampled
from tests import finished, tiny

ROOT = Path(__file__).resolve().parents[1]
STORY = {"before": "ab", "after": "ba"}


def settings(folder: Path, **task: Any) -> dict[str, Any]:
    """A support of the eight characters that the model likes best here, so that its own sentences lie in it."""
    model = load_pretrained(folder / "model", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(folder / "model")
    with torch.no_grad():
        logits = model(torch.tensor([context_tokens(tokenizer, STORY["before"])])).logits[0, -1]
    best = [tokenizer.decode([token]) for token in logits.argsort(descending=True).tolist()]
    stop, *letters = [text for text in best if text in tiny.CHARACTERS and not text.isspace()][:9]
    section = {
        "kind": "infilling", "stories": str(folder / "stories.jsonl"), "prompt": "{before}{after}", "stop": stop,
        "illegal": [text for text in tiny.CHARACTERS if text not in letters], "max_tokens": 3, "min_tokens": 1,
    }  # fmt: skip
    return {
        "model": {"path": str(folder / "model")},
        "lora": {"rank": 4, "alpha": 8},
        "task": section | task,
        "sampler": {"kv_cache_mb": 16, "exploration": {"on_policy": 1}},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.folder(folder).rename(folder / "model")
    (folder / "stories.jsonl").write_text(json.dumps(STORY) + "\n")
    return folder


def learner_of(cfg: Config, problem: Any) -> Learner:
    learner = Learner(cfg, locate(cfg.model), problem.constraints, cfg.model.path, list(range(10, 40)))
    tiny.perturb(learner.policy.parameters.values(), seed=1, scale=0.03)
    return learner


def test_bounds_from_self_consistent_stories_enclose_the_exact_log_z(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config_file.parse(settings(folder))
    stories = list(self_consistent.draw(cfg, per_story=150, ending=2, seed=0))
    assert len(stories) == 150
    (folder / "told.jsonl").write_text("".join(json.dumps(story) + "\n" for story in stories))
    cfg = config_file.parse(settings(folder, stories=str(folder / "told.jsonl")))
    problem = prepare(cfg).problem
    learner = learner_of(cfg, problem)
    frozen = load_pretrained(locate(cfg.model), torch.float32, torch.device("cpu"))
    reward = Posterior(LanguageModel(frozen), problem.reward_stop)

    letters = [t for t in problem.constraints.columns.tolist() if t != problem.constraints.stop_token]
    outcomes = tuple(sampled(list(z)) for n in (1, 2, 3) for z in itertools.product(letters, repeat=n))
    exact, lower, gaps = [], [], []
    for prompt in problem.prompts:
        group = Group(prompt, outcomes, tuple(reward.log_rewards(prompt, outcomes)), 0, 0)
        [score] = learner.score([group])
        q, u = np.exp(score.log_q_K), group.end_log_reward_K - score.log_q_K
        assert q.sum() == pytest.approx(1.0, abs=1e-4)
        log_z = log_mean_exp(group.end_log_reward_K) + np.log(len(outcomes))
        p = np.exp(group.end_log_reward_K - log_z)
        exact.append(log_z)
        lower.append(float((q * u).sum()))
        gaps.append(float(((p - q) * u).sum()))
    rows = [{"prompt": prompt.id, "log_z_lower": value} for prompt, value in zip(problem.prompts, lower, strict=True)]
    local: Any = SimpleNamespace(sampler=reward, learner=learner)
    metrics = evaluate._upper_bound(problem, local, Evaluation({}, rows))
    assert metrics["posterior/prompts_with_true_z"] == 150
    assert np.mean(lower) < np.mean(exact) < metrics["posterior/log_z_upper"]
    # E over the stories of u(true Z) - E_q[u] is the symmetrised KL, here known by enumeration.
    assert metrics["posterior/symmetrised_kl"] == pytest.approx(np.mean(gaps), rel=0.35)
    local.sampler = Posterior(LanguageModel(tiny.llama(seed=1)), problem.reward_stop)
    assert evaluate._upper_bound(problem, local, Evaluation({}, rows)) == {}
    assert "another model told these stories" in caplog.text
    shorter = config_file.parse(settings(folder, stories=str(folder / "told.jsonl"), max_tokens=4))
    longer_rows = [row for row in rows if row["prompt"] in {prompt.id for prompt in prepare(shorter).problem.prompts}]
    assert evaluate._upper_bound(prepare(shorter).problem, local, Evaluation({}, longer_rows)) == {}
    assert "150 stories, which were told within other lengths or tokens" in caplog.text


def test_few_stories_are_told_by_few_samples_and_a_beginning_that_has_none_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(self_consistent, "MOST_TRIES", 100)
    monkeypatch.setattr(self_consistent, "_tell", lambda beginning, tries, *_: asked.append(tries) or [])
    assert list(self_consistent.draw(config_file.parse(settings(folder)), per_story=2, ending=2, seed=0)) == []
    assert asked == [8, 64, 64, 64]


def test_a_process_of_its_own_takes_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cfg = config_file.parse({"task": {"kind": "continuation"}})
    cores = len(os.sched_getaffinity(0))
    assert (alone(cfg).actors.threads, alone(cfg).learner.thread_count) == (cores, cores)
    wide = config_file.parse({"task": {"kind": "continuation"}, "actors": {"cpus": cores + 3}})
    assert alone(wide).actors.threads == cores + 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    assert alone(cfg).actors.threads == 1


@pytest.mark.parametrize("gpu", [False, True])
def test_a_process_of_its_own_uses_the_gpu_that_there_is_and_compiles_there_alone(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.machine.os.environ", environment := {"OMP_NUM_THREADS": "3"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for reserved in (0, 1):
        cfg = config_file.parse({"task": {"kind": "continuation"}, "actors": {"gpus": reserved}})
        taken = take_machine(cfg)
        assert (taken.actors.gpus, taken.learner.gpus) == (gpu, gpu)
        assert taken.actors.threads == 3
    assert ("TORCH_COMPILE_DISABLE" in environment) is not gpu
    assert environment["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_the_command_compares_the_base_with_the_adapter_on_other_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    cfg = config_file.parse(settings(folder))
    (run / "config.yaml").write_text(config_file.dump(cfg))
    problem = prepare(cfg).problem
    learner_of(cfg, problem).adapter(1).materialise(run / "adapter")
    tokenizer = load_tokenizer(locate(cfg.model))
    middle = [t for t in problem.constraints.columns.tolist() if t != problem.constraints.stop_token][:2]
    after = tokenizer.encode(" ab", add_special_tokens=False)
    frozen = LanguageModel(load_pretrained(locate(cfg.model), torch.float32, torch.device("cpu")))
    context = context_tokens(tokenizer, "ca")
    asked = Prompt("ca", context, context, tuple(after))
    [log_p_T] = Posterior(frozen, problem.reward_stop).log_rewards(asked, [sampled(middle)])
    story = {"before": "ca", "after": "ab", "tokens": {"middle": middle, "after": after}}
    story["told"] = {"support": problem.constraints.described(), "log_p": float(log_p_T[-1])}
    (folder / "other.jsonl").write_text(json.dumps(story) + "\n")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(ROOT / "deploy/evaluate.py"), *arguments]
        return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=240, check=False)

    done = command("one", f"task.stories={folder / 'other.jsonl'}", "--samples", "64")
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads(done.stdout.splitlines()[-1])
    overrides = ["task.offset=0", "task.limit=null", "task.held_out=0", f"task.stories={folder / 'other.jsonl'}"]
    written = json.loads((run / "heldout.json").read_text())
    assert written == {"overrides": overrides, "samples": 64, "temperature": 1.0, "metrics": metrics}
    assert metrics["heldout/posterior/prompts_with_true_z"] == 1
    rows = [json.loads(line) for line in (run / "heldout_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 64
    assert {(row["prompt"], row["context"]) for row in rows} == {("line-1", "<s>caab")}
    assert all(0 < len(row["text"]) <= 3 and row["log_q"] < 0 and row["length"] == len(row["text"]) for row in rows)
    assert metrics["heldout/task/max_log_reward"] == pytest.approx(max(row["log_reward"] for row in rows))
    assert ("heldout/task/diversity" in metrics) is (find_spec(diversity.PACKAGE) is not None)
    assert (run / "heldout.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["heldout/posterior/spread"] != metrics["heldout/base/posterior/spread"]
    for which in ("heldout", "heldout/base"):
        assert metrics[f"{which}/posterior/log_z_lower"] < metrics[f"{which}/posterior/log_z_weighted"]

    colder = ("one", f"task.stories={folder / 'other.jsonl'}", "--only", "adapter", "--temperature", "0.01", "--name", "cold")
    done = command(*colder)
    assert done.returncode == 0, done.stderr[-3000:]
    likeliest = [json.loads(line)["text"] for line in (run / "heldout-cold_samples.jsonl").read_text().splitlines()]
    assert len(likeliest) == 32 and len(set(likeliest)) == 1 < len({row["text"] for row in rows})
    names = json.loads(done.stdout.splitlines()[-1]).keys()
    assert {name for name in names if "/task/" not in name} == {"heldout-cold/posterior/length"}
    assert not (run / "heldout-cold.png").exists()

    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        asked = []
        only = Evaluation({"posterior/spread": 2.0}, samples=[{"text": "new", "length": 1, "log_q": -1.0, "log_reward": -1.0}])
        known: dict[str, float] = {}

        def found(
            _config: Config, _adapter: Path, _samples: int, which: str, _behaviour: Behaviour
        ) -> Iterator[tuple[str, Evaluation]]:
            asked.append(which)
            if which == "adapter":  # meanwhile the base model's evaluation in another process comes to its end
                known["heldout/base/posterior/ess"] = 0.5
                content = json.loads((run / "heldout.json").read_text())
                (run / "heldout.json").write_text(json.dumps(content | {"metrics": known}))
            yield which, only

        patch.setattr(evaluate, "evaluate", found)
        patch.setattr(evaluate, "take_machine", lambda config: config)
        # What an evaluation left that had no temperature to note was drawn at 1.
        (run / "heldout.json").write_text(json.dumps({"overrides": [], "samples": 32, "metrics": {"earlier": 1.0}}))
        known["earlier"] = 1.0
        for which, name in (("base", "heldout/base/posterior/spread"), ("adapter", "heldout/posterior/spread")):
            before = (run / "heldout_samples.jsonl").read_text()
            assert evaluate.main(["one", "--only", which]) == 0
            known[name] = 2.0
            assert json.loads((run / "heldout.json").read_text())["metrics"] == known
            assert ((run / "heldout_samples.jsonl").read_text() == before) is (which == "base")
            assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {name: 2.0}
        # A plot is of what the figures beside it are of.
        drawn = (run / "heldout.png").read_bytes()
        others = [{"text": text, "length": len(text), "log_q": -2.0, "log_reward": -1.0} for text in ("of", "others")]
        later = Evaluation({"posterior/spread": 2.0}, samples=others)
        patch.setattr(evaluate, "evaluate", lambda *_: iter([("adapter", later)]))
        for more, there in ((["--samples", "4"], True), (["--temperature", "0.5"], False)):
            assert evaluate.main(["one", *more]) == 0
            assert (run / "heldout.png").exists() is there
            assert not there or (run / "heldout.png").read_bytes() != drawn
            drawn = b""
        assert evaluate.main(["one"]) == 0
        heldout = (run / "heldout.json").read_text()
        patch.setattr(evaluate, "evaluate", lambda *_: iter([("base", only)]))
        assert evaluate.main(["one", "task.stories=others.jsonl", "--name", "others"]) == 0
        content = json.loads((run / "heldout-others.json").read_text())
        assert content["metrics"] == {"heldout-others/base/posterior/spread": 2.0}
        assert content["overrides"] == ["task.offset=0", "task.limit=null", "task.held_out=0", "task.stories=others.jsonl"]
        assert (run / "heldout.json").read_text() == heldout
        assert evaluate.main(["one", "--name", "a/b"]) == 2
        assert "--name 'a/b': letters, digits, dots and dashes make a name" in capsys.readouterr().err
        (run / "heldout.json").write_text(heldout[:-3])
        assert evaluate.main(["one"]) == 2
        assert "heldout.json is damaged" in capsys.readouterr().err
        (run / "heldout.json").write_text(heldout)

        def cut_off(*_: Any) -> Iterator[tuple[str, Evaluation]]:
            yield "base", Evaluation({"posterior/spread": 7.0})
            raise ConfigError("the adapter is gone")

        patch.setattr(evaluate, "evaluate", cut_off)
        assert evaluate.main(["one", "--name", "half"]) == 2
        kept = json.loads((run / "heldout-half.json").read_text())
        assert kept["metrics"] == {"heldout-half/base/posterior/spread": 7.0}
        patch.setattr(runs.os, "access", lambda path, _: "heldout" not in path.name and path != run)
        assert evaluate.main(["one", "--name", "new"]) == 2
        assert f"RUN '{run}/heldout-new.json' cannot be written" in capsys.readouterr().err
    assert asked == ["base", "adapter"]

    weights = run / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("the base was evaluated first"))
    assert evaluate.main(["one"]) == 2
    assert f"adapter {run}/adapter: adapter_model.safetensors is damaged" in capsys.readouterr().err
    weights.unlink()
    mistakes = {
        ("one", "--samples", "1"): "one draw says nothing",
        ("one", "--temperature", "0"): "--temperature=0: divides logits; give one above 0",
        ("one", "--samples-file", "x.jsonl", "--only", "base"): "--samples-file with --only base: ",
        ("one", "--samples-file", "none/x.jsonl"): f"--samples-file 'none/x.jsonl': there is no folder {folder}/none",
        ("two",): "no such run",
        ("one",): "the run did not end; --resume it first",
    }
    for arguments, message in mistakes.items():
        assert evaluate.main(list(arguments)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "behaviour", "reward", "bounded"),
    [
        (1.0, ON_POLICY, {"kind": "lm_posterior"}, True),
        (0.5, ON_POLICY, {"kind": "lm_posterior"}, False),
        (1.0, Behaviour(0.5), {"kind": "lm_posterior"}, False),
        (1.0, ON_POLICY, {"kind": "function", "path": "tests.faulty:score"}, False),
    ],
)
def test_what_is_held_out_is_evaluated_at_the_last_temperature_and_told_stories_bound_the_models_own_posterior_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, end: float, behaviour: Behaviour, reward: dict[str, Any], bounded: bool
) -> None:
    (folder / "two.jsonl").write_text(2 * (json.dumps(STORY) + "\n"))
    sections = settings(folder, stories=str(folder / "two.jsonl"), held_out=1, reward=reward)
    sections |= {"learner": {"reward_temperature": {"start": 2.0, "end": end, "horizon": 5}}, "loss": {"kind": "vargrad"}}
    cfg = config_file.parse(sections)
    prepared = prepare(cfg)
    local = SimpleNamespace(problem=prepared.problem, tokenizer=prepared.tokenizer, use=lambda adapter: None)
    asked: list[tuple[Sequence[Prompt], dict[str, Any]]] = []

    def found(prompts: Sequence[Prompt], _samplers: Any, _scorer: Any, **how: Any) -> Evaluation:
        asked.append((prompts, how))
        return Evaluation({})

    monkeypatch.setattr("deploy.local.opened", lambda *_: nullcontext(local))
    monkeypatch.setattr("system.diversity.diversity_measure", lambda: None)
    monkeypatch.setattr("system.evaluation.sampled", found)
    monkeypatch.setattr(evaluate, "_upper_bound", lambda *_: {"posterior/log_z_upper": 0.0})
    [(_, result)] = evaluate.evaluate(cfg, folder / "adapter", 4, "adapter", behaviour)
    [(prompts, how)] = asked
    assert prompts == prepared.problem.prompts[1:]
    assert (how["temperature"], how["behaviour"], how["samples"], how["seed"]) == (end, behaviour, 4, cfg.seed)
    assert bool(result.metrics) is bounded


def test_other_data_are_taken_whole_unless_a_part_of_them_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: {kind: continuation, limit: 3, offset: 2, held_out: 1}")

    def part(*overrides: str) -> tuple[int, int | None, int]:
        task: Any = config_file.load(tmp_path / "config.yaml", [*evaluate.all_of_others(list(overrides)), *overrides]).task
        return task.offset, task.limit, task.held_out

    assert part() == (2, 3, 1)
    assert part("task.max_tokens=9") == (2, 3, 1)
    assert part("task.prompts=others.txt") == (0, None, 0)
    assert part("task.prompts=others.txt", "task.limit=5") == (0, 5, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none/x.jsonl",), "OUTPUT 'none/x.jsonl': there is no folder "),
        ((".",), "OUTPUT '.' is a folder; name a file"),
        (("x.jsonl", "--per-story", "0"), "--per-story=0: tell at least one story"),
        (("x.jsonl", "--ending", "0"), "--ending=0: Y has at least one token"),
    ],
)
def test_stories_that_could_not_be_told_or_written_are_refused_before_any_is_drawn(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(self_consistent, "draw", lambda *_: pytest.fail("stories were drawn"))
    assert self_consistent.main([str(ROOT / "deploy/configs/infilling.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_under_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = finished.run(tmp_path)
    asked: list[Path] = []

    def found(_config: Config, adapter: Path, *_: Any) -> Iterator[tuple[str, Evaluation]]:
        asked.append(adapter)
        yield "adapter", Evaluation({"posterior/spread": float(len(asked))})

    monkeypatch.setattr(evaluate, "evaluate", found)
    monkeypatch.setattr(evaluate, "take_machine", lambda config: config)
    monkeypatch.setattr(evaluate, "adapter_tensors", lambda *_: {})
    monkeypatch.setattr(evaluate, "adapter_at", lambda folder, _, step: folder / f"adapter of {step}")
    for step in ([], ["--step", "80"], ["--step", "80", "--name", "others"]):
        assert evaluate.main([str(run_dir), *step]) == 0
    assert asked == [run_dir / f"adapter of {step}" for step in (None, 80, 80)]
    stems = ("heldout", "heldout-step-80", "heldout-step-80-others")
    for number, stem in enumerate(stems, 1):
        assert json.loads((run_dir / f"{stem}.json").read_text())["metrics"] == {f"{stem}/posterior/spread": number}
    capsys.readouterr()
    assert evaluate.main([str(run_dir), "--name", "step-80"]) == 2
    assert "--name 'step-80': a checkpoint's evaluation is called so" in capsys.readouterr().err
