"""Search over plans (papers/18): which units of a model take which level, under a budget.

`spec` what a plan says of it, `budget` what may be spent, `space` points and mutations, `candidates` the program of a point, `fitness` its
distance from the model, `evolution` the algorithm, `workers` where it runs, `times` milliseconds per level, `picture` the front, `run` all.
"""
