"""Stories that the model tells itself: X from a file, then Z and Y drawn from the model, so that Z is an exact posterior draw.

    python deploy/self_consistent.py deploy/configs/infilling.yaml stories.jsonl [--per-story 4] [key=value …]

Z is drawn left to right until it is a sentence of the task's support (its tokens, its lengths, its stop), then Y is
`--ending` tokens more. So (Z, Y) is a draw of p(Z stop | X) p(Y | X Z stop), and given Y, Z is one of p(Z | X, Y). Their
tokens are kept beside the text, so that nothing is lost in between. `task.stories=stories.jsonl` then reads the result.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402

TRIES = 8
"""Samples at once for each story that is wanted of a beginning: about one in three is inside the support."""
MOST_BATCHES = 500
"""Tries of a beginning before it is left out."""


def draw(config: Config, per_story: int, ending: int, seed: int) -> list[dict[str, Any]]:
    """Up to `per_story` stories for each X of the config's stories."""
    import torch

    from system import tasks
    from system.language_model import load_pretrained, load_tokenizer, resolve_device
    from system.models import locate

    folder = locate(config.model)
    tokenizer = load_tokenizer(folder)
    problem = tasks.build(config.task, tokenizer)
    device = resolve_device(config.learner.device)
    model = load_pretrained(folder, getattr(torch, config.learner.dtype), device)
    torch.manual_seed(seed)
    stories = []
    for prompt in problem.prompts:
        found: list[dict[str, Any]] = []
        for _ in range(MOST_BATCHES):
            if len(found) >= per_story:
                break
            rows = _generate(model, prompt.reward_tokens, TRIES * per_story, problem.constraints.max_tokens + 1 + ending)
            for row in rows:
                story = _story(row, tokenizer, problem.constraints, ending)
                if story and len(found) < per_story:
                    number = f"{prompt.id}/{len(found)}"
                    found.append({"id": number, "before": prompt.meta["before"], **story})
        stories += found
    return stories


def _generate(model: Any, context: tuple[int, ...], samples: int, tokens: int) -> list[list[int]]:
    """Ancestral samples of that many tokens."""
    import torch

    inputs = torch.tensor([context], device=model.device)
    # The end of sequence is a token like others: it makes a story that is drawn anew.
    rows = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0, num_return_sequences=samples,
        max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return rows[:, len(context) :].tolist()


def _story(row: list[int], tokenizer: Any, constraints: Any, ending: int) -> dict[str, Any] | None:
    """Middle and ending of a sample whose middle lies in the support, else None."""
    import numpy as np

    from system.language_model import decode

    stop = constraints.stop_token
    if stop not in row:
        return None
    length = row.index(stop)
    middle, after = row[:length], row[length + 1 : length + 1 + ending]
    inside = constraints.min_tokens <= length <= constraints.max_tokens and np.isin(middle, constraints.columns).all()
    text = decode(tokenizer, after).strip()
    # What is asked of Y alone leaves Z, given Y, a posterior draw.
    if not inside or not text or set(after) & set(tokenizer.all_special_ids):
        return None
    sentence = decode(tokenizer, [*middle, stop]).strip()
    return {"middle": sentence, "after": text, "tokens": {"middle": middle, "after": after}}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/self_consistent.py", description=__doc__)
    parser.add_argument("config", help="a config of the task infilling")
    parser.add_argument("output", type=Path, help="JSONL file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--per-story", type=int, default=4, help="stories for each beginning")
    parser.add_argument("--ending", type=int, default=16, help="tokens of Y")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = config_file.load(arguments.config, arguments.overrides)
        if config.task.kind != "infilling":
            raise ConfigError(f"task.kind={config.task.kind}: stories are of the task infilling; name a config of that")
        stories = draw(config, arguments.per_story, arguments.ending, arguments.seed)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return 2
    arguments.output.write_text("".join(json.dumps(story) + "\n" for story in stories), encoding="utf-8")
    print(f"{len(stories)} stories in {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
