"""The model repository: layout, manifests, publishing, scanning."""
