"""Public benchmarks, each read from its own files and scored by its own rules; nothing is downloaded."""
