"""The embedding table (Lance) and the ANN index over it (FAISS)."""
