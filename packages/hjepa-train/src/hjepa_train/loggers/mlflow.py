"""MLflow: rows as metrics of a run, on a tracking server, in a database or in a folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hjepa_train.errors import one_line
from hjepa_train.extra import load, require
from hjepa_train.protocols import Callback

if TYPE_CHECKING:
    from hjepa_train.outcome import Outcome
    from hjepa_train.trainer import Trainer

logger = logging.getLogger(__name__)

_PARAMS = 100
"""Parameters of one request that MLflow takes."""


class MLflowLog(Callback):
    """Writes each row on the main rank; a resumed run goes on in the run that its checkpoint names.

    A server that is not there at the start is an error; one that goes away later costs rows, counted at the end, and
    not the training.

    Args:
        uri: Where MLflow keeps runs; None means `MLFLOW_TRACKING_URI` or MLflow's own default.
        experiment: Made where there is none of that name.
        name: Of the run; None lets MLflow choose.
        settings: What to keep as the run's parameters.

    Raises:
        ValueError: Where the extra `mlflow` is not installed.
    """

    def __init__(
        self, uri: str | None, *, experiment: str, name: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> None:
        require("mlflow", "loggers=mlflow", "hjepa-train[mlflow]")
        self.uri, self.experiment, self.name = uri, experiment, name
        self.settings = {} if settings is None else dict(settings)
        self._id: str | None = None
        self._last = 0
        self._lost = 0
        self._client: Any = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open the run."""
        if not trainer.world.is_main:
            return
        mlflow = self._mlflow()
        try:
            self._client = mlflow.MlflowClient(tracking_uri=self.uri)
            if self._id is None:
                self._id = self._new_run(mlflow)
            self._last = self._last_step()
            self._client.update_run(self._id, status="RUNNING")
        except mlflow.exceptions.MlflowException as error:
            self._client = None
            raise ValueError(
                f"{self._where(mlflow)}: {one_line(error).split('. ')[0]}; allowed: a server (http://HOST:PORT), with "
                "the whole package (pip install mlflow) a database, or a folder where MLFLOW_ALLOW_FILE_STORE=true is "
                "set; give one, or leave mlflow out of loggers"
            ) from error

    def on_row(self, trainer: Trainer, row: Mapping[str, float]) -> None:
        """Add the row's metrics, unless they are there: MLflow's history only grows."""
        if self._client is not None and row["step"] > self._last:
            mlflow, now = self._mlflow(), int(1000 * time.time())
            metrics = [
                mlflow.entities.Metric(name, value, now, int(row["step"]))
                for name, value in row.items()
                if name != "step"
            ]
            try:
                self._client.log_batch(self._id, metrics=metrics)
            except mlflow.exceptions.MlflowException as error:
                self._lost += 1
                if self._lost == 1:
                    logger.warning("step %d: mlflow did not take the row: %s", trainer.step, one_line(error))

    def on_fit_end(self, trainer: Trainer, outcome: Outcome | None) -> None:
        """Close the run and say how it ended."""
        if self._client is not None:
            mlflow, client, self._client = self._mlflow(), self._client, None
            status = {None: "FAILED", "done": "FINISHED"}.get(outcome, "KILLED")
            try:
                client.set_terminated(self._id, status=status)
            except mlflow.exceptions.MlflowException as error:
                logger.warning("mlflow was not told of the end: %s", one_line(error))
            if self._lost:
                logger.warning("mlflow did not take %d rows", self._lost)

    def state_dict(self) -> dict[str, Any]:
        """Return the id of the run; other ranks than the main one have none."""
        return {} if self._id is None else {"id": self._id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with a run."""
        self._id = state["id"]

    def _mlflow(self) -> Any:  # noqa: ANN401
        return load("mlflow", "loggers=mlflow", "hjepa-train[mlflow]")

    def _where(self, mlflow: Any) -> str:  # noqa: ANN401
        """Name the place where runs should be kept by the setting that gave it."""
        if self.uri is not None:
            return f"mlflow_uri={self.uri}"
        given = os.environ.get("MLFLOW_TRACKING_URI")
        if given:
            return f"MLFLOW_TRACKING_URI={given}"
        return f"mlflow_uri=null and no MLFLOW_TRACKING_URI, so mlflow's default {mlflow.get_tracking_uri()}"

    def _last_step(self) -> int:
        """Return the last step that has a row; a run that was killed has some after its checkpoint."""
        names = self._client.get_run(self._id).data.metrics
        history = (metric.step for name in names for metric in self._client.get_metric_history(self._id, name))
        return max(history, default=0)

    def _new_run(self, mlflow: Any) -> str:  # noqa: ANN401
        found = self._client.get_experiment_by_name(self.experiment)
        experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
        run = str(self._client.create_run(experiment, run_name=self.name).info.run_id)
        parameters = [mlflow.entities.Param(name, str(value)) for name, value in self.settings.items()]
        for first in range(0, len(parameters), _PARAMS):
            self._client.log_batch(run, params=parameters[first : first + _PARAMS])
        return run
