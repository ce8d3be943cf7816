"""`planc fit`: draft heads taught by the target itself (papers/A1 section 8).

The target writes its own text (`texts`), says what its states are behind every token of it (`states`), and the head learns to guess them
(`train`); `fit` goes the whole way and writes the file that a plan names.
"""
