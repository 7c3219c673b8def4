"""An MLServer runtime for one ONNX file; imported by MLServer, in its own environment, only."""

from typing import Any

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor, ResponseOutput

DATATYPES = {
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(int64)": "INT64",
    "tensor(uint8)": "UINT8",
}


def described(tensors: Any) -> list[MetadataTensor]:
    """Return KServe's words for what a graph takes or gives; a dimension it leaves open is -1."""
    return [
        MetadataTensor(
            name=tensor.name,
            datatype=DATATYPES[tensor.type],
            shape=[d if isinstance(d, int) else -1 for d in tensor.shape],
        )
        for tensor in tensors
    ]


class OnnxModel(MLModel):
    """One graph, by the names that its inputs and outputs have."""

    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        self.inputs = described(self._session.get_inputs())
        self.outputs = described(self._session.get_outputs())
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        given = {tensor.name: NumpyCodec.decode_input(tensor) for tensor in payload.inputs}
        datatypes = {tensor.name: tensor.datatype for tensor in self.outputs}
        wanted = [tensor.name for tensor in payload.outputs or self.outputs]
        if unknown := set(wanted) - set(datatypes):
            raise InferenceError(f"no such output: {sorted(unknown)}")
        try:
            values = self._session.run(wanted, given)
        except Exception as error:  # ONNX Runtime's classes are many; all of them are the caller's
            raise InferenceError(str(error)) from error
        # Not by NumpyCodec, which makes a column of every vector: [N] would arrive as [N, 1].
        outputs = [
            ResponseOutput(
                name=name,
                datatype=datatypes[name],
                shape=list(value.shape),
                data=value.ravel().tolist(),
            )
            for name, value in zip(wanted, values, strict=True)
        ]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
