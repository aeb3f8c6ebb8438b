"""A repository in object storage: no rename, no lock, no folder; create-only writes and compare-and-swap instead."""
