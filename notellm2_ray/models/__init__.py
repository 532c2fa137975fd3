"""The models, in plain single-device PyTorch without Ray, vLLM or DeepSpeed."""
