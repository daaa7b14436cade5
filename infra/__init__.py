"""Ground floor: storage, shards, manifests, the Stage contract, executors, the registry, progress."""
