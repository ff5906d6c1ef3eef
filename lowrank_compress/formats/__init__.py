"""Storage formats of matrices: what each costs, what may be chosen of it, and how a matrix is put into it."""
