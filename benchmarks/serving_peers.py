"""The same exported graph behind other servers: a hand-written endpoint, MLServer, the SDK of KServe; and no graph at all.

    python benchmarks/serving_peers.py minimal|mlserver|kserve|constant FOLDER PORT

Each runs in an environment of its own and imports nothing of domlora. All do what such an endpoint must and nothing else: a
domain's banks stay in memory and are fed beside the rows, one thread of inference, one process, no log of requests.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import onnxruntime

HEADER_LENGTH = "inference-header-content-length"
MODEL = "live"


class Graph:
    """``one.onnx`` of an exported folder, with the banks of its domains."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(str(folder / "one.onnx"), options)
        names = json.loads((folder / "schema.json").read_text())["domains"]
        self.banks = {name: read(folder / f"adapters/{number:05d}.safetensors") for number, name in enumerate(names)}
        self.no_dense = np.empty((0, 0), np.float32)

    def probability(self, ids: np.ndarray, domain: str) -> np.ndarray:
        fed = {"ids": ids, "dense": np.empty((len(ids), 0), np.float32), **self.banks[domain]}
        logit = self.session.run(None, fed)[0]
        return 1.0 / (1.0 + np.exp(-logit))


def read(file: Path) -> dict[str, np.ndarray]:
    """A safetensors file: the peers' environments need no package for it."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(content[start + told["data_offsets"][0] : start + told["data_offsets"][1]], "<f4").reshape(
            told["shape"]
        )
        for name, told in header.items()
    }


def minimal(graph: Graph, port: int) -> None:
    """What somebody writes in an afternoon: Starlette, the binary tensors of version 2 of the protocol or its JSON."""
    import msgspec
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def infer(request: Request) -> Response:
        body = await request.body()
        length = int(request.headers.get(HEADER_LENGTH, len(body)))
        head = msgspec.json.decode(body[:length])
        tensor = head["inputs"][0]
        if "data" in tensor:
            ids = np.array(tensor["data"], np.int64).reshape(tensor["shape"])
        else:
            ids = np.frombuffer(body, "<i8", tensor["parameters"]["binary_data_size"] // 8, length).reshape(
                tensor["shape"]
            )
        found = graph.probability(ids, head["parameters"]["domain"])
        output: dict[str, Any] = {"name": "probability", "datatype": "FP32", "shape": found.shape}
        told = {"model_name": MODEL, "model_version": "1", "outputs": [output]}
        if "data" in tensor:
            output["data"] = found.tolist()
            return Response(msgspec.json.encode(told), media_type="application/json")
        output["parameters"] = {"binary_data_size": found.nbytes}
        text = msgspec.json.encode(told)
        headers = {HEADER_LENGTH: str(len(text))}
        return Response(text + found.tobytes(), media_type="application/octet-stream", headers=headers)

    app = Starlette(routes=[Route(f"/v2/models/{MODEL}/infer", infer, methods=["POST"])])
    uvicorn.run(app, port=port, loop="uvloop", http="httptools", log_level="warning", access_log=False)


def mlserver(graph: Graph, port: int) -> None:
    """Its runtime for one's own models; without workers for parallel inference, which cost it more."""
    import asyncio

    from mlserver import MLModel, MLServer, ModelSettings, Settings
    from mlserver.codecs import NumpyCodec
    from mlserver.types import InferenceRequest, InferenceResponse

    class Ours(MLModel):
        async def load(self) -> bool:
            return True

        async def predict(self, payload: InferenceRequest) -> InferenceResponse:
            ids = NumpyCodec.decode_input(payload.inputs[0])
            found = graph.probability(ids, payload.parameters.domain)
            return InferenceResponse(model_name=MODEL, outputs=[NumpyCodec.encode_output("probability", found)])

    globals()["Ours"] = Ours  # it looks the class up by its name in this module
    settings = Settings(
        debug=False, host="127.0.0.1", http_port=port, grpc_port=port + 1, metrics_endpoint=None, parallel_workers=0
    )
    model = ModelSettings(name=MODEL, implementation=Ours)
    asyncio.run(MLServer(settings).start([model]))


def kserve(graph: Graph, port: int) -> None:
    """Its SDK for one's own predictors."""
    from kserve import InferOutput, InferResponse, Model, ModelServer

    class Ours(Model):
        def __init__(self) -> None:
            super().__init__(MODEL)
            self.ready = True

        async def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> InferResponse:  # noqa: ARG002
            found = graph.probability(payload.inputs[0].as_numpy(), payload.parameters["domain"])
            output = InferOutput("probability", list(found.shape), "FP32")
            output.set_data_from_numpy(found, binary_data=bool(payload.use_binary_outputs))
            return InferResponse(payload.id or "1", MODEL, [output])

    ModelServer(http_port=port, enable_grpc=False, workers=1, access_log_format=None).start([Ours()])


def constant(graph: Graph, port: int) -> None:
    """The same bytes to whatever comes: what a load generator can do is seen before it."""
    import asyncio

    import uvloop

    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 256\r\n\r\n" + graph.banks["d0"]["tower.0.lora_A"].tobytes()[:256]

    class Constant(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = transport

        def data_received(self, data: bytes) -> None:
            if data[:4] in (b"POST", b"GET "):  # a request's first packet
                self.transport.write(answer)

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Constant, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    {"minimal": minimal, "mlserver": mlserver, "kserve": kserve, "constant": constant}[sys.argv[1]](
        Graph(Path(sys.argv[2])), int(sys.argv[3])
    )
