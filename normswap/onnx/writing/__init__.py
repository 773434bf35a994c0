"""From a torch model to an ONNX file, in the form that onnxruntime runs fastest. Proves nothing."""
