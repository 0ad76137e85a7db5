"""Runs side by side, from folders as runs write them; and baselines measured on a tiny model, with their table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from mlflow import MlflowClient

from actors import decoding
from actors.decoder import Decoder, Draws
from deploy import baselines, compare
from deploy.prepare import prepare
from learner.learner import Learner
from system import config_file
from system.config import Config, ConfigError
from system.journal import State
from system.learner_config import VarGrad
from system.models import locate
from system.posterior import effective_share, log_mean_exp
from system.run_error import RunError
from system.tracking import Tracker
from tests import tiny


def run(folder: Path, name: str, seed: int, bound: float, **other: Any) -> Path:
    """A finished run's folder; `bound` is its last log Z bound, nats."""
    path = folder / f"{name}-{seed}-{bound}"
    path.mkdir(parents=True)
    cfg = config_file.parse({"name": name, "seed": seed, "task": {"kind": "continuation"}, "output_dir": str(path), **other})
    (path / "config.yaml").write_text(config_file.dump(cfg))
    before, after = ({"posterior/log_z_lower": value, "task/distinct": 1.0} for value in (-30.0, bound))
    summary = {"run": name, "seed": seed, "finished": True, "before": before, "after": after}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def evaluated(
    folder: Path, metrics: dict[str, float], *overrides: str, samples: int = 32, temperature: float = 1.0, name: str = "heldout"
) -> Path:
    """As `deploy/evaluate.py` leaves it."""
    content = {"overrides": list(overrides), "samples": samples, "temperature": temperature, "metrics": metrics}
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def table(*folders: Path) -> dict[str, compare.Row]:
    made = compare.rows([entry for folder in folders for entry in compare.read(folder)])
    assert len({row.name for row in made}) == len(made)
    return {row.name: row for row in made}


def test_seeds_of_one_config_are_one_row_with_their_mean_and_range(tmp_path: Path) -> None:
    rows = table(*(run(tmp_path, "one", seed, bound) for seed, bound in enumerate((-10.0, -8.0, -9.0))))
    assert set(rows) == {"one: before", "one: after"}
    assert rows["one: after"].seeds == (0, 1, 2)
    assert compare.cell(rows["one: after"].values["posterior/log_z_lower"]) == "-9 (-10 to -8)"
    assert compare.cell((-3.0,)) == "-3"
    assert compare.cell(()) == ""


def test_another_config_or_name_is_another_row(tmp_path: Path) -> None:
    folders = [
        run(tmp_path, "one", 0, -10.0),
        run(tmp_path, "one", 1, -8.0, learner={"lr": 0.5}),
        run(tmp_path, "two", 2, -7.0),
    ]
    assert list(table(*folders)) == [
        "one: before (learner.lr=0.001)",
        "one: after (learner.lr=0.001)",
        "one: before (learner.lr=0.5)",
        "one: after (learner.lr=0.5)",
        "two: before",
        "two: after",
    ]


def test_held_out_figures_stand_apart_from_those_of_the_training_prompts(tmp_path: Path) -> None:
    folder = run(tmp_path, "one", 0, -10.0)
    heldout = {"heldout/posterior/ess": 0.7, "heldout/base/posterior/ess": 0.1, "heldout/task/bleu_4": 0.02}
    evaluated(folder, heldout)
    rows = table(folder)
    assert rows["one: held out"].values == {"posterior/ess": (0.7,), "task/bleu_4": (0.02,)}
    assert rows["one: held out, base"].values == {"posterior/ess": (0.1,)}
    assert "posterior/ess" not in rows["one: after"].values
    others = {"heldout-base-2/posterior/ess": 0.6, "heldout-base-2/base/posterior/ess": 0.2}
    rows = table(evaluated(folder, others, name="heldout-base-2"))
    assert rows["one: held out"].values["posterior/ess"] == (0.7,)
    assert rows["one: held out, base-2"].values == {"posterior/ess": (0.6,)}
    assert rows["one: held out, base-2, base"].values == {"posterior/ess": (0.2,)}


def test_evaluations_on_other_data_or_with_other_samples_are_rows_of_their_own(tmp_path: Path) -> None:
    metrics = {"heldout/posterior/ess": 0.5, "heldout/base/posterior/ess": 0.1}
    ways: list[tuple[tuple[str, ...], int, float]] = [
        (("task.offset=1", "task.limit=4"), 32, 1.0),
        (("task.limit=4", "task.offset=1", "actors.cpus=3"), 32, 1.0),
        (("task.offset=2", "task.limit=4"), 32, 1.0),
        (("task.offset=1", "task.limit=4"), 64, 1.0),
        (("task.offset=1", "task.limit=4"), 64, 0.1),
    ]
    folders = [
        evaluated(run(tmp_path, "one", seed, -1.0), metrics, *overrides, samples=samples, temperature=temperature)
        for seed, (overrides, samples, temperature) in enumerate(ways)
    ]
    rows = table(*folders)
    for name in ("one: held out", "one: held out, base"):
        assert {shown.removeprefix(name): row.seeds for shown, row in rows.items() if shown.startswith(f"{name} (")} == {
            " (evaluated.task.offset=1, samples=32, temperature=1.0)": (0, 1),
            " (evaluated.task.offset=2, samples=32, temperature=1.0)": (2,),
            " (evaluated.task.offset=1, samples=64, temperature=1.0)": (3,),
            " (evaluated.task.offset=1, samples=64, temperature=0.1)": (4,),
        }


def test_adapters_of_other_configs_are_rows_of_their_own_and_the_methods_without_them_are_not(tmp_path: Path) -> None:
    folders = []
    for seed, lr in enumerate((0.5, 0.5, 0.25)):
        folder = run(tmp_path, "one", seed, -1.0)
        (folder / "summary.json").unlink()
        adapter = config_file.parse({"seed": seed, "task": {"kind": "continuation"}, "learner": {"lr": lr}})
        methods = {"smc": {"seconds": 1.0}, baselines.TUNED: {"seconds": 2.0}}
        content = {"samples": 8, "settings": {}, "adapter_config": adapter.model_dump(mode="json"), "methods": methods}
        (folder / "baselines.json").write_text(json.dumps(content))
        folders.append(folder)
    made = compare.rows([entry for folder in folders for entry in compare.read(folder)])
    assert [(row.name, row.seeds) for row in made] == [
        ("one: smc", (0, 1, 2)),
        ("one: gflownet (adapter.learner.lr=0.5)", (0, 1)),
        ("one: gflownet (adapter.learner.lr=0.25)", (2,)),
    ]


def test_the_table_is_markdown_with_the_metrics_that_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path, "one", 0, -10.0)
    assert compare.main([str(folder), "--metric", "task/distinct", "--plots", str(tmp_path / "plots")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| run | runs | task/distinct |",
        "|---|---|---|",
        "| one: before | 1 | 1 |",
        "| one: after | 1 | 1 |",
    ]
    assert (tmp_path / "plots" / "metrics.png").stat().st_size > 1000
    (tmp_path / "file").touch()
    assert compare.main([str(folder), "--plots", str(tmp_path / "file")]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err
    assert compare.main([str(folder), "--metric", "task/nothing"]) == 2
    assert "no run has it; there are posterior/log_z_lower, task/distinct" in capsys.readouterr().err


def tracked(folder: Path) -> str:
    """Sends what `run` left to the server of its config. The id that it has there."""
    cfg = config_file.load(folder / "config.yaml", [])
    tracker = Tracker(folder, cfg)
    for name in ("config.yaml", "summary.json"):
        tracker.artifact(folder / name)
    tracker.close("FINISHED")
    run_id = State.load(folder / "tracking.json").run_id
    assert run_id is not None
    return run_id


def test_runs_at_a_server_are_read_by_id_by_name_and_as_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = {"uri": uri, "sweep": "both-seeds", "flush_seconds": 0.1}
    folders = [run(tmp_path, "one", seed, -10.0 - seed, tracking=settings) for seed in (0, 1)]
    ids = [tracked(folder) for folder in folders]
    assert compare.main([str(folder) for folder in folders]) == 0
    expected = capsys.readouterr().out
    assert "| one: after | 2 | 1 (1 to 1) | -10.5 (-11 to -10) |" in expected
    client = MlflowClient(uri)
    parent = client.get_run(ids[0]).data.tags["mlflow.parentRunId"]
    for asked in (ids, ["one"], ["both-seeds"], [parent], ["one", ids[0], "both-seeds"]):
        assert compare.main([*asked, "--tracking", uri, "--mlflow"]) == 0
        printed = capsys.readouterr()
        assert printed.out == expected
        assert all(run_id in printed.err for run_id in ids)
    assert compare.main(["another", "--tracking", uri]) == 2
    assert f"RUN='another': {uri} has no run of that id" in capsys.readouterr().err
    assert compare.main(["one", "--tracking", "http://user:secret@example.org"]) == 2
    assert "secret" not in capsys.readouterr().err


def test_a_run_that_did_not_end_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path, "one", 0, -10.0)
    (folder / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"no summary\.json of a run that came to its end: --resume it first"):
        compare.read(folder)
    stopped = json.loads((run(tmp_path, "two", 0, -9.0) / "summary.json").read_text()) | {"finished": False}
    (folder / "summary.json").write_text(json.dumps(stopped))
    with pytest.raises(ConfigError, match=r"no summary\.json of a run that came to its end: --resume it first"):
        compare.read(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(ConfigError, match="its results cannot be read"):
        compare.read(folder)


# ------------------------------------------------------------------------------------------------------- baselines


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("baselines")
    tiny.folder(folder).rename(folder / "model")
    (folder / "prompts.txt").write_text("ab\ncab\n")
    return config_file.parse(
        {
            "name": "told",
            "output_dir": str(folder / "runs"),
            "model": {"path": str(folder / "model")},
            "lora": {"rank": 4, "alpha": 8},
            "task": {"kind": "continuation", "prompts": str(folder / "prompts.txt"), "max_tokens": 4},
            "learner": {"reward_temperature": {"start": 0.8, "end": 0.8}},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        }
    )


def trained(cfg: Config) -> Path:
    """A run's folder with an adapter that is not the base."""
    path = Path(cfg.output_dir) / "trained"
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(config_file.dump(cfg))
    problem = prepare(cfg).problem
    learner = Learner(cfg, locate(cfg.model), problem.constraints, cfg.model.path, list(range(10, 40)))
    tiny.perturb(learner.policy.parameters.values(), seed=1)
    learner.adapter(1).materialise(path / "adapter")
    return path


def test_each_method_is_measured_and_the_adapter_beside_it(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("system.diversity.find_spec", lambda name: None)
    methods = ["ancestral", "beam", "smc", "gflownet_sir"]
    folder = baselines.run(tiny_config, methods, 8, {"oversample": 2}, trained(tiny_config))
    rows = table(folder)
    written = json.loads((folder / "baselines.json").read_text())
    assert written["adapter_config"] == tiny_config.model_dump(mode="json")
    assert list(rows) == ["told: ancestral", "told: beam", "told: smc", "told: gflownet_sir", "told: gflownet"]
    weighted = {name for name, row in rows.items() if "posterior/log_z_weighted" in row.values}
    assert weighted == {"told: ancestral", "told: smc", "told: gflownet_sir", "told: gflownet"}
    for row in rows.values():
        assert row.values["task/max_log_reward"] >= row.values["task/mean_log_reward"]
        assert row.values["task/max_log_likelihood"] == pytest.approx(row.values["task/max_log_reward"], abs=1e-4)
        assert row.values["model_tokens"][0] > 0
        assert "task/diversity" not in row.values
    assert rows["told: smc"].values["model_tokens"] > rows["told: ancestral"].values["model_tokens"]
    assert rows["told: gflownet_sir"].values["model_tokens"] > rows["told: gflownet"].values["model_tokens"]
    assert rows["told: gflownet"].values["task/mean_log_reward"] != rows["told: ancestral"].values["task/mean_log_reward"]
    [samples] = (folder / "smc" / "tables" / "samples").glob("*.json")
    content = json.loads(samples.read_text())
    assert len(content["data"]) == 2 * 8
    assert {"prompt", "text", "log_reward", "log_weight"} <= set(content["columns"])
    [at_server] = compare.fetch(tiny_config.tracking.uri, "told-smc", tmp_path)
    assert table(at_server)["told: smc"].values == rows["told: smc"].values
    [(uri, addresses)] = compare.mlflow_views([folder]).items()
    address = addresses["compare"]
    assert uri.startswith("sqlite:") and address.startswith("http://127.0.0.1:5000/#/compare-runs?runs=")
    client = MlflowClient(uri)
    run_ids = json.loads(parse_qs(address.partition("?")[2])["runs"][0])
    assert {client.get_run(run_id).info.run_name for run_id in run_ids} == {f"told-{name}" for name in [*methods, "gflownet"]}
    experiment = client.get_experiment_by_name("headwater")
    assert experiment is not None
    for name in ("headwater-posterior", "headwater-speed"):
        assert addresses[f"headwater: {name}"].endswith(f"/runs?viewStateShareKey={name}")
        view = json.loads(experiment.tags[f"mlflow.sharedViewState.{name}"])
        assert view["name"] == name and "params.`seed`" in json.loads(view["state"])["selectedColumns"]
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.headwater-speed", "as a user changed it")
    assert compare.mlflow_views([folder]) == {uri: addresses}
    tags = client.get_experiment(experiment.experiment_id).tags
    assert tags["mlflow.sharedViewState.headwater-speed"] == "as a user changed it"


def test_a_run_that_never_reached_mlflow_is_named_with_what_sends_it(tmp_path: Path) -> None:
    folder = run(tmp_path, "one", 0, -10.0)
    with pytest.raises(ConfigError, match=r"no tracking\.json"):
        compare.mlflow_views([folder])
    State("http://127.0.0.1:1", "headwater", "one").save(folder / "tracking.json")
    with pytest.raises(ConfigError, match=r"has not reached http://127\.0\.0\.1:1; python -m system\.tracking"):
        compare.mlflow_views([folder])


@pytest.mark.parametrize(
    ("method", "settings"),
    [("ancestral", {}), ("best_of_n", {}), ("sir", {}), ("smc", {}), ("smc", {"twist": "reward"}), ("beam", {})],
)
def test_samples_without_a_reward_are_left_out_and_counted(tiny_config: Config, method: str, settings: dict[str, Any]) -> None:
    raising = {"kind": "function", "path": "tests.faulty:without_a", "seconds": None}
    task = config_file.parse(
        {"task": tiny_config.task.model_dump() | {"reward": {"kind": "product", "of": [{"kind": "lm_posterior"}, raising]}}}
    ).task
    cfg = tiny_config.model_copy(update={"task": task, "loss": VarGrad()})
    subject = baselines.Baselines(cfg, {"oversample": 2} | settings, None)
    metrics, rows = subject.measure(method, 64)
    assert rows and all("a" not in row["text"] for row in rows)
    assert metrics["reward_faults"] > 0
    assert np.isfinite(metrics["task/mean_log_reward"])


def test_weights_and_bounds_are_of_what_is_held_out_at_the_last_temperature_over_all_draws(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising = {"kind": "function", "path": "tests.faulty:without_a", "seconds": None}
    reward = {"kind": "product", "of": [{"kind": "lm_posterior"}, raising]}
    sections = {"task": tiny_config.task.model_dump() | {"reward": reward, "held_out": 1}, "loss": {"kind": "vargrad"}}
    sections["learner"] = {"reward_temperature": {"start": 1.6, "end": 0.8, "horizon": 5}}
    log_q: dict[tuple[int, ...], float] = {}

    def draw(decoder: Decoder, *how: Any) -> Draws:
        draws = whole(decoder, *how)
        assert draws.log_q_K is not None
        log_q.update(zip(draws.tokens_K, draws.log_q_K.tolist(), strict=True))
        return draws

    whole = decoding.draw
    monkeypatch.setattr(decoding, "draw", draw)
    subject = baselines.Baselines(config_file.parse(tiny_config.model_dump() | sections), {}, None)
    metrics, rows = subject.measure("ancestral", 64)
    assert {row["prompt"] for row in rows} == {"line-2"}
    assert 0 < metrics["reward_faults"] == 64 - len(rows)
    weights = [row["log_reward"] / 0.8 - log_q[tuple(row["tokens"])] for row in rows]
    assert [row["log_weight"] for row in rows] == pytest.approx(weights)
    assert metrics["posterior/log_z_weighted"] == pytest.approx(log_mean_exp(np.array(weights), 64))
    assert metrics["posterior/ess"] == pytest.approx(effective_share(np.array(weights), 64))


def test_smc_alone_asks_at_prefixes_for_functions_that_are_known_there(tiny_config: Config) -> None:
    length = {"kind": "function", "path": "system.tasks.continuation:length", "every_prefix": True, "seconds": None}
    reward = {"kind": "product", "of": [{"kind": "lm_posterior"}, length]}
    task = config_file.parse({"task": tiny_config.task.model_dump() | {"reward": reward}}).task
    subject = baselines.Baselines(tiny_config.model_copy(update={"task": task}), {"oversample": 2}, None)
    subject.measure("sir", 4)
    assert "prefix_reward" not in vars(subject)
    _, rows = subject.measure("smc", 4)
    asked = vars(subject)["prefix_reward"]
    assert asked.progress > 0 == asked.tokens_forwarded
    assert all(len(row["tokens"]) <= 4 for row in rows)


def test_a_method_of_which_no_sample_has_a_reward_says_so(tiny_config: Config) -> None:
    raising = {"kind": "function", "path": "tests.faulty:never", "seconds": None}
    task = config_file.parse({"task": tiny_config.task.model_dump() | {"reward": raising}, "loss": {"kind": "vargrad"}}).task
    subject = baselines.Baselines(tiny_config.model_copy(update={"task": task, "loss": VarGrad()}), {}, None)
    with pytest.raises(
        RunError, match=r"smc: no prompt has two samples with a reward; .*: mend the reward, or raise --samples"
    ):
        subject.measure("smc", 4)


def test_an_adapter_of_another_model_is_refused_by_what_differs(tiny_config: Config, tmp_path: Path) -> None:
    path = tiny_config.model.path

    def refusal(**changed: str) -> str:
        other = tiny_config.model_copy(update={"model": tiny_config.model.model_copy(update=changed)})
        (tmp_path / "config.yaml").write_text(config_file.dump(other))
        with pytest.raises(ConfigError) as refused:
            baselines.Baselines(tiny_config, {}, tmp_path)
        return str(refused.value)

    assert "trained with model.revision='v2', not None: set that" in refusal(revision="v2")
    both = f"trained with model.path='other', not {path!r}; model.revision='v2', not None: set that"
    assert both in refusal(path="other", revision="v2")


def test_a_method_that_is_not_there_is_named(tiny_config: Config) -> None:
    for method, message in (("greedy", "no 'greedy'; there are ancestral, "), ("gflownet_sir", "name it by --run")):
        with pytest.raises(ConfigError, match=message):
            baselines.run(tiny_config, [method], 4, {}, None)
    with pytest.raises(ConfigError, match=r"'gflownet_smc' needs --twist reward: .* or take gflownet_sir"):
        baselines.check(["gflownet_smc"], {}, tuned=True)
    baselines.check(["gflownet_smc"], {"twist": "reward"}, tuned=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--temperature", "0"), r"--temperature=0\.0: must be above 0"),
        (("--temperature", "nan"), "--temperature=nan: must be above 0"),
        (("--top-p", "0"), r"--top-p=0\.0: must be above 0 and at most 1"),
        (("--top-p", "1.1"), r"--top-p=1\.1: must be above 0 and at most 1"),
        (("--penalty", "-1"), r"--penalty=-1\.0: must be 0 or more"),
        (("--oversample", "0"), "--oversample=0: must be 1 or more"),
        (("--methods", "smc,beam,smc"), "--methods: 'smc' is there 2 times; name each method once"),
    ],
)
def test_settings_out_of_bounds_are_named_before_a_model_is_loaded(
    arguments: tuple[str, ...],
    message: str,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(baselines, "take_machine", lambda config: config)
    monkeypatch.setattr(baselines, "Baselines", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "config.yaml").write_text(config_file.dump(tiny_config))
    assert baselines.main([str(tmp_path / "config.yaml"), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_task_with_a_tool_is_refused() -> None:
    cfg = config_file.parse({"task": {"kind": "arithmetic"}})
    with pytest.raises(ConfigError, match=r"task.kind=arithmetic: its samples need a tool"):
        baselines.Baselines(cfg, {}, None)
