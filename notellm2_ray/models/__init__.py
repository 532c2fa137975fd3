"""The NoteLLM-2 model: plain single-device PyTorch, without Ray, vLLM or DeepSpeed."""
