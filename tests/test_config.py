"""The config: what is refused and how the message reads, overrides, and the way to YAML and back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deploy.job import main
from system.config import ConfigError
from system.config_file import dump, flatten, load, parse, parse_overrides
from system.learner_config import RewardTemperature
from system.requests import explore
from system.sampler_config import Exploration
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = sorted((ROOT / "deploy" / "configs").glob("*.yaml"))
NUMBER = {"kind": "random_number"}
CONTINUATION = {"kind": "continuation"}
FUNCTION = {"kind": "function", "path": "package.module:name"}
HALF = {"fresh": 0.5, "uniform": 0.5}


def with_field(field: str, value: Any, task: dict[str, Any] = NUMBER) -> dict[str, Any]:
    """The smallest config tree, with one field set."""
    tree: dict[str, Any] = {"task": copy.deepcopy(task)}
    *sections, name = field.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
    node[name] = value
    return tree


def ranks(**learner: Any) -> dict[str, Any]:
    """A learner of two ranks, with fields set."""
    return {"task": NUMBER, "learner": {"ranks": 2, "groups_per_update": 2} | learner}


CONTRAST = {"kind": "product", "of": [{"kind": "lm_posterior"}, {"kind": "contrast"}]}


def refusal(tree: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(tree)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("field", "value", "fix"),
    [
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**32, "less than 4294967296"),
        ("actors.gpus", 2, "less than or equal to 1"),
        ("name", "a/b", "must be of letters, digits, `_`, `.` and `-`"),
        ("name", "../up", "with a letter or digit first"),
        ("tracking.model", "a b", "must be of letters"),
        ("model", "gpt2", "write model.path=gpt2"),
        ("learner.betas", [0.9], "must have as many entries as its default"),
        ("name", 7, "put it in quotes"),
        ("model.path", "", "at least 1 character"),
        ("model.path", None, "put it in quotes"),
        ("lora.rank", 0, "greater than or equal to 1"),
        ("lora.alpha", 0, "greater than 0"),
        ("lora.targets", "q_proj", "must be 'all-linear' or be a list, such as [a, b]"),
        ("lora.targets", [], "must be 'all-linear' or have at least 1 item"),
        ("task.floor", -1, "less than or equal to -10"),
        ("task.high", 10000, "less than or equal to 9999"),
        ("task.stop", "", "at least 1 character"),
        ("sampler.samples_per_prompt", 1, "greater than or equal to 2"),
        ("sampler.dtype", "int8", "'float32' or 'bfloat16'"),
        ("sampler.exploration.epsilon", 1, "less than 1"),
        ("sampler.gpu_memory_utilization", 1.5, "less than or equal to 1"),
        ("actors.count", 0, "greater than or equal to 1"),
        ("actors.cpus", -1, "greater than or equal to 0"),
        ("actors.answer_seconds", 0, "greater than 0"),
        ("learner.answer_seconds", 0, "greater than 0"),
        ("cluster.wait_seconds", -1, "greater than or equal to 0"),
        ("replay.capacity", 0, "greater than or equal to 1"),
        ("learner.lr", 0, "greater than 0"),
        ("learner.lr", float("nan"), "finite number"),
        ("learner.lr", float("inf"), "finite number"),
        ("learner.lr", "fast", "valid number"),
        ("learner.steps", 1.5, "valid integer"),
        ("learner.betas", [0.9, 1.0], "each of the two must be in [0, 1)"),
        ("learner.decay", "exp", "'constant', 'linear' or 'cosine'"),
        ("learner.device", "tpu", "must be auto, cpu, cuda"),
        ("learner.reward_temperature.start", 0, "greater than 0"),
        ("cluster.dashboard", "maybe", "valid boolean"),
        ("tracking.experiment", "", "at least 1 character"),
        ("loss.kind", "dpo", "'pooled', 'vargrad', 'tb', 'db', 'subtb', 'grpo', 'ppo', 'rloo', 'mle'"),
        ("task.kind", "chess", "'random_number', 'continuation'"),
        ("learner", 3, "must be a section"),
        ("learner", None, "leave it out for the defaults"),
        ("loss", "pooled", "a mapping of fields with a kind"),
        ("learner.lrr", 1, "check the spelling: learner.lr? "),
        ("learner.low", 1, "check the spelling: task.low? "),
        ("exploration", {}, "check the spelling: sampler.exploration? "),
        ("task.keywords", [], "no field of this kind, but of kind=constrained; check the kind"),
        ("foo", 1, "check the spelling"),
    ],
)
def test_a_bad_value_is_refused_by_field_value_and_fix(field: str, value: Any, fix: str) -> None:
    message = refusal(with_field(field, value))
    assert any(line.startswith(f"{field}={value!r}: ") and fix in line for line in message.splitlines()), message


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        (with_field("learner.warmup_steps", 100), ["learner: warmup_steps=100", "steps=100", "lower warmup_steps"]),
        ({"task": NUMBER, "loss": {"kind": "tb", "decay": 0.5}}, ["loss.decay=0.5: no field of this kind, but of kind=subtb"]),
        ({"task": NUMBER, "learner.lr": 0.5}, ["learner.lr=0.5: no such field"]),
        (with_field("learner.shard_base", True), ["learner: shard_base=true", "ranks=1", "raise ranks"]),
        (with_field("learner.gpus", 4), ["learner: gpus=4", "one rank", "ranks=4 and gpus=1"]),
        (with_field("learner.ranks", 2), ["learner: ranks=2", "groups_per_update=1", "set groups_per_update >= 2"]),
        (ranks(gpus=0.5), ["learner: gpus=0.5", "ranks=2", "set gpus=1 or 0"]),
        (ranks(device="cuda"), ["learner: device=cuda with ranks=2 and gpus=0", "gpus=1"]),
        (ranks(device="cuda:1", gpus=1), ["learner: device=cuda:1 with ranks=2", "device=auto or cuda"]),
        (ranks(device="cpu", gpus=1), ["learner: device=cpu with ranks=2 and gpus=1", "device=cpu with gpus=0"]),
        (with_field("actors.max", 1) | {"actors": {"min": 2, "max": 1}}, ["actors: min=2 is above max=1", "raise max"]),
        (
            {"task": NUMBER, "actors": {"gpus": 1}, "sampler": {"install": "adapter"}},
            ["sampler.install=adapter with sampler.dtype=float32 and actors.gpus=1", "set sampler.dtype=bfloat16"],
        ),
        (
            {"task": NUMBER, "actors": {"gpus": 0.25}, "sampler": {"gpu_memory_utilization": 0.5}},
            ["sampler.gpu_memory_utilization=0.5 is more of a GPU than actors.gpus=0.25", "lower it"],
        ),
        (with_field("learner", {"device": "cpu", "gpus": 1}), ["gpus=1 would be reserved for device=cpu", "set gpus=0, or"]),
        (with_field("learner.max_staleness", 1), ["max_staleness=1 is", "publish_every - 1 = 3", ">= 3 or publish_every <= 2"]),
        (with_field("replay.fresh", 0.5), ["replay: fresh=0.5, prioritised=0 and uniform=0", "add up to 0.5", "change one"]),
        (with_field("replay.demonstrations", True), ["replay: demonstrations=true", "fresh=1", "lower fresh"]),
        (
            {"task": NUMBER, "cluster": {"wait_seconds": 700}},
            ["cluster.wait_seconds=700 is above actors.start_seconds=600", "raise actors.start_seconds or lower"],
        ),
        (with_field("sampler.exploration.temperature", [2, 1]), ["sampler.exploration: temperature=[2.0, 1.0]", "low <= high"]),
        (with_field("sampler.exploration.temperature", [1, float("nan")]), ["sampler.exploration.temperature.1=nan", "finite"]),
        ({"task": NUMBER | {"reward": {"kind": "verifier"}}}, ["task.reward.kind='verifier': must be one of 'lm_posterior'"]),
        ({"task": NUMBER | {"low": 5, "high": 5}}, ["task: high=5", "low=5", "raise high"]),
        (with_field("task.prompt", "{name}"), ["task: prompt='{name}'", "only {low} and {high}"]),
        (with_field("task.prompt", "{low.x}"), ["task: prompt='{low.x}'", "only {low} and {high}"]),
        (with_field("task.prompt", "{low[0]}"), ["task: prompt='{low[0]}'", "only {low} and {high}"]),
        (with_field("task.prompt", "a { b"), ["task: prompt='a { b'", "write {{ and }} for braces"]),
        (
            {"task": {"kind": "arithmetic", "rationales": "a.json"}},
            ["task: rationales='a.json'", "questions=generated", "set rationales=null"],
        ),
        (with_field("task.min_tokens", 31, CONTINUATION), ["task: min_tokens=31", "max_tokens=30", "lower min_tokens"]),
        ({"task": NUMBER | {"reward": FUNCTION | {"path": "a.b"}}}, ["task.reward.path='a.b': must be module:function"]),
        ({"task": NUMBER | {"reward": {"kind": "product", "of": [FUNCTION]}}}, ["task.reward.of=", "have at least 2 items"]),
        ({"task": NUMBER | {"reward": CONTRAST}}, ["kind=contrast", "task.kind=random_number has none", "stage=reason"]),
        ({"task": {"kind": "subjectivity", "stage": "label"}}, ["task.stage=label with loss.kind=pooled", "set loss.kind=mle"]),
        ({"task": {"kind": "subjectivity", "prompt": "hello"}}, ["prompt='hello' is the same for every text", "write {text}"]),
        ({"task": {"kind": "verifiable", "prompt": "hello"}}, ["prompt='hello' is the same for every question"]),
        ({"task": NUMBER | {"reward": {"kind": "product", "of": [FUNCTION, {}]}}}, ["lm_posterior, function, contrast"]),
        ({"task": {"kind": "subjectivity", "stage": "label", "reward": CONTRAST}}, ["task.stage=label has none"]),
        (with_field("learner.reward_temperature.start", 2.0), ["learner.reward_temperature: start=2", "set horizon"]),
        (with_field("learner.reward_temperature", {"start": 2, "end": 2}), ["reward_temperature.end=2", "set end=1 or below"]),
        (with_field("learner.steps", True), ["learner: steps=True", "truth value", "give a number"]),
        (with_field("loss.decay", 0.5), ["loss.kind: must be set, to one of pooled, vargrad", "subtb, grpo, ppo, rloo, mle"]),
        (with_field("task.reward.beta", 2.0), ["task.reward.kind: must be set, to one of lm_posterior, function, product"]),
        ({"task": {}}, ["task.kind: must be set, to one of random_number, continuation"]),
        ({}, ["task.kind: must be set, to one of random_number, continuation"]),
        (None, ["a mapping of sections, not NoneType"]),
        ([NUMBER], ["a mapping of sections, not list"]),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_both_values_and_a_fix(tree: Any, expected: list[str]) -> None:
    message = refusal(tree)
    assert all(piece in message for piece in expected), message


@pytest.mark.parametrize("loss", ["db", "subtb", "tb"])
def test_a_loss_inside_a_trajectory_wants_a_reward_there(loss: str) -> None:
    product = {"kind": "product", "of": [{"kind": "lm_posterior"}, FUNCTION]}
    for reward in (FUNCTION, product):
        message = refusal({"task": NUMBER | {"reward": reward}, "loss": {"kind": loss}})
        assert f"loss.kind={loss}" in message
        assert f"task.reward.kind={reward['kind']}" in message
        assert "use loss.kind=vargrad or pooled" in message
    everywhere = FUNCTION | {"every_prefix": True}
    for reward in (everywhere, product | {"of": [{"kind": "lm_posterior"}, everywhere]}, {"kind": "lm_posterior"}):
        assert parse({"task": NUMBER | {"reward": reward}, "loss": {"kind": loss}}).loss.kind == loss


@pytest.mark.parametrize("loss", ["grpo", "ppo", "rloo"])
def test_a_policy_gradient_refuses_samples_that_are_not_the_policys(loss: str) -> None:
    own: dict[str, Any] = {"sampler": {"exploration": {"on_policy": 1}}, "replay": {"fresh": 1}}
    base = {"task": NUMBER, "loss": {"kind": loss}}
    assert parse(base | own).loss.kind == loss
    message = refusal(base | own | {"replay": {"fresh": 0.5, "uniform": 0.5}})
    assert f"loss.kind={loss}" in message
    assert "replay.fresh=0.5" in message
    fix = ["sampler.exploration.on_policy=1", "sampler.exploration.planted=0"]
    assert all(each in message for each in fix)
    fix.append("replay={fresh: 1, prioritised: 0, uniform: 0, demonstrations: false}")
    assert fix[-1] in message
    for name in ("arithmetic", "constrained"):
        assert load(ROOT / f"deploy/configs/{name}.yaml", [f"loss.kind={loss}", *fix]).loss.kind == loss
    assert "sampler.exploration.on_policy=0.5" in refusal(base | {"replay": {"fresh": 1}})


@pytest.mark.parametrize("loss", ["pooled", "vargrad"])
def test_a_loss_across_the_group_takes_terminal_rewards(loss: str) -> None:
    assert not parse({"task": NUMBER | {"reward": FUNCTION}, "loss": {"kind": loss}}).task.reward.every_prefix


def test_every_wrong_field_has_a_line() -> None:
    message = refusal({"task": NUMBER, "seed": -1, "learner": {"lr": -1, "stepz": 3}, "actors": {"count": 0}})
    assert {line.split("=")[0] for line in message.splitlines()} == {"seed", "actors.count", "learner.lr", "learner.stepz"}


def test_a_mistake_inside_a_list_or_section_has_one_line() -> None:
    factor = {"kind": "function", "path": "my_rewards:score", "beta": 0}
    product = {"kind": "product", "of": [{"kind": "lm_posterior"}, factor]}
    assert refusal(with_field("task.reward", product)) == "task.reward.of.1.beta=0: must be greater than 0"
    factor |= {"path": "my_rewards.py:score", "beta": 1}
    fix = "must be a module and not a file; leave .py out: my_rewards:score"
    assert refusal(with_field("task.reward", product)) == f"task.reward.of.1.path='my_rewards.py:score': {fix}"
    assert refusal(with_field("lora.targets", [3])) == "lora.targets.0=3: must be a text; put it in quotes"


def test_a_long_value_is_shortened_in_the_message() -> None:
    assert len(refusal(with_field("learner.decay", "x" * 10_000))) < 300


def test_lengths_are_checked_against_the_model() -> None:
    config = parse(with_field("task.max_tokens", 30, CONTINUATION))
    config.check_lengths(context_length=128, lengths={"line-1": 97})  # 97 + 30 + the stop
    with pytest.raises(ConfigError) as caught:
        config.check_lengths(context_length=128, lengths={"line-1": 97, "line-2": 98, "line-3": 100})
    expected = ("task.max_tokens=30", "'line-3' (100 tokens", "longest of 2", "131", config.model.path, "128", "shorten")
    assert all(piece in str(caught.value) for piece in expected)


def test_a_sharded_base_may_have_more_ranks_than_groups() -> None:
    learner = parse(ranks(ranks=4, shard_base=True, groups_per_update=1)).learner
    assert (learner.ranks, learner.groups_per_update) == (4, 1)


# ----------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize("override", ["steps", "=3", "learner..lr=1", ".lr=1", "learner.=1", ""])
def test_an_override_that_is_no_assignment_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not of the form key=value, such as actors\.count=2") as caught:
        parse_overrides([override])
    assert repr(override) in str(caught.value)


@pytest.mark.parametrize("override", ["task.illegal=[a", "name=2001-13-01", "name=!x y", "seed=" + "1" * 5000])
def test_an_override_with_a_value_that_is_no_yaml_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"the value is not YAML .*; put it in quotes") as caught:
        parse_overrides([override])
    assert repr(override) in str(caught.value)


def test_a_plain_value_cannot_be_used_as_a_section() -> None:
    with pytest.raises(ConfigError, match=r"override 'learner.lr.x=2': 'lr' was already set to a plain value"):
        parse_overrides(["learner.lr=1", "learner.lr.x=2"])


def test_a_value_may_contain_an_equals_sign_and_the_last_of_two_counts() -> None:
    assert parse_overrides(["task.prompt=a=b", "seed=1", "seed=2"]) == {"task": {"prompt": "a=b"}, "seed": 2}


def test_overrides_are_laid_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {kind: random_number, high: 50}\nlearner: {steps: 10, warmup_steps: 2}\n")
    config = load(path, ["learner.lr=1e-4", "learner.warmup_steps=3", "actors.count=2", "task.high=60"])
    assert (config.learner.lr, config.learner.steps, config.learner.warmup_steps) == (1e-4, 10, 3)
    assert (config.actors.count, config.task.max_tokens) == (2, 2)


def test_another_kind_starts_a_section_afresh(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {kind: continuation, max_tokens: 9}\nloss: {kind: subtb, decay: 0.5}\n")
    assert load(path, ["loss.kind=subtb"]).loss == load(path).loss
    assert load(path, ["loss.kind=pooled"]).loss.kind == "pooled"  # subtb's decay would be an unknown field
    assert load(path, ["task.kind=random_number", "task.high=7"]).task.max_tokens == 1


def test_an_override_of_one_field_keeps_the_rest_of_a_section_or_list_at_its_default(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {kind: verifiable}\n")
    kept = load(path).task.reward.model_dump(mode="json")
    kept["of"][1]["beta"] = 0.05
    assert load(path, ["task.reward.of.1.beta=0.05"]).task.reward.model_dump(mode="json") == kept
    changed = load(path, ["task.reward.of.1={kind: lm_posterior}"]).task.reward.model_dump()
    assert [factor["kind"] for factor in changed["of"]] == ["lm_posterior", "lm_posterior"]
    assert load(path, ["learner.betas.1=0.5"]).learner.betas == (0.9, 0.5)
    path = write(tmp_path, "task: {kind: continuation}\n")
    assert not load(path, ["task.reward.every_prefix=false", "loss.kind=vargrad"]).task.reward.every_prefix


@pytest.mark.parametrize(
    "overrides",
    [["task.reward.kind=function", "task.reward.path=a.b:f"], ["task.reward={kind: function, path: 'a.b:f'}"]],
    ids=["by field", "whole"],
)
def test_a_reward_that_is_named_by_its_kind_has_nothing_of_the_tasks_own(tmp_path: Path, overrides: list[str]) -> None:
    given = load(write(tmp_path, "task: {kind: random_number}\nloss: {kind: vargrad}\n"), overrides).task.reward
    assert given == load(write(tmp_path, f"task: {{{REWARD_OF_A_FILE}}}\nloss: {{kind: vargrad}}\n")).task.reward
    assert given.model_dump()["seconds"] == 10
    path = write(tmp_path, f"task: {{{REWARD_OF_A_FILE.replace('}', ', beta: 0.3}')}}}\nloss: {{kind: vargrad}}\n")
    assert load(path, overrides).task.reward.model_dump()["beta"] == 0.3, "what the file says of the same kind stays"


REWARD_OF_A_FILE = "kind: random_number, reward: {kind: function, path: 'a.b:f'}"


def test_overrides_count_from_the_entries_of_the_files_own_list(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {kind: continuation, illegal: [a, b]}\n")
    assert load(path, ["task.illegal.1=c"]).task.model_dump()["illegal"] == ("a", "c")
    with pytest.raises(ConfigError, match=r"override task.illegal.2: task.illegal has 2 entries, of which the first is 0"):
        load(path, ["task.illegal.2=c"])


def test_an_override_through_a_plain_value_of_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "task: {kind: random_number}\nname: here\n")
    with pytest.raises(ConfigError, match=r"name=\{'x': 3\}: must be a text"):
        load(path, ["name.x=3"])


KEYS = st.text("abcde", min_size=1, max_size=3)
VALUES = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.text("xyz= .", max_size=5))


@given(st.dictionaries(KEYS, st.one_of(VALUES, st.dictionaries(KEYS, VALUES, min_size=1))))
def test_overrides_say_any_tree(tree: dict[str, Any]) -> None:
    """One `a.b=value` for each leaf, with the value as YAML, gives the tree back."""

    def plain(value: Any) -> str:
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()

    overrides = []
    for key, value in tree.items():
        if isinstance(value, dict):
            overrides += [f"{key}.{inner}={plain(leaf)}" for inner, leaf in value.items()]
        else:
            overrides.append(f"{key}={plain(value)}")
    assert parse_overrides(overrides) == tree


@given(st.lists(st.text(max_size=12), max_size=4))
def test_overrides_are_read_or_refused_but_never_crash(overrides: list[str]) -> None:
    try:
        assert isinstance(parse_overrides(overrides), dict)
    except ConfigError as error:
        assert "override" in str(error)


# --------------------------------------------------------------------------------------------------------- files


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no.yaml' cannot be read: No such file or directory; name a YAML file"):
        load(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory; name a YAML file"):
        load(tmp_path)


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml' is not UTF-8 \(byte 9\); save it as UTF-8"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b", "is a list, but must be a mapping"),
        ("hello", "is a str, but must be a mapping"),
        ("[]", "is a list, but must be a mapping"),
        ("0", "is a int, but must be a mapping"),
        ("a: [1", r"is not YAML \(line 1, column 6: .*\); correct it"),
        ("name: a\nseed: 1\nname: b", r"line 3, column 1: 'name' is set twice"),
        ("learner: {lr: 1, lr: 2}", "'lr' is set twice"),
        ("name: 2001-13-01", "month must be in 1..12"),
        ("{[a]: 1}", "found unhashable key"),
        ("name: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("", "task.kind: must be set"),
    ],
)
def test_a_file_that_is_no_mapping_of_sections_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load(write(tmp_path, text))


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_every_packaged_config_loads_under_its_own_name(path: Path) -> None:
    config = load(path)
    assert config.name == path.stem
    assert parse(yaml.safe_load(dump(config))) == config


def test_there_are_packaged_configs() -> None:
    assert {"random_number", "continuation"} <= {path.stem for path in PACKAGED}


# ------------------------------------------------------------------------------------------------ dump and flatten


@given(
    prompt=st.text(min_size=1).filter(lambda text: "{" not in text and "}" not in text),
    lr=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    illegal=st.lists(st.text(), max_size=4),
)
@example(prompt="123", lr=1e-5, illegal=["\n", "\r", "yes", "“", "\ufeff", "\x85", "1e-3", "null"])
def test_dump_and_load_give_the_config_back(tmp_path: Path, prompt: str, lr: float, illegal: list[str]) -> None:
    for task in (NUMBER | {"prompt": prompt}, CONTINUATION | {"illegal": illegal}):
        config = parse({"task": task, "learner": {"lr": lr}, "loss": {"kind": "subtb", "decay": 0.5}})
        assert load(write(tmp_path, dump(config))) == config


def test_a_product_of_rewards_survives_dump_and_load(tmp_path: Path) -> None:
    reward = {"kind": "product", "of": [{"kind": "lm_posterior"}, FUNCTION | {"beta": 0.5}]}
    config = parse({"task": CONTINUATION | {"reward": reward}, "lora": {"targets": ["q_proj"]}})
    assert load(write(tmp_path, dump(config))) == config


def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a section tree by attribute access, sections in lists included."""
    if isinstance(node, BaseModel):
        dot = f"{prefix}." if prefix else ""
        return {key: v for name in type(node).model_fields for key, v in leaves(getattr(node, name), dot + name).items()}
    if isinstance(node, tuple) and any(isinstance(item, BaseModel) for item in node):
        return {key: v for i, item in enumerate(node) for key, v in leaves(item, f"{prefix}.{i}").items()}
    return {prefix: list(node) if isinstance(node, tuple) else node}


def test_flatten_has_every_leaf_by_its_path() -> None:
    product = {"kind": "product", "of": [{"kind": "lm_posterior"}, FUNCTION]}
    for task in (NUMBER, CONTINUATION, CONTINUATION | {"reward": product}):
        config = parse({"task": task})
        assert flatten(config) == leaves(config)
        assert flatten(config)["learner.lr"] == config.learner.lr
    assert flatten(config)["task.reward.of.1.path"] == FUNCTION["path"]


def test_nothing_in_a_config_can_be_changed() -> None:
    config = parse({"task": NUMBER})
    for section, field in ((config, "seed"), (config.learner, "lr"), (config.task, "high"), (config.task.reward, "beta")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, 1)


def test_an_error_crosses_process_borders_whole() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("learner.lr=0: must be greater than 0")))
    assert isinstance(error, ConfigError)
    assert str(error) == "learner.lr=0: must be greater than 0"


def test_the_reward_temperature_moves_linearly_and_stays() -> None:
    schedule = RewardTemperature(start=2.0, end=1.0, horizon=10)
    assert [schedule.at(step) for step in (0, 5, 10, 99)] == [2.0, 1.5, 1.0, 1.0]
    assert RewardTemperature(start=0.8, end=0.8).at(0) == 0.8


# ---------------------------------------------------------------------------------------------------- the command


def job(*arguments: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, str(ROOT / "deploy" / "job.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_dry_run_prints_a_config_that_loads_and_imports_nothing_heavy(tmp_path: Path, elsewhere: bool) -> None:
    path = ROOT / "deploy/configs/random_number.yaml"
    cwd, name = (tmp_path, str(path)) if elsewhere else (ROOT, "deploy/configs/random_number.yaml")
    done = job("--dry-run", name, "actors.count=2", cwd=cwd, options=("-X", "importtime"))
    assert done.returncode == 0, done.stderr
    assert load(write(tmp_path, done.stdout)) == load(path, ["actors.count=2"])
    imported = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "pydantic" in imported
    assert not imported & {"torch", "ray", "vllm", "mlflow", "transformers", "peft", "numpy"}
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]


def test_a_config_error_ends_the_job_with_code_2_and_one_readable_line(tmp_path: Path) -> None:
    done = job("--dry-run", str(ROOT / "deploy/configs/random_number.yaml"), "learner.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("config error: learner.lrr=1: no such field")


def test_a_check_reads_the_tokenizer_and_the_data_and_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    few = ("task.prompts=prompts.txt", f"model.path={tiny.folder(tmp_path)}", "learner.steps=2", "learner.warmup_steps=0")
    config = str(ROOT / "deploy/configs/continuation.yaml")
    done = job("--check", config, *few, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 prompts, contexts of up to ")
    assert "draws 2 groups for 3 prompts: the others are never seen; raise steps" in done.stderr
    assert "replays earlier samples of a prompt, and none comes a second time" in done.stderr
    assert not (tmp_path / "runs").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("def score(*_): return 0.0\n")
    refused = {
        "task.prompts=none.txt": "task.prompts='none.txt' cannot be read",
        "lora.start=nosuch": "lora.start='nosuch': no run and no PEFT folder",
        "task.reward={kind: function, path: 'nosuch:score'}": "task.reward.path='nosuch:score': there is no module 'nosuch'",
        "task.reward={kind: function, path: 'mine:scor'}": "task.reward.path='mine:scor'",
        "loss.kind=mle": "task: no prompt has a demonstration",
    }
    for override, message in refused.items():
        assert main(["--check", config, *few, override, "replay={fresh: 1, prioritised: 0, uniform: 0}"]) == 2
        output = capsys.readouterr()
        assert output.out == "" and message in output.err


REWARD = "task.reward={{kind: function, path: 'mine:score', batch: {}, seconds: 2}}"


@pytest.mark.parametrize(
    ("code", "batch", "status", "said"),
    [
        ("def score(text): return 0.0", False, 2, "cannot be called with (prompt, text, tokens), as it is score(text)"),
        ("def score(*_): return 'good'", False, 2, "function 'score' returned 'good' for prompt 'line-1', text "),
        ("def score(*_): return 1.0", True, 2, "returned 1.0, which is no list, for prompt 'line-1', 2 texts; return one"),
        ("def score(*_): return [1.0]", True, 2, "returned 1 values for prompt 'line-1', 2 texts; return one for each"),
        ("def score(prompt, *_): return prompt.meta['x']", False, 0, "KeyError: 'x'; a sample without a reward is left out"),
        ("def score(*_): import time; time.sleep(9)", False, 0, "no answer after 2 s; a sample without a reward is left out"),
        ("def score(prompt, texts, _): return [len(prompt.meta['text'] + text) for text in texts]", True, 0, ""),
    ],
)
def test_a_check_calls_the_reward_once_on_the_first_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
    code: str, batch: bool, status: int, said: str,
) -> None:  # fmt: skip
    (tmp_path / "prompts.txt").write_text("one\n")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config, reward = str(ROOT / "deploy/configs/continuation.yaml"), REWARD.format(str(batch).lower())
    few = ("task.prompts=prompts.txt", f"model.path={tiny.folder(tmp_path)}", "replay={fresh: 1, prioritised: 0, uniform: 0}")
    assert main(["--check", config, *few, reward]) == status
    told = capsys.readouterr().err if status else caplog.text
    assert said in told
    assert ("task.reward.path='mine:score'" in told) == bool(said)


def test_a_tracking_uri_that_is_refused_or_passes_away_is_named_before_anything_starts(tmp_path: Path) -> None:
    config = str(ROOT / "deploy/configs/random_number.yaml")
    done = job("--dry-run", config, "tracking.uri=./mlruns", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "tracking.uri='./mlruns': a scheme that is not supported" in done.stderr
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0a1b"
    copy.mkdir(parents=True)
    done = job("--dry-run", config, f"output_dir={tmp_path}", cwd=copy)
    assert "tracking.uri='sqlite:///mlflow.db' is in the copy of the working directory" in done.stderr
    assert "output_dir=" not in done.stderr
    for stays in ("tracking.uri=http://mlflow.example:5000", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"):
        assert job("--dry-run", config, f"output_dir={tmp_path}", stays, cwd=copy).stderr == ""


@pytest.mark.parametrize(("steps", "replay", "warned"), [(2, {}, 1), (3, {}, 0), (3, HALF, 1), (4, HALF, 0), (2, HALF, 2)])
def test_prompts_that_are_never_seen_and_replay_that_has_nothing_are_warned_of(
    steps: int, replay: dict[str, Any], warned: int
) -> None:
    learner = {"steps": steps, "warmup_steps": 0}
    assert len(parse({"task": NUMBER, "learner": learner, "replay": replay}).warnings_about(3)) == warned
    more = parse({"task": NUMBER, "learner": learner | {"groups_per_update": 2}, "replay": replay})
    assert more.warnings_about(3) == []


def test_ranks_without_a_prompt_of_their_own_are_warned_of() -> None:
    config = parse({"task": NUMBER, "learner": {"ranks": 2, "groups_per_update": 2}})
    [warning] = config.warnings_about(1)
    assert warning.startswith("learner.ranks=2 share out the prompts of an update, and the task has 1: ")
    assert config.warnings_about(2) == []


def test_tracking_goes_where_mlflow_itself_would_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert parse({"task": NUMBER}).tracking.uri == "sqlite:///mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert parse({"task": NUMBER}).tracking.uri == "http://mlflow:5000"
    assert parse({"task": NUMBER, "tracking": {"uri": "sqlite:///a.db"}}).tracking.uri == "sqlite:///a.db"


def test_an_engine_takes_half_of_what_is_reserved_of_a_gpu() -> None:
    for gpus, share in ((0, 0.5), (1, 0.5), (0.5, 0.25)):
        assert parse({"task": NUMBER, "actors": {"gpus": gpus}}).gpu_memory_utilization == share
    own = {"task": NUMBER, "actors": {"gpus": 0.5}, "sampler": {"gpu_memory_utilization": 0.4}}
    assert parse(own).gpu_memory_utilization == 0.4


def test_the_job_without_a_config_says_what_it_needs(tmp_path: Path) -> None:
    done = job(cwd=tmp_path)
    assert done.returncode == 2
    assert "a config file is needed, such as deploy/configs/random_number.yaml" in done.stderr
    done = job("--dry-run", "--resume", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "RUN='nothing': no such run" in done.stderr
    done = job("a.yaml", "--resume", "nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "--resume takes the run's own config: leave a.yaml out" in done.stderr


@pytest.mark.parametrize(
    ("on_policy", "planted", "samples"),
    [(1, 0.67, 12), (0.5, 0.05, 12), (0.95, 1, 8)],
)
def test_what_would_be_planted_into_no_sample_is_refused(on_policy: float, planted: float, samples: int) -> None:
    exploration = Exploration(on_policy=on_policy, planted=planted)
    hints, rng = [(1,)], np.random.default_rng(0)
    assert not any(behaviour.planted for behaviour in explore(exploration, samples, hints, 4, rng))
    tree = with_field("sampler.exploration", exploration.model_dump(), {"kind": "constrained", "keywords": ["a"]})
    tree["sampler"]["samples_per_prompt"] = samples
    message = refusal(tree)
    expected = (f"sampler: exploration.planted={planted:g}", f"samples_per_prompt={samples}", "raise planted, lower on_policy")
    assert all(piece in message for piece in expected), message
    tree["sampler"]["exploration"] |= {"planted": 0.5, "on_policy": 0.5}
    assert parse(tree)


@pytest.mark.parametrize(
    ("steps", "overrides", "warned"),
    [
        (60, [], True),
        (80, [], True),
        (81, [], False),
        (60, ["loss.kind=mle", "replay={fresh: 1, prioritised: 0, uniform: 0}"], False),
        (60, ["learner.reward_temperature.end=1"], False),
    ],
)
def test_a_reward_temperature_that_does_not_reach_its_end_is_warned_of(steps: int, overrides: list[str], warned: bool) -> None:
    warnings = load(ROOT / "deploy/configs/continuation.yaml", [f"learner.steps={steps}", *overrides]).warnings()
    assert len(warnings) == warned
    for piece in (f"learner.reward_temperature.horizon=80 with learner.steps={steps}", "evaluations take T at its end, 0.8"):
        assert all(piece in warning for warning in warnings)


def test_the_job_logs_its_warnings_and_goes_on(tmp_path: Path) -> None:
    done = job("--dry-run", str(ROOT / "deploy/configs/continuation.yaml"), "learner.steps=60", cwd=tmp_path)
    assert done.returncode == 0
    assert "WARNING headwater: learner.reward_temperature.horizon=80" in done.stderr


def test_what_is_to_be_planted_has_to_be_there_and_to_fit() -> None:
    exploration = {"exploration": {"planted": 0.5}}
    message = refusal({"task": {"kind": "continuation"}, "sampler": exploration})
    assert "sampler.exploration.planted=0.5" in message and "use kind=constrained with keywords" in message
    config = parse({"task": {"kind": "constrained", "keywords": ["a"], "max_tokens": 3}, "sampler": exploration})
    config.check_planted([(1, 2, 3)])
    for hints in ([], [(1, 2), (3, 4)]):
        with pytest.raises(ConfigError, match=r"planted=0\.5: the keywords are [04] tokens .* task\.max_tokens=3"):
            config.check_planted(hints)


def test_samplers_that_a_range_does_not_have_are_warned_of() -> None:
    path, between = ROOT / "deploy/configs/random_number.yaml", ["actors.min=2", "actors.max=4"]
    [warning] = load(path, [*between, "actors.count=8"]).warnings()
    assert warning == "actors.count=8 counts for nothing beside min=2 and max=4"
    assert load(path, between).warnings() == load(path, ["actors.count=5"]).warnings() == []


def test_samplers_for_which_the_gate_has_no_work_are_warned_of() -> None:
    path = ROOT / "deploy/configs/random_number.yaml"
    [warning] = load(path, ["actors.count=8"]).warnings()
    assert "max_staleness=4 with groups_per_update=1 lets 5 groups be under way at a time: 3 of 8 samplers" in warning
    assert load(path, ["actors.count=8", "learner.groups_per_update=2"]).warnings() == []


def test_float32_on_a_gpu_is_warned_of() -> None:
    path, gpus = ROOT / "deploy/configs/random_number.yaml", ["actors.gpus=1", "learner.gpus=1"]
    [warning] = load(path, gpus).warnings()
    assert warning.startswith("sampler.dtype, sampler.reward_dtype, learner.dtype are float32, which a GPU computes")
    [warning] = load(path, [*gpus, "sampler.dtype=bfloat16", "sampler.reward_dtype=bfloat16"]).warnings()
    assert warning.startswith("learner.dtype is float32")


def test_a_high_temperature_is_refused_where_the_posterior_is_listed_alone() -> None:
    hot = {"reward_temperature": {"start": 1.2, "end": 1.2}}
    with pytest.raises(ConfigError, match=r"reward_temperature.end=1.2 with task.kind=random_number: numbers stay equally"):
        parse({"task": NUMBER, "learner": hot})
    assert parse({"task": NUMBER | {"reward": {"kind": "lm_posterior"}}, "learner": hot})


def test_a_learner_has_as_many_threads_as_cpus_unless_it_is_said() -> None:
    def threads(**learner: Any) -> int:
        return parse({"task": {"kind": "continuation"}, "learner": learner}).learner.thread_count

    assert [threads(), threads(cpus=4), threads(cpus=0.5), threads(cpus=0), threads(cpus=4, threads=2)] == [1, 4, 1, 1, 2]
