"""Why heads look where they look, and what they carry: head loadings, QK attribution, stories of edges."""
