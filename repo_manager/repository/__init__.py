"""The model repository: layout, manifests, publishing, looking, checking, changing, cleaning."""
