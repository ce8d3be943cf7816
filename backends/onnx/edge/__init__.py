"""Artifacts as folders for devices and browsers. `generate.py` or `classify.py` becomes `run.py` there, and needs no planc; `web` is its page."""
