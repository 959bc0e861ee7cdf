"""From a loaded model to a folder of ONNX graphs, and the proof that they compute what the model does."""
