"""MLServer, another server of the same protocol, from the environment of `make mlserver-env`."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from tests.servers.process import LOOPBACK, ServerProcess, entered, find_environment

RUNTIME = Path(__file__).with_name("mlserver_runtime.py")


def mlserver_environment() -> Path:
    """Return MLServer's environment; skip the test without, or fail it where it is required."""
    return find_environment(".venv-mlserver", "ZTUNE_MLSERVER_ENV", "mlserver-env")


class MlServer(ServerProcess):
    """MLServer with one model per folder that holds a `model.onnx`; ready when constructed.

    The model's name is its folder's. `settings` overrides MLServer's own, by their names.
    """

    def __init__(
        self,
        models: Path,
        *,
        settings: Mapping[str, object] | None = None,
        wait_s: float = 180.0,
    ) -> None:
        self.environment = mlserver_environment()
        super().__init__(wait_s=wait_s)
        self._repository = self.folder / "repository"
        self._repository.mkdir()
        # A copy, alone on the path: our other modules here have the names of real packages.
        shutil.copy(RUNTIME, self.folder)
        for graph in sorted(models.absolute().glob("*/model.onnx")):
            document = {
                "name": graph.parent.name,
                "platform": "onnx",
                "implementation": "mlserver_runtime.OnnxModel",
                "parameters": {"uri": str(graph), "version": "1"},
            }
            folder = self._repository / graph.parent.name
            folder.mkdir()
            (folder / "model-settings.json").write_text(json.dumps(document))
        asked = {
            "host": LOOPBACK,
            "http_port": self._http_port,
            "grpc_port": self._grpc_port,
            "metrics_endpoint": None,
            "parallel_workers": 0,
            "debug": False,
            **(settings or {}),
        }
        (self._repository / "settings.json").write_text(json.dumps(asked))
        self.start()

    def _command(self) -> list[str]:
        return [str(self.environment / "bin" / "mlserver"), "start", str(self._repository)]

    def _environment(self) -> dict[str, str]:
        return entered(self.environment) | {"PYTHONPATH": str(self.folder)}

    def _clean(self) -> None:
        pass
