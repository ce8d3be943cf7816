"""The decoding side of planc: engines, caches, drafters, loops. numpy and small libraries only; never torch, never another room."""
