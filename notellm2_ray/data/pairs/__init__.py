"""Related notes, mined from co-occurrence, and their split."""
