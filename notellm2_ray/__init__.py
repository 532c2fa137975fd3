"""NoteLLM-2 and MLLM-MSR on Ray: multimodal note embeddings, recall, and LLM ranking."""

__version__ = "0.1.0"
