"""A repository in object storage: each request certain, each change a compare-and-swap."""
