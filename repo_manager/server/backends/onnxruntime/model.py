import os

import onnxruntime as ort
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args):
        self.s = ort.InferenceSession(os.path.join(args["model_repository"], args["model_version"], "model.onnx"))


    def execute(self, requests):
        out = []
        for r in requests:
            y = self.s.run(["y"], {"x": pb.get_input_tensor_by_name(r, "x").as_numpy()})
            out.append(pb.InferenceResponse([pb.Tensor("y", y[0])]))
        return out
