"""Suites of tasks whose answers can be judged exactly, for `planc bench --suite`."""
