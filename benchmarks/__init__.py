"""Measurements that a reader can repeat; each file says what it compares and how to run it."""
