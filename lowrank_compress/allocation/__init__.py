"""Which rank each matrix gets: curves of stored elements against loss, budgets, and a table of allocators."""
