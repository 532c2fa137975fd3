"""The note embedder: network, preprocessing, losses, and the directory it is saved in."""
