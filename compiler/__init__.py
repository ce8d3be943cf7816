"""The compiling side of planc: plans, model loading, tracing, the Program and its pipeline, verification, reports, the command line."""
