"""The tests mirror the package; what they share lies in ``tests.support``."""
