"""The executors on ONNX Runtime, which run whole-component programs."""
