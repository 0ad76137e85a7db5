"""Runs that are at a tracking server, as folders here: what they found, without their weights."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from system.config import ConfigError
from system.journal import State, TrackingError, brief
from system.mlflow_run import PARENT_TAG, SWEEP_TAG
from system.tracking_uri import resolve_uri, set_environment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

RESULTS = ("config.yaml", "summary.json", "heldout*.json", "baselines.json")
LIMIT = 1000
"""Most runs of one name."""


def fetch(uri: str, name: str, into: Path) -> list[Path]:
    """The run of that id, or every finished run of that name, or of the sweep of that id or name: each as a folder in `into`,
    with RESULTS and its tracking.json.

    Raises:
        ConfigError: there is none, or `uri` names no server.
        TrackingError: the server cannot be reached, or refuses.
    """
    set_environment()
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = resolve_uri(uri)
    client = MlflowClient(tracking_uri=uri)
    try:
        found = _find(client, name)
        if not found:
            raise ConfigError(f"RUN={name!r}: {uri} has no run of that id, no finished one of that name, and no sweep")
        return [_download(client, uri, run, into / run.info.run_id) for run in found]
    except MlflowException as error:
        raise TrackingError(f"{uri}: {brief(error)}") from error


def _find(client: MlflowClient, name: str) -> list[Run]:
    from mlflow.exceptions import MlflowException

    everywhere = [experiment.experiment_id for experiment in client.search_experiments(max_results=LIMIT)]

    def matching(condition: str) -> list[Run]:
        filters = f"attributes.status = 'FINISHED' and {condition}"
        return list(client.search_runs(everywhere, filters, max_results=LIMIT, order_by=["attributes.start_time ASC"]))

    try:
        named = [client.get_run(name)]
    except MlflowException as error:
        # What cannot be an id is refused as such.
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        # No run of ours has such a name, and a filter cannot say it.
        named = [] if "'" in name else matching(f"attributes.run_name = '{name}'")
    sweeps = [run for run in named if SWEEP_TAG in run.data.tags]
    children = [child for sweep in sweeps for child in matching(f"tags.`{PARENT_TAG}` = '{sweep.info.run_id}'")]
    return [run for run in named if run not in sweeps] + children


def _download(client: MlflowClient, uri: str, run: Run, folder: Path) -> Path:
    if folder.exists():  # asked for by two names
        return folder
    there = {file.path for file in client.list_artifacts(run.info.run_id)}
    if "config.yaml" not in there:
        raise ConfigError(f"run {run.info.run_id} at {uri} has no config.yaml: it is none of this project")
    folder.mkdir(parents=True)
    for name in there:
        if any(fnmatch(name, pattern) for pattern in RESULTS):
            client.download_artifacts(run.info.run_id, name, str(folder))
    experiment = client.get_experiment(run.info.experiment_id).name
    State(uri, experiment, str(run.info.run_name), run_id=run.info.run_id).save(folder / "tracking.json")
    return folder
