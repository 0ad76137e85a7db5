"""A finished run behind an OpenAI-compatible API: `python deploy/serve.py RUN [--host 127.0.0.1] [--port 8000] [-- …]`.

Starts vLLM's own server with the base model, under the name that the config gives it, and the run's adapter beside it, under
the name of the run's folder; the same command on CPU and on GPU. Ctrl-C ends it. Clients need $VLLM_API_KEY, if that is set.
What stands after `--` is for vLLM's server, such as `--tensor-parallel-size 2 --gpu-memory-utilization 0.5`.

    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "RUN", "prompt": "The sky is", "max_tokens": 20, "stop": ".", "n": 4}'

The server draws from the model's whole vocabulary, at temperature 1 by default, on a CPU with all cores or OMP_NUM_THREADS of
them. A run's own support (its legal tokens, lengths and stop) is up to the request: `allowed_token_ids`, `min_tokens`,
`max_tokens`, `stop_token_ids`. deploy/sample.py keeps to it, and to words that a sample must have (`task.guided`), which no
request can ask for.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from actors.settings import BLOCK, engine_environment, max_lora_rank  # noqa: E402
from deploy.command import command  # noqa: E402
from deploy.machine import alone  # noqa: E402
from deploy.runs import adapter_at, adapter_file, adapter_tensors, add_step, find_run  # noqa: E402
from deploy.stop import heard  # noqa: E402
from system import config_file  # noqa: E402
from system.config import Config, ConfigError  # noqa: E402

STOP_SECONDS = 20.0
"""For the server to end by itself when it is asked to."""
POLL_SECONDS = 0.5


def command_line(config: Config, run_dir: Path, adapter: Path, host: str, port: int, *, gpu: bool) -> list[str]:
    """vLLM's server for a run and an adapter file of it.

    Raises:
        ConfigError: the adapter is damaged or of another model, or the model cannot be had.
    """
    from system.models import locate

    adapter_tensors(adapter, config.model.path, config.lora)  # vLLM would take it as it is
    folder = locate(config.model)
    section = config.sampler
    options = {
        "model": folder,
        "served-model-name": config.model.path,
        "lora-modules": f"{run_dir.name}={adapter.parent}",
        "max-lora-rank": max_lora_rank(config.lora.rank),
        "host": host,
        "port": port,
        # vLLM's LoRA kernels on a GPU take no float32.
        "dtype": "bfloat16" if gpu else section.dtype,
        # As long as the KV cache has room for: the whole context of a large model may be more than there is.
        "max-model-len": -1,
        "max-num-seqs": section.max_num_seqs,
        "seed": config.seed,
        # A model's own settings would sharpen or cut the distribution that was trained.
        "generation-config": "vllm",
        "load-format": "safetensors",
    }
    # A GPU is the server's own, whatever share of one the run gave its samplers.
    if not gpu:
        options |= {"kv-cache-memory-bytes": section.kv_cache_mb << 20, "block-size": BLOCK}
    flags = [f"--{name}={value}" for name, value in options.items()]
    # `vllm serve` looks for a package named vllm, which the CPU build is not.
    python = [sys.executable, "-W", "ignore::DeprecationWarning", "-m"]
    eager = ["--enforce-eager"] if section.enforce_eager or not gpu else []
    return [*python, "vllm.entrypoints.openai.api_server", "--enable-lora", *eager, *flags]


def environment(config: Config, *, gpu: bool) -> dict[str, str]:
    """Of the server, whose engine is a process of its own below it. What is set already stays."""
    own = engine_environment(config.actors.threads, gpu)
    del own["VLLM_ENABLE_V1_MULTIPROCESSING"]
    return own | os.environ


def check_passed_on(flags: list[str], overrides: list[str]) -> None:
    """Raises ConfigError for what is set on the other side of `--`."""
    for flag in flags:
        if flag.partition("=")[0] in ("--host", "--port"):
            raise ConfigError(f"{flag} after --: it is this command's own; put it before --")
    for override in overrides:
        if override.startswith("sampler.gpu_memory_utilization="):
            share = override.partition("=")[2]
            raise ConfigError(f"{override} is of a run's engines; for the server add -- --gpu-memory-utilization {share}")


def check_port(host: str, port: int) -> None:
    """Raises ConfigError if nothing can listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--host {host} --port {port}: nothing can listen there ({error}); choose another port"
            ) from error


class Server:
    """vLLM's server as a child process, in a session of its own: a Ctrl-C in the terminal reaches it through us alone, once.

    `close` it: nothing else ends it with us.
    """

    def __init__(self, command: list[str], environment: dict[str, str], url: str) -> None:
        self.url = url
        self.asked: int | None = None
        """The signal that asked for the end."""
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)
        # Not through a proxy, which the environment may have for other addresses.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, number: int) -> None:
        """To end. The first request lets vLLM end what it runs; what does not end in time is killed."""
        self.asked = number

    def wait_until_healthy(self) -> bool:
        """False if the server ended, or was asked to, before it answered."""
        while self._process.poll() is None and self.asked is None:
            try:
                with self._opener.open(f"{self.url}/health", timeout=POLL_SECONDS):
                    return True
            # Not there yet: it loads for some seconds, and hears nothing meanwhile.
            except (urllib.error.URLError, OSError):
                time.sleep(POLL_SECONDS)
        return False

    def wait(self) -> int:
        """Until it ends by itself or is asked to. Returns its exit status, 0 if it was asked."""
        while self._process.poll() is None and self.asked is None:
            time.sleep(POLL_SECONDS)
        return 0 if self.asked is not None else self._process.poll() or 0

    def close(self) -> None:
        """Ends all of its processes."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        # What is left of its session, such as an engine whose server was killed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@command
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python deploy/serve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run, or its name under runs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as sampler.kv_cache_mb=4096")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000)
    add_step(parser)
    own, passed_on = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    arguments = parser.parse_intermixed_args(own)
    check_passed_on(passed_on, arguments.overrides)
    run_dir = find_run(arguments.run)
    if arguments.step is None:
        adapter_file(run_dir)  # missed now, and not when torch is loaded
    config = alone(config_file.load(run_dir / "config.yaml", arguments.overrides))
    check_port(arguments.host, arguments.port)
    import torch

    gpu = torch.cuda.is_available()
    adapter = adapter_at(run_dir, config, arguments.step)
    line = [*command_line(config, run_dir, adapter, arguments.host, arguments.port, gpu=gpu), *passed_on]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(arguments.host, arguments.host)
    with closing(Server(line, environment(config, gpu=gpu), f"http://{host}:{arguments.port}")) as server:
        for number in heard():
            signal.signal(number, lambda asked, _: server.ask(asked))
        if server.wait_until_healthy():
            print(f"{server.url}/v1 serves {config.model.path} and {run_dir.name}; Ctrl-C ends it", flush=True)
        return server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
