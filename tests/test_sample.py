"""Samples of a finished run: what is written of them, against PEFT and the base model; and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from peft import PeftModel

from deploy import sample
from system import config_file, tasks
from system.config import ConfigError
from system.handles import GroupLogQ
from system.posterior import log_mean_exp
from system.pretrained import load_tokenizer
from system.tasks.arithmetic import read_questions
from system.tasks.continuation import read_prompts
from system.trajectory import Group, sampled
from tests import fakes, finished, lora, tiny

ROOT = Path(__file__).resolve().parents[1]
STORY = {"before": "ab", "after": "ba"}


def config_of(**task: Any) -> Any:
    return config_file.parse({"task": task})


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "deploy/sample.py"), *arguments]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=240, check=False)


def test_each_record_has_its_samples_with_the_models_own_figures(tmp_path: Path) -> None:
    learner = {"reward_temperature": {"start": 0.5, "end": 0.5}}
    run_dir, config = finished.run(tmp_path, learner=learner)
    texts = ["two\nlines", "abc", "x y z"]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    done = command(tmp_path, "one", "--input", "in.jsonl", "--output", "out.jsonl", "--samples", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["context"] for record in records] == [f"<s>{text}" for text in texts]

    folder = Path(config.model.path)
    tokenizer = load_tokenizer(folder)
    problem = tasks.build(sample.with_prompts(config, tmp_path / "in.jsonl").task, tokenizer)
    base = lora.load(folder)
    tuned: Any = PeftModel.from_pretrained(lora.load(folder), str(run_dir / "adapter"))
    for prompt, record in zip(problem.prompts, records, strict=True):
        assert len({row["text"] for row in record["samples"]}) > 2
        for row in record["samples"]:
            assert row["text"] == tokenizer.decode(row["tokens"])
            drawn = replace(sampled(row["tokens"]), stop=row["stop"])
            log_q = lora.drawn_log_probs(tuned, problem.constraints, prompt, drawn).sum()
            assert row["log_q"] == pytest.approx(log_q, abs=1e-3)
            whole = [*prompt.reward_tokens, *row["tokens"], problem.constraints.stop_token]
            log_reward = lora.token_log_probs(base, whole)[len(prompt.reward_tokens) - 1 :].sum()
            assert row["log_reward"] == pytest.approx(log_reward, abs=1e-3)
            assert row["log_weight"] == pytest.approx(row["log_reward"] / 0.5 - row["log_q"], abs=1e-9)
        log_weights = np.array([row["log_weight"] for row in record["samples"]])
        weights = np.exp(log_weights) / np.exp(log_weights).sum()
        assert [row["weight"] for row in record["samples"]] == pytest.approx(weights.tolist())
        assert record["ess"] == pytest.approx(1 / (8 * np.square(weights).sum()))
        assert record["log_z"] == pytest.approx(log_mean_exp(log_weights))


def test_a_text_on_the_command_line_is_printed_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.run(tmp_path)
    asked: list[Any] = []

    @contextmanager
    def opened(config: Any, samples: int) -> Iterator[Any]:
        asked.append(([record for _, record in read_prompts(config.task)], samples))
        yield SimpleNamespace(use=lambda adapter: asked.append(adapter))

    row = {"text": "a b", "log_q": -1.0, "log_reward": -2.0, "weight": 1.0}
    record = {"prompt": "line-1", "context": "<s>b a", "log_z": -1.0, "ess": 1.0, "samples": [row]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deploy.local.opened", opened)
    monkeypatch.setattr(sample, "take_machine", lambda config: config)
    monkeypatch.setattr(sample, "draw", lambda *_: iter([record]))
    assert sample.main(["one", "--prompt", "b a", "--samples", "3"]) == 0
    assert asked == [([{"prompt": "b a"}], 3), tmp_path / "runs/one/adapter/adapter_model.safetensors"]
    first, heads, line = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("line-1  log Z ") and first.endswith("'<s>b a'")
    assert heads.split() == ["weight", "log", "q", "log", "R", "text"]
    assert line.split() == ["1.0000", "-1.000", "-2.000", "'a", "b'"]


def test_prompts_are_asked_for_once_each_and_a_seed_changes_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_record", lambda local, group: {})

    class Asked:
        config = config_of(kind="continuation")
        problem = SimpleNamespace(prompts=fakes.PROMPTS)

        def __init__(self) -> None:
            self.requests: list[Any] = []

        def sample(self, request: Any) -> Any:
            self.requests.append(request)
            return SimpleNamespace(result=lambda: None)

    def seeds(number: int) -> list[int]:
        local: Any = Asked()
        assert len(list(sample.draw(local, 4, number))) == len(fakes.PROMPTS)
        assert [request.prompt for request in local.requests] == list(fakes.PROMPTS)
        assert {len(request.behaviours_K) for request in local.requests} == {4}
        return [request.seed for request in local.requests]

    assert seeds(0) == seeds(0)
    assert len({*seeds(0), *seeds(1)}) == 2 * len(fakes.PROMPTS)


def test_a_table_shows_no_control_characters_of_a_sample() -> None:
    row = {"text": "\x1b[31mred", "log_q": -1.0, "log_reward": -2.0, "weight": 1.0}
    text = sample.table({"prompt": "a", "context": "\x07", "log_z": 0.0, "ess": 1.0, "samples": [row]})
    assert text.isascii() and not {"\x1b", "\x07"} & set(text)


def test_samples_without_a_reward_count_among_those_that_were_drawn() -> None:
    trajectories_K = (sampled([3]), sampled([4]))
    group = Group(fakes.PROMPTS[0], trajectories_K, (np.zeros(2), np.zeros(2)), 0, 0, faults=("log of zero",) * 2)
    score = GroupLogQ(np.log([0.25, 0.25]), np.zeros(2))
    learner = SimpleNamespace(score=lambda groups: [score])
    local: Any = SimpleNamespace(learner=learner, config=config_of(kind="continuation"), tokenizer=tiny.tokenizer())
    record = sample._record(local, group)
    # Two outcomes of probability 1/4 and R = 1 each: Z is 2, and half of the draws say nothing.
    assert (record["log_z"], record["ess"]) == (pytest.approx(np.log(2)), pytest.approx(0.5))


def test_a_prompt_of_which_no_sample_has_a_reward_is_a_record_without_samples(caplog: pytest.LogCaptureFixture) -> None:
    group = Group(fakes.PROMPTS[0], (), (), 0, 0, faults=("log of zero", "log of zero"))
    local: Any = SimpleNamespace(tokenizer=tiny.tokenizer())
    record = sample._record(local, group)
    assert (record["prompt"], record["samples"], record["log_z"]) == ("prompt-0", [], None)
    assert "2 samples have no reward: log of zero" in caplog.text
    assert "no sample has a reward" in sample.table(record)


@pytest.mark.parametrize(
    ("task", "text", "record"),
    [
        ({"kind": "continuation"}, "Once", {"prompt": "Once"}),
        ({"kind": "continuation"}, "12", {"prompt": "12"}),
        ({"kind": "infilling"}, json.dumps(STORY), STORY),
    ],
)
def test_a_prompt_is_a_text_or_a_record(task: dict[str, Any], text: str, record: dict[str, Any]) -> None:
    assert sample.record_of(config_of(**task), text) == record


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"--prompt='Once': task.kind=infilling needs a record in JSON"):
        sample.record_of(config_of(kind="infilling"), "Once")
    with pytest.raises(ConfigError, match=r"task.kind=random_number has a prompt of its own and reads no file"):
        sample.with_prompts(config_of(kind="random_number"), Path("a.jsonl"))
    with pytest.raises(ConfigError, match=r"--input 'a.txt': records are read from JSONL"):
        sample.with_prompts(config_of(kind="continuation"), Path("a.txt"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', r"in\.jsonl', line 2: no JSON"),
        ('{"text": "a"}', r"in\.jsonl', line 2: needs \{\"prompt\": text\}"),
        ('{"prompt": " "}', r"in\.jsonl', line 2: needs"),
        ('["a"]', r"in\.jsonl', line 2: needs"),
    ],
)
def test_a_bad_line_of_the_input_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "fine"}\n' + line + "\n")
    config = sample.with_prompts(config_of(kind="continuation"), tmp_path / "in.jsonl")
    with pytest.raises(ConfigError, match=message):
        tasks.build(config.task, tiny.tokenizer())


def test_a_missing_run_or_adapter_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    done = command(tmp_path, "nothing")
    assert done.returncode == 2
    assert "config error: RUN='nothing': no such run" in done.stderr
    run_dir = tmp_path / "runs" / "one"
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(config_file.dump(config_of(kind="random_number")))
    done = command(tmp_path, "one")
    assert done.returncode == 2
    assert "has no adapter/adapter_model.safetensors: the run did not end; --resume it first" in done.stderr


def test_questions_from_a_file_have_the_runs_own_examples_in_front(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"question": "Question: 1 + 2 - 3 = ? Answer:", "answer": 0}\n')
    config = config_of(kind="arithmetic")
    task: Any = sample.with_prompts(config, tmp_path / "in.jsonl").task
    [(_, asked)], shown = read_questions(task)
    assert asked.expression == "1 + 2 - 3"
    assert shown == read_questions(config.task)[1] != []


def test_a_file_that_could_not_be_written_is_refused_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sample.main(["one", "--output", "none/out.jsonl"]) == 2
    assert f"--output 'none/out.jsonl': there is no folder {tmp_path}/none; make it first" in capsys.readouterr().err
    assert sample.main(["one", "--output", "."]) == 2
    assert "--output '.' is a folder; name a file" in capsys.readouterr().err
