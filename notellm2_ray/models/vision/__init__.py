"""Vision towers and image preprocessing for them."""
