"""Where MLflow is, and what its client needs before its first call."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from system.config import ConfigError

_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the courier retries
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}


def resolve_uri(uri: str) -> str:
    """The URI with an absolute path, so that a replay from another folder finds the same file.

    Raises:
        ConfigError: neither a SQLite file nor a server, or one with a password in it.
    """
    fix = "use a SQLite file such as 'sqlite:///mlflow.db' or a server such as 'http://127.0.0.1:5000'"
    if uri == os.environ.get("MLFLOW_TRACKING_URI"):
        fix += "; it is the environment's MLFLOW_TRACKING_URI, which counts where the config says nothing"
    scheme, _, rest = uri.partition("://")
    if scheme == "sqlite":
        path = Path(rest[1:])
        if rest[:1] != "/" or not rest[1:] or ":memory:" in rest or path.is_dir():
            raise ConfigError(f"tracking.uri={uri!r}: names no file; {fix}")
        return f"sqlite:///{path.resolve()}"
    if scheme not in ("http", "https"):
        raise ConfigError(f"tracking.uri={uri!r}: a scheme that is not supported (MLflow refuses file stores); {fix}")
    try:
        parts = urlsplit(uri)
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"tracking.uri={uri!r}: {error}; {fix}") from error
    if not host:
        raise ConfigError(f"tracking.uri={uri!r}: names no host; {fix}")
    if "@" in parts.netloc:
        shown = f"{scheme}://***@{parts.netloc.rpartition('@')[2]}"
        fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise ConfigError(f"tracking.uri={shown!r}: everybody who sees the run would read the password; {fix}")
    return uri.rstrip("/")


def set_environment() -> None:
    """What every client of MLflow here wants, before its first call: no retries of its own, no long waits, no telemetry."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
