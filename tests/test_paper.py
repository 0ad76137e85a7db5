"""The experiments of the paper as commands: each is a config that can be run, and results of several seeds make one table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from system import config_file
from system.tasks.arithmetic import generate
from tests.benchmarks import paper, validation
from tests.benchmarks.lab import Lab
from tests.benchmarks.paper import EXPERIMENTS, table

COMMANDS: list[tuple[str, ...]] = []
METRICS = {"heldout/task/accuracy": 0.9, "heldout/base/task/accuracy": 0.1}


@dataclass(frozen=True)
class Rehearsal(Lab):
    """Checks the config of a command, and leaves what it would have left."""

    def _run(self, script: str, *arguments: str) -> str:
        COMMANDS.append((script, *arguments))
        overrides = [argument for argument in arguments[1:] if "=" in argument]
        if script == "self_consistent":
            Path(arguments[1]).write_text("{}\n", encoding="utf-8")
            return ""
        if script == "export":
            Path(arguments[2]).mkdir()
            return ""
        config = config_file.load(Path(arguments[0], "config.yaml") if script == "evaluate" else Path(arguments[0]), overrides)
        if script == "evaluate":
            assert ("--samples-file" in arguments) is (arguments[-2:] != ("--only", "base"))
            return "a table\n" + json.dumps(METRICS)
        folder = Path(config.output_dir) / "run"
        (folder / ("adapter" if script == "job" else "gflownet")).mkdir(parents=True)
        (folder / "config.yaml").write_text(config_file.dump(config), encoding="utf-8")
        if script == "baselines":
            methods = [*arguments[arguments.index("--methods") + 1].split(","), "gflownet"]
            (folder / "baselines.json").write_text(json.dumps({"methods": {method: {"x": 1.0} for method in methods}}))
        return ""


QUESTION = {"str_query": "Question: 1 + 2 - 3 = ? Answer:", "num_sol": 0}


def write_data(folder: Path) -> None:
    """Of the form of the paper's data: all that is read in a rehearsal, and what a validation set is made of."""

    def lines(count: int, **fields: str) -> str:
        records = [{name: f"{value} {i}" for name, value in fields.items()} for i in range(count)]
        return "".join(json.dumps(record) + "\n" for record in records)

    def stories(count: int, title: str, part: str) -> str:
        told = [{"id": f"{title} {i}{part}", "title": f"{title} {i}", "sentences": list("12345")} for i in range(count)]
        return "".join(json.dumps(story) + "\n" for story in told)

    def questions(count: int, terms: int) -> list[dict[str, object]]:
        digits = [f"{i:0{terms}d}" for i in range(count)]
        return [{"str_query": f"Question: {' + '.join(of)} = ? Answer:", "num_sol": sum(map(int, of))} for of in digits]

    files = {
        "prompts/openwebtext_1000.txt": "".join(f"Prompt {i}.\n" for i in range(200)),
        "stories/train.jsonl": stories(15, "A", "a") + stories(12, "A", "b") + stories(8, "C", "a"),
        "arithmetic/train_rationales_50.json": json.dumps([QUESTION | {"str_rationale": "1 + 2 =, 3 - 3 ="}]),
        "arithmetic/train_questions_1000.json": json.dumps(questions(150, 3) + questions(150, 4)),
        "arithmetic/test_5_operands.json": json.dumps(
            [{"str_query": question.text, "num_sol": question.answer} for question in generate((5,), 300, test=True)]
        ),
        "arithmetic/test_6_operands.json": json.dumps(questions(30, 6)),
        "subj/train.jsonl": lines(300, text="a text"),
    } | {f"subj/train.{count}.jsonl": lines(count, text="a text") for count in (10, 20, 50)}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("task", EXPERIMENTS)
def test_every_command_of_an_experiment_has_a_config_that_is_accepted(task: str, tmp_path: Path):
    write_data(tmp_path)
    rows = EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path, 3, ("learner.steps=20",)))
    [trained] = tmp_path.glob("gflownet-3/*/config.yaml")
    assert config_file.load(trained, []).learner.steps == 20
    assert len(rows) > 1 and "gflownet" in rows


def test_what_has_its_result_is_not_run_again(tmp_path: Path):
    write_data(tmp_path)
    for task, commands in {"verifiable": 6, "constrained": 3, "infilling": 12}.items():
        COMMANDS.clear()
        (tmp_path / task).mkdir()
        first = EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path / task, 0, ()))
        assert EXPERIMENTS[task](Rehearsal(tmp_path, tmp_path / task, 0, ())) == first
        assert len(COMMANDS) == commands


def test_all_infilling_starts_from_the_model_that_learnt_how_stories_go_on(tmp_path: Path):
    write_data(tmp_path)
    COMMANDS.clear()
    for seed in (0, 1):
        EXPERIMENTS["infilling"](Rehearsal(tmp_path, tmp_path, seed, (), shared=("model.path=another",)))
    merged = [arguments[2] for script, *arguments in COMMANDS if script == "export"]
    assert len(merged) == 1
    started = [path.parent.parent.name for path in tmp_path.glob("*/run/config.yaml")]
    assert sorted(started) == ["gflownet-0", "gflownet-1", "supervised-0", "supervised-1", "teller-0"]
    for name in started:
        config = config_file.load(tmp_path / name / "run/config.yaml", [])
        assert config.model.path == ("another" if name == "teller-0" else merged[0])
    told = [
        config_file.load(Path(arguments[0]), arguments[2:-2]) for script, *arguments in COMMANDS if script == "self_consistent"
    ]
    assert [config.model.path for config in told] == merged * 2
    first, second, *_ = (json.loads(line) for line in (tmp_path / "sentences.jsonl").read_text().splitlines())
    assert (first["after"], first["before"], first["middle"]) == ("1", "2", "3")
    assert (second["after"], second["before"], second["middle"]) == ("1", "2 3", "4")


def test_a_validation_set_shares_no_record_with_training_or_test_data(tmp_path: Path):
    write_data(tmp_path / "data")
    folder = validation.write(tmp_path / "data", tmp_path / "validation")

    def read(name: str) -> list[str]:
        text = (folder / name).read_text(encoding="utf-8")
        return [json.dumps(record) for record in json.loads(text)] if name.endswith(".json") else text.splitlines()

    assert read("prompts/openwebtext_1000.txt") == [f"Prompt {i}." for i in range(150)]
    stories = {name: {json.loads(line)["title"] for line in read(f"stories/{name}.jsonl")} for name in ("train", "test")}
    assert stories["train"] and not stories["train"] & stories["test"] and len(read("stories/test.jsonl")) >= 20
    asked = set(read("arithmetic/train_questions_1000.json"))
    for operands in (3, 4, 5, 6):
        held_out = read(f"arithmetic/test_{operands}_operands.json")
        assert len(held_out) >= 100 and not asked & set(held_out)
        assert all(len(json.loads(record)["str_query"].split("+")) == operands for record in held_out if operands < 5)
    tests = json.loads((tmp_path / "data/arithmetic/test_5_operands.json").read_text(encoding="utf-8"))
    assert not {question["str_query"] for question in tests} & {
        json.loads(record)["str_query"] for record in read("arithmetic/test_5_operands.json")
    }
    assert len(asked) == 300 - 200 and len(texts := read("subj/test.jsonl")) == 200
    assert not set(texts) & set(read("subj/train.50.jsonl"))
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    validation.write(tmp_path / "data", folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_what_an_experiment_makes_itself_is_held_out_of_the_training_half_too(tmp_path: Path):
    sums: dict[bool, dict[str, set[str]]] = {}
    for validating in (False, True):
        output = tmp_path / str(validating)
        output.mkdir()
        EXPERIMENTS["verifiable"](Rehearsal(tmp_path, output, 0, (), (), validating))
        sums[validating] = {name: set((output / f"{name}.jsonl").read_text().splitlines()) for name in ("train", "test")}
    assert sums[True]["train"] | sums[True]["test"] == sums[False]["train"]
    assert not sums[True]["train"] & sums[True]["test"] and len(sums[True]["test"]) == 30


def test_seeds_of_a_method_are_one_row_with_their_range():
    results = {"0": {"a": {"m": 1.0}, "b": {"n": 5.0}}, "1": {"a": {"m": 3.0}}}
    heads = ["| run | runs | m | n |", "|---|---|---|---|"]
    assert table(results).splitlines() == [*heads, "| a | 2 | 2 (1 to 3) |  |", "| b | 1 |  | 5 |"]


def test_what_goes_to_every_training_reaches_the_baselines_too(tmp_path: Path):
    EXPERIMENTS["verifiable"](Rehearsal(tmp_path, tmp_path, 0, ("learner.steps=30",), ("learner.warmup_steps=4",)))
    runs = {run: config_file.load(next(tmp_path.glob(f"{run}-0/*/config.yaml")), []) for run in ("gflownet", "grpo")}
    assert [cfg.learner.warmup_steps for cfg in runs.values()] == [4, 4]
    assert runs["gflownet"].learner.steps == 30 != runs["grpo"].learner.steps


def test_policy_gradients_have_settings_of_their_own(tmp_path: Path):
    lab = Rehearsal(tmp_path, tmp_path, 0, (), policy_gradient=("learner.max_staleness=0", "learner.publish_every=1"))
    EXPERIMENTS["verifiable"](lab)
    staleness = {
        run: config_file.load(next(tmp_path.glob(f"{run}-0/*/config.yaml")), []).learner.max_staleness
        for run in ("gflownet", "grpo", "rloo")
    }
    assert staleness.pop("gflownet") > 0
    assert staleness == {"grpo": 0, "rloo": 0}


def test_supervised_training_has_settings_of_its_own(tmp_path: Path):
    write_data(tmp_path / "data")
    for task, names in {"subjectivity": ("supervised", "predict"), "arithmetic": ("supervised",)}.items():
        (tmp_path / task).mkdir()
        EXPERIMENTS[task](
            Rehearsal(tmp_path / "data", tmp_path / task, 0, ("learner.lr=2e-4",), imitation=("learner.lr=5e-5",))
        )
        rates = {run: config_file.load(next((tmp_path / task).glob(f"{run}-0/*/config.yaml")), []).learner.lr for run in names}
        assert set(rates.values()) == {5e-5}
        [trained] = (tmp_path / task).glob("gflownet-0/*/config.yaml")
        assert config_file.load(trained, []).learner.lr == 2e-4


def test_a_folder_with_results_of_another_version_of_an_experiment_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results(lab: Lab) -> dict[str, dict[str, float]]:
        return {"gflownet": {"x": float(lab.seed)}}

    asked = ["continuation", "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--seeds"]
    monkeypatch.setitem(EXPERIMENTS, "continuation", results)
    for seed in "12":
        paper.main([*asked, seed])
    assert json.loads((tmp_path / "out/results.json").read_text())["by_seed"].keys() == {"1", "2"}
    changed = tmp_path / "paper.py"
    changed.write_text(Path(paper.__file__).read_text(encoding="utf-8").replace("learner.lr=5e-4", "learner.lr=1e-4"))
    monkeypatch.setattr(paper, "__file__", str(changed))
    with pytest.raises(SystemExit, match=r"results\.json is of .*: choose another --output"):
        paper.main([*asked, "3"])


def test_settings_of_a_training_that_an_experiment_does_not_have_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        paper.main(["continuation", "--data", str(tmp_path), "--policy-gradient", "learner.lr=1e-4"])
    assert "--policy-gradient: continuation has none; random_number, verifiable, arithmetic have" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        paper.main(["continuation", "--data", str(tmp_path), "--imitation", "learner.lr=1e-4"])
    assert "--imitation: continuation has no supervised training; infilling, subjectivity, arithmetic have" in (
        capsys.readouterr().err
    )
