"""The server as its users start it, asked by the real client; its log-probs against PEFT's and the base model's."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from peft import PeftModel

from deploy import serve
from system.config import ConfigError
from tests import finished, lora
from tests.servers import free_port

ROOT = Path(__file__).resolve().parents[1]
TOKENS = [1, 14, 15, 16, 20, 30, 17, 18]


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """An orphan may stay a zombie until the machine's first process asks for its status."""
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def prompt_log_probs(client: openai.OpenAI, model: str) -> np.ndarray:
    answer = client.completions.create(model=model, prompt=TOKENS, max_tokens=1, echo=True, logprobs=0)
    values: Any = answer.choices[0].logprobs.token_logprobs  # type: ignore[union-attr]
    return np.array(values[1 : len(TOKENS)], float)


def test_the_server_offers_the_base_and_the_adapter_with_the_learners_log_probs(tmp_path: Path) -> None:
    run_dir, config = finished.run(tmp_path, lora={"rank": 4, "alpha": 8, "layers": 0.5})
    port = free_port()
    line = [sys.executable, str(ROOT / "deploy/serve.py"), "one", "--port", str(port), "--", "--max-model-len", "64"]
    log = (tmp_path / "log.txt").open("w")
    process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for said in process.stdout:
            if said.startswith(f"http://127.0.0.1:{port}/v1 serves "):
                break
        assert said.startswith("http"), (tmp_path / "log.txt").read_text()[-3000:]
        started = psutil.Process(process.pid).children(recursive=True)
        assert len(started) >= 2
        addresses = {entry.laddr.ip for child in started for entry in child.net_connections("tcp") if entry.laddr.port == port}
        assert addresses == {"127.0.0.1"}

        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        models: dict[str, Any] = {model.id: model for model in client.models.list()}
        assert set(models) == {config.model.path, "one"}
        assert models[config.model.path].max_model_len == 64, "what stands after -- is vLLM's"
        answer = client.completions.create(model="one", prompt="abc", max_tokens=5, n=3, seed=0, stop=".")
        assert len({choice.text for choice in answer.choices}) > 1

        tuned: Any = PeftModel.from_pretrained(lora.load(Path(config.model.path)), str(run_dir / "adapter"))
        wanted = lora.token_log_probs(tuned, TOKENS)
        with tuned.disable_adapter():
            base = lora.token_log_probs(tuned, TOKENS)
        assert np.abs(wanted - base).max() > 0.1
        np.testing.assert_allclose(prompt_log_probs(client, "one"), wanted, atol=1e-3)
        np.testing.assert_allclose(prompt_log_probs(client, config.model.path), base, atol=1e-3)

        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert alive(started) == []
    finally:
        process.terminate()
        process.wait(60)


def test_a_damaged_adapter_and_one_of_another_policy_are_never_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = finished.run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "Server", None)
    port = str(free_port())
    for name, message in (("adapter_model.safetensors", "is damaged"), ("adapter_config.json", "is damaged or was changed")):
        whole = (run_dir / "adapter" / name).read_bytes()
        (run_dir / "adapter" / name).write_bytes(whole.replace(b"8", b"9", 1))
        assert serve.main(["one", "--port", port]) == 2
        assert f"{name} {message}" in capsys.readouterr().err
        (run_dir / "adapter" / name).write_bytes(whole)
    assert serve.main(["one", "--port", port, "lora.alpha=4"]) == 2
    assert "set lora.alpha=8" in capsys.readouterr().err


def test_the_end_of_the_server_is_the_end_of_the_command_with_its_status() -> None:
    with closing(serve.Server([sys.executable, "-c", "raise SystemExit(3)"], {}, f"http://127.0.0.1:{free_port()}")) as server:
        assert not server.wait_until_healthy()
        assert server.wait() == 3


def test_a_proxy_of_the_environment_is_not_asked_for_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    answers = (
        "from http.server import *; H = type('H', (BaseHTTPRequestHandler,), {'do_GET': lambda s: (s.send_response(200), "
        f"s.end_headers())}}); HTTPServer(('127.0.0.1', {port}), H).serve_forever()"
    )
    with closing(serve.Server([sys.executable, "-c", answers], {}, f"http://127.0.0.1:{port}")) as server:
        assert server.wait_until_healthy()


def test_a_server_that_does_not_end_is_killed_with_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "STOP_SECONDS", 1.0)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {deaf!r}]); {deaf}"
    server = serve.Server([sys.executable, "-c", parent], {}, "http://127.0.0.1:1")
    main = psutil.Process(server._process.pid)
    while not (children := main.children()):
        time.sleep(0.1)
    server.ask(signal.SIGINT)
    assert server.wait() == 0
    server.close()
    psutil.wait_procs(children, timeout=10)
    assert alive([main, *children]) == []


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[psutil.Process]]:
    """What `serve.main(["one"])` starts in place of vLLM; it would go on for a while, and then fail."""
    finished.run(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "check_port", lambda *_: None)
    stand_in = [sys.executable, "-c", "import time; time.sleep(20); raise SystemExit(3)"]
    monkeypatch.setattr(serve, "command_line", lambda *_, **__: stand_in)
    processes: list[psutil.Process] = []
    start = serve.Server.__init__

    def recorded(self: serve.Server, *arguments: Any) -> None:
        start(self, *arguments)
        processes.append(psutil.Process(self._process.pid))

    monkeypatch.setattr(serve.Server, "__init__", recorded)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # A signal that the command leaves alone must not end the tests.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield processes
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_every_signal_that_asks_for_the_end_ends_the_server(
    number: signal.Signals, started: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.Server, "wait_until_healthy", lambda _: signal.raise_signal(number))
    assert serve.main(["one"]) == 0
    assert len(started) == 1 and alive(started) == []


def test_a_hangup_that_nohup_ignores_is_ignored(started: list[psutil.Process], monkeypatch: pytest.MonkeyPatch) -> None:
    def hangup(_: serve.Server) -> None:
        signal.raise_signal(signal.SIGHUP)
        assert alive(started)
        signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(serve.Server, "wait_until_healthy", hangup)
    assert serve.main(["one"]) == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_failure_of_the_command_leaves_no_server_behind(
    started: list[psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: serve.Server) -> None:
        raise OSError("no")

    monkeypatch.setattr(serve.Server, "wait_until_healthy", fail)
    with pytest.raises(OSError, match="no"):
        serve.main(["one"])
    assert len(started) == 1 and alive(started) == []


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: nothing can listen there .*; choose another port"):
            serve.check_port("127.0.0.1", port)
    serve.check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--port 70000"):
        serve.check_port("127.0.0.1", 70000)


def test_a_server_takes_a_gpu_of_which_its_run_had_a_part(tmp_path: Path) -> None:
    run_dir, config = finished.run(tmp_path, actors={"gpus": 0.5})
    line = serve.command_line(config, run_dir, run_dir / "adapter/adapter_model.safetensors", "127.0.0.1", 1, gpu=True)
    assert not [flag for flag in line if "gpu-memory" in flag]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--port", "9000"], "--port after --: it is this command's own; put it before --"),
        (["--", "--host=0.0.0.0"], "--host=0.0.0.0 after --: "),
        (["sampler.gpu_memory_utilization=0.9"], "for the server add -- --gpu-memory-utilization 0.9"),
    ],
)
def test_what_is_set_on_the_other_side_of_the_dashes_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert serve.main(["nosuch", *arguments]) == 2
    assert message in capsys.readouterr().err
