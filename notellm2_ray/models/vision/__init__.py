"""Vision towers and the pixels that they take."""
