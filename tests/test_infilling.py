"""Infilled sentences: what of a story is prompt, evidence and demonstration, and the overlap with the story's own sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from system.config import ConfigError
from system.tasks.infilling import overlap
from system.tasks.problem import Problem
from system.text import decode
from tests.problems import TOKENIZER, asked, judged, problem, text_of

FIVE = '{"id": "a", "sentences": ["one. ", "two.", " three.", "four.", "five."]}'
TWO = '{"before": "one.", "after": "three.", "middle": "two."}'


def infilling(text: str, folder: Path, **fields: Any) -> Problem:
    (folder / "stories.jsonl").write_text(text, encoding="utf-8")
    return problem("infilling", stories=str(folder / "stories.jsonl"), **fields)


def test_the_policy_sees_both_sides_and_the_reward_scores_the_ending_as_evidence(tmp_path: Path) -> None:
    template = "b {before} e {after} m"
    given = infilling(f"{FIVE}\n\n{TWO}\n", tmp_path, prompt=template)
    five, two = given.prompts
    assert text_of(five) == "b one. two. three. e five. m"
    assert decode(TOKENIZER, five.reward_tokens[1:]) == "one. two. three."
    assert decode(TOKENIZER, five.evidence_tokens or ()) == " five."
    assert five.meta["middle"] == "four."
    assert (two.id, text_of(two)) == ("line-3", "b one. e three. m")
    assert given.reward_stop == (given.constraints.stop_token,)
    # The evidence opens a sentence, so it begins with a space and without a beginning-of-sequence token.
    assert five.evidence_tokens is not None
    assert five.evidence_tokens[0] == TOKENIZER.encode(" ", add_special_tokens=False)[0]


def test_the_gap_may_be_another_sentence(tmp_path: Path) -> None:
    (story,) = infilling(FIVE, tmp_path, gap=1, prompt="{before}|{after}".replace("|", "-")).prompts
    assert text_of(story) == "one.-three. four. five."
    assert story.meta["middle"] == "two."
    [unknown] = infilling('{"before": "one.", "after": "three.", "middle": null}', tmp_path).prompts
    assert unknown.meta["middle"] == ""


def test_tokens_that_a_model_drew_are_taken_as_they_are(tmp_path: Path) -> None:
    after, middle = TOKENIZER.encode("  xy", add_special_tokens=False), TOKENIZER.encode("ab", add_special_tokens=False)
    story = {"before": "one.", "after": "xy", "middle": "ab.", "tokens": {"middle": middle, "after": after}}
    task = infilling(json.dumps(story), tmp_path)
    (prompt,) = task.prompts
    assert list(prompt.evidence_tokens or ()) == after
    [demonstration] = task.demonstrations[prompt.id]
    assert demonstration.tokens_T.tolist() == middle
    with pytest.raises(ConfigError, match="are not its text"):
        infilling(json.dumps(story | {"after": "yx"}), tmp_path)


@pytest.mark.parametrize(("longest", "stop"), [(4, "sampled"), (3, "forced")])
def test_a_demonstration_as_long_as_may_be_has_a_forced_stop(tmp_path: Path, longest: int, stop: str) -> None:
    task = infilling('{"before": "one.", "after": "two.", "middle": "ab."}', tmp_path, max_tokens=longest)  # " ab"
    [demonstration] = task.demonstrations["line-1"]
    assert demonstration.stop == stop


def test_a_demonstration_that_is_too_long_to_draw_is_left_out_and_counted(tmp_path: Path) -> None:
    task = infilling('{"before": "one.", "after": "two.", "middle": "ab."}', tmp_path, max_tokens=2)
    assert (task.demonstrations, task.undrawable) == ({}, 1)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("{", {}, "line 1: no JSON"),
        ("[1]", {}, "line 1: needs"),
        (f'{TWO}\n{{"before": "x"}}', {}, "line 2: needs"),
        ('{"before": " ", "after": "y"}', {}, "line 1: needs"),
        ('{"sentences": ["a", "", "c", "d", "e"]}', {}, "line 1: needs"),
        (FIVE, {"gap": 4}, "line 1: task.gap=4 needs sentences before and after it, but there are 5"),
        (f"{FIVE}\n{FIVE}", {}, "two stories have the same id"),
        (FIVE, {"offset": 1}, "none of them after task.offset=1"),
    ],
)
def test_lines_that_are_no_stories_are_refused(tmp_path: Path, text: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        infilling(text, tmp_path, **fields)
    with pytest.raises(ConfigError, match="cannot be read"):
        problem("infilling", stories=str(tmp_path / "none"))


def test_the_packaged_stories_are_whole_and_fit_the_packaged_model(smollm2: PreTrainedTokenizerBase) -> None:
    given = problem("infilling", smollm2)
    assert len(given.prompts) >= 10
    assert all(prompt.meta["middle"] for prompt in given.prompts)
    assert all(5 < len(prompt.evidence_tokens or ()) < 40 for prompt in given.prompts)
    # What was written could have been drawn.
    for prompt in given.prompts:
        tokens = smollm2.encode(" " + prompt.meta["middle"].removesuffix("."), add_special_tokens=False)
        given.constraints.column_of(np.array(tokens))


def test_an_infilled_sentence_is_compared_with_the_storys_own_without_its_stop() -> None:
    prompt = asked(middle="The cat sat on the mat.", stop=".")
    same, near, far = (
        judged(overlap, prompt, [text]) for text in (" The cat sat on the mat", " The dog sat on the mat", " No")
    )
    assert same == {"bleu_4": pytest.approx(1.0), "gleu_4": pytest.approx(1.0)}
    # 5/6, 3/5, 2/4 and 1/3 of the n-grams are right; GLEU counts them together.
    assert near["bleu_4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert near["gleu_4"] == pytest.approx(11 / 18)
    assert far["bleu_4"] < 0.01
    assert far["gleu_4"] == 0.0
    both = judged(overlap, prompt, [" The cat sat on the mat", ""])
    assert both["gleu_4"] == pytest.approx(0.5)


def test_a_story_without_its_own_sentence_has_no_overlap() -> None:
    assert judged(overlap, asked(middle="", stop="."), ["a", "b"]) == {}


def test_only_what_a_model_told_is_an_exact_sample(tmp_path: Path) -> None:
    after, middle = (TOKENIZER.encode(text, add_special_tokens=False) for text in (" xy", "ab"))
    story = {"id": "told", "before": "one.", "after": "xy", "middle": "ab.", "tokens": {"middle": middle, "after": after}}
    support = infilling(TWO, tmp_path).constraints.described()

    def exact(**changes: Any) -> frozenset[str]:
        told = {"told": {"support": support | changes, "log_p": -3.0}}
        task = infilling(f"{TWO}\n{json.dumps(story | told)}", tmp_path)
        assert len(task.demonstrations) == 2
        return task.exact

    assert exact() == {"told"}
    assert exact(max_tokens=support["max_tokens"] + 1) == {"told"}, "what is asked for here is a part of what was told"
    assert exact(max_tokens=support["max_tokens"] - 1) == exact(tokens="others") == frozenset()
    assert infilling(f"{TWO}\n{json.dumps(story)}", tmp_path).exact == frozenset(), "nobody says who told it"
