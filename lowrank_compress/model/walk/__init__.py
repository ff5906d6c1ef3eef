"""One block of each model in memory at a time, forwards and backwards."""
