"""A finished run as plain Hugging Face weights: `python deploy/export.py RUN [key=value …] --merge FOLDER`.

W + (alpha / rank) B A in float32 from the pristine base, for each weight that the run adapted, beside the base's own config
and tokenizer: a folder that transformers, vLLM and others load as a model, without PEFT and without this project. It is
written in float32, because bfloat16 would round small updates away. RUN/adapter needs no export where PEFT can be used. The
run's support (legal tokens, lengths, required words) is no part of weights: deploy/sample.py keeps to it.
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

from deploy.command import command  # noqa: E402
from deploy.runs import adapter_at, adapter_tensors, add_step, find_run  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402
from system.whole_file import whole_folder  # noqa: E402


def merge(config: Config, adapter: Path, folder: Path) -> Path:
    """Writes `folder`, which appears whole or not at all, from the base and a run's adapter file. Returns it.

    Raises:
        ConfigError: `folder` holds something, the base cannot be had, or the adapter is damaged or not of this base.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from system.adapters import PEFT_CONFIG, AdapterError, updates_of
    from system.models import locate
    from system.pretrained import load_tokenizer

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--merge {str(folder)!r} is there already; name a new folder, or an empty one")
    base = locate(config.model)
    tensors = adapter_tensors(adapter, config.model.path, config.lora)
    tokenizer = load_tokenizer(base)
    # As it is on disk: what training changes of a model's config, such as its dropout, is no part of the result.
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    peft_config = json.loads((adapter.parent / PEFT_CONFIG).read_text(encoding="utf-8"))
    try:
        with torch.no_grad():
            for module, update in updates_of(tensors, peft_config).items():
                weight = model.get_parameter(f"{module}.weight")
                delta_OI = torch.from_numpy(update.b_OR) @ torch.from_numpy(update.a_RI)
                weight.add_(delta_OI.T if update.transposed else delta_OI, alpha=update.scale)
    except (AdapterError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{adapter} does not fit {config.model.path!r}: {error}") from error
    with whole_folder(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    return folder


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python deploy/export.py", description=__doc__)
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.path=WHERE_IT_IS_NOW")
    parser.add_argument("--merge", metavar="FOLDER", type=Path, required=True, help="where base + adapter is written")
    add_step(parser)
    arguments = parser.parse_intermixed_args(argv)
    run_dir = find_run(arguments.run)
    config = config_file.load(run_dir / "config.yaml", arguments.overrides)
    adapter = adapter_at(run_dir, config, arguments.step)
    print(merge(config, adapter, arguments.merge.absolute()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
