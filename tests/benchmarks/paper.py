"""The experiments of the paper with their baselines: training, supervised fine-tuning and held-out evaluation, over seeds.

    python -m tests.benchmarks.paper TASK [--data FOLDER] [--seeds 0,1,2] [--output FOLDER] [--validation] [--all key=value …]
                                     [--imitation key=value …] [--policy-gradient key=value …] [key=value …]

TASK is one of EXPERIMENTS. FOLDER has the paper's data: `arithmetic/`, `prompts/openwebtext_1000.txt`, `stories/`, `subj/`.
`key=value` goes to the GFlowNet's training, `--imitation key=value` to each supervised one, `--policy-gradient key=value` to
those of PPO, GRPO and RLOO, `--all key=value` to all. With `--validation` a part of the training data stands for the test
data, which then no step reads: settings are chosen with it.

Every step is a command of `deploy/`, run in OUTPUT (paper-TASK, validation-TASK) and printed; a step that has its result there
already is not run again, so that an interrupted experiment goes on and further seeds add to it. Ends with a table of means over
seeds, and writes it with the values of each seed to OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy.compare import Entry, markdown, rows
from system.tasks.arithmetic import generate
from tests.benchmarks import lab as lab_module
from tests.benchmarks import validation
from tests.benchmarks.lab import Lab, Metrics, Rows
from tests.benchmarks.runs import NO_REPLAY, ON_POLICY, ROOT

IMITATION = ("loss.kind=mle", *NO_REPLAY, "learner.lr=5e-4", "learner.threads=2")
"""The sampler rests meanwhile."""
PAPERS_INFILLING = "Beginning: {before}\nEnding: {after}\nMiddle:"
"""The prompt of the paper's code."""


def random_number(lab: Lab) -> Rows:
    """PPO and RLOO maximise the reward that the GFlowNet samples in proportion to; all distances are exact. At the GFlowNet's
    learning rate RLOO falls onto few numbers."""
    runs = {"gflownet": lab.train("gflownet", "random_number", *lab.overrides)}
    for loss, rate in (("ppo", "1e-3"), ("rloo", "3e-4")):
        runs[loss] = _policy_gradient(lab, loss, "random_number", f"loss={{kind: {loss}, kl: 0.05}}", f"learner.lr={rate}")
    return _evaluated(lab, runs, samples=2)


def continuation(lab: Lab, config: str = "continuation", test: slice = slice(24, 50)) -> Rows:
    """All but the last 50 prompts, 950 of them, are for training. The temperature of `continuation` was set after a look at
    some of the first 24 of these: the other 26 are for evaluation."""
    known, others = _prompts(lab, test)
    run = lab.train("gflownet", config, *known, *lab.overrides)
    methods = "ancestral,tempered,nucleus,beam,diverse_beam,best_of_n,sir,smc,gflownet_best_of_n"
    return lab.baselines(run, *others, methods=methods, samples=8)


def constrained(lab: Lab, asked: tuple[str, ...] = ()) -> Rows:
    """As `continuation`, with a keyword that must be in the sentence, or what `asked` says, which nothing guides or plants."""
    known, others = _prompts(lab)
    long = ("learner.steps=600", "task.floor=-30")
    alone = (*asked, "task.keywords=[]", "task.guided=false", "sampler.exploration.planted=0") if asked else ()
    run = lab.train("gflownet", "constrained", *known, *long, *alone, *lab.overrides)
    rows = lab.baselines(run, *others, methods="ancestral,best_of_n,sir,smc", samples=8)
    # More samples than a comparison at equal cost allows: a share of 1 % is to be seen.
    _, more = lab.evaluate("more", run, *others, samples=32)
    return rows | {"gflownet, 32 samples": more}


def _prompts(lab: Lab, test: slice = slice(24)) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(for training, for evaluation), as settings of a task. `test`: of the prompts that are held out."""
    first, end, _ = test.indices(validation.HELD_OUT["prompts"])
    path = lab.data / "prompts/openwebtext_1000.txt"
    count = len(path.read_text(encoding="utf-8").splitlines()) - validation.HELD_OUT["prompts"]
    prompts = f"task.prompts={path}"
    return (prompts, f"task.limit={count}"), (prompts, f"task.offset={count + first}", f"task.limit={end - first}")


def infilling(lab: Lab) -> Rows:
    """BLEU and GLEU on written stories; the symmetrised KL on those that the model told itself, for other beginnings than in
    training.

    As in the paper, the model that all start from, and that is the reward, has learnt from the training stories how such
    stories go on: each sentence from the third on, after those before it and without those behind it, over the task's tokens.
    The GFlowNet is then shown written and told stories without their missing sentence, supervised fine-tuning the written ones
    with it. `prompting` has the paper's prompt, `ending first` the prompt that both are trained with.
    """
    written = lab.data / "stories/train.jsonl"
    imitation = (*IMITATION, "learner.groups_per_update=8", "learner.steps=33", *lab.imitation)
    going_on = (f"task.stories={_sentences(written, lab.output / 'sentences.jsonl')}", "task.prompt='{after} {before}'")
    teller = lab.export(replace(lab, seed=0).train("teller", "infilling", *going_on, *imitation))
    lab = replace(lab, shared=(*lab.shared, f"model.path={teller}"))
    told = lab.self_consistent("told-train", written, 44)
    both = lab.output / "both.jsonl"
    both.write_text(written.read_text(encoding="utf-8") + told.read_text(encoding="utf-8"), encoding="utf-8")
    runs = {
        "gflownet": lab.train("gflownet", "infilling", f"task.stories={both}", *lab.overrides),
        "supervised": lab.train("supervised", "infilling", f"task.stories={written}", *imitation),
    }
    others = {
        "": (lab.data / "stories/test.jsonl", ("task/bleu_4", "task/gleu_4", "posterior/length")),
        "-told": (
            lab.self_consistent("told-test", lab.data / "stories/test.jsonl", 20),
            ("posterior/log_z", "posterior/symmetrised_kl"),
        ),
    }
    rows: Rows = {}
    for kind, (stories, wanted) in others.items():
        asked = (f"task.stories={stories}",)
        papers = (*asked, f"task.prompt={json.dumps(PAPERS_INFILLING)}")
        found = {"prompting": lab.evaluate(f"prompting{kind}", runs["gflownet"], *papers, samples=32, only="base")[0]}
        found["ending first"], found["gflownet"] = lab.evaluate(
            f"gflownet{kind}", runs["gflownet"], *asked, samples=32, only=None
        )
        _, found["supervised"] = lab.evaluate(f"supervised{kind}", runs["supervised"], *asked, samples=32)
        for name, metrics in found.items():
            rows.setdefault(name, {}).update(_only(metrics, wanted))
    return rows


def _sentences(stories: Path, result: Path) -> Path:
    """Writes each sentence of the stories from the third on to `result`, as what is missing after those before it, of which the
    first stands for the ending: a prompt needs both, and "{after} {before}" is then what was told so far. Returns it."""
    records = []
    for story in validation.read_lines(stories):
        first, *sentences = story["sentences"]
        for number in range(1, len(sentences)):
            before, middle = " ".join(sentences[:number]), sentences[number]
            records.append({"id": f"{story['id']}/{number}", "after": first, "before": before, "middle": middle})
    validation.write_lines(result, records)
    return result


def verifiable(lab: Lab) -> Rows:
    """Sums up to 14 + 14, each once: 90 for training, 30 for evaluation. The reward of GRPO and RLOO is the verdict, and a KL
    penalty; RLOO's is that of the GFlowNet's posterior, which maximises it. GRPO divides by the spread of a group's verdicts,
    at most 0.5, so that the same penalty weighs less there. All have 600 updates: after 240 the GFlowNet's lower bound is 3
    nats below its weighted estimate."""
    pairs = [(a, b) for a in range(15) for b in range(a, 15)]
    random.Random(0).shuffle(pairs)
    if lab.validation:
        pairs = pairs[:90]
    for name, chosen in (("train", pairs[:-30]), ("test", pairs[-30:])):
        records = [{"question": f"What is {a} + {b}?", "answer": a + b} for a, b in chosen]
        validation.write_lines(lab.output / f"{name}.jsonl", records)
    questions = f"task.questions={lab.output / 'train.jsonl'}"
    verdict = "task.reward={kind: function, path: 'system.tasks.verifiable:last_number', seconds: null}"
    long = (questions, "learner.steps=600")
    runs = {
        "gflownet": lab.train("gflownet", "verifiable", *long, *lab.overrides),
        "grpo": _policy_gradient(lab, "grpo", "verifiable", *long, verdict, "loss={kind: grpo, kl: 0.05}"),
        "rloo": _policy_gradient(lab, "rloo", "verifiable", *long, verdict, "loss={kind: rloo, kl: 0.1}"),
    }
    rows = _evaluated(lab, runs, f"task.questions={lab.output / 'test.jsonl'}", samples=8)
    # The rewards differ, and so do the posteriors.
    return {name: _only(metrics, "task/") for name, metrics in rows.items()}


def subjectivity(lab: Lab, labelled: int = 10) -> Rows:
    """`labelled` training sentences and 200 test sentences, with votes of 11, where two labels cannot tie. `+ supervised` is
    the M-step: labels learnt from the E-step's reasons, which vote. Few-shot prompts show 20 at most: each is read for every
    text."""
    train, test = lab.data / f"subj/train.{labelled}.jsonl", lab.data / "subj/test.jsonl"
    known, unknown = f"task.records={train}", (f"task.records={test}", "task.limit=200")
    imitation = (*IMITATION, "learner.groups_per_update=10", "learner.steps=40", *lab.imitation)
    label = lab.train("supervised", "subjectivity", known, *imitation, "task.stage=label")
    rows: Rows = {}
    rows["zero-shot"], rows["supervised"] = lab.evaluate("supervised", label, *unknown, samples=2, only=None)
    shown = (f"task.examples={min(labelled, 20)}", f"task.examples_from={train}")
    rows["few-shot"], _ = lab.evaluate("few-shot", label, *unknown, *shown, samples=2, only="base")
    reason = lab.train("gflownet", "subjectivity", known, *lab.overrides)
    _, rows["gflownet"] = lab.evaluate("gflownet", reason, *unknown, samples=11)
    lab.evaluate("reasons", reason, known, samples=20)
    predict = lab.train(
        "predict", "subjectivity", known, *imitation, "task.stage=predict", f"task.rationales={lab.samples('reasons')}"
    )
    reasons = f"task.rationales={lab.samples('gflownet')}"
    _, rows["gflownet + supervised"] = lab.evaluate("predict", predict, *unknown, reasons, samples=2)
    return rows


def arithmetic(lab: Lab) -> Rows:
    """The paper's 50 worked and 1,000 other questions of 3 and 4 operands for training, with 15 and 85 of 2, without which the
    number of steps is nearly a constant to learn by heart; 100 questions of each length that are in no training file. The
    GFlowNet and PPO start from the supervised adapter."""
    folder = lab.data / "arithmetic"
    short = generate((2,), 100, test=False)
    records = {
        "rationales": [
            {"question": question.text, "answer": question.answer, "rationale": f"{question.expression} ="}
            for question in short[:15]
        ],
        "questions": [{"question": question.text, "answer": question.answer} for question in short[15:]],
    }
    for name, file in (("rationales", "train_rationales_50.json"), ("questions", "train_questions_1000.json")):
        content = json.loads((folder / file).read_text(encoding="utf-8")) + records[name]
        (lab.output / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    rationales = f"task.rationales={lab.output / 'rationales.json'}"
    train = (f"task.questions={lab.output / 'questions.json'}", rationales)
    imitation = ("learner.groups_per_update=4", "learner.steps=40", *lab.imitation)
    supervised = lab.train("supervised", "arithmetic_mle", *train, *imitation)
    start = (f"lora.start={supervised}", "learner.lr=3e-4")
    ppo = ("replay.demonstrations=false", "loss={kind: ppo, kl: 0.05}")
    runs = {
        "supervised": supervised,
        "gflownet": lab.train("gflownet", "arithmetic", *train, *start, *lab.overrides),
        "ppo": _policy_gradient(lab, "ppo", "arithmetic", *train, *start, *ppo),
    }
    rows: Rows = {}
    for operands in (3, 4, 5, 6):
        questions = (
            f"task.questions={folder / f'test_{operands}_operands.json'}",
            rationales,
            "task.split=test",
            "task.limit=100",
        )
        longer = ("task.max_tokens=60", "task.tool_tokens=40")
        for name, metrics in _evaluated(lab, runs, *questions, *longer, samples=8, kind=f"-{operands}").items():
            found = _only(metrics, "task/")
            rows.setdefault(name, {}).update({f"{key}/{operands}": value for key, value in found.items()})
    return rows


def _policy_gradient(lab: Lab, name: str, config: str, *overrides: str) -> Path:
    """A run on samples of its own alone."""
    return lab.train(name, config, *ON_POLICY, *NO_REPLAY, *overrides, *lab.policy_gradient)


def _evaluated(lab: Lab, runs: Mapping[str, Path], *overrides: str, samples: int, kind: str = "") -> Rows:
    """The base model as `prompting`, and each run."""
    rows: Rows = {"prompting": {}}
    for name, run in runs.items():
        only = "adapter" if rows["prompting"] else None
        untrained, rows[name] = lab.evaluate(f"{name}{kind}", run, *overrides, samples=samples, only=only)
        rows["prompting"] |= untrained
    return rows


def _only(metrics: Metrics, prefix: str | tuple[str, ...]) -> Metrics:
    return {name: value for name, value in metrics.items() if name.startswith(prefix)}


EXPERIMENTS: dict[str, Callable[[Lab], Rows]] = {
    "random_number": random_number,
    "continuation": continuation,
    "continuation_length": partial(continuation, config="continuation_length", test=slice(24)),
    "constrained": constrained,
    "constrained_pattern": partial(constrained, asked=(r"task.pattern=\d",)),
    "constrained_predicate": partial(constrained, asked=("task.predicate=tests.benchmarks.predicates:eight_words",)),
    "infilling": infilling,
    "verifiable": verifiable,
    "subjectivity": subjectivity,
    "subjectivity_20": partial(subjectivity, labelled=20),
    "subjectivity_50": partial(subjectivity, labelled=50),
    "arithmetic": arithmetic,
}

IMITATING = ("infilling", "subjectivity", "arithmetic")
"""How the names of those with supervised training begin."""
GRADIENTS = ("random_number", "verifiable", "arithmetic")
"""Those with a policy gradient."""


def version(task: str) -> str:
    """Of an experiment: another one where its steps or its settings are not the same."""
    files = [Path(__file__), Path(lab_module.__file__), *sorted((ROOT / "deploy/configs").glob(f"{task.split('_')[0]}*.yaml"))]
    written = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\n".join(written).encode()).hexdigest()[:12]


def table(results: Mapping[str, Rows]) -> str:
    """Markdown: a row a method, a column a metric; of several seeds the mean, with the least and the largest."""
    by_seed = [(int(seed), of_seed) for seed, of_seed in results.items()]
    found = rows([Entry(name, {}, seed, metrics) for seed, of_seed in by_seed for name, metrics in of_seed.items()])
    return markdown(found, list(dict.fromkeys(name for row in found for name in row.values)))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=tuple(EXPERIMENTS))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the GFlowNet's training")
    parser.add_argument("--imitation", action="append", default=[], metavar="key=value", help="of each supervised training")
    parser.add_argument("--policy-gradient", action="append", default=[], metavar="key=value", help="of PPO, GRPO and RLOO")
    parser.add_argument("--all", action="append", default=[], metavar="key=value", help="of every training")
    parser.add_argument("--data", type=Path, help="needed by all but random_number")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--validation", action="store_true", help="on a part of the training data, to choose settings")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.imitation and not arguments.task.startswith(IMITATING):
        parser.error(f"--imitation: {arguments.task} has no supervised training; {', '.join(IMITATING)} have")
    if arguments.policy_gradient and arguments.task not in GRADIENTS:
        parser.error(f"--policy-gradient: {arguments.task} has none; {', '.join(GRADIENTS)} have")
    if arguments.data is None and arguments.task != "random_number":
        parser.error(f"--data: {arguments.task} needs the folder of the paper's data")
    output = (arguments.output or Path(f"{'validation' if arguments.validation else 'paper'}-{arguments.task}")).resolve()
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "results.json"
    asked: dict[str, Any] = {
        "task": arguments.task,
        "version": version(arguments.task),
        "overrides": arguments.overrides,
        "imitation": arguments.imitation,
        "policy_gradient": arguments.policy_gradient,
        "all": arguments.all,
        "validation": arguments.validation,
    }
    content = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else asked | {"by_seed": {}}
    if (of := {name: content.get(name) for name in asked}) != asked:
        sys.exit(f"{kept} is of {of}, not of {asked}: choose another --output")
    results: dict[str, Rows] = content["by_seed"]
    given = arguments.data or output
    data = validation.write(given, output / "data") if arguments.validation else given
    for seed in map(int, arguments.seeds.split(",")):
        lab = Lab(
            data.resolve(), output, seed, tuple(arguments.overrides), tuple(arguments.all), arguments.validation,
            tuple(arguments.imitation), tuple(arguments.policy_gradient),
        )  # fmt: skip
        results[str(seed)] = EXPERIMENTS[arguments.task](lab)
        kept.write_text(json.dumps(content, indent=2), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
