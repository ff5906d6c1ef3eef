"""Where the weight matrices of each supported architecture are, and what they do."""
