"""Addresses in MLflow's UI: the compare view of some runs, and saved views of their experiments.

MLflow keeps a saved view as a tag of the experiment, lists it under "Views" there, and opens it by the tag's name; this
writes such tags.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from urllib.parse import quote, urlencode

from system.journal import TrackingError, brief

_LOCAL_UI = "http://127.0.0.1:5000"
_VIEW_TAG = "mlflow.sharedViewState."

_WHAT = ("task.kind", "loss.kind", "seed")
VIEWS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "headwater-posterior": {
        "params": _WHAT,
        "metrics": (
            "exact/kl_target_q", "posterior/log_z_lower", "posterior/log_z_weighted", "posterior/spread", "posterior/ess",
            "posterior/length", "task/accuracy", "task/vote", "task/validity", "task/max_log_likelihood",
            "task/diversity", "seconds_training",
        ),
    },
    "headwater-speed": {
        "params": (*_WHAT, "actors.count", "sampler.samples_per_prompt", "learner.publish_every"),
        "metrics": (
            "rate/trajectories_per_second", "rate/sampled_tokens_per_second", "rate/learner_tokens_per_second",
            "idle/learner", "idle/samplers", "staleness", "seconds/step", "seconds/update", "seconds/wait",
        ),
    },
}  # fmt: skip
"""Name -> the columns of the experiment's table, of those that its runs have: how near to the posterior, and how fast."""


def save_views(uri: str, run_ids: Sequence[str]) -> dict[str, str]:
    """Name -> address: `compare`, MLflow's compare view of these runs, and VIEWS of each of their experiments.

    A view that an experiment lacks is saved; one that it has stays as its users left it. An address is at the server, or for
    a database file where `mlflow ui` serves it.

    Raises:
        TrackingError: MLflow does not know a run, takes no tag, or cannot be reached.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri)
    try:
        ids = dict.fromkeys(client.get_run(run_id).info.experiment_id for run_id in run_ids)
        experiments = [client.get_experiment(experiment_id) for experiment_id in ids]
        for experiment in experiments:
            for name in VIEWS:
                if (tag := _VIEW_TAG + name) not in experiment.tags:
                    client.set_experiment_tag(experiment.experiment_id, tag, _view(name))
    except MlflowException as error:
        raise TrackingError(f"{uri}: {brief(error)}") from error
    ui = _LOCAL_UI if uri.startswith("sqlite:") else uri
    query = urlencode({"runs": json.dumps(list(run_ids)), "experiments": json.dumps(list(ids))}, quote_via=quote)
    addresses = {"compare": f"{ui}/#/compare-runs?{query}"}
    for experiment in experiments:
        for name in VIEWS:
            where = f"{ui}/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={name}"
            addresses[f"{experiment.name}: {name}"] = where
    return addresses


def _view(name: str) -> str:
    """As the UI of MLflow 3.17 writes it; what its state leaves out is as in a new view."""
    columns = [f"{kind}.`{column}`" for kind, names in VIEWS[name].items() for column in names]
    now = round(1000 * time.time())
    return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps({"selectedColumns": columns})})
