"""Which keys a query may see, and the kernels that compute it, tile by tile."""
