"""One script per task that `evaluate.load(path)` takes; `metric_path(task)` says where."""
