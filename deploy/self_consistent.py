"""Stories that the model tells itself: X from a file, then Z and Y drawn from the model, so that Z is an exact posterior draw.

    python deploy/self_consistent.py deploy/configs/infilling.yaml stories.jsonl [--per-story 4] [key=value …]

Z is drawn left to right until it is a sentence of the task's support (its tokens, its lengths, its stop), then Y is
`--ending` tokens more. So (Z, Y) is a draw of p(Z stop | X) p(Y | X Z stop), and given Y, Z is one of p(Z | X, Y). Their
tokens are kept beside the text, so that nothing is lost in between, and the support and log p with them: Z is a draw of the
posterior of this model on this support alone. `task.stories=stories.jsonl` then reads the result. Until the last story is told,
those that are stand in stories.jsonl.part.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from deploy.command import command, log_to_stderr  # noqa: E402
from deploy.runs import check_output  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402

if TYPE_CHECKING:
    from actors.stepping import Rows
    from system.constraints import Constraints

logger = logging.getLogger("headwater")

FIRST = 4
"""Of samples that are drawn first, for each story that is wanted."""
BATCH = 64
"""Samples at once where those were too few, and at most."""
MOST_TRIES = 4000
"""Samples for each story that is wanted of a beginning; then it has fewer, or none."""


def draw(config: Config, per_story: int, ending: int, seed: int) -> Iterator[dict[str, Any]]:
    """Up to `per_story` stories for each X of the config's stories, as they are told."""
    import torch

    from actors.stepping import NextTokens
    from deploy.prepare import prepare
    from system.constraints import Constraints
    from system.pretrained import load_pretrained, resolve_device
    from system.text import decode, special_tokens

    prepared = prepare(config)
    problem, tokenizer = prepared.problem, prepared.tokenizer
    support, device = problem.constraints, resolve_device(config.learner.device)
    model = load_pretrained(prepared.folder, getattr(torch, config.learner.dtype), device)
    longest = support.max_tokens + 1 + ending
    # The model itself, whatever the support is: the end of sequence is a token like others.
    everything = Constraints.of(
        stop_token=support.stop_token, min_tokens=0, max_tokens=longest + 1, vocab_size=model.config.vocab_size
    )
    teller, special = NextTokens(model, everything), special_tokens(tokenizer)
    torch.manual_seed(seed)
    told = 0
    for number, prompt in enumerate(problem.prompts, 1):
        found: list[dict[str, Any]] = []
        beginning = teller.start(prompt.reward_tokens)
        tries, batch = 0, min(FIRST * per_story, BATCH)
        while len(found) < per_story and tries < MOST_TRIES * per_story:
            for middle, after, log_p in _tell(beginning, batch, support, ending):
                text = decode(tokenizer, after).strip()
                # What is asked of Y alone leaves Z, given Y, a posterior draw.
                if text and not set(after) & special and len(found) < per_story:
                    sentence = decode(tokenizer, [*middle, support.stop_token]).strip()
                    story = {"before": prompt.meta["before"], "middle": sentence, "after": text}
                    story["tokens"] = {"middle": middle, "after": after}
                    found.append(story | {"told": {"support": support.described(), "log_p": log_p}})
            tries, batch = tries + batch, BATCH
        yield from ({"id": f"{prompt.id}/{index}", **story} for index, story in enumerate(found))
        told += len(found)
        logger.info("%d of %d beginnings, %d stories", number, len(problem.prompts), told)


def _tell(beginning: Rows, tries: int, support: Constraints, ending: int) -> list[tuple[list[int], list[int], float]]:
    """(middle, after, log p of both and the stop, nats) of those of `tries` ancestral samples whose middle is inside the
    support, in the order of the tries.

    A sample that leaves the support is dropped there: the rest of it would change nothing.
    """
    import numpy as np

    from actors.stepping import draw_columns

    legal = set(support.columns.tolist())
    rows = beginning.fork(np.zeros(tries, np.int64))
    live = list(range(tries))
    told: list[tuple[list[int], list[int] | None]] = [([], None) for _ in live]
    log_p = np.zeros(tries)
    while live:
        # Of the whole vocabulary a column is its token.
        drawn, log_p_B = draw_columns(rows.log_q_BC)
        log_p[live] += log_p_B
        going = []
        for row, (number, token) in enumerate(zip(live, drawn.tolist(), strict=True)):
            middle, after = told[number]
            if after is not None:
                after.append(token)
            elif token == support.stop_token:
                told[number] = middle, []
            else:
                middle.append(token)
            middle, after = told[number]
            if after is None:
                inside = token in legal and len(middle) <= support.max_tokens
            else:
                inside = len(middle) >= support.min_tokens and len(after) < ending
            if inside:
                going.append(row)
        live = [live[row] for row in going]
        rows.advance(np.array(going, np.int64), drawn[going])
    complete = zip(told, log_p.tolist(), strict=True)
    return [(middle, after, value) for (middle, after), value in complete if after is not None and len(after) == ending]


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/self_consistent.py", description=__doc__)
    parser.add_argument("config", help="a config of the task infilling")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="JSONL file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--per-story", type=int, default=4, help="stories for each beginning")
    parser.add_argument("--ending", type=int, default=16, help="tokens of Y")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args(argv)
    log_to_stderr()
    if arguments.per_story < 1:
        raise ConfigError(f"--per-story={arguments.per_story}: tell at least one story for each beginning")
    if arguments.ending < 1:
        raise ConfigError(f"--ending={arguments.ending}: Y has at least one token")
    check_output("OUTPUT", arguments.output)
    config = config_file.load(arguments.config, arguments.overrides)
    if config.task.kind != "infilling":
        raise ConfigError(f"task.kind={config.task.kind}: stories are of the task infilling; name a config of that")
    told, part = 0, arguments.output.with_name(f"{arguments.output.name}.part")
    with part.open("w", encoding="utf-8") as file:
        for story in draw(config, arguments.per_story, arguments.ending, arguments.seed):
            file.write(json.dumps(story) + "\n")
            file.flush()
            told += 1
    part.replace(arguments.output)
    print(f"{told} stories in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
